//! The steps that delete what can no longer matter.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{ports::PurgeStore, throttle::AttemptSubject},
    error::StoreError,
    store::{shared::run_to_completion, statement::Statement},
};

use super::transaction::Backend;

/// Deletes at most `$3` revocations that no token needs any more, by `$1`, the time, and by what this process has had in
/// memory for long enough, up to number `$2`: a clock that was wrong for a while deletes nothing. The newest stays, so that
/// readers recognise the log.
const REVOCATIONS: &str = "DELETE FROM revocations WHERE number IN (SELECT number FROM revocations \
     WHERE forget_time < $1 AND number <= $2 AND number < (SELECT max(number) FROM revocations) \
     ORDER BY forget_time LIMIT $3)";

/// The last of the next `$2` subjects of attempts after `$1`.
const LAST_SUBJECT: &str = "SELECT subject FROM (SELECT subject FROM login_attempts WHERE subject > $1 \
     ORDER BY subject LIMIT $2) AS next ORDER BY subject DESC LIMIT 1";

fn before(statement: &'static str, time: OffsetDateTime, limit: u32) -> Statement {
    Statement::new(statement).bind(time).bind(i64::from(limit))
}

#[async_trait]
impl<B: Backend> PurgeStore for B {
    async fn purge_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        self.execute(before(B::DIALECT.purges.sessions, now, limit)).await
    }

    async fn purge_mail(
        &self,
        now: OffsetDateTime,
        dead_before: OffsetDateTime,
        limit: u32,
    ) -> Result<u64, StoreError> {
        let backend = self.clone();
        run_to_completion(async move {
            let mail = B::DIALECT.purges.mail.map(|statement| (statement, now));
            let mut most = 0;
            for (statement, time) in mail.into_iter().chain([(B::DIALECT.purges.dead_mails, dead_before)]) {
                most = most.max(backend.execute(before(statement, time, limit)).await?);
            }
            Ok(most)
        })
        .await
    }

    async fn purge_revocations(&self, now: OffsetDateTime, settled: i64, limit: u32) -> Result<u64, StoreError> {
        self.execute(Statement::new(REVOCATIONS).bind(now).bind(settled).bind(i64::from(limit))).await
    }

    async fn purge_attempts(
        &self,
        now: OffsetDateTime,
        after: Option<AttemptSubject>,
        limit: u32,
    ) -> Result<Option<AttemptSubject>, StoreError> {
        // The empty key is before all others.
        let after = after.map(|subject| subject.0.to_vec()).unwrap_or_default();
        let next = Statement::new(LAST_SUBJECT).bind(after.clone()).bind(i64::from(limit));
        let Some((last,)) = self.rows::<(Vec<u8>,)>(next).await?.pop() else {
            return Ok(None);
        };
        self.execute(Statement::new(B::DIALECT.purges.attempts).bind(after).bind(last.clone()).bind(now)).await?;
        let last = last.try_into().map_err(|_| StoreError::broken("login_attempts.subject has not 32 bytes"))?;
        Ok(Some(AttemptSubject(last)))
    }

    async fn purge_audit_events(&self, before_time: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        self.execute(before(B::DIALECT.purges.audit_events, before_time, limit)).await
    }
}
