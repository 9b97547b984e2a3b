//! What a step runs on: a transaction with verbs, which each backend implements, and the combinations of verbs that
//! several steps need.

use std::{future::Future, time::Duration};

use async_trait::async_trait;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    domain::{
        account::{Email, User, Username},
        audit::{Action, AuditContext, AuditTarget},
        ids::{MailId, ServiceAccountId, SessionId, UserId},
        mail::{MailKind, NewMail},
        one_time::{OneTimeGrant, Purpose},
        password::PasswordHash,
        ports::{AccountCreation, NewAccount, NewSession},
        role::Role,
        service_account::ServiceAccount,
        session::RevokeReason,
        throttle::{AddressLimit, AttemptSubject},
    },
    error::StoreError,
    trace::TraceParent,
};

use crate::store::{
    purges::Purges,
    rows::{SERVICE_BY_ID, StoredRow, USER_BY_EMAIL, USER_BY_ID, roles_text},
    shared::run_to_completion,
    statement::Statement,
};

/// The live token with a grant, whose values [`of_live_token`] binds.
macro_rules! live_token {
    () => {
        " WHERE id = $1 AND user_id = $2 AND purpose = $3 AND email = $4 AND expire_time > $5"
    };
}

/// The queries that differ between the dialects.
pub(in crate::store) struct Dialect {
    /// At most `$1` users by address, after `$2`, from `$3` on and before `$4`.
    pub users_by_email: &'static str,
    /// The same by username in lower case, without those that `users_by_email` lists for this range.
    pub users_by_username: &'static str,
    /// At most `$1` audit rows before id `$2` of user `$3` with action `$4`.
    pub audit_events_of_user_with_action: &'static str,
    pub purges: Purges,
}

/// A database that steps run on.
pub(in crate::store) trait Backend: Clone + Send + Sync + 'static {
    type Transaction: WriteTransaction;
    /// The queries in its dialect.
    const DIALECT: Dialect;

    /// Begins a transaction that writes. Dropping it without a commit rolls it back.
    fn begin(&self) -> impl Future<Output = Result<Self::Transaction, StoreError>> + Send;

    /// Creates an account. A backend that can do it in one statement does.
    fn create_account(&self, account: NewAccount) -> impl Future<Output = Result<AccountCreation, StoreError>> + Send;

    /// Runs one statement that writes, outside a transaction and to its end, even if its caller goes away. Returns how many
    /// rows it changed.
    fn execute(&self, statement: Statement) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Runs a query outside a transaction and returns its rows.
    fn rows<R: StoredRow>(&self, query: Statement) -> impl Future<Output = Result<Vec<R>, StoreError>> + Send;
}

/// Runs a step in a transaction, to its end, even if its caller goes away. A step that returns without a commit changes
/// nothing.
pub(in crate::store) async fn write<B: Backend, T: Send + 'static, F>(
    backend: &B,
    step: impl FnOnce(B::Transaction) -> F + Send + 'static,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>> + Send,
{
    let backend = backend.clone();
    run_to_completion(async move { step(backend.begin().await?).await }).await
}

/// The verbs of a step: each is one or two statements of static SQL. Those whose SQL is the same in every dialect are
/// written here. A verb decides nothing but what its `WHERE` clause says; `bool` tells whether it found a row.
#[async_trait]
pub(in crate::store) trait WriteTransaction: Send + Sized {
    /// Logs that account `$1` has roles `$2` since `$3`, to be kept until `$4` at least, and as long as any token of its
    /// sessions can be presented.
    const LOG_ROLES: &'static str;
    /// Counts a mail in a table of limits, if the address has room. `$1` address, `$2` time of the mail, `$3` and `$4` the
    /// interval and the tolerance of the limit, `$5` how far ahead the count can be: what is further was written by a clock
    /// that was ahead, and does not count.
    fn count_mail_in(budget: Budget) -> &'static str;
    /// Whether an account has a username that is `$1` in lower case.
    const USERNAME_TAKEN: &'static str;
    /// Locks service account `$1` against every other step that changes it.
    const LOCK_SERVICE: &'static str;

