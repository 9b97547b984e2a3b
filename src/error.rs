//! Why a call failed, in the domain's words. One variant for each row of the contract's codes table
//! (`docs/errors.md`); it knows no transport, `grpc/status.rs` alone says what each becomes on the wire.
//! What it loses on purpose: which of several causes led to `InvalidCredentials` or `RefreshTokenInvalid`.

use std::{borrow::Cow, time::Duration};

/// One refused field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field's name as the caller knows it, such as `email`; empty where it is the message as a whole.
    pub field: Cow<'static, str>,
    /// What is wrong with it, for a person; never the value itself.
    pub description: String,
}

impl FieldViolation {
    pub fn new(field: impl Into<Cow<'static, str>>, description: impl Into<String>) -> Self {
        Self { field: field.into(), description: description.into() }
    }

    /// The same of a field that the request calls otherwise.
    #[must_use]
    pub fn of(self, field: &'static str) -> Self {
        Self { field: field.into(), ..self }
    }
}

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It is away, full or too busy. Nothing is known to have been written; trying again is safe and may help.
    #[error("the database is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It is there and does not hold what this version expects: a missing table, a row that makes no sense.
    #[error("the database is broken: {0}")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StoreError {
    pub(crate) fn broken(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Broken(cause.into())
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a field is invalid")]
    InvalidFields(Vec<FieldViolation>),
    #[error("another account has this email address")]
    EmailTaken,
    #[error("another account has this username")]
    UsernameTaken,
    /// Wrong password, unknown email or disabled account.
    #[error("the email or the password is wrong")]
    InvalidCredentials,
    /// The password is right, but the deployment demands a verified address.
    #[error("the email address is not verified")]
    EmailNotVerified,
    #[error("this call needs an access token")]
    TokenMissing,
    #[error("the access token is invalid")]
    TokenInvalid,
    #[error("the access token has expired")]
    TokenExpired,
    /// The access token's session was ended, or its user disabled or deleted.
    #[error("the session has ended")]
    SessionRevoked,
    /// Expired, revoked, reused or unknown.
    #[error("the refresh token is invalid")]
    RefreshTokenInvalid,
    /// A token from a mail is wrong, used, superseded or expired.
    #[error("the link is invalid: it was used, replaced by a newer one, or has expired")]
    OneTimeTokenInvalid,
    /// The caller is known and lacks the role that the RPC wants.
    #[error("the caller lacks the role that this call needs")]
    RoleRequired,
    /// Too much of something by this caller, or on this account.
    #[error("too many attempts")]
    Throttled { retry_after: Duration },
    /// More work than this replica takes on.
    #[error("the service is overloaded")]
    Overloaded { retry_after: Duration },
    #[error("the deadline has passed")]
    DeadlineExceeded,
    #[error("the store is unavailable")]
    StoreUnavailable(#[source] StoreError),
    /// Nobody knows what is revoked: the store could not be read for too long.
    #[error("the store is unavailable")]
    RevocationsUnknown,
    /// Somebody else's session, or no such user.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// No enabled admin would be left.
    #[error("this is the last enabled admin")]
    LastAdmin,
    /// A bug or a broken installation: the caller learns nothing but that.
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// A failure that no caller can cause, with what the log should say.
    pub fn internal(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal(cause.into())
    }

    /// One refused field.
    pub fn field(field: &'static str, description: impl Into<String>) -> Self {
        Self::InvalidFields(vec![FieldViolation::new(field, description)])
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::StoreUnavailable(error),
            StoreError::Broken(_) => Self::internal(error),
        }
    }
}
