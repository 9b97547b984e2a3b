//! The verbs of a step, in PostgreSQL's dialect.
//!
//! Isolation is READ COMMITTED. Where two steps could meet, the row of the user decides: each step that changes an
//! account locks it first (`FOR NO KEY UPDATE`).

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::{
    Postgres, Transaction,
    postgres::PgArguments,
    query::{Query, QueryScalar},
};
use time::OffsetDateTime;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    domain::{
        account::{Email, User, Username},
        audit::{Action, AuditContext, AuditTarget},
        ids::{MailId, SessionId, UserId},
        mail::{MailKind, NewMail},
        one_time::{OneTimeGrant, Purpose},
        password::PasswordHash,
        ports::{NewAccount, NewSession, Rehash},
        role::Role,
        session::RevokeReason,
        throttle::{AddressLimit, AttemptSubject},
    },
    error::StoreError,
    store::{
        rows::{UserRow, roles_text, user_columns},
        shared::Stamp,
        steps::WriteTransaction,
    },
};

/// The channel on which replicas tell each other about new entries in the log of revocations.
pub(super) const REVOCATIONS: &str = "postern_revocations";

/// Ends the sessions whose column has a value, if they have not ended, and logs the revocations.
macro_rules! end_sessions {
    ($column:literal) => {
        concat!(
            "WITH ended AS (UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE ",
            $column,
            " = $1 AND revoke_time IS NULL RETURNING id) ",
            "INSERT INTO revocations (session_id, revoke_time, forget_time) SELECT id, $2, $4 FROM ended"
        )
    };
}

/// A transaction that writes.
pub(in crate::store) struct Tx {
    pub(super) sql: Transaction<'static, Postgres>,
    /// Woken after the commit, if the step queued mail.
    mail_queued: Arc<Notify>,
    queued: bool,
}

impl Tx {
    pub(super) fn new(sql: Transaction<'static, Postgres>, mail_queued: Arc<Notify>) -> Self {
        Self { sql, mail_queued, queued: false }
    }

    /// Wakes the replicas that listen, when this commits. The others poll.
    async fn notify(&mut self) -> Result<(), StoreError> {
        sqlx::query("SELECT pg_notify($1, '')").bind(REVOCATIONS).execute(&mut *self.sql).await?;
        Ok(())
    }

    /// Runs a statement.
    async fn run(&mut self, statement: Query<'_, Postgres, PgArguments>) -> Result<(), StoreError> {
        statement.execute(&mut *self.sql).await?;
        Ok(())
    }

    /// Runs a statement and tells whether it changed one row.
    async fn changes_one(&mut self, statement: Query<'_, Postgres, PgArguments>) -> Result<bool, StoreError> {
        Ok(statement.execute(&mut *self.sql).await?.rows_affected() == 1)
    }

    /// Tells whether a query finds a row.
    async fn finds(&mut self, query: Query<'_, Postgres, PgArguments>) -> Result<bool, StoreError> {
        Ok(query.fetch_optional(&mut *self.sql).await?.is_some())
    }

    /// Returns the one value of a query.
    async fn is_true(&mut self, query: QueryScalar<'_, Postgres, bool, PgArguments>) -> Result<bool, StoreError> {
        Ok(query.fetch_one(&mut *self.sql).await?)
    }

    /// Runs [`end_sessions!`] and tells whether it ended one session.
    async fn end_sessions(
        &mut self,
        statement: &'static str,
        id: Uuid,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<bool, StoreError> {
        let statement = sqlx::query(statement)
            .bind(id)
            .bind(Stamp(context.now))
            .bind(reason.as_str())
            .bind(Stamp(context.retain_until));
        let ended_one = self.changes_one(statement).await?;
        self.notify().await?;
        Ok(ended_one)
    }
}

#[async_trait]
impl WriteTransaction for Tx {
    async fn commit(self) -> Result<(), StoreError> {
        self.sql.commit().await?;
        if self.queued {
            self.mail_queued.notify_one();
        }
        Ok(())
    }

    async fn insert_user(&mut self, account: &NewAccount) -> Result<bool, StoreError> {
        let statement = sqlx::query(
            "INSERT INTO users (id, username, email, password_hash, create_time, update_time) \
             VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT DO NOTHING",
        )
        .bind(account.id.0)
        .bind(account.username.as_str())
        .bind(account.email.as_str())
        .bind(account.password_hash.as_str())
        .bind(Stamp(account.context.now));
        self.changes_one(statement).await
    }

