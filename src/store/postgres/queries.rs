//! The queries, in PostgreSQL's dialect.
//! `COLLATE "C"` makes the order and the index ranges independent of the database's locale.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::{Email, User},
        audit::{Action, AuditEvent},
        ids::{MailId, SessionId, UserId},
        ports::{AuditPage, Credentials, MailQueue, OneTimeToken, Queries, UserOrder, UserPage},
        session::SessionSummary,
    },
    error::StoreError,
    store::{
        rows::{
            AuditRow, CredentialsRow, MailQueueRow, OneTimeTokenRow, SessionRow, UserRow, end_of_prefix, user_columns,
        },
        shared::Stamp,
    },
};

use super::PostgresStore;

#[async_trait]
impl Queries for PostgresStore {
    async fn user(&self, id: UserId) -> Result<Option<User>, StoreError> {
        sqlx::query_as::<_, UserRow>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
            .bind(id.0)
            .fetch_optional(self.pool()?)
            .await?
            .map(UserRow::into_user)
            .transpose()
    }

    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError> {
        sqlx::query_as::<_, UserRow>(concat!(
            "SELECT ",
            user_columns!(),
            " FROM users u JOIN sessions s ON s.user_id = u.id ",
            "WHERE s.id = $1 AND u.id = $2 AND s.revoke_time IS NULL AND NOT u.disabled"
        ))
        .bind(session.0)
        .bind(user.0)
        .fetch_optional(self.pool()?)
        .await?
        .map(UserRow::into_user)
        .transpose()
    }

    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError> {
        sqlx::query_as::<_, CredentialsRow>(concat!(
            "SELECT ",
            user_columns!(),
            ", u.password_hash, u.password_version FROM users u WHERE u.email = $1"
        ))
        .bind(email.as_str())
        .fetch_optional(self.pool()?)
        .await?
        .map(CredentialsRow::into_credentials)
        .transpose()
    }

    async fn credentials_of_session(
        &self,
        session: SessionId,
        user: UserId,
    ) -> Result<Option<Credentials>, StoreError> {
        sqlx::query_as::<_, CredentialsRow>(concat!(
            "SELECT ",
            user_columns!(),
            ", u.password_hash, u.password_version FROM users u JOIN sessions s ON s.user_id = u.id ",
            "WHERE s.id = $1 AND u.id = $2 AND s.revoke_time IS NULL AND NOT u.disabled"
        ))
        .bind(session.0)
        .bind(user.0)
        .fetch_optional(self.pool()?)
        .await?
        .map(CredentialsRow::into_credentials)
        .transpose()
    }

    async fn list_users(&self, page: UserPage) -> Result<Vec<User>, StoreError> {
        let limit = i64::from(page.limit);
        let users = match page.order {
            UserOrder::ById { after: None } => sqlx::query_as::<_, UserRow>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u ORDER BY u.id LIMIT $1"
            ))
            .bind(limit),
            UserOrder::ById { after: Some(after) } => sqlx::query_as::<_, UserRow>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u WHERE u.id > $2 ORDER BY u.id LIMIT $1"
            ))
            .bind(limit)
            .bind(after.0),
            UserOrder::ByEmail { prefix, after } => sqlx::query_as::<_, UserRow>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u WHERE u.email COLLATE \"C\" > $2 AND u.email COLLATE \"C\" >= $3 ",
                "AND u.email COLLATE \"C\" < $4 ORDER BY u.email COLLATE \"C\" LIMIT $1"
            ))
            .bind(limit)
            .bind(after.unwrap_or_default())
            .bind(prefix.clone())
            .bind(end_of_prefix(&prefix)),
            UserOrder::ByUsername { prefix, after } => sqlx::query_as::<_, UserRow>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u WHERE lower(u.username) COLLATE \"C\" > $2 AND lower(u.username) COLLATE \"C\" >= $3 ",
                "AND lower(u.username) COLLATE \"C\" < $4 ",
                "AND NOT (u.email COLLATE \"C\" >= $3 AND u.email COLLATE \"C\" < $4) ",
                "ORDER BY lower(u.username) COLLATE \"C\" LIMIT $1"
            ))
            .bind(limit)
            .bind(after.unwrap_or_default())
            .bind(prefix.clone())
            .bind(end_of_prefix(&prefix)),
        };
        users.fetch_all(self.pool()?).await?.into_iter().map(UserRow::into_user).collect()
    }

    async fn list_sessions(&self, user: UserId, now: OffsetDateTime) -> Result<Vec<SessionSummary>, StoreError> {
        sqlx::query_as::<_, SessionRow>(
            "SELECT id, create_time, last_refresh_time, refresh_expire_time, client_ip, user_agent FROM sessions \
             WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2 ORDER BY id DESC",
        )
        .bind(user.0)
        .bind(Stamp(now))
        .fetch_all(self.pool()?)
        .await?
        .into_iter()
        .map(SessionRow::into_summary)
        .collect()
    }

    async fn list_audit_events(&self, page: AuditPage) -> Result<Vec<AuditEvent>, StoreError> {
        let limit = i64::from(page.limit);
        // Ids start with the time, so this one is newer than any other.
        let before = page.before.map_or(uuid::Uuid::max(), |id| id.0);
        let action = page.action.map(Action::as_str);
        let events = match (page.user, action) {
            (None, None) => sqlx::query_as::<_, AuditRow>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before),
            (Some(user), None) => sqlx::query_as::<_, AuditRow>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 AND user_id = $3 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before)
            .bind(user.0),
            (None, Some(action)) => sqlx::query_as::<_, AuditRow>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 AND action = $3 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before)
            .bind(action),
            (Some(user), Some(action)) => sqlx::query_as::<_, AuditRow>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 AND user_id = $3 AND action = $4 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before)
            .bind(user.0)
            .bind(action),
        };
        events.fetch_all(self.pool()?).await?.into_iter().map(AuditRow::into_event).collect()
    }

    async fn one_time_token(&self, token: MailId) -> Result<Option<OneTimeToken>, StoreError> {
        sqlx::query_as::<_, OneTimeTokenRow>(concat!(
            "SELECT t.id AS token_id, t.purpose, t.email AS token_email, t.expire_time, ",
            user_columns!(),
            " FROM one_time_tokens t JOIN users u ON u.id = t.user_id WHERE t.id = $1"
        ))
        .bind(token.0)
        .fetch_optional(self.pool()?)
        .await?
        .map(OneTimeTokenRow::into_token)
        .transpose()
    }

    async fn mail_queue(&self) -> Result<MailQueue, StoreError> {
        let queue = sqlx::query_as::<_, MailQueueRow>(
            "SELECT count(*) FILTER (WHERE dead_time IS NULL) AS waiting, \
             count(*) FILTER (WHERE dead_time IS NOT NULL) AS dead FROM mail_outbox",
        )
        .fetch_one(self.pool()?)
        .await?;
        Ok(queue.into_queue())
    }
}
