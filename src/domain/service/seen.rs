//! Notes which access tokens have come back, and writes it to the sessions' rows once a second.

use std::{sync::Arc, time::Duration};

use crate::{
    domain::{seen::SeenGeneration, token::VerifiedToken},
    error::StoreError,
};

use super::Service;

/// The time between two writes. A replica that dies has lost what it saw since the last one.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);
/// How many generations one statement writes. It locks their rows for some ten milliseconds; with SQLite nobody else writes
/// meanwhile.
const AT_ONCE: usize = 2_500;

impl Service {
    /// Notes that an access token came back. Costs no I/O, and for a token that was noted before, one look at a flag.
    ///
    /// Before the first refresh of a session there is no older refresh token, so nobody asks whether that generation was
    /// seen.
    pub(super) fn note_seen(&self, token: &VerifiedToken) {
        if token.generation <= 0 || self.sessions.lost_answer_window.is_zero() {
            return;
        }
        let seen = SeenGeneration { session: token.caller.session(), generation: token.generation };
        token.note_once(|| {
            let has_room = self.seen.note(seen);
            if !has_room {
                metrics::counter!("postern_seen_generations_total", "outcome" => "no_room").increment(1);
            }
            has_room
        });
    }

    /// Writes what was seen once a second, for ever.
    pub async fn run_writing_seen(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(WRITE_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.write_seen().await {
                tracing::debug!(%error, "what was seen of access tokens could not be written; it waits for the next attempt");
            }
        }
    }

    /// Writes what was seen since the last time. A row that another step has locked is left for the next time, because
    /// whoever waits for several rows could wait for ever.
    pub async fn write_seen(&self) -> Result<(), StoreError> {
        while self.write_some_seen().await? {}
        Ok(())
    }

    /// `true` if there is more to write.
    async fn write_some_seen(&self) -> Result<bool, StoreError> {
        let mut batch = self.seen.waiting_at_most(AT_ONCE);
        if batch.is_empty() {
            return Ok(false);
        }
        let is_full = batch.len() == AT_ONCE;
        let locked = self.store.write_seen(&batch).await?;
        batch.retain(|seen| !locked.contains(&seen.session));
        self.seen.written(&batch);
        let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        metrics::counter!("postern_seen_generations_total", "outcome" => "written").increment(count);
        Ok(is_full && locked.is_empty())
    }
}
