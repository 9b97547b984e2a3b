//! The outbox and one-time tokens. Every step is alone while it runs, so nothing is locked row by row.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{
    MailId, UserId,
    account::{Email, User},
    audit::{Action, Occasion},
    mail::NewMail,
    one_time::{OneTimeGrant, Purpose},
};

use super::{SqliteStore, Time, Tx, audit, microseconds, span};
use crate::store::{
    About, AddressLimit, Enqueued, MailClaim, MailQueue, MailRetry, MailStore, OneTimeToken, StoreError, is_wanted,
    rows::{LeasedMail, MailQueueRow, OneTimeTokenRow, OutboxRow, UserRow, user_columns},
    to_the_end,
};

#[async_trait]
impl MailStore for SqliteStore {
    async fn request_mail(&self, mail: NewMail, limit: AddressLimit) -> Result<Enqueued, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let enqueued = queue_within(&mut tx, &mail, limit).await?;
            tx.commit().await?;
            Ok(enqueued)
        })
        .await
    }

    async fn claim_mail(&self, now: OffsetDateTime, lease: Duration) -> Result<MailClaim, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let Some(leased) = sqlx::query_as::<_, OutboxRow<Time>>(
                "UPDATE mail_outbox SET attempts = attempts + 1, next_attempt_time = $1 + $2 \
                 WHERE id = (SELECT id FROM mail_outbox WHERE dead_time IS NULL AND next_attempt_time <= $1 \
                 ORDER BY next_attempt_time LIMIT 1) \
                 RETURNING id, kind, recipient, user_id, new_email, create_time, attempts",
            )
            .bind(microseconds(now))
            .bind(span(lease))
            .fetch_optional(&mut *tx)
            .await?
            else {
                return Ok(MailClaim::NoneDue);
            };
            let claim = match leased.into_leased() {
                Ok(leased) => prepare(&mut tx, leased, now).await,
                Err(makes_no_sense) => Err(makes_no_sense),
            };
            // A failure, too, leaves the mail leased: one that cannot be read must not hold up those behind it.
            tx.commit().await?;
            claim
        })
        .await
    }

    async fn mail_sent(&self, mail: MailId, attempt: i64) -> Result<bool, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
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
        to_the_end(async move {
            let settled = match retry {
                MailRetry::After(delay) => sqlx::query(
                    "UPDATE mail_outbox SET next_attempt_time = $3 \
                     WHERE id = $1 AND attempts = $2 AND dead_time IS NULL",
                )
                .bind(mail.0)
                .bind(attempt)
                .bind(microseconds(now + delay)),
                MailRetry::Never => sqlx::query(
                    "UPDATE mail_outbox SET dead_time = $3 WHERE id = $1 AND attempts = $2 AND dead_time IS NULL",
                )
                .bind(mail.0)
                .bind(attempt)
                .bind(microseconds(now)),
            };
            Ok(settled.execute(&writer).await?.rows_affected() == 1)
        })
        .await
    }

    async fn mail_queue(&self) -> Result<MailQueue, StoreError> {
        let queue = sqlx::query_as::<_, MailQueueRow>(
            "SELECT count(*) FILTER (WHERE dead_time IS NULL) AS waiting, \
             count(*) FILTER (WHERE dead_time IS NOT NULL) AS dead FROM mail_outbox",
        )
        .fetch_one(&self.readers)
        .await?;
        Ok(queue.into_queue())
    }

    async fn one_time_token(&self, token: MailId) -> Result<Option<OneTimeToken>, StoreError> {
        sqlx::query_as::<_, OneTimeTokenRow<Time>>(concat!(
            "SELECT t.id AS token_id, t.purpose, t.email AS token_email, t.expire_time, ",
            user_columns!(),
            " FROM one_time_tokens t JOIN users u ON u.id = t.user_id WHERE t.id = $1"
        ))
        .bind(token.0)
        .fetch_optional(&self.readers)
        .await?
        .map(OneTimeTokenRow::into_token)
        .transpose()
    }

    async fn issue_token(&self, token: OneTimeGrant, occasion: Occasion) -> Result<bool, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let user = find_user(&mut tx, token.user_id).await?;
            if !user.is_some_and(|user| !user.disabled && user.email == token.email) {
                return Ok(false);
            }
            issue(&mut tx, Some(&token), occasion.now, occasion.now).await?;
            audit::record(&mut tx, Action::ResetLinkIssued, &occasion, About::user(token.user_id)).await?;
            tx.commit().await?;
            Ok(true)
        })
        .await
    }

    async fn forget_old_mail(&self, now: OffsetDateTime, dead_before: OffsetDateTime) -> Result<(), StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            for (statement, time) in [
                ("DELETE FROM one_time_tokens WHERE expire_time < $1", now),
                ("DELETE FROM mail_limits WHERE spent_until < $1", now),
                ("DELETE FROM mail_outbox WHERE dead_time < $1", dead_before),
            ] {
                sqlx::query(statement).bind(microseconds(time)).execute(&writer).await?;
            }
            Ok(())
        })
        .await
    }
}

/// Puts a mail into the outbox, due at once.
pub(super) async fn queue(tx: &mut Tx, mail: &NewMail) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO mail_outbox (id, kind, recipient, user_id, new_email, create_time, next_attempt_time) \
         VALUES ($1, $2, $3, $4, $5, $6, $6)",
    )
    .bind(mail.id.0)
    .bind(mail.kind.as_str())
    .bind(mail.recipient.as_str())
    .bind(mail.user_id.map(|user| user.0))
    .bind(mail.new_email.as_ref().map(Email::as_str))
    .bind(microseconds(mail.create_time))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// The same, if its address has not had too many.
