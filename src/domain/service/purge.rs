//! Deletes what can no longer matter: expired sessions, tokens, limits, dead mails and old audit rows. Every replica
//! does this, in batches; it is harmless that several do. Each also looks at the parameters of the stored passwords.

use std::{sync::Arc, time::Duration};

use crate::error::StoreError;

use super::Service;

/// The time between two purges.
const INTERVAL: Duration = Duration::from_hours(1);
/// How many rows one statement deletes at most.
const BATCH: u32 = 500;
/// The pause after a batch. With SQLite there is one writer, and a batch keeps it for some milliseconds.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a mail that was given up is kept for an operator to look at.
const DEAD_MAIL_KEPT: Duration = Duration::from_hours(30 * 24);

/// The time after which the limits of clients that have not called lately are forgotten.
const FORGET_INTERVAL: Duration = Duration::from_mins(1);

impl Service {
    /// Forgets every minute which clients have called, for ever.
    pub async fn run_forgetting(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(FORGET_INTERVAL);
        loop {
            ticks.tick().await;
            let mails = [&self.mails.limiter, &self.mails.sign_up_limiter];
            for limiter in mails.into_iter().chain([&self.login_limiter, &self.sign_up_limiter]) {
                limiter.drop_idle();
            }
            self.token_revocation_limiter.drop_idle();
        }
    }

    /// Purges every hour, for ever.
    pub async fn run_purge(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            ticks.tick().await;
            match self.purge_expired().await {
                Ok(()) => metrics::counter!("postern_housekeeping_total", "outcome" => "done").increment(1),
                Err(error) => {
                    metrics::counter!("postern_housekeeping_total", "outcome" => "failed").increment(1);
                    tracing::warn!(%error, "expired data could not be deleted; the next attempt is in an hour");
                }
            }
        }
    }

    /// Each kind is deleted on its own, so that one that fails leaves the others.
    async fn purge_expired(&self) -> Result<(), StoreError> {
        let (now, store) = (self.env.now(), self.store.as_ref());
        let settled = self.revocations.settled().await;
        let outcomes = [
            in_batches(|| store.purge_sessions(now, BATCH)).await,
            in_batches(|| store.purge_mail(now, now - DEAD_MAIL_KEPT, BATCH)).await,
            in_batches(|| store.purge_revocations(now, settled, BATCH)).await,
            self.purge_attempts().await,
            in_batches(|| store.purge_audit_events(now - self.audit_retention, BATCH)).await,
        ];
        self.hasher.expect_stored(&store.password_parameters().await?);
        outcomes.into_iter().collect()
    }

    /// Walks over all attempts: no index knows which of them no longer count, because every login would have to change it.
    async fn purge_attempts(&self) -> Result<(), StoreError> {
        let mut after = None;
        while let Some(last) = self.store.purge_attempts(self.env.now(), after, BATCH).await? {
            after = Some(last);
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

/// Deletes batch after batch, with a pause between them for the calls that wait.
async fn in_batches<F: Future<Output = Result<u64, StoreError>>>(delete: impl Fn() -> F) -> Result<(), StoreError> {
    while delete().await? >= u64::from(BATCH) {
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