    async fn user(&mut self, id: UserId) -> Result<User, StoreError> {
        sqlx::query_as::<_, UserRow>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
            .bind(id.0)
            .fetch_one(&mut *self.sql)
            .await?
            .into_user()
    }

    async fn lock_user(&mut self, id: UserId) -> Result<Option<User>, StoreError> {
        // The account is read after the lock is held. The roles that the waiting statement itself saw would be from
        // before the wait.
        let locked: Option<Uuid> = sqlx::query_scalar("SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE")
            .bind(id.0)
            .fetch_optional(&mut *self.sql)
            .await?;
        match locked {
            Some(id) => self.user(UserId(id)).await.map(Some),
            None => Ok(None),
        }
    }

    async fn lock_user_by_email(&mut self, email: &Email) -> Result<Option<User>, StoreError> {
        let locked: Option<Uuid> = sqlx::query_scalar("SELECT id FROM users WHERE email = $1 FOR NO KEY UPDATE")
            .bind(email.as_str())
            .fetch_optional(&mut *self.sql)
            .await?;
        match locked {
            Some(id) => self.user(UserId(id)).await.map(Some),
            None => Ok(None),
        }
    }

    async fn lock_enabled_user(&mut self, id: UserId, password_version: i64) -> Result<bool, StoreError> {
        let query = sqlx::query(
            "SELECT id FROM users WHERE id = $1 AND password_version = $2 AND NOT disabled FOR NO KEY UPDATE",
        )
        .bind(id.0)
        .bind(password_version);
        self.finds(query).await
    }

    async fn is_email_taken(&mut self, email: &Email) -> Result<bool, StoreError> {
        self.is_true(sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users WHERE email = $1)").bind(email.as_str()))
            .await
    }

    async fn is_username_taken(&mut self, username: &Username) -> Result<bool, StoreError> {
        let query = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users WHERE lower(username) = lower($1))")
            .bind(username.as_str());
        self.is_true(query).await
    }

    async fn mark_email_verified(&mut self, token: &OneTimeGrant, now: OffsetDateTime) -> Result<bool, StoreError> {
        let found =
            sqlx::query("UPDATE users SET email_verified = true, update_time = $3 WHERE id = $1 AND email = $2")
                .bind(token.user_id.0)
                .bind(token.email.as_str())
                .bind(Stamp(now))
                .execute(&mut *self.sql)
                .await?
                .rows_affected();
        Ok(found == 1)
    }

    async fn reset_password(
        &mut self,
        token: &OneTimeGrant,
        hash: &PasswordHash,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let statement = sqlx::query(
            "UPDATE users SET password_hash = $3, password_version = password_version + 1, email_verified = true, \
             update_time = $4 WHERE id = $1 AND email = $2 AND NOT disabled",
        )
        .bind(token.user_id.0)
        .bind(token.email.as_str())
        .bind(hash.as_str())
        .bind(Stamp(now));
        self.changes_one(statement).await
    }

    async fn replace_password(
        &mut self,
        id: UserId,
        password_version: i64,
        hash: &PasswordHash,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let statement = sqlx::query(
            "UPDATE users SET password_hash = $3, password_version = password_version + 1, update_time = $4 \
             WHERE id = $1 AND password_version = $2 AND NOT disabled",
        )
        .bind(id.0)
        .bind(password_version)
        .bind(hash.as_str())
        .bind(Stamp(now));
        self.changes_one(statement).await
    }

    async fn replace_hash(&mut self, id: UserId, rehash: &Rehash) -> Result<(), StoreError> {
        let statement = sqlx::query("UPDATE users SET password_hash = $2 WHERE id = $1 AND password_hash = $3")
            .bind(id.0)
            .bind(rehash.to.as_str())
            .bind(rehash.from.as_str());
        self.run(statement).await
    }

