//! The queries, in SQLite's dialect.

use async_trait::async_trait;
use sqlx::{
    FromRow, Sqlite,
    query::QueryAs,
    sqlite::{SqliteArguments, SqliteRow},
};
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
            AuditRow, CREDENTIALS_OF_SESSION, CredentialsRow, MailQueueRow, OneTimeTokenRow, SessionRow,
            USER_OF_SESSION, UserRow, end_of_prefix, user_columns,
        },
        shared::Stamp,
    },
};

use super::SqliteStore;

impl SqliteStore {
    /// Runs a query and reads its rows as values of the domain.
    async fn read<R, T>(
        &self,
        query: QueryAs<'_, Sqlite, R, SqliteArguments>,
        read: impl Fn(R) -> Result<T, StoreError>,
    ) -> Result<Vec<T>, StoreError>
    where
        R: for<'r> FromRow<'r, SqliteRow> + Send + Unpin,
    {
        query.fetch_all(&self.readers).await?.into_iter().map(read).collect()
    }
}

#[async_trait]
impl Queries for SqliteStore {
    async fn user(&self, id: UserId) -> Result<Option<User>, StoreError> {
        let query = sqlx::query_as::<_, UserRow>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
            .bind(id.0);
        Ok(self.read(query, UserRow::into_user).await?.pop())
    }

    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError> {
        let query = sqlx::query_as(USER_OF_SESSION).bind(session.0).bind(user.0);
        Ok(self.read(query, UserRow::into_user).await?.pop())
    }

    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError> {
        let query = sqlx::query_as::<_, CredentialsRow>(concat!(
            "SELECT ",
            user_columns!(),
            ", u.password_hash, u.password_version FROM users u WHERE u.email = $1"
        ))
        .bind(email.as_str());
        Ok(self.read(query, CredentialsRow::into_credentials).await?.pop())
    }

    async fn credentials_of_session(
        &self,
        session: SessionId,
        user: UserId,
    ) -> Result<Option<Credentials>, StoreError> {
        let query = sqlx::query_as(CREDENTIALS_OF_SESSION).bind(session.0).bind(user.0);
        Ok(self.read(query, CredentialsRow::into_credentials).await?.pop())
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
            UserOrder::ByEmail { prefix, after } => users_by_prefix(
                concat!(
                    "SELECT ",
                    user_columns!(),
                    " FROM users u WHERE u.email > $2 AND u.email >= $3 ",
                    "AND u.email < $4 ORDER BY u.email LIMIT $1"
                ),
                limit,
                &prefix,
                after,
            ),
            UserOrder::ByUsername { prefix, after } => users_by_prefix(
                concat!(
                    "SELECT ",
                    user_columns!(),
                    " FROM users u WHERE lower(u.username) > $2 AND lower(u.username) >= $3 ",
                    "AND lower(u.username) < $4 ",
                    "AND NOT (u.email >= $3 AND u.email < $4) ",
                    "ORDER BY lower(u.username) LIMIT $1"
                ),
                limit,
                &prefix,
                after,
            ),
        };
        self.read(users, UserRow::into_user).await
    }

    async fn list_sessions(&self, user: UserId, now: OffsetDateTime) -> Result<Vec<SessionSummary>, StoreError> {
        let query = sqlx::query_as::<_, SessionRow>(
            "SELECT id, create_time, last_refresh_time, refresh_expire_time, client_ip, user_agent FROM sessions \
             WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2 ORDER BY id DESC",
        )
        .bind(user.0)
        .bind(Stamp(now));
        self.read(query, |row: SessionRow| Ok(row.into_summary())).await
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
            // The plus makes SQLite use the index on the user. Without it SQLite may choose the index on the action and
            // read every event of that kind.
            (Some(user), Some(action)) => sqlx::query_as::<_, AuditRow>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 AND user_id = $3 AND +action = $4 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before)
            .bind(user.0)
            .bind(action),
        };
        self.read(events, |row: AuditRow| Ok(row.into_event())).await
    }

    async fn one_time_token(&self, token: MailId) -> Result<Option<OneTimeToken>, StoreError> {
        let query = sqlx::query_as::<_, OneTimeTokenRow>(concat!(
            "SELECT t.id AS token_id, t.purpose, t.email AS token_email, t.expire_time, ",
            user_columns!(),
            " FROM one_time_tokens t JOIN users u ON u.id = t.user_id WHERE t.id = $1"
        ))
        .bind(token.0);
        Ok(self.read(query, OneTimeTokenRow::into_token).await?.pop())
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
}

/// Binds the range of a list of users that starts with a prefix.
fn users_by_prefix(
    sql: &'static str,
    limit: i64,
    prefix: &str,
    after: Option<String>,
) -> QueryAs<'static, Sqlite, UserRow, SqliteArguments> {
    let range = (prefix.to_owned(), end_of_prefix(prefix));
    sqlx::query_as(sql).bind(limit).bind(after.unwrap_or_default()).bind(range.0).bind(range.1)
}
