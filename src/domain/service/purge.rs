//! Deletes what can no longer matter: expired sessions, tokens, limits, dead mails and old audit rows. Every replica
//! does this, in batches; it is harmless that several do. Each also looks at the parameters of the stored passwords.

use std::time::Duration;

use crate::error::StoreError;

use super::Service;

/// The time between two purges.
const INTERVAL: Duration = Duration::from_hours(1);
/// How many rows one statement deletes at most.
const BATCH: u32 = 1_000;
/// How long a mail that was given up is kept for an operator to look at.
const DEAD_MAIL_KEPT: Duration = Duration::from_hours(30 * 24);

/// The time after which the limits of clients that have not called lately are forgotten.
const FORGET_INTERVAL: Duration = Duration::from_mins(1);

impl Service {
    /// Forgets every minute which clients have called, for ever.
    pub async fn run_forgetting(&self) {
        let mut ticks = tokio::time::interval(FORGET_INTERVAL);
        loop {
            ticks.tick().await;
            let mails = [&self.mails.limiter, &self.mails.sign_up_limiter];
            for limiter in mails.into_iter().chain([&self.login_limiter, &self.sign_up_limiter]) {
                limiter.drop_idle();
            }
        }
    }

    /// Purges every hour, for ever.
    pub async fn run_purge(&self) {
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

    async fn purge_expired(&self) -> Result<(), StoreError> {
        let now = self.store.time(self.env.now());
        while self.store.purge_sessions(now, BATCH).await? == u64::from(BATCH) {}
        self.store.purge_mail(now, now - DEAD_MAIL_KEPT).await?;
        self.store.purge_revocations(now, self.revocations.settled().await).await?;
        let too_old = now - self.audit_retention;
        while self.store.purge_audit_events(too_old, BATCH).await? == u64::from(BATCH) {}
        self.hasher.expect_stored(&self.store.password_parameters().await?);
        Ok(())
    }
}
