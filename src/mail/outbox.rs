//! The outbox worker sends the mails of the store: it claims one, renders it, sends it and marks it. Several replicas
//! do this at the same time.
//!
//! A mail is sent at least once, and normally once. If a replica dies between sending and marking, its claim lapses and
//! the mail is sent again, with the same token and the same `Message-ID`. No RPC waits for this: it is answered when
//! its mail is in the store.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use crate::{
    domain::{
        env::Env,
        mail::MailKind,
        one_time::OneTimeTokens,
        ports::{ClaimedMail, LONGEST_BACKOFF, MailClaim, MailRetry, Store},
    },
    error::StoreError,
    trace::Span,
};

use super::{Mailer, messages::MailTemplates};

/// How many mails a replica sends at the same time. A mail server that hangs delays only these.
const SENDERS: usize = 8;
/// How often the worker asks the store while no mail is due. This finds retries and mail of other processes.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long one attempt may take.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a claim holds. It must be longer than an attempt and all tries to mark the mail as sent, because another
/// replica sends the mail again when the claim lapses.
const LEASE: Duration = Duration::from_secs(40);
/// How often the worker tries to mark a mail as sent, and the pause after each try.
const MARK_ATTEMPTS: u32 = 8;
const MARK_PAUSE: Duration = Duration::from_secs(1);
const _: () = assert!(
    LEASE.as_secs() > SEND_TIMEOUT.as_secs() + MARK_ATTEMPTS as u64 * MARK_PAUSE.as_secs(),
    "a claim must outlive its attempt and the tries to mark it"
);
/// A mail that could not be sent until this age is not retried.
const GIVE_UP_AFTER: Duration = Duration::from_hours(24);
/// How often the queue is counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);

/// The worker with its collaborators.
#[derive(Debug)]
pub struct Outbox {
    pub store: Arc<dyn Store>,
    pub tokens: Arc<OneTimeTokens>,
    pub mailer: Mailer,
    pub templates: MailTemplates,
    pub env: Env,
}

impl Outbox {
    /// Sends mails until `stop`, then lets mails in flight finish.
    pub async fn run(self, stop: CancellationToken) {
        let outbox = Arc::new(self);
        let (senders, in_flight) = (Arc::new(Semaphore::new(SENDERS)), TaskTracker::new());
        let counting = tokio::spawn(Arc::clone(&outbox).count());
        while let Some(Ok(sender)) = stop.run_until_cancelled(Arc::clone(&senders).acquire_owned()).await {
            // This step is not cancelled: the store could have claimed a mail that nobody would then send.
            match outbox.store.claim_mail(outbox.env.now(), LEASE).await {
                Ok(MailClaim::Claimed(mail)) => {
                    in_flight.spawn(Arc::clone(&outbox).deliver(mail, sender));
                }
                Ok(MailClaim::Dropped(kind)) => count(kind, "dropped"),
                Ok(MailClaim::NoneDue) => {
                    stop.run_until_cancelled(outbox.wait_for_mail()).await;
                }
                Err(error) => {
                    log_store_error(&error, "claiming a mail failed");
                    stop.run_until_cancelled(tokio::time::sleep(POLL_INTERVAL)).await;
                }
            }
        }
        counting.abort();
        in_flight.close();
        in_flight.wait().await;
    }

    /// Waits until this process has queued mail, or until it is time to look for mail of other processes and for
    /// retries.
    async fn wait_for_mail(&self) {
        tokio::select! {
            () = self.store.mail_queued() => {}
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }

    /// Delivers a mail in the trace of the call that caused it.
    async fn deliver(self: Arc<Self>, mail: ClaimedMail, _sender: OwnedSemaphorePermit) {
        let span = Span::of_later_work("deliver mail", mail.trace.as_ref());
        span.set("postern.mail.kind", mail.kind.as_str());
        span.set("postern.mail.attempt", mail.attempt);
        let attempt = Box::pin(self.attempt(mail));
        match span.trace_id() {
            None => attempt.await,
            Some(id) => span.run(attempt.instrument(tracing::info_span!("mail", trace_id = id))).await,
        }
    }

    async fn attempt(&self, mail: ClaimedMail) {
        let sending = Span::outside("send mail");
        let sent = sending.run(Box::pin(self.send(&mail))).await;
        if sent.is_err() {
            sending.failed();
        }
        drop(sending);
        match sent {
            Ok(()) => {
                count(mail.kind, "sent");
                tracing::info!(mail_id = %mail.id, kind = mail.kind.as_str(), attempt = mail.attempt, "mail sent");
                self.mark_sent(&mail).await;
            }
            Err(error) => self.reschedule(&mail, error.as_ref()).await,
        }
    }

    async fn send(&self, mail: &ClaimedMail) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let token = mail.grant.as_ref().map(|grant| self.tokens.mint(grant));
        let content = self.templates.render(mail, token.as_deref())?;
        let sending = self.mailer.send(mail.id, &mail.recipient, &content, mail.create_time);
        Ok(tokio::time::timeout(SEND_TIMEOUT, sending).await??)
    }

