//! The verbs of a step, in SQLite's dialect. Every step is alone while it runs, so no row is locked.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::{FromRow as _, Row as _, Sqlite, Transaction};
use time::OffsetDateTime;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    domain::{
        account::{Email, User},
        audit::AuditContext,
        ids::{MailId, SessionId, UserId},
        mail::NewMail,
        ports::NewSession,
        service_account::ServiceAccount,
        session::RevokeReason,
    },
    error::StoreError,
    store::{
        rows::{ServiceRow, USER_BY_EMAIL, USER_BY_ID, UserRow},
        statement::Statement,
        steps::{ANOTHER_ADMIN_ENABLED, Budget, WriteTransaction, bind_mail, bind_session},
    },
};

/// Logs the revocation of the sessions whose column has a value and that have not ended.
macro_rules! log_revocations {
    ($column:literal) => {
        concat!(
            "INSERT INTO revocations (session_id, revoke_time, forget_time) SELECT id, $2, \
             max($2, refresh_issue_time, coalesce(newest_token_time, 0)) + ($3 - $2) FROM sessions WHERE ",
            $column,
            " = $1 AND revoke_time IS NULL"
        )
    };
}

/// Ends the same sessions.
macro_rules! end_sessions {
    ($column:literal) => {
        concat!(
            "UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE ",
            $column,
            " = $1 AND revoke_time IS NULL"
        )
    };
}

/// The text of `count_mail_in` for a table.
macro_rules! count_mail {
    ($table:literal) => {
        concat!(
            "INSERT INTO ",
            $table,
            " AS l (email, spent_until) VALUES ($1, $2 + $3) \
             ON CONFLICT (email) DO UPDATE SET \
             spent_until = iif(l.spent_until > $2 + $5, $2, max(l.spent_until, $2)) + $3 \
             WHERE l.spent_until <= $2 + $4 OR l.spent_until > $2 + $5"
        )
    };
}

/// A transaction that writes.
pub(in crate::store) struct Tx {
    pub(super) sql: Transaction<'static, Sqlite>,
    /// Woken after the commit, if the step queued mail.
    mail_queued: Arc<Notify>,
    queued: bool,
}

impl Tx {
    pub(super) fn new(sql: Transaction<'static, Sqlite>, mail_queued: Arc<Notify>) -> Self {
        Self { sql, mail_queued, queued: false }
    }

    /// Runs [`log_revocations!`] and [`end_sessions!`], and tells whether they ended one session.
    async fn end_sessions(
        &mut self,
        (log, end): (&'static str, &'static str),
        id: Uuid,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<bool, StoreError> {
        self.run(Statement::new(log).bind(id).bind(context.now).bind(context.retain_until)).await?;
        self.changes_one(Statement::new(end).bind(id).bind(context.now).bind(reason.as_str())).await
    }
}

#[async_trait]
impl WriteTransaction for Tx {
    const USERNAME_TAKEN: &'static str = "SELECT EXISTS (SELECT 1 FROM users WHERE lower(username) = $1)";
    const LOCK_SERVICE: &'static str = "SELECT id FROM service_accounts WHERE id = $1";
    const LOG_ROLES: &'static str = "INSERT INTO revocations (user_id, roles, revoke_time, forget_time) \
         SELECT $1, $2, $3, max($3, coalesce(max(refresh_issue_time), 0), coalesce(max(newest_token_time), 0)) + ($4 - $3) \
         FROM sessions WHERE user_id = $1";

    fn count_mail_in(budget: Budget) -> &'static str {
        match budget {
            Budget::All => count_mail!("mail_limits"),
            Budget::Resets => count_mail!("reset_limits"),
            Budget::Notices => count_mail!("notice_limits"),
        }
    }

    async fn commit(self) -> Result<(), StoreError> {
        self.sql.commit().await?;
        if self.queued {
            self.mail_queued.notify_one();
        }
        Ok(())
    }

    async fn execute(&mut self, statement: Statement) -> Result<u64, StoreError> {
        Ok(statement.into_query().execute(&mut *self.sql).await?.rows_affected())
    }

    async fn is_true(&mut self, query: Statement) -> Result<bool, StoreError> {
        Ok(query.into_query().fetch_one(&mut *self.sql).await?.try_get(0)?)
    }

