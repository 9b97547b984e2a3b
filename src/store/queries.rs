//! The queries: each is one statement, the same on every backend but for the texts of the backend's dialect.

use async_trait::async_trait;

use crate::{
    domain::{
        account::{Email, User},
        audit::{Action, AuditEvent},
        ids::{MailId, SessionId, UserId},
        ports::{
            AuditPage, Credentials, MailQueue, OneTimeToken, Queries, Revocation, SessionPage, UserOrder, UserPage,
        },
        session::SessionSummary,
    },
    error::StoreError,
};

use super::{
    rows::{
        AuditRow, CREDENTIALS_OF_SESSION, CredentialsRow, MailQueueRow, OneTimeTokenRow, RevocationRow, SessionRow,
        StoredRow, USER_BY_ID, USER_OF_SESSION, UserRow, audit_events, end_of_prefix, user_columns,
    },
    statement::Statement,
    steps::Backend,
};

/// Runs a query and reads its rows as values of the domain.
async fn read<B: Backend, R: StoredRow, T>(
    backend: &B,
    query: Statement,
    read: impl Fn(R) -> Result<T, StoreError> + Send,
) -> Result<Vec<T>, StoreError> {
    backend.rows(query).await?.into_iter().map(read).collect()
}

#[async_trait]
impl<B: Backend> Queries for B {
    async fn user(&self, id: UserId) -> Result<Option<User>, StoreError> {
        let query = Statement::new(USER_BY_ID).bind(id.0);
        Ok(read(self, query, UserRow::into_user).await?.pop())
    }

    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError> {
        let query = Statement::new(USER_OF_SESSION).bind(session.0).bind(user.0);
        Ok(read(self, query, UserRow::into_user).await?.pop())
    }

    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError> {
        let query = Statement::new(concat!(
            "SELECT ",
            user_columns!(),
            ", u.password_hash, u.password_version FROM users u WHERE u.email = $1"
        ))
        .bind(email.as_str());
        Ok(read(self, query, CredentialsRow::into_credentials).await?.pop())
    }

    async fn credentials_of_session(
        &self,
        session: SessionId,
        user: UserId,
    ) -> Result<Option<Credentials>, StoreError> {
        let query = Statement::new(CREDENTIALS_OF_SESSION).bind(session.0).bind(user.0);
        Ok(read(self, query, CredentialsRow::into_credentials).await?.pop())
    }

    async fn list_users(&self, page: UserPage) -> Result<Vec<User>, StoreError> {
        let limit = i64::from(page.limit);
        let users = match page.order {
            UserOrder::ById { after: None } => {
                Statement::new(concat!("SELECT ", user_columns!(), " FROM users u ORDER BY u.id LIMIT $1")).bind(limit)
            }
            UserOrder::ById { after: Some(after) } => Statement::new(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u WHERE u.id > $2 ORDER BY u.id LIMIT $1"
            ))
            .bind(limit)
            .bind(after.0),
            UserOrder::ByEmail { prefix, after } => users_by_prefix(B::DIALECT.users_by_email, limit, &prefix, after),
            UserOrder::ByUsername { prefix, after } => {
                users_by_prefix(B::DIALECT.users_by_username, limit, &prefix, after)
            }
        };
        read(self, users, UserRow::into_user).await
    }

    async fn list_sessions(&self, page: SessionPage) -> Result<Vec<SessionSummary>, StoreError> {
        let query = Statement::new(
            "SELECT id, create_time, last_refresh_time, refresh_expire_time, client_ip, user_agent FROM sessions \
             WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2 AND id < $3 \
             ORDER BY id DESC LIMIT $4",
        )
        .bind(page.user.0)
        .bind(page.now)
        .bind(page.before.map_or(uuid::Uuid::max(), |id| id.0))
        .bind(i64::from(page.limit));
        read(self, query, |row: SessionRow| Ok(row.into_summary())).await
    }

    async fn list_audit_events(&self, page: AuditPage) -> Result<Vec<AuditEvent>, StoreError> {
        let limit = i64::from(page.limit);
        // Ids start with the time, so this one is newer than any other.
        let before = page.before.map_or(uuid::Uuid::max(), |id| id.0);
        let action = page.action.map(Action::as_str);
        let events = match (page.user, action) {
            (None, None) => Statement::new(audit_events!("")).bind(limit).bind(before),
            (Some(user), None) => {
                Statement::new(audit_events!(" AND user_id = $3")).bind(limit).bind(before).bind(user.0)
            }
            (None, Some(action)) => {
                Statement::new(audit_events!(" AND action = $3")).bind(limit).bind(before).bind(action)
            }
            (Some(user), Some(action)) => Statement::new(B::DIALECT.audit_events_of_user_with_action)
                .bind(limit)
                .bind(before)
                .bind(user.0)
                .bind(action),
        };
        read(self, events, |row: AuditRow| Ok(row.into_event())).await
    }

    async fn revocation_page(&self, after: i64, up_to: i64, limit: u32) -> Result<Vec<Revocation>, StoreError> {
        let query = Statement::new(
            "SELECT number, session_id, user_id, roles, revoke_time, forget_time FROM revocations \
             WHERE number > $1 AND number <= $2 ORDER BY number LIMIT $3",
        )
        .bind(after)
        .bind(up_to)
        .bind(i64::from(limit));
        read(self, query, RevocationRow::into_revocation).await
    }

    async fn one_time_token(&self, token: MailId) -> Result<Option<OneTimeToken>, StoreError> {
        let query = Statement::new(concat!(
            "SELECT t.id AS token_id, t.purpose, t.email AS token_email, t.expire_time, ",
            user_columns!(),
            " FROM one_time_tokens t JOIN users u ON u.id = t.user_id WHERE t.id = $1"
        ))
        .bind(token.0);
        Ok(read(self, query, OneTimeTokenRow::into_token).await?.pop())
    }

    async fn password_parameters(&self) -> Result<Vec<String>, StoreError> {
        // `$`, 22 characters of salt, `$` and 43 characters of hash.
        let query = Statement::new(
            "SELECT DISTINCT CASE WHEN length(password_hash) > 67 \
             THEN substr(password_hash, 1, length(password_hash) - 67) ELSE '' END FROM users",
        );
        read(self, query, |(parameters,): (String,)| Ok(parameters)).await
    }

    async fn mail_queue(&self) -> Result<MailQueue, StoreError> {
        let query = Statement::new(
            "SELECT count(*) FILTER (WHERE dead_time IS NULL) AS waiting, \
             count(*) FILTER (WHERE dead_time IS NOT NULL) AS dead FROM mail_outbox",
        );
        let queue = read(self, query, |row: MailQueueRow| Ok(row.into_queue())).await?.pop();
        queue.ok_or_else(|| StoreError::broken("a count returned no row"))
    }
}

/// Binds the range of a list of users that starts with a prefix.
fn users_by_prefix(sql: &'static str, limit: i64, prefix: &str, after: Option<String>) -> Statement {
    Statement::new(sql)
        .bind(limit)
        .bind(after.unwrap_or_default().as_str())
        .bind(prefix)
        .bind(end_of_prefix(prefix).as_str())
}