pub(super) async fn queue_within(tx: &mut Tx, mail: &NewMail, limit: AddressLimit) -> Result<Enqueued, StoreError> {
    let taken = sqlx::query(
        "INSERT INTO mail_limits (email, spent_until) VALUES ($1, $2 + $3) \
         ON CONFLICT (email) DO UPDATE SET spent_until = \
         max(mail_limits.spent_until, $2) + $3 \
         WHERE mail_limits.spent_until <= $2 + $4",
    )
    .bind(mail.recipient.as_str())
    .bind(microseconds(mail.create_time))
    .bind(span(limit.interval))
    .bind(span(limit.tolerance()))
    .execute(&mut **tx)
    .await?
    .rows_affected();
    if taken == 0 {
        return Ok(Enqueued::OverLimit);
    }
    queue(tx, mail).await?;
    Ok(Enqueued::Queued)
}

/// Ends an account's tokens for these purposes, and the mails that would bring more.
pub(super) async fn void_tokens(
    tx: &mut Tx,
    user: UserId,
    email: &Email,
    purposes: &[Purpose],
) -> Result<(), StoreError> {
    for purpose in purposes {
        sqlx::query("DELETE FROM one_time_tokens WHERE user_id = $1 AND purpose = $2")
            .bind(user.0)
            .bind(purpose.as_str())
            .execute(&mut **tx)
            .await?;
        sqlx::query("DELETE FROM mail_outbox WHERE user_id = $1 AND kind = $2")
            .bind(user.0)
            .bind(purpose.carrier().as_str())
            .execute(&mut **tx)
            .await?;
        // Those that were asked for by the address alone.
        sqlx::query("DELETE FROM mail_outbox WHERE recipient = $1 AND user_id IS NULL AND kind = $2")
            .bind(email.as_str())
            .bind(purpose.carrier().as_str())
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

/// Uses up a live token for that purpose. `false` if it is none.
pub(super) async fn use_up(
    tx: &mut Tx,
    purpose: Purpose,
    token: &OneTimeGrant,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    if token.purpose != purpose {
        return Ok(false);
    }
    let used = sqlx::query(
        "DELETE FROM one_time_tokens WHERE id = $1 AND user_id = $2 AND purpose = $3 AND email = $4 AND expire_time > $5",
    )
    .bind(token.id.0)
    .bind(token.user_id.0)
    .bind(purpose.as_str())
    .bind(token.email.as_str())
    .bind(microseconds(now))
    .execute(&mut **tx)
    .await?;
    Ok(used.rows_affected() == 1)
}

/// Finds out whose a leased mail is and whether it is still called for, and makes its token the live one.
async fn prepare(tx: &mut Tx, leased: LeasedMail, now: OffsetDateTime) -> Result<MailClaim, StoreError> {
    let dropped = MailClaim::Dropped(leased.mail.kind);
    let user = match leased.mail.user_id {
        Some(id) => find_user(tx, id).await?,
        None => find_user_of(tx, &leased.mail.recipient).await?,
    };
    if let Some(user) = user.filter(|user| is_wanted(leased.mail.kind, &leased.mail.recipient, user)) {
        let grant = leased.grant(&user);
        if issue(tx, grant.as_ref(), leased.mail.create_time, now).await? {
            return Ok(MailClaim::Claimed(leased.claimed(user, grant)));
        }
    }
    sqlx::query("DELETE FROM mail_outbox WHERE id = $1").bind(leased.mail.id.0).execute(&mut **tx).await?;
    Ok(dropped)
}

/// Makes a token its account's one live token for its purpose. `false` if a newer one is there, or if it would be
/// expired already. A mail without a token passes.
async fn issue(
    tx: &mut Tx,
    grant: Option<&OneTimeGrant>,
    create_time: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    let Some(grant) = grant else {
        return Ok(true);
    };
    let expire_time = create_time + grant.purpose.lifetime();
    if expire_time <= now {
        return Ok(false);
    }
    let issued = sqlx::query(
        "INSERT INTO one_time_tokens (id, user_id, purpose, email, create_time, expire_time) \
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id, purpose) DO UPDATE SET id = excluded.id, \
         email = excluded.email, create_time = excluded.create_time, expire_time = excluded.expire_time \
         WHERE one_time_tokens.create_time <= excluded.create_time",
    )
    .bind(grant.id.0)
    .bind(grant.user_id.0)
    .bind(grant.purpose.as_str())
    .bind(grant.email.as_str())
    .bind(microseconds(create_time))
    .bind(microseconds(expire_time))
    .execute(&mut **tx)
    .await?;
    Ok(issued.rows_affected() == 1)
}

pub(super) async fn find_user(tx: &mut Tx, id: UserId) -> Result<Option<User>, StoreError> {
    sqlx::query_as::<_, UserRow<Time>>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
        .bind(id.0)
        .fetch_optional(&mut **tx)
        .await?
        .map(UserRow::into_user)
        .transpose()
}

async fn find_user_of(tx: &mut Tx, email: &Email) -> Result<Option<User>, StoreError> {
    sqlx::query_as::<_, UserRow<Time>>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.email = $1"))
        .bind(email.as_str())
        .fetch_optional(&mut **tx)
        .await?
        .map(UserRow::into_user)
        .transpose()
}
