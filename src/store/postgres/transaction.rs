//! The verbs of a step, in PostgreSQL's dialect.
//!
//! Isolation is READ COMMITTED. Where two steps could meet, the row of the user decides: each step that changes an
//! account locks it first (`FOR NO KEY UPDATE`).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use sqlx::{Executor as _, PgConnection, Row as _};
use time::OffsetDateTime;
use tokio::{runtime::Handle, sync::Notify};
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
        rows::{ServiceRow, StoredRow, USER_BY_EMAIL, USER_BY_ID, UserRow},
        statement::Statement,
        steps::{ANOTHER_ADMIN_ENABLED, Budget, WriteTransaction, bind_mail, bind_session},
    },
};

use super::pool::Lease;

/// The channel on which replicas tell each other about new entries in the log of revocations.
pub(super) const REVOCATIONS: &str = "postern_revocations";

/// Until when a revocation is kept: as long after the time of the step as the step says, or after the newest access token
/// that it ends, or after now by the database's clock, whichever is the latest. Any of these clocks may be wrong.
macro_rules! forget_time {
    ($now:literal, $until:literal $(, $token_time:literal)+) => {
        concat!("greatest(clock_timestamp(), ", $now, $(", ", $token_time,)+ ") + (", $until, "::timestamptz - ", $now, "::timestamptz)")
    };
}
pub(super) use forget_time;

/// Ends the sessions whose column has a value, if they have not ended, logs the revocations and announces them. Returns
/// how many it ended.
macro_rules! end_sessions {
    ($column:literal) => {
        concat!(
            "WITH ended AS (UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE ",
            $column,
            " = $1 AND revoke_time IS NULL RETURNING id, refresh_issue_time, newest_token_time), ",
            "logged AS (INSERT INTO revocations (session_id, revoke_time, forget_time) SELECT id, $2, ",
            forget_time!("$2", "$4", "refresh_issue_time", "newest_token_time"),
            " FROM ended) ",
            "SELECT count(*), pg_notify($5, '') FROM ended"
        )
    };
}

/// How long a transaction that was not committed may take to roll back, before its connection is closed instead.
const ROLLBACK_TIMEOUT: Duration = Duration::from_secs(2);

/// The text of `count_mail_in` for a table.
macro_rules! count_mail {
    ($table:literal) => {
        concat!(
            "INSERT INTO ",
            $table,
            " AS l (email, spent_until) VALUES ($1, $2 + make_interval(secs => $3)) \
             ON CONFLICT (email) DO UPDATE SET spent_until = make_interval(secs => $3) + \
             CASE WHEN l.spent_until > $2 + make_interval(secs => $5) THEN $2 ELSE greatest(l.spent_until, $2) END \
             WHERE l.spent_until <= $2 + make_interval(secs => $4) OR l.spent_until > $2 + make_interval(secs => $5)"
        )
    };
}

/// A transaction that writes. It is rolled back when it is dropped without a commit.
pub(in crate::store) struct Tx {
    /// Taken when the transaction ends.
    connection: Option<Lease>,
    /// Woken after the commit, if the step queued mail.
    mail_queued: Arc<Notify>,
    queued: bool,
}

impl Drop for Tx {
    fn drop(&mut self) {
        let (Some(mut connection), Ok(runtime)) = (self.connection.take(), Handle::try_current()) else {
            return;
        };
        runtime.spawn(async move {
            let Ok(on) = connection.get() else {
                return;
            };
            if let Ok(Ok(_)) = tokio::time::timeout(ROLLBACK_TIMEOUT, on.execute("ROLLBACK")).await {
                connection.give_back();
            }
        });
    }
}

impl Tx {
    pub(super) async fn begin(mut connection: Lease, mail_queued: Arc<Notify>) -> Result<Self, StoreError> {
        connection.get()?.execute("BEGIN").await?;
        Ok(Self { connection: Some(connection), mail_queued, queued: false })
    }

    fn connection(&mut self) -> Result<&mut PgConnection, StoreError> {
        match &mut self.connection {
            Some(connection) => connection.get(),
            None => Err(StoreError::broken("the transaction has ended")),
        }
    }

    /// The row that a query finds.
    pub(super) async fn find<R: StoredRow>(&mut self, query: Statement) -> Result<Option<R>, StoreError> {
        let row = query.into_query().fetch_optional(self.connection()?).await?;
        Ok(row.as_ref().map(R::from_row).transpose()?)
    }

    /// Runs [`end_sessions!`] and tells whether it ended one session.
    async fn end_sessions(
        &mut self,
        statement: &'static str,
        id: Uuid,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<bool, StoreError> {
        let statement = Statement::new(statement)
            .bind(id)
            .bind(context.now)
            .bind(reason.as_str())
            .bind(context.retain_until)
            .bind(REVOCATIONS);
        Ok(self.number(statement).await? == 1)
    }
}

#[async_trait]
impl WriteTransaction for Tx {
    const USERNAME_TAKEN: &'static str =
        "SELECT EXISTS (SELECT 1 FROM users WHERE lower(username COLLATE \"C\") = $1 COLLATE \"C\")";
    const LOCK_SERVICE: &'static str = "SELECT id FROM service_accounts WHERE id = $1 FOR UPDATE";
    const LOG_ROLES: &'static str = concat!(
        "INSERT INTO revocations (user_id, roles, revoke_time, forget_time) \
         SELECT $1, $2, $3, ",
        forget_time!("$3", "$4", "max(refresh_issue_time)", "max(newest_token_time)"),
        " FROM sessions WHERE user_id = $1"
    );

