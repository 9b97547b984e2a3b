//! Forgets what is over: sessions, tokens and limits that can never matter again. Every replica does, in batches; that
//! several do is harmless.

use std::time::Duration;

use crate::store::StoreError;

use super::Postern;

const INTERVAL: Duration = Duration::from_hours(1);
/// How many sessions at a time.
const BATCH: u32 = 1_000;
/// How long a mail that was given up is kept for a person to look at.
const DEAD_MAIL_KEPT: Duration = Duration::from_hours(30 * 24);

impl Postern {
    /// Does so every hour, for ever.
    pub async fn forget_what_is_over(&self) {
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            ticks.tick().await;
            self.mails.per_client.forget_idle();
            self.clients.forget_idle();
            match self.forget_once().await {
                Ok(()) => metrics::counter!("postern_housekeeping_total", "outcome" => "done").increment(1),
                Err(error) => {
                    metrics::counter!("postern_housekeeping_total", "outcome" => "failed").increment(1);
                    tracing::warn!(%error, "what is over could not be deleted; trying again in an hour");
                }
            }
        }
    }

    async fn forget_once(&self) -> Result<(), StoreError> {
        let now = self.env.now();
        while self.store.forget_ended_sessions(now, BATCH).await? == u64::from(BATCH) {}
        self.store.forget_old_mail(now, now - DEAD_MAIL_KEPT).await?;
        self.store.forget_revocations(now).await?;
        let too_old = now - self.audit_retention;
        while self.store.forget_audit_events(too_old, BATCH).await? == u64::from(BATCH) {}
        Ok(())
    }
}
