//! What a step runs on: a transaction with verbs, which each backend implements, and the combinations of verbs that
//! several steps need.

use std::future::Future;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::{Email, User, Username},
        audit::{Action, AuditContext, AuditTarget},
        ids::{MailId, SessionId, UserId},
        mail::{MailKind, NewMail},
        one_time::{OneTimeGrant, Purpose},
        password::PasswordHash,
        ports::{Enqueued, NewAccount, NewSession, Rehash},
        role::Role,
        session::RevokeReason,
        throttle::{AddressLimit, AttemptSubject},
    },
    error::StoreError,
};

use crate::store::shared::run_to_completion;

/// A database that steps run on.
pub(in crate::store) trait Backend: Clone + Send + Sync + 'static {
    type Transaction: WriteTransaction;

    /// Begins a transaction that writes. Dropping it without a commit rolls it back.
    fn begin(&self) -> impl Future<Output = Result<Self::Transaction, StoreError>> + Send;
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

/// The verbs of a step: each is one or two statements of static SQL. A verb decides nothing but what its `WHERE` clause
/// says; `bool` tells whether it found a row.
#[async_trait]
pub(in crate::store) trait WriteTransaction: Send + Sized {
    async fn commit(self) -> Result<(), StoreError>;

    // Users.

    /// Inserts the account, without roles. `false` if its address or its username is taken.
    async fn insert_user(&mut self, account: &NewAccount) -> Result<bool, StoreError>;
    /// The account, which must exist.
    async fn user(&mut self, id: UserId) -> Result<User, StoreError>;
    /// The account, locked against every other step that changes it.
    async fn lock_user(&mut self, id: UserId) -> Result<Option<User>, StoreError>;
    /// The account with this address, locked likewise.
    async fn lock_user_by_email(&mut self, email: &Email) -> Result<Option<User>, StoreError>;
    /// Locks the account, if it is enabled and its password has this version.
    async fn lock_enabled_user(&mut self, id: UserId, password_version: i64) -> Result<bool, StoreError>;
    async fn is_email_taken(&mut self, email: &Email) -> Result<bool, StoreError>;
    async fn is_username_taken(&mut self, username: &Username) -> Result<bool, StoreError>;
    /// Marks the address of a token as verified, if it is still the account's.
    async fn mark_email_verified(&mut self, token: &OneTimeGrant, now: OffsetDateTime) -> Result<bool, StoreError>;
    /// Sets the password and marks the address as verified, if the account is enabled and the token's address is still
    /// the account's.
    async fn reset_password(
        &mut self,
        token: &OneTimeGrant,
        hash: &PasswordHash,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError>;
    /// Sets the password, if the account is enabled and its password has this version.
    async fn replace_password(
        &mut self,
        id: UserId,
        password_version: i64,
        hash: &PasswordHash,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError>;
    /// Replaces the hash of a password by another hash of the same password, if it has not changed since.
    async fn replace_hash(&mut self, id: UserId, rehash: &Rehash) -> Result<(), StoreError>;
    /// Sets the address and marks it as verified. `false` if another account has it; the transaction cannot go on then.
    async fn set_email(&mut self, id: UserId, email: &Email, now: OffsetDateTime) -> Result<bool, StoreError>;
    async fn set_disabled(&mut self, id: UserId, disabled: bool, now: OffsetDateTime) -> Result<(), StoreError>;
    /// Adds a role to an account that does not have it.
    async fn add_role(&mut self, id: UserId, role: &Role) -> Result<(), StoreError>;
    async fn remove_roles(&mut self, id: UserId) -> Result<(), StoreError>;
    /// Sets the time of the last change to the account.
    async fn touch(&mut self, id: UserId, now: OffsetDateTime) -> Result<(), StoreError>;
    /// Whether an enabled admin other than this account exists. No other step can change the answer before this one
    /// ends.
    async fn is_another_admin_enabled(&mut self, id: UserId) -> Result<bool, StoreError>;
    async fn delete_user(&mut self, id: UserId) -> Result<(), StoreError>;

    // Sessions and attempts.

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
    async fn count_open_sessions(&mut self, user: UserId, now: OffsetDateTime) -> Result<u64, StoreError>;
    /// Forgets all attempts at a password.
    async fn reset_attempts(&mut self, subject: AttemptSubject) -> Result<(), StoreError>;

    // Mail and one-time tokens.

    /// Puts a mail into the outbox, due at once.
    async fn queue(&mut self, mail: &NewMail) -> Result<(), StoreError>;
    /// Counts a mail to its address. `false` if the address is over its limit.
    async fn count_mail(&mut self, mail: &NewMail, limit: AddressLimit) -> Result<bool, StoreError>;
    /// Locks a mail of the outbox, if it still exists with this number of attempts.
    async fn lock_mail(&mut self, mail: MailId, attempt: i64) -> Result<bool, StoreError>;
    async fn delete_mail(&mut self, mail: MailId) -> Result<(), StoreError>;
    /// Deletes the mails of this kind to an account.
    async fn delete_mails_of(&mut self, user: UserId, kind: MailKind) -> Result<(), StoreError>;
    /// Deletes the mails of this kind that were requested for an address.
    async fn delete_mails_to(&mut self, email: &Email, kind: MailKind) -> Result<(), StoreError>;
    /// Makes a token its account's one token for its purpose. `false` if a newer one exists.
    async fn put_token(
        &mut self,
        token: &OneTimeGrant,
        create_time: OffsetDateTime,
        expire_time: OffsetDateTime,
    ) -> Result<bool, StoreError>;
    /// Deletes a live token with exactly this grant. Of two callers at the same time, one finds it.
    async fn delete_token(&mut self, token: &OneTimeGrant, now: OffsetDateTime) -> Result<bool, StoreError>;
    async fn delete_tokens(&mut self, user: UserId, purpose: Purpose) -> Result<(), StoreError>;

    // The audit log and the log of revocations.

    /// Writes the audit row of a step.
    async fn record(&mut self, action: Action, context: &AuditContext, target: AuditTarget) -> Result<(), StoreError>;
    /// Tells every replica which roles an account has from now on.
    async fn log_roles(&mut self, user: UserId, roles: &[Role], context: &AuditContext) -> Result<(), StoreError>;
    /// Deletes audit rows from before a moment, at most `limit` of them. Returns how many.
    async fn delete_audit_events(&mut self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError>;
}

/// Queues a mail, if its address is within its limit.
pub(super) async fn queue_within<T: WriteTransaction>(
    tx: &mut T,
    mail: &NewMail,
    limit: AddressLimit,
) -> Result<Enqueued, StoreError> {
    if !tx.count_mail(mail, limit).await? {
        return Ok(Enqueued::OverLimit);
    }
    tx.queue(mail).await?;
    Ok(Enqueued::Queued)
}

/// Consumes a live token, if it has this purpose.
pub(super) async fn consume_token<T: WriteTransaction>(
    tx: &mut T,
    purpose: Purpose,
    token: &OneTimeGrant,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    Ok(token.purpose == purpose && tx.delete_token(token, now).await?)
}

/// Ends an account's tokens for these purposes, and the mails that would bring new ones. The caller holds the lock on
/// the user. `email` is the address that mails were requested for.
pub(super) async fn void_tokens<T: WriteTransaction>(
    tx: &mut T,
    user: UserId,
    email: &Email,
    purposes: &[Purpose],
) -> Result<(), StoreError> {
    for purpose in purposes {
        let kind = MailKind::carrying(*purpose);
        tx.delete_tokens(user, *purpose).await?;
        tx.delete_mails_of(user, kind).await?;
        tx.delete_mails_to(email, kind).await?;
    }
    Ok(())
}