    async fn set_email(&mut self, id: UserId, email: &Email, now: OffsetDateTime) -> Result<bool, StoreError> {
        let changed = sqlx::query("UPDATE users SET email = $2, email_verified = true, update_time = $3 WHERE id = $1")
            .bind(id.0)
            .bind(email.as_str())
            .bind(Stamp(now))
            .execute(&mut *self.sql)
            .await;
        match changed {
            Ok(_) => Ok(true),
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn set_disabled(&mut self, id: UserId, disabled: bool, now: OffsetDateTime) -> Result<(), StoreError> {
        let statement = sqlx::query("UPDATE users SET disabled = $2, update_time = $3 WHERE id = $1")
            .bind(id.0)
            .bind(disabled)
            .bind(Stamp(now));
        self.run(statement).await
    }

    async fn add_role(&mut self, id: UserId, role: &Role) -> Result<(), StoreError> {
        let statement =
            sqlx::query("INSERT INTO user_roles (user_id, role) VALUES ($1, $2)").bind(id.0).bind(role.as_str());
        self.run(statement).await
    }

    async fn remove_roles(&mut self, id: UserId) -> Result<(), StoreError> {
        self.run(sqlx::query("DELETE FROM user_roles WHERE user_id = $1").bind(id.0)).await
    }

    async fn touch(&mut self, id: UserId, now: OffsetDateTime) -> Result<(), StoreError> {
        self.run(sqlx::query("UPDATE users SET update_time = $2 WHERE id = $1").bind(id.0).bind(Stamp(now))).await
    }

    async fn is_another_admin_enabled(&mut self, id: UserId) -> Result<bool, StoreError> {
        // The rows of all admins are locked first, so that of two such steps the second looks when the first is done.
        // That is why the second statement is needed: it sees what was committed while the first one waited.
        sqlx::query("SELECT user_id FROM user_roles WHERE role = 'admin' ORDER BY user_id FOR UPDATE")
            .execute(&mut *self.sql)
            .await?;
        let query = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM user_roles r JOIN users u ON u.id = r.user_id \
             WHERE r.role = 'admin' AND NOT u.disabled AND u.id <> $1)",
        )
        .bind(id.0);
        self.is_true(query).await
    }

    async fn delete_user(&mut self, id: UserId) -> Result<(), StoreError> {
        self.run(sqlx::query("DELETE FROM users WHERE id = $1").bind(id.0)).await
    }