    async fn number(&mut self, query: Statement) -> Result<i64, StoreError> {
        Ok(query.into_query().fetch_one(&mut *self.sql).await?.try_get(0)?)
    }

    async fn finds(&mut self, query: Statement) -> Result<bool, StoreError> {
        Ok(query.into_query().fetch_optional(&mut *self.sql).await?.is_some())
    }

    async fn find_id(&mut self, query: Statement) -> Result<Option<Uuid>, StoreError> {
        let row = query.into_query().fetch_optional(&mut *self.sql).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    async fn find_user(&mut self, query: Statement) -> Result<Option<User>, StoreError> {
        let row = query.into_query().fetch_optional(&mut *self.sql).await?;
        row.map(|row| UserRow::from_row(&row)?.into_user()).transpose()
    }

    async fn find_service(&mut self, query: Statement) -> Result<Option<ServiceAccount>, StoreError> {
        let row = query.into_query().fetch_optional(&mut *self.sql).await?;
        row.map(|row| ServiceRow::from_row(&row)?.into_account()).transpose()
    }

    async fn lock_user(&mut self, id: UserId) -> Result<Option<User>, StoreError> {
        self.find_user(Statement::new(USER_BY_ID).bind(id.0)).await
    }

    async fn lock_user_by_email(&mut self, email: &Email) -> Result<Option<User>, StoreError> {
        self.find_user(Statement::new(USER_BY_EMAIL).bind(email.as_str())).await
    }

    async fn lock_enabled_user(&mut self, id: UserId, password_version: i64) -> Result<bool, StoreError> {
        let query = Statement::new("SELECT id FROM users WHERE id = $1 AND password_version = $2 AND NOT disabled")
            .bind(id.0)
            .bind(password_version);
        self.finds(query).await
    }

    async fn changes_unless_taken(&mut self, statement: Statement) -> Result<bool, StoreError> {
        // The caller has looked before, and no other step has run since.
        self.changes_one(statement).await
    }

    async fn is_another_admin_enabled(&mut self, id: UserId) -> Result<bool, StoreError> {
        self.is_true(Statement::new(ANOTHER_ADMIN_ENABLED).bind(id.0)).await
    }

    async fn insert_session(&mut self, session: NewSession) -> Result<(), StoreError> {
        let statement = Statement::new(
            "INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
             refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $3, $9, $10)",
        );
        self.run(bind_session(statement, session)).await
    }

    async fn revoke(
        &mut self,
        session: SessionId,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<bool, StoreError> {
        let statements = (log_revocations!("id"), end_sessions!("id"));
        self.end_sessions(statements, session.0, reason, context).await
    }

    async fn revoke_all(
        &mut self,
        user: UserId,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<(), StoreError> {
        let statements = (log_revocations!("user_id"), end_sessions!("user_id"));
        self.end_sessions(statements, user.0, reason, context).await.map(drop)
    }

    async fn lock_open_session(
        &mut self,
        session: SessionId,
        user: UserId,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let query = Statement::new(
            "SELECT id FROM sessions WHERE id = $1 AND user_id = $2 AND revoke_time IS NULL \
             AND refresh_expire_time > $3",
        )
        .bind(session.0)
        .bind(user.0)
        .bind(now);
        self.finds(query).await
    }

    async fn queue(&mut self, mail: &NewMail) -> Result<(), StoreError> {
        let statement = Statement::new(
            "INSERT INTO mail_outbox (id, kind, recipient, user_id, new_email, create_time, trace_parent, next_attempt_time) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $6)",
        );
        self.run(bind_mail(statement, mail)).await?;
        self.queued = true;
        Ok(())
    }

    async fn lock_mail(&mut self, mail: MailId, attempt: i64) -> Result<bool, StoreError> {
        self.finds(
            Statement::new("SELECT id FROM mail_outbox WHERE id = $1 AND attempts = $2").bind(mail.0).bind(attempt),
        )
        .await
    }

    async fn announce_revocations(&mut self) -> Result<(), StoreError> {
        // There is one serving process, which reads its own entries before it answers.
        Ok(())
    }
}