    async fn mark_sent(&self, mail: &ClaimedMail) {
        for _ in 0..MARK_ATTEMPTS {
            match self.store.mail_sent(mail.id, mail.attempt).await {
                Ok(_) => return,
                Err(error) => log_store_error(&error, "a sent mail could not be marked as sent"),
            }
            tokio::time::sleep(MARK_PAUSE).await;
        }
        tracing::warn!(mail_id = %mail.id, "a sent mail could not be marked as sent: it will be sent again");
    }

    async fn reschedule(&self, mail: &ClaimedMail, error: &(dyn std::error::Error + Send + Sync)) {
        let now = self.env.now();
        let pause = self.backoff(mail.attempt);
        let gives_up = now + pause >= mail.create_time + GIVE_UP_AFTER;
        let (mail_id, kind, attempt) = (mail.id, mail.kind.as_str(), mail.attempt);
        let retry = if gives_up {
            count(mail.kind, "dead");
            tracing::error!(%mail_id, kind, attempt, %error, "a mail could not be sent and is not retried; it stays in the outbox");
            MailRetry::Never
        } else {
            count(mail.kind, "failed");
            let seconds = pause.as_secs();
            tracing::warn!(%mail_id, kind, attempt, %error, "a mail could not be sent; it is retried in {seconds} s");
            MailRetry::After(pause)
        };
        if let Err(error) = self.store.mail_failed(mail.id, mail.attempt, retry, now).await {
            log_store_error(
                &error,
                "a failed attempt could not be recorded; the mail is retried when its claim lapses",
            );
        }
    }

    /// 1 s, 2 s, 4 s and so on, reduced at random by up to a half, so that mails that failed together are not all
    /// retried at the same moment.
    fn backoff(&self, attempt: i64) -> Duration {
        let doublings = u32::try_from(attempt.saturating_sub(1)).unwrap_or(0).min(20);
        let full = LONGEST_BACKOFF.min(Duration::from_secs(1) * 2_u32.saturating_pow(doublings));
        let [chance] = self.env.random::<1>().unwrap_or_default();
        full.saturating_sub(full / 2 * u32::from(chance) / u32::from(u8::MAX))
    }

    /// Updates the gauges of the queue.
    async fn count(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(COUNT_INTERVAL);
        loop {
            ticks.tick().await;
            if let Ok(queue) = self.store.mail_queue().await {
                for (state, mails) in [("waiting", queue.waiting), ("dead", queue.dead)] {
                    #[expect(clippy::cast_precision_loss, reason = "a queue is far shorter than 2^52")]
                    metrics::gauge!("postern_mail_queue", "state" => state).set(mails as f64);
                }
            }
        }
    }
}

/// Starts every counter of mails, so that the first event is a rise.
pub fn count_from_zero() {
    for kind in MailKind::ALL {
        for outcome in ["sent", "failed", "dropped", "dead"] {
            metrics::counter!("postern_mails_total", "kind" => kind.as_str(), "outcome" => outcome).increment(0);
        }
    }
}

fn count(kind: MailKind, outcome: &'static str) {
    metrics::counter!("postern_mails_total", "kind" => kind.as_str(), "outcome" => outcome).increment(1);
}

/// The health monitor logs when the database goes down and comes back, so only other failures are errors here.
fn log_store_error(error: &StoreError, what: &'static str) {
    match error {
        StoreError::Unavailable(_) => tracing::debug!(%error, "{what}"),
        StoreError::Broken(_) => tracing::error!(%error, "{what}"),
    }
}
