//! Accounts, as they are created and changed.

use async_trait::async_trait;

use crate::domain::{
    MailId, SessionId, UserId,
    account::{Email, User, Username},
    audit::Occasion,
    mail::NewMail,
    one_time::OneTimeGrant,
    password::PasswordHash,
};

use super::{AddressLimit, AttemptSubject, NewSession, SessionOpening, StoreError};

/// The steps of an account's life. Where one causes a mail, that is queued in the same transaction.
#[async_trait]
pub trait AccountStore {
    /// Creates an account with the role `user`.
    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError>;

    /// The account of an address with its password hash.
    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError>;

    /// The account of a live session with its password hash.
    async fn credentials_of_session(&self, session: SessionId, user: UserId)
    -> Result<Option<Credentials>, StoreError>;

    /// The user of a session; `None` once the session was ended or its user disabled or deleted.
    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError>;

    /// Uses up a verification token, if it is live and its address still the account's. `None` if not.
    async fn verify_email(&self, token: OneTimeGrant, occasion: Occasion) -> Result<Option<User>, StoreError>;

    /// Uses up a reset token and sets the password; the address counts as verified. Every session ends, and so do all
    /// one-time tokens and the mails that would bring more.
    async fn reset_password(&self, reset: PasswordReset) -> Result<PasswordResetOutcome, StoreError>;

    /// Replaces the password that was verified and opens a session by the new one. Every other session ends, and so do
    /// reset tokens and a pending change of address.
    async fn change_password(&self, change: PasswordChange) -> Result<SessionOpening, StoreError>;

    /// Queues the mails for a change of address.
    async fn request_email_change(&self, change: EmailChange) -> Result<EmailChangeRequest, StoreError>;

    /// Uses up a change token: its address becomes the account's, and is verified. All other one-time tokens end: they
    /// were mailed to the address before.
    async fn confirm_email_change(
        &self,
        confirmation: EmailConfirmation,
    ) -> Result<EmailConfirmationOutcome, StoreError>;
}

/// An account to create.
#[derive(Debug, Clone)]
pub struct NewAccount {
    pub id: UserId,
    pub username: Username,
    pub email: Email,
    pub password_hash: PasswordHash,
    pub occasion: Occasion,
    /// To the new address.
    pub verification: NewMail,
    /// Where it is not to be told that the address is taken: the mail to its owner instead.
    pub concealed: Option<NewMail>,
    /// For both.
    pub limit: AddressLimit,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountCreation {
    Created(User),
    /// Said before `UsernameTaken` where both hold, unless it is not to be told: then `UsernameTaken` goes first.
    EmailTaken,
    UsernameTaken,
}

/// What a login is checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    pub user: User,
    pub password_hash: PasswordHash,
    /// Counts the changes of the password; a rehash is none.
    pub password_version: i64,
}

/// A password to set by a token that was mailed.
#[derive(Debug, Clone)]
pub struct PasswordReset {
    pub token: OneTimeGrant,
    pub password_hash: PasswordHash,
    pub notice: NewMail,
    /// Guesses at the password before do not count any more.
    pub attempts: AttemptSubject,
    pub occasion: Occasion,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PasswordResetOutcome {
    Reset,
    /// The token was used, superseded or has expired, or the account is disabled. Nothing changed.
    TokenDead,
}

/// A password to set in the place of one that was verified.
#[derive(Debug, Clone)]
pub struct PasswordChange {
    pub password_hash: PasswordHash,
    /// The fresh session; its `password_version` is that of the password that was verified.
    pub session: NewSession,
    pub notice: NewMail,
}

/// An address to change to.
#[derive(Debug, Clone)]
pub struct EmailChange {
    pub user_id: UserId,
    /// Of the password that was verified.
    pub password_version: i64,
    /// Its recipient is the address to change to.
    pub confirmation: NewMail,
    /// To the address as it is.
    pub notice: NewMail,
    /// Where it is not to be told that the address is taken: the mail to its owner instead of the confirmation.
    pub concealed: Option<NewMail>,
    pub occasion: Occasion,
    /// For all but the notice, which nobody may suppress by asking for mails.
    pub limit: AddressLimit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmailChangeRequest {
    Requested,
    /// Another account has that address, and it may be told.
    EmailTaken,
    /// That address has had too many mails.
    OverLimit,
    /// The account is gone, disabled, or has another password by now.
    Refused,
}

/// A token that confirms a change of address.
#[derive(Debug, Clone)]
pub struct EmailConfirmation {
    pub token: OneTimeGrant,
    /// Of the mail that tells the address before.
    pub notice: MailId,
    pub occasion: Occasion,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmailConfirmationOutcome {
    Changed(User),
    /// Another account got that address meanwhile. Nothing changed, the token is still good.
    EmailTaken,
    /// The token was used, superseded or has expired, or the account is disabled. Nothing changed.
    TokenDead,
}
