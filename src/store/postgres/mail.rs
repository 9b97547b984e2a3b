//! The steps of the outbox, in PostgreSQL's dialect. The claim takes a mail without waiting, and releases it again
//! before it locks the user, so that it follows the order of locks in `steps`.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        audit::AuditContext,
        ids::MailId,
        mail::NewMail,
        one_time::OneTimeGrant,
        ports::{Enqueued, LONGEST_BACKOFF, MailClaim, MailRetry, MailStore},
        throttle::AddressLimit,
    },
    error::StoreError,
    store::{
        rows::OutboxRow,
        shared::run_to_completion,
        statement::Statement,
        steps::{self, Backend as _, WriteTransaction as _},
    },
};

use super::PostgresStore;

#[async_trait]
impl MailStore for PostgresStore {
    async fn request_mail(&self, mail: NewMail, limit: AddressLimit) -> Result<Enqueued, StoreError> {
        steps::write(self, move |tx| steps::request_mail(tx, mail, limit)).await
    }

    async fn claim_mail(&self, now: OffsetDateTime, lease: Duration) -> Result<MailClaim, StoreError> {
        let store = self.clone();
        run_to_completion(async move {
            let statement = Statement::new(
                "UPDATE mail_outbox SET attempts = attempts + 1, \
                 next_attempt_time = clock_timestamp() + make_interval(secs => $1) \
                 WHERE id = (SELECT id FROM mail_outbox WHERE dead_time IS NULL AND (next_attempt_time <= clock_timestamp() \
                 OR next_attempt_time > clock_timestamp() + make_interval(secs => $2)) ORDER BY next_attempt_time LIMIT 1 FOR UPDATE SKIP LOCKED) \
                 RETURNING id, kind, recipient, user_id, new_email, create_time, trace_parent, attempts",
            )
            .bind(lease.as_secs_f64())
            .bind(lease.max(LONGEST_BACKOFF).as_secs_f64());
            let Some(leased) = store.written::<OutboxRow>(statement).await? else {
                return Ok(MailClaim::NoneDue);
            };
            let leased = leased.into_leased()?;
            let mut tx = store.begin().await?;
            let claim = steps::prepare(&mut tx, leased, now).await?;
            tx.commit().await?;
            Ok(claim)
        })
        .await
    }

    async fn mail_sent(&self, mail: MailId, attempt: i64) -> Result<bool, StoreError> {
        let statement = Statement::new("DELETE FROM mail_outbox WHERE id = $1 AND attempts = $2");
        Ok(self.execute(statement.bind(mail.0).bind(attempt)).await? == 1)
    }

    async fn mail_failed(
        &self,
        mail: MailId,
        attempt: i64,
        retry: MailRetry,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let statement = match retry {
            MailRetry::After(delay) => Statement::new(
                "UPDATE mail_outbox SET next_attempt_time = clock_timestamp() + make_interval(secs => $3) \
                 WHERE id = $1 AND attempts = $2 AND dead_time IS NULL",
            )
            .bind(mail.0)
            .bind(attempt)
            .bind(delay.as_secs_f64()),
            MailRetry::Never => Statement::new(
                "UPDATE mail_outbox SET dead_time = $3 WHERE id = $1 AND attempts = $2 AND dead_time IS NULL",
            )
            .bind(mail.0)
            .bind(attempt)
            .bind(now),
        };
        Ok(self.execute(statement).await? == 1)
    }

    async fn mail_queued(&self) {
        self.mail_queued.notified().await;
    }

    async fn issue_token(&self, token: OneTimeGrant, context: AuditContext) -> Result<bool, StoreError> {
        steps::write(self, move |tx| steps::issue_token(tx, token, context)).await
    }
}