    fn count_mail_in(budget: Budget) -> &'static str {
        match budget {
            Budget::All => count_mail!("mail_limits"),
            Budget::Resets => count_mail!("reset_limits"),
            Budget::Notices => count_mail!("notice_limits"),
        }
    }

    async fn commit(mut self) -> Result<(), StoreError> {
        if let Some(mut connection) = self.connection.take() {
            connection.get()?.execute("COMMIT").await?;
            connection.give_back();
        }
        if self.queued {
            self.mail_queued.notify_one();
        }
        Ok(())
    }

    async fn execute(&mut self, statement: Statement) -> Result<u64, StoreError> {
        Ok(statement.into_query().execute(self.connection()?).await?.rows_affected())
    }

    async fn is_true(&mut self, query: Statement) -> Result<bool, StoreError> {
        Ok(query.into_query().fetch_one(self.connection()?).await?.try_get(0)?)
    }

    async fn number(&mut self, query: Statement) -> Result<i64, StoreError> {
        Ok(query.into_query().fetch_one(self.connection()?).await?.try_get(0)?)
    }

    async fn finds(&mut self, query: Statement) -> Result<bool, StoreError> {
        Ok(query.into_query().fetch_optional(self.connection()?).await?.is_some())
    }

    async fn find_id(&mut self, query: Statement) -> Result<Option<Uuid>, StoreError> {
        let row = query.into_query().fetch_optional(self.connection()?).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    async fn find_user(&mut self, query: Statement) -> Result<Option<User>, StoreError> {
        self.find::<UserRow>(query).await?.map(UserRow::into_user).transpose()
    }

    async fn find_service(&mut self, query: Statement) -> Result<Option<ServiceAccount>, StoreError> {
        self.find::<ServiceRow>(query).await?.map(ServiceRow::into_account).transpose()
    }

    async fn lock_user(&mut self, id: UserId) -> Result<Option<User>, StoreError> {
        // The account is read after the lock is held. The roles that the waiting statement itself saw would be from
        // before the wait.
        if !self.finds(Statement::new("SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE").bind(id.0)).await? {
            return Ok(None);
        }
        self.find_user(Statement::new(USER_BY_ID).bind(id.0)).await
    }

    async fn lock_user_by_email(&mut self, email: &Email) -> Result<Option<User>, StoreError> {
        let lock = Statement::new("SELECT id FROM users WHERE email = $1 FOR NO KEY UPDATE").bind(email.as_str());
        if !self.finds(lock).await? {
            return Ok(None);
        }
        self.find_user(Statement::new(USER_BY_EMAIL).bind(email.as_str())).await
    }

    async fn lock_enabled_user(&mut self, id: UserId, password_version: i64) -> Result<bool, StoreError> {
        let query = Statement::new(
            "SELECT id FROM users WHERE id = $1 AND password_version = $2 AND NOT disabled FOR NO KEY UPDATE",
        )
        .bind(id.0)
        .bind(password_version);
        self.finds(query).await
    }

    async fn changes_unless_taken(&mut self, statement: Statement) -> Result<bool, StoreError> {
        let changed = statement.into_query().execute(self.connection()?).await;
        match changed {
            Ok(_) => Ok(true),
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn is_another_admin_enabled(&mut self, id: UserId) -> Result<bool, StoreError> {
        // The rows of all admins are locked first, so that of two such steps the second looks when the first is done.
        // That is why the second statement is needed: it sees what was committed while the first one waited.
        self.run(Statement::new("SELECT user_id FROM user_roles WHERE role = 'admin' ORDER BY user_id FOR UPDATE"))
            .await?;
        self.is_true(Statement::new(ANOTHER_ADMIN_ENABLED).bind(id.0)).await
    }

    async fn insert_session(&mut self, session: NewSession) -> Result<(), StoreError> {
        let statement = Statement::new(
            "INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
             refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp(), $9, $10)",
        );
        self.run(bind_session(statement, session)).await
    }

    async fn revoke(
        &mut self,
        session: SessionId,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<bool, StoreError> {
        self.end_sessions(end_sessions!("id"), session.0, reason, context).await
    }

    async fn revoke_all(
        &mut self,
        user: UserId,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<(), StoreError> {
        self.end_sessions(end_sessions!("user_id"), user.0, reason, context).await.map(drop)
    }

    async fn lock_open_session(
        &mut self,
        session: SessionId,
        user: UserId,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let query = Statement::new(
            "SELECT id FROM sessions WHERE id = $1 AND user_id = $2 AND revoke_time IS NULL \
             AND refresh_expire_time > $3 FOR UPDATE",
        )
        .bind(session.0)
        .bind(user.0)
        .bind(now);
        self.finds(query).await
    }

    async fn queue(&mut self, mail: &NewMail) -> Result<(), StoreError> {
        let statement = Statement::new(
            "INSERT INTO mail_outbox (id, kind, recipient, user_id, new_email, create_time, trace_parent, next_attempt_time) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, clock_timestamp())",
        );
        self.run(bind_mail(statement, mail)).await?;
        self.queued = true;
        Ok(())
    }

    async fn lock_mail(&mut self, mail: MailId, attempt: i64) -> Result<bool, StoreError> {
        let query = Statement::new("SELECT id FROM mail_outbox WHERE id = $1 AND attempts = $2 FOR UPDATE")
            .bind(mail.0)
            .bind(attempt);
        self.finds(query).await
    }

    async fn announce_revocations(&mut self) -> Result<(), StoreError> {
        self.run(Statement::new("SELECT pg_notify($1, '')").bind(REVOCATIONS)).await
    }
}
