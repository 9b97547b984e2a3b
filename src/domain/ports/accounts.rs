//! The steps that create and change accounts.

use async_trait::async_trait;

use crate::{
    domain::{
        account::{Email, User, Username},
        audit::AuditContext,
        ids::{MailId, SessionId, UserId},
        mail::NewMail,
        one_time::OneTimeGrant,
        password::PasswordHash,
        role::Role,
        throttle::{AddressLimit, AttemptSubject},
    },
    error::StoreError,
};

use super::sessions::{NewSession, SessionOpening};

/// The steps of an account's life. A mail that a step causes is queued in the same transaction.
#[async_trait]
pub trait AccountStore {
    /// Creates an account with the role `user`.
    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError>;

    /// Consumes a verification token, if it is live and its address is still the account's. Returns `None` if not.
    /// Unless an open session of the account proves that its user is the one who reads the mail, every session and a
    /// pending change of address end.
    async fn verify_email(&self, verification: EmailVerification) -> Result<Option<User>, StoreError>;

    /// Consumes a reset token and sets the password. The address then counts as verified. Every session ends, and so do
    /// all one-time tokens of the account and the mails that would bring more.
    async fn reset_password(&self, reset: PasswordReset) -> Result<PasswordResetOutcome, StoreError>;

    /// Replaces the password that was verified and opens a session with the new one. Every other session ends, and so
    /// do reset tokens and a pending change of address.
    async fn change_password(&self, change: PasswordChange) -> Result<SessionOpening, StoreError>;

    /// Queues the mails for a change of address.
    async fn request_email_change(&self, change: EmailChange) -> Result<EmailChangeRequest, StoreError>;

    /// Consumes a change token: its address becomes the account's and is verified. All other one-time tokens end, since
    /// they were mailed to the old address. An account that holds the address and yields it
    /// ([`User::yields_address`]) is deleted.
    async fn confirm_email_change(
        &self,
        confirmation: EmailConfirmation,
    ) -> Result<EmailConfirmationOutcome, StoreError>;

    /// Changes the username of an account whose password was verified.
    async fn change_username(&self, change: UsernameChange) -> Result<UsernameChangeOutcome, StoreError>;
}

/// An account to create.
#[derive(Debug, Clone)]
pub struct NewAccount {
    pub id: UserId,
    pub username: Username,
    pub email: Email,
    pub password_hash: PasswordHash,
    pub context: AuditContext,
    /// The roles that an operator gives it besides the role `user`, and the context of their audit row.
    pub roles: Option<(Vec<Role>, AuditContext)>,
    /// An operator vouches for the address: it counts as verified, and no verification is mailed.
    pub email_verified: bool,
    /// To the new address.
    pub verification: NewMail,
    /// Set where the caller must not learn that the address is taken: the mail that its owner gets instead.
    pub owner_notice: Option<NewMail>,
    /// Applies to both mails.
    pub limit: AddressLimit,
    /// The client has caused too many mails: the account is created, and neither mail is queued.
    pub withholds_mail: bool,
}

/// The result of creating an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountCreation {
    Created(User),
    /// Returned rather than `UsernameTaken` where both are taken. Where the caller must not learn that the address is
    /// taken, `UsernameTaken` goes first.
    EmailTaken,
    UsernameTaken,
}

/// An address to mark as verified by a token that was mailed there.
#[derive(Debug, Clone)]
pub struct EmailVerification {
    pub token: OneTimeGrant,
    /// The session whose access token came with the call.
    pub session: Option<SessionId>,
    /// Matches no password. It replaces the password of an account that somebody tried to move to another address.
    pub no_password: PasswordHash,
    pub context: AuditContext,
}

/// A password to set by a token that was mailed.
#[derive(Debug, Clone)]
pub struct PasswordReset {
    pub token: OneTimeGrant,
    pub password_hash: PasswordHash,
    pub notice: NewMail,
    /// Earlier failed attempts on this account no longer count.
    pub attempts: AttemptSubject,
    pub context: AuditContext,
}

/// The result of a password reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PasswordResetOutcome {
    Reset,
    /// The token was used, superseded or has expired, or the account is disabled. Nothing changed.
    TokenDead,
}

/// A password to set in place of one that was verified.
#[derive(Debug, Clone)]
pub struct PasswordChange {
    pub password_hash: PasswordHash,
    /// The session of the caller, which must not have ended meanwhile.
    pub caller: SessionId,
    /// The new session. Its `password_version` is that of the password that was verified.
    pub session: NewSession,
    pub notice: NewMail,
    /// Applies to the notice while the address is not verified.
    pub limit: AddressLimit,
}

/// An address to change to.
#[derive(Debug, Clone)]
pub struct EmailChange {
    pub user_id: UserId,
    /// The session of the caller, which must not have ended meanwhile.
    pub caller: SessionId,
    /// The version of the password that was verified.
    pub password_version: i64,
    /// To the address to change to.
    pub confirmation: NewMail,
    /// To the current address.
    pub notice: NewMail,
    /// Set where the caller must not learn that the address is taken: the mail that its owner gets instead of the
    /// confirmation.
    pub owner_notice: Option<NewMail>,
    pub context: AuditContext,
    /// Applies to all mails but the notice to a verified address, which nobody may suppress by asking for mails.
    pub limit: AddressLimit,
}

/// The result of asking for a change of address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmailChangeRequest {
    Requested,
    /// Another account has that address and does not yield it, and the caller may know it.
    EmailTaken,
    /// That address was sent too many mails.
    OverLimit,
    /// The account is deleted or disabled, or its password has changed since.
    Refused,
}

/// A token that confirms a change of address.
#[derive(Debug, Clone)]
pub struct EmailConfirmation {
    pub token: OneTimeGrant,
    /// The id of the mail that tells the old address about the change.
    pub notice: MailId,
    pub context: AuditContext,
    /// The context of the audit row about an account that is deleted because it yields the address.
    pub eviction: AuditContext,
}

/// The result of confirming a change of address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmailConfirmationOutcome {
    Changed(User),
    /// Another account has that address and does not yield it. Nothing changed; the token is still live.
    EmailTaken,
    /// The token was used, superseded or has expired, or the account is disabled. Nothing changed.
    TokenDead,
}

/// A username to change to.
#[derive(Debug, Clone)]
pub struct UsernameChange {
    pub user_id: UserId,
    /// The session of the caller, which must not have ended meanwhile.
    pub caller: SessionId,
    /// The version of the password that was verified.
    pub password_version: i64,
    pub username: Username,
    pub context: AuditContext,
}

/// The result of changing a username.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UsernameChangeOutcome {
    Changed(User),
    /// Another account has that username, in upper or lower case.
    UsernameTaken,
    /// The account is deleted or disabled, its password has changed since, or the caller's session has ended.
    Refused,
}
