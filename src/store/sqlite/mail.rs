//! The steps of the outbox, in SQLite's dialect.

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
        shared::{Stamp, run_to_completion, span},
        steps::{self, WriteTransaction as _},
    },
};

use super::SqliteStore;

#[async_trait]
impl MailStore for SqliteStore {
    async fn request_mail(&self, mail: NewMail, limit: AddressLimit) -> Result<Enqueued, StoreError> {
        steps::write(self, move |tx| steps::request_mail(tx, mail, limit)).await
    }

    async fn claim_mail(&self, now: OffsetDateTime, lease: Duration) -> Result<MailClaim, StoreError> {
        steps::write(self, move |mut tx| async move {
            let leased = sqlx::query_as::<_, OutboxRow>(
                "UPDATE mail_outbox SET attempts = attempts + 1, next_attempt_time = $1 + $2 \
                 WHERE id = (SELECT id FROM mail_outbox WHERE dead_time IS NULL \
                 AND (next_attempt_time <= $1 OR next_attempt_time > $1 + $3) ORDER BY next_attempt_time LIMIT 1) \
                 RETURNING id, kind, recipient, user_id, new_email, create_time, trace_parent, attempts",
            )
            .bind(Stamp(now))
            .bind(span(lease))
            .bind(span(lease.max(LONGEST_BACKOFF)))
            .fetch_optional(&mut *tx.sql)
            .await?;
            let Some(leased) = leased else {
                return Ok(MailClaim::NoneDue);
            };
            let claim = match leased.into_leased() {
                Ok(leased) => steps::prepare(&mut tx, leased, now).await,
                Err(unreadable) => Err(unreadable),
            };
            // The lease is committed even after a failure, so that a mail that cannot be read does not hold up others.
            tx.commit().await?;
            claim
        })
        .await
    }

    async fn mail_sent(&self, mail: MailId, attempt: i64) -> Result<bool, StoreError> {
        let writer = self.writer.clone();
        run_to_completion(async move {
            let sent = sqlx::query("DELETE FROM mail_outbox WHERE id = $1 AND attempts = $2")
                .bind(mail.0)
                .bind(attempt)
                .execute(&writer)
                .await?;
            Ok(sent.rows_affected() == 1)
        })
        .await
    }

    async fn mail_failed(
        &self,
        mail: MailId,
        attempt: i64,
        retry: MailRetry,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let writer = self.writer.clone();
        run_to_completion(async move {
            let settled = match retry {
                MailRetry::After(delay) => sqlx::query(
                    "UPDATE mail_outbox SET next_attempt_time = $3 \
                     WHERE id = $1 AND attempts = $2 AND dead_time IS NULL",
                )
                .bind(mail.0)
                .bind(attempt)
                .bind(Stamp(now + delay)),
                MailRetry::Never => sqlx::query(
                    "UPDATE mail_outbox SET dead_time = $3 WHERE id = $1 AND attempts = $2 AND dead_time IS NULL",
                )
                .bind(mail.0)
                .bind(attempt)
                .bind(Stamp(now)),
            };
            Ok(settled.execute(&writer).await?.rows_affected() == 1)
        })
        .await
    }

    async fn mail_queued(&self) {
        self.mail_queued.notified().await;
    }

    async fn issue_token(&self, token: OneTimeGrant, context: AuditContext) -> Result<bool, StoreError> {
        steps::write(self, move |tx| steps::issue_token(tx, token, context)).await
    }
}
