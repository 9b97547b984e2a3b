//! The steps that delete what can no longer matter, a bounded number of rows at a time.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{domain::throttle::AttemptSubject, error::StoreError};

/// The steps of housekeeping. Each deletes at most `limit` rows of a kind, and returns how many unless it says otherwise.
#[async_trait]
pub trait PurgeStore {
    /// Deletes sessions whose absolute end is past.
    async fn purge_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError>;

    /// Deletes expired tokens, address limits that are idle, and dead mails older than `dead_before`. Returns how many of
    /// the kind of which there were most.
    async fn purge_mail(&self, now: OffsetDateTime, dead_before: OffsetDateTime, limit: u32)
    -> Result<u64, StoreError>;

    /// Deletes revocations that can no longer affect any token, up to number `settled` and but for the newest one.
    async fn purge_revocations(&self, now: OffsetDateTime, settled: i64, limit: u32) -> Result<u64, StoreError>;

    /// Looks at the next `limit` subjects of attempts after `after`, and deletes the attempts that no longer count. Returns
    /// the last of these subjects; `None` if there is none.
    async fn purge_attempts(
        &self,
        now: OffsetDateTime,
        after: Option<AttemptSubject>,
        limit: u32,
    ) -> Result<Option<AttemptSubject>, StoreError>;

    /// Deletes audit rows from before a moment.
    async fn purge_audit_events(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError>;
}