    async fn insert_session(&mut self, session: NewSession) -> Result<(), StoreError> {
        let statement = sqlx::query(
            "INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
             refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp(), $9, $10)",
        )
        .bind(session.grant.session_id.0)
        .bind(session.grant.user_id.0)
        .bind(Stamp(session.context.now))
        .bind(Stamp(session.grant.session_end_time))
        .bind(session.grant.generation)
        .bind(session.refresh_hash.0.as_slice())
        .bind(Stamp(session.grant.issue_time))
        .bind(Stamp(session.grant.expire_time))
        .bind(session.context.client_ip.map(|ip| ip.to_string()))
        .bind(session.user_agent);
        self.run(statement).await
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
        let query = sqlx::query(
            "SELECT id FROM sessions WHERE id = $1 AND user_id = $2 AND revoke_time IS NULL \
             AND refresh_expire_time > $3 FOR UPDATE",
        )
        .bind(session.0)
        .bind(user.0)
        .bind(Stamp(now));
        self.finds(query).await
    }

    async fn count_open_sessions(&mut self, user: UserId, now: OffsetDateTime) -> Result<u64, StoreError> {
        let open: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM sessions WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2",
        )
        .bind(user.0)
        .bind(Stamp(now))
        .fetch_one(&mut *self.sql)
        .await?;
        Ok(open.unsigned_abs())
    }

    async fn reset_attempts(&mut self, subject: AttemptSubject) -> Result<(), StoreError> {
        self.run(sqlx::query("DELETE FROM login_attempts WHERE subject = $1").bind(subject.0.as_slice())).await
    }

    async fn queue(&mut self, mail: &NewMail) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO mail_outbox (id, kind, recipient, user_id, new_email, create_time, next_attempt_time) \
             VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp())",
        )
        .bind(mail.id.0)
        .bind(mail.kind.as_str())
        .bind(mail.recipient.as_str())
        .bind(mail.user_id.map(|user| user.0))
        .bind(mail.new_email.as_ref().map(Email::as_str))
        .bind(Stamp(mail.create_time))
        .execute(&mut *self.sql)
        .await?;
        self.queued = true;
        Ok(())
    }

    async fn count_mail(&mut self, mail: &NewMail, limit: AddressLimit) -> Result<bool, StoreError> {
        let statement = sqlx::query(
            "INSERT INTO mail_limits (email, spent_until) VALUES ($1, $2 + make_interval(secs => $3)) \
             ON CONFLICT (email) DO UPDATE SET spent_until = \
             greatest(mail_limits.spent_until, $2) + make_interval(secs => $3) \
             WHERE mail_limits.spent_until <= $2 + make_interval(secs => $4)",
        )
        .bind(mail.recipient.as_str())
        .bind(Stamp(mail.create_time))
        .bind(limit.interval.as_secs_f64())
        .bind(limit.tolerance().as_secs_f64());
        self.changes_one(statement).await
    }

    async fn lock_mail(&mut self, mail: MailId, attempt: i64) -> Result<bool, StoreError> {
        let query = sqlx::query("SELECT id FROM mail_outbox WHERE id = $1 AND attempts = $2 FOR UPDATE")
            .bind(mail.0)
            .bind(attempt);
        self.finds(query).await
    }

    async fn delete_mail(&mut self, mail: MailId) -> Result<(), StoreError> {
        self.run(sqlx::query("DELETE FROM mail_outbox WHERE id = $1").bind(mail.0)).await
    }

    async fn delete_mails_of(&mut self, user: UserId, kind: MailKind) -> Result<(), StoreError> {
        let statement =
            sqlx::query("DELETE FROM mail_outbox WHERE user_id = $1 AND kind = $2").bind(user.0).bind(kind.as_str());
        self.run(statement).await
    }

    async fn delete_mails_to(&mut self, email: &Email, kind: MailKind) -> Result<(), StoreError> {
        let statement = sqlx::query("DELETE FROM mail_outbox WHERE recipient = $1 AND user_id IS NULL AND kind = $2")
            .bind(email.as_str())
            .bind(kind.as_str());
        self.run(statement).await
    }

    async fn put_token(
        &mut self,
        token: &OneTimeGrant,
        create_time: OffsetDateTime,
        expire_time: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let statement = sqlx::query(
            "INSERT INTO one_time_tokens (id, user_id, purpose, email, create_time, expire_time) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id, purpose) DO UPDATE SET id = excluded.id, \
             email = excluded.email, create_time = excluded.create_time, expire_time = excluded.expire_time \
             WHERE one_time_tokens.create_time <= excluded.create_time",
        )
        .bind(token.id.0)
        .bind(token.user_id.0)
        .bind(token.purpose.as_str())
        .bind(token.email.as_str())
        .bind(Stamp(create_time))
        .bind(Stamp(expire_time));
        self.changes_one(statement).await
    }

    async fn delete_token(&mut self, token: &OneTimeGrant, now: OffsetDateTime) -> Result<bool, StoreError> {
        let statement = sqlx::query(
            "DELETE FROM one_time_tokens \
             WHERE id = $1 AND user_id = $2 AND purpose = $3 AND email = $4 AND expire_time > $5",
        )
        .bind(token.id.0)
        .bind(token.user_id.0)
        .bind(token.purpose.as_str())
        .bind(token.email.as_str())
        .bind(Stamp(now));
        self.changes_one(statement).await
    }

    async fn delete_tokens(&mut self, user: UserId, purpose: Purpose) -> Result<(), StoreError> {
        let statement = sqlx::query("DELETE FROM one_time_tokens WHERE user_id = $1 AND purpose = $2")
            .bind(user.0)
            .bind(purpose.as_str());
        self.run(statement).await
    }

    async fn record(&mut self, action: Action, context: &AuditContext, target: AuditTarget) -> Result<(), StoreError> {
        let statement = sqlx::query(
            "INSERT INTO audit_events (id, create_time, action, actor_id, user_id, session_id, client_ip, detail) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(context.event.0)
        .bind(Stamp(context.now))
        .bind(action.as_str())
        .bind(context.actor.map(|actor| actor.0))
        .bind(target.user.map(|user| user.0))
        .bind(target.session.map(|session| session.0))
        .bind(context.client_ip.map(|ip| ip.to_string()))
        .bind(target.detail);
        self.run(statement).await
    }

    async fn log_roles(&mut self, user: UserId, roles: &[Role], context: &AuditContext) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO revocations (user_id, roles, revoke_time, forget_time) VALUES ($1, $2, $3, $4)")
            .bind(user.0)
            .bind(roles_text(roles))
            .bind(Stamp(context.now))
            .bind(Stamp(context.retain_until))
            .execute(&mut *self.sql)
            .await?;
        self.notify().await
    }

    async fn delete_audit_events(&mut self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let deleted = sqlx::query(
            "DELETE FROM audit_events WHERE id IN (SELECT id FROM audit_events WHERE create_time < $1 \
             ORDER BY create_time LIMIT $2 FOR UPDATE SKIP LOCKED)",
        )
        .bind(Stamp(before))
        .bind(i64::from(limit))
        .execute(&mut *self.sql)
        .await?
        .rows_affected();
        Ok(deleted)
    }
}