    // What each backend implements.

    async fn commit(self) -> Result<(), StoreError>;
    /// Runs a statement and returns how many rows it changed.
    async fn execute(&mut self, statement: Statement) -> Result<u64, StoreError>;
    /// The one value of a query.
    async fn is_true(&mut self, query: Statement) -> Result<bool, StoreError>;
    /// The one value of a query.
    async fn number(&mut self, query: Statement) -> Result<i64, StoreError>;
    /// Whether a query finds a row.
    async fn finds(&mut self, query: Statement) -> Result<bool, StoreError>;
    /// The id that a query finds.
    async fn find_id(&mut self, query: Statement) -> Result<Option<Uuid>, StoreError>;
    /// The account that a query of [`user_columns!`] finds.
    async fn find_user(&mut self, query: Statement) -> Result<Option<User>, StoreError>;
    /// The service account that a query of [`service_columns!`] finds.
    async fn find_service(&mut self, query: Statement) -> Result<Option<ServiceAccount>, StoreError>;
    /// The account, locked against every other step that changes it.
    async fn lock_user(&mut self, id: UserId) -> Result<Option<User>, StoreError>;
    /// The account with this address, locked likewise.
    async fn lock_user_by_email(&mut self, email: &Email) -> Result<Option<User>, StoreError>;
    /// Locks the account, if it is enabled and its password has this version.
    async fn lock_enabled_user(&mut self, id: UserId, password_version: i64) -> Result<bool, StoreError>;
    /// Runs a statement that changes one row. `false` if a unique index refuses the change; the transaction cannot go on
    /// then.
    async fn changes_unless_taken(&mut self, statement: Statement) -> Result<bool, StoreError>;
    /// Whether an enabled admin other than this account exists. No other step can change the answer before this one
    /// ends.
    async fn is_another_admin_enabled(&mut self, id: UserId) -> Result<bool, StoreError>;
    async fn insert_session(&mut self, session: NewSession) -> Result<(), StoreError>;
    /// Ends a session and logs the revocation, if the session has not ended before.
    async fn revoke(
        &mut self,
        session: SessionId,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<bool, StoreError>;
    /// Ends every session of a user and logs the revocations. The caller holds the lock on the user.
    async fn revoke_all(
        &mut self,
        user: UserId,
        reason: RevokeReason,
        context: &AuditContext,
    ) -> Result<(), StoreError>;
    /// Locks the session of an account, if it can still be refreshed.
    async fn lock_open_session(
        &mut self,
        session: SessionId,
        user: UserId,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError>;
    /// Puts a mail into the outbox, due at once.
    async fn queue(&mut self, mail: &NewMail) -> Result<(), StoreError>;
    /// Locks a mail of the outbox, if it still exists with this number of attempts.
    async fn lock_mail(&mut self, mail: MailId, attempt: i64) -> Result<bool, StoreError>;
    /// Wakes the replicas that listen for new entries in the log of revocations, when this commits. The others poll.
    async fn announce_revocations(&mut self) -> Result<(), StoreError>;

    // What is the same on every backend.

    /// Runs a statement.
    async fn run(&mut self, statement: Statement) -> Result<(), StoreError> {
        self.execute(statement).await.map(drop)
    }

    /// Runs a statement and tells whether it changed one row.
    async fn changes_one(&mut self, statement: Statement) -> Result<bool, StoreError> {
        Ok(self.execute(statement).await? == 1)
    }

    /// Inserts the account, without roles. `false` if its address or its username is taken.
    async fn insert_user(&mut self, account: &NewAccount) -> Result<bool, StoreError> {
        let statement = Statement::new(
            "INSERT INTO users (id, username, email, password_hash, create_time, update_time) \
             VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT DO NOTHING",
        )
        .bind(account.id.0)
        .bind(account.username.as_str())
        .bind(account.email.as_str())
        .bind(account.password_hash.as_str())
        .bind(account.context.now);
        self.changes_one(statement).await
    }

    /// The account, which must exist.
    async fn user(&mut self, id: UserId) -> Result<User, StoreError> {
        let user = self.find_user(Statement::new(USER_BY_ID).bind(id.0)).await?;
        user.ok_or_else(|| StoreError::broken("the account of a step does not exist"))
    }

    async fn is_email_taken(&mut self, email: &Email) -> Result<bool, StoreError> {
        self.is_true(Statement::new("SELECT EXISTS (SELECT 1 FROM users WHERE email = $1)").bind(email.as_str())).await
    }

    async fn is_username_taken(&mut self, username: &Username) -> Result<bool, StoreError> {
        self.is_true(Statement::new(Self::USERNAME_TAKEN).bind(username.as_str().to_ascii_lowercase().as_str())).await
    }

    /// Sets the address and marks it as verified. `false` if another account has it; the transaction cannot go on then.
    async fn set_email(&mut self, id: UserId, email: &Email, now: OffsetDateTime) -> Result<bool, StoreError> {
        let statement =
            Statement::new("UPDATE users SET email = $2, email_verified = true, update_time = $3 WHERE id = $1")
                .bind(id.0)
                .bind(email.as_str())
                .bind(now);
        self.changes_unless_taken(statement).await
    }

    /// Sets the username. `false` if another account has it; the transaction cannot go on then.
    async fn set_username(&mut self, id: UserId, username: &Username, now: OffsetDateTime) -> Result<bool, StoreError> {
        let statement = Statement::new("UPDATE users SET username = $2, update_time = $3 WHERE id = $1")
            .bind(id.0)
            .bind(username.as_str())
            .bind(now);
        self.changes_unless_taken(statement).await
    }

    /// The account that has this address now. It is not locked.
    async fn holder_of(&mut self, email: &Email) -> Result<Option<User>, StoreError> {
        self.find_user(Statement::new(USER_BY_EMAIL).bind(email.as_str())).await
    }

    /// Marks the address of a token as verified, if it is still the account's and was not verified before.
    async fn mark_email_verified(&mut self, token: &OneTimeGrant, now: OffsetDateTime) -> Result<bool, StoreError> {
        let statement = Statement::new(
            "UPDATE users SET email_verified = true, update_time = $3 \
             WHERE id = $1 AND email = $2 AND NOT email_verified",
        )
        .bind(token.user_id.0)
        .bind(token.email.as_str())
        .bind(now);
        self.changes_one(statement).await
    }

    /// Sets the password and marks the address as verified, if the account is enabled and the token's address is still
    /// the account's.
    async fn reset_password(
        &mut self,
        token: &OneTimeGrant,
        hash: &PasswordHash,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let statement = Statement::new(
            "UPDATE users SET password_hash = $3, password_version = password_version + 1, email_verified = true, \
             update_time = $4 WHERE id = $1 AND email = $2 AND NOT disabled",
        )
        .bind(token.user_id.0)
        .bind(token.email.as_str())
        .bind(hash.as_str())
        .bind(now);
        self.changes_one(statement).await
    }

    /// Sets the password, if the account is enabled and its password has this version.
    async fn replace_password(
        &mut self,
        id: UserId,
        password_version: i64,
        hash: &PasswordHash,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let statement = Statement::new(
            "UPDATE users SET password_hash = $3, password_version = password_version + 1, update_time = $4 \
             WHERE id = $1 AND password_version = $2 AND NOT disabled",
        )
        .bind(id.0)
        .bind(password_version)
        .bind(hash.as_str())
        .bind(now);
        self.changes_one(statement).await
    }

    /// Sets the password of an account that the caller has locked.
    async fn set_password(&mut self, id: UserId, hash: &PasswordHash, now: OffsetDateTime) -> Result<(), StoreError> {
        let statement = Statement::new(
            "UPDATE users SET password_hash = $2, password_version = password_version + 1, update_time = $3 \
             WHERE id = $1",
        )
        .bind(id.0)
        .bind(hash.as_str())
        .bind(now);
        self.run(statement).await
    }

    /// Whether somebody asked for a change of address that has not been confirmed. The mail may still be in the outbox.
    async fn is_email_change_pending(&mut self, id: UserId) -> Result<bool, StoreError> {
        let query = Statement::new(
            "SELECT EXISTS (SELECT 1 FROM one_time_tokens WHERE user_id = $1 AND purpose = $2) \
             OR EXISTS (SELECT 1 FROM mail_outbox WHERE user_id = $1 AND kind = $3)",
        )
        .bind(id.0)
        .bind(Purpose::ChangeEmail.as_str())
        .bind(MailKind::ConfirmEmailChange.as_str());
        self.is_true(query).await
    }

    async fn set_disabled(&mut self, id: UserId, disabled: bool, now: OffsetDateTime) -> Result<(), StoreError> {
        let statement = Statement::new("UPDATE users SET disabled = $2, update_time = $3 WHERE id = $1")
            .bind(id.0)
            .bind(disabled)
            .bind(now);
        self.run(statement).await
    }

    /// Adds a role to an account that does not have it.
    async fn add_role(&mut self, id: UserId, role: &Role) -> Result<(), StoreError> {
        let statement =
            Statement::new("INSERT INTO user_roles (user_id, role) VALUES ($1, $2)").bind(id.0).bind(role.as_str());
        self.run(statement).await
    }

    async fn remove_roles(&mut self, id: UserId) -> Result<(), StoreError> {
        self.run(Statement::new("DELETE FROM user_roles WHERE user_id = $1").bind(id.0)).await
    }

    /// Sets the time of the last change to the account.
    async fn touch(&mut self, id: UserId, now: OffsetDateTime) -> Result<(), StoreError> {
        self.run(Statement::new("UPDATE users SET update_time = $2 WHERE id = $1").bind(id.0).bind(now)).await
    }

    async fn delete_user(&mut self, id: UserId) -> Result<(), StoreError> {
        self.run(Statement::new("DELETE FROM users WHERE id = $1").bind(id.0)).await
    }

    async fn count_open_sessions(&mut self, user: UserId, now: OffsetDateTime) -> Result<u64, StoreError> {
        let query = Statement::new(
            "SELECT count(*) FROM sessions WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2",
        )
        .bind(user.0)
        .bind(now);
        Ok(self.number(query).await?.unsigned_abs())
    }

    /// The open session of a user that was not used for the longest time.
    async fn least_used_session(&mut self, user: UserId, now: OffsetDateTime) -> Result<Option<SessionId>, StoreError> {
        let query = Statement::new(
            "SELECT id FROM sessions WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2 \
             ORDER BY last_refresh_time, id LIMIT 1",
        )
        .bind(user.0)
        .bind(now);
        Ok(self.find_id(query).await?.map(SessionId))
    }

    /// Forgets all attempts at a password.
    async fn reset_attempts(&mut self, subject: AttemptSubject) -> Result<(), StoreError> {
        self.run(Statement::new("DELETE FROM login_attempts WHERE subject = $1").bind(subject.0)).await
    }

    /// Counts a mail to its address. `false` if the address is over its limit, and then nothing is counted.
    async fn count_mail(
        &mut self,
        budget: Budget,
        mail: &NewMail,
        limit: AddressLimit,
        furthest: Duration,
    ) -> Result<bool, StoreError> {
        let statement = Statement::new(Self::count_mail_in(budget))
            .bind(mail.recipient.as_str())
            .bind(mail.create_time)
            .bind(limit.interval)
            .bind(limit.tolerance())
            .bind(furthest);
        self.changes_one(statement).await
    }

    async fn delete_mail(&mut self, mail: MailId) -> Result<(), StoreError> {
        self.run(Statement::new("DELETE FROM mail_outbox WHERE id = $1").bind(mail.0)).await
    }

    /// Deletes the mails of this kind to an account.
    async fn delete_mails_of(&mut self, user: UserId, kind: MailKind) -> Result<(), StoreError> {
        let statement =
            Statement::new("DELETE FROM mail_outbox WHERE user_id = $1 AND kind = $2").bind(user.0).bind(kind.as_str());
        self.run(statement).await
    }

    /// Deletes the mails of this kind that were requested for an address.
    async fn delete_mails_to(&mut self, email: &Email, kind: MailKind) -> Result<(), StoreError> {
        let statement =
            Statement::new("DELETE FROM mail_outbox WHERE recipient = $1 AND user_id IS NULL AND kind = $2")
                .bind(email.as_str())
                .bind(kind.as_str());
        self.run(statement).await
    }

    /// Makes a token its account's one token for its purpose. `false` if a newer one exists. One from after `now` is not
    /// newer: a clock was ahead.
    async fn put_token(
        &mut self,
        token: &OneTimeGrant,
        create_time: OffsetDateTime,
        expire_time: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError> {
        let statement = Statement::new(
            "INSERT INTO one_time_tokens (id, user_id, purpose, email, create_time, expire_time) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id, purpose) DO UPDATE SET id = excluded.id, \
             email = excluded.email, create_time = excluded.create_time, expire_time = excluded.expire_time \
             WHERE one_time_tokens.create_time <= excluded.create_time OR one_time_tokens.create_time > $7",
        )
        .bind(token.id.0)
        .bind(token.user_id.0)
        .bind(token.purpose.as_str())
        .bind(token.email.as_str())
        .bind(create_time)
        .bind(expire_time)
        .bind(now);
        self.changes_one(statement).await
    }

    /// Locks a live token with exactly this grant, if there is one. The update changes nothing.
    async fn lock_token(&mut self, token: &OneTimeGrant, now: OffsetDateTime) -> Result<bool, StoreError> {
        let sql = concat!("UPDATE one_time_tokens SET expire_time = expire_time", live_token!());
        self.changes_one(of_live_token(sql, token, now)).await
    }

    /// Deletes a live token with exactly this grant. Of two callers at the same time, one finds it.
    async fn delete_token(&mut self, token: &OneTimeGrant, now: OffsetDateTime) -> Result<bool, StoreError> {
        let sql = concat!("DELETE FROM one_time_tokens", live_token!());
        self.changes_one(of_live_token(sql, token, now)).await
    }

    async fn delete_tokens(&mut self, user: UserId, purpose: Purpose) -> Result<(), StoreError> {
        let statement = Statement::new("DELETE FROM one_time_tokens WHERE user_id = $1 AND purpose = $2")
            .bind(user.0)
            .bind(purpose.as_str());
        self.run(statement).await
    }

    /// Writes the audit row of a step.
    async fn record(&mut self, action: Action, context: &AuditContext, target: AuditTarget) -> Result<(), StoreError> {
        let statement = Statement::new(
            "INSERT INTO audit_events (id, create_time, action, actor_id, user_id, session_id, client_ip, detail) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(context.event.0)
        .bind(context.now)
        .bind(action.as_str())
        .bind(context.actor.map(|actor| actor.0))
        .bind(target.user.map(|user| user.0))
        .bind(target.session.map(|session| session.0))
        .bind(context.client_ip.map(|ip| ip.to_string()))
        .bind(target.detail);
        self.run(statement).await
    }

    /// Tells every replica which roles an account has from now on. One without any is disabled or deleted: then its tokens
    /// are refused, also those of sessions that a restored database does not know.
    async fn log_roles(&mut self, user: UserId, roles: &[Role], context: &AuditContext) -> Result<(), StoreError> {
        self.log_roles_text(user, &roles_text(roles), context).await
    }

    /// The same with the roles as the log has them.
    async fn log_roles_text(&mut self, user: UserId, roles: &str, context: &AuditContext) -> Result<(), StoreError> {
        let statement =
            Statement::new(Self::LOG_ROLES).bind(user.0).bind(roles).bind(context.now).bind(context.retain_until);
        self.run(statement).await?;
        self.announce_revocations().await
    }

    /// Tells every replica that the tokens of a key, or one token, are refused from now on.
    async fn log_session(&mut self, session: SessionId, context: &AuditContext) -> Result<(), StoreError> {
        let statement =
            Statement::new("INSERT INTO revocations (session_id, revoke_time, forget_time) VALUES ($1, $2, $3)")
                .bind(session.0)
                .bind(context.now)
                .bind(context.retain_until);
        self.run(statement).await?;
        self.announce_revocations().await
    }

    /// The service account, locked against every other step that changes it. It is read after the lock is held.
    async fn lock_service(&mut self, id: ServiceAccountId) -> Result<Option<ServiceAccount>, StoreError> {
        if !self.finds(Statement::new(Self::LOCK_SERVICE).bind(id.0)).await? {
            return Ok(None);
        }
        self.find_service(Statement::new(SERVICE_BY_ID).bind(id.0)).await
    }
}

/// Whether an enabled admin other than account `$1` exists.
pub(in crate::store) const ANOTHER_ADMIN_ENABLED: &str = "SELECT EXISTS (SELECT 1 FROM user_roles r JOIN users u ON u.id = r.user_id \
     WHERE r.role = 'admin' AND NOT u.disabled AND u.id <> $1)";

fn of_live_token(sql: &'static str, token: &OneTimeGrant, now: OffsetDateTime) -> Statement {
    Statement::new(sql)
        .bind(token.id.0)
        .bind(token.user_id.0)
        .bind(token.purpose.as_str())
        .bind(token.email.as_str())
        .bind(now)
}

/// Settles an attempt whose password was right: earlier failures no longer count.
pub(in crate::store) fn forgive_attempts(subject: AttemptSubject) -> Statement {
    Statement::new(
        "UPDATE login_attempts SET failures = 0, blocked_until = $2, forget_time = under_way_until, \
         under_way = CASE WHEN under_way > 0 THEN under_way - 1 ELSE 0 END WHERE subject = $1",
    )
    .bind(subject.0)
    .bind(OffsetDateTime::UNIX_EPOCH)
}

/// Settles an attempt that was never made.
pub(in crate::store) fn abandon_attempt(subject: AttemptSubject) -> Statement {
    Statement::new("UPDATE login_attempts SET under_way = under_way - 1 WHERE subject = $1 AND under_way > 0")
        .bind(subject.0)
}

/// The values of a statement that inserts a session, `$1` to `$10`.
pub(in crate::store) fn bind_session(statement: Statement, session: NewSession) -> Statement {
    statement
        .bind(session.grant.session_id.0)
        .bind(session.grant.user_id.0)
        .bind(session.context.now)
        .bind(session.grant.session_end_time)
        .bind(session.grant.generation)
        .bind(session.refresh_hash.0)
        .bind(session.grant.issue_time)
        .bind(session.grant.expire_time)
        .bind(session.context.client_ip.map(|ip| ip.to_string()))
        .bind(session.user_agent)
}

/// The values of a statement that inserts a mail, `$1` to `$6`.
pub(in crate::store) fn bind_mail(statement: Statement, mail: &NewMail) -> Statement {
    statement
        .bind(mail.id.0)
        .bind(mail.kind.as_str())
        .bind(mail.recipient.as_str())
        .bind(mail.user_id.map(|user| user.0))
        .bind(mail.new_email.as_ref().map(|email| email.as_str().to_owned()))
        .bind(mail.create_time)
        .bind(mail.trace.as_ref().map(|TraceParent(text)| text.clone()))
}

/// What the mails to an address are counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Budget {
    /// All mails that somebody else can cause.
    All,
    /// Of these, the mails for a reset of the password.
    Resets,
    /// Notices about the account to an address that nobody has verified.
    Notices,
}
