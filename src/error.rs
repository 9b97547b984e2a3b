//! Why a call failed. There is one variant for each row of the table in `docs/errors.md`. The error knows no transport:
//! `grpc/status.rs` maps each variant to a status. It hides on purpose which of several causes led to
//! `InvalidCredentials` or `RefreshTokenInvalid`.

use std::{borrow::Cow, fmt, time::Duration};

/// What is wrong with a field, for a program: a form can show it in any language. `docs/errors.md` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldReason {
    /// It is empty, and must not be.
    Required,
    /// It has too few characters.
    TooShort,
    /// It has too many characters, or the request is too large.
    TooLong,
    /// It has too many entries, or there are too many of what it would create.
    TooMany,
    /// It is a password that is easy to guess.
    TooWeak,
    /// It is not written as its type asks.
    Malformed,
    /// It is a number or a time outside of what is allowed.
    OutOfRange,
    /// It is a name that this deployment keeps for itself.
    Reserved,
    /// It is what the account has already.
    Unchanged,
    /// The request has no such field.
    UnknownField,
    /// The request has it twice.
    Duplicate,
}

impl FieldReason {
    pub const ALL: [Self; 11] = [
        Self::Required,
        Self::TooShort,
        Self::TooLong,
        Self::TooMany,
        Self::TooWeak,
        Self::Malformed,
        Self::OutOfRange,
        Self::Reserved,
        Self::Unchanged,
        Self::UnknownField,
        Self::Duplicate,
    ];

    /// As it is sent.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Required => "REQUIRED",
            Self::TooShort => "TOO_SHORT",
            Self::TooLong => "TOO_LONG",
            Self::TooMany => "TOO_MANY",
            Self::TooWeak => "TOO_WEAK",
            Self::Malformed => "MALFORMED",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::Reserved => "RESERVED",
            Self::Unchanged => "UNCHANGED",
            Self::UnknownField => "UNKNOWN_FIELD",
            Self::Duplicate => "DUPLICATE",
        }
    }
}

/// One refused field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The name of the field in the request, such as `email`. Empty for the message as a whole.
    pub field: Cow<'static, str>,
    /// What is wrong with it, for a program.
    pub reason: FieldReason,
    /// What is wrong with it, for a person. Never contains the value.
    pub description: String,
}

/// How many violations an error names. A request can have thousands, and the answer must not be larger than the request.
pub const MOST_VIOLATIONS: usize = 20;

impl FieldViolation {
    pub fn new(field: impl Into<Cow<'static, str>>, reason: FieldReason, description: impl Into<String>) -> Self {
        Self { field: field.into(), reason, description: description.into() }
    }

    /// A field that is empty, and must not be.
    pub fn required(field: &'static str) -> Self {
        Self::new(field, FieldReason::Required, "is required")
    }

    /// The same violation of a field with another name.
    #[must_use]
    pub fn of(self, field: &'static str) -> Self {
        Self { field: field.into(), ..self }
    }
}

/// The field and what is wrong with it.
impl fmt::Display for FieldViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(format!("{} {}", self.field, self.description).trim_start())
    }
}

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is down, full or too busy. Nothing is known to have been written. A retry is safe and can help.
    #[error("the database is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The database does not contain what this version expects: a table is missing, or a row cannot be read.
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
    /// Another service account has this name.
    #[error("another service account has this name")]
    ServiceNameTaken,
    /// Wrong password, unknown email or disabled account.
    #[error("the email or the password is wrong")]
    InvalidCredentials,
    /// The password is right, but the deployment requires a verified address.
    #[error("the email address is not verified")]
    EmailNotVerified,
    #[error("this call needs an access token")]
    TokenMissing,
    #[error("the access token is invalid")]
    TokenInvalid,
    #[error("the access token has expired")]
    TokenExpired,
    /// The session of the access token has ended, or its user was disabled or deleted.
    #[error("the session has ended")]
    SessionRevoked,
    /// Expired, revoked, reused or unknown.
    #[error("the refresh token is invalid")]
    RefreshTokenInvalid,
    /// A token from a mail is wrong, used, superseded or expired.
    #[error("the link is invalid: it was used, replaced by a newer one, or has expired")]
    OneTimeTokenInvalid,
    /// The token of a verification link whose address is verified already. To callers it is the same as an invalid one; the
    /// page that the link opens says that nothing is left to do.
    #[error("the link is invalid: it was used, replaced by a newer one, or has expired")]
    OneTimeTokenSpent,
    /// The caller is authenticated but lacks the role that the RPC requires.
    #[error("the caller lacks the role that this call needs")]
    RoleRequired,
    /// A service called what only a person can call.
    #[error("this call is for people, and the token is that of a service")]
    UserRequired,
    /// A person called what only a service can call.
    #[error("this call is for services, and the token is that of a person")]
    ServiceRequired,
    /// The credentials of a service are unknown, wrong, expired, deleted or disabled.
    #[error("the client id or the client secret is wrong")]
    InvalidClient,
    /// The cursor of a stream is older than the log of revocations, or from another database.
    #[error("the cursor is older than the log or from another database: begin again without one")]
    CursorExpired,
    /// A stream has ended without a fault of anybody's.
    #[error("the stream has ended, because {0}: resume it with the last cursor")]
    StreamEnded(&'static str),
    /// A rate limit of this caller or of this account was reached.
    #[error("too many attempts")]
    Throttled { retry_after: Duration },
    /// This replica is at its limit of concurrent work.
    #[error("the service is overloaded")]
    Overloaded { retry_after: Duration },
    #[error("the deadline has passed")]
    DeadlineExceeded,
    #[error("the store is unavailable")]
    StoreUnavailable(#[source] StoreError),
    /// The log of revocations could not be read for too long, so any token may be revoked.
    #[error("the store is unavailable")]
    RevocationsUnknown,
    /// There is no such user, or no such session of the caller.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// No enabled admin would be left.
    #[error("this is the last enabled admin")]
    LastAdmin,
    /// A bug or a broken installation. The caller learns nothing more.
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// A failure that no caller can cause. `cause` is logged.
    pub fn internal(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal(cause.into())
    }

    /// The message with its cause, which an operator may see. A caller over the network may not.
    pub fn for_operators(&self) -> String {
        match self {
            Self::Internal(cause) => cause.to_string(),
            Self::StoreUnavailable(cause) => cause.to_string(),
            Self::InvalidFields(violations) => {
                violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
            }
            other => other.to_string(),
        }
    }

    /// One refused field.
    pub fn field(field: &'static str, reason: FieldReason, description: impl Into<String>) -> Self {
        Self::InvalidFields(vec![FieldViolation::new(field, reason, description)])
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

impl From<FieldViolation> for Error {
    fn from(violation: FieldViolation) -> Self {
        Self::InvalidFields(vec![violation])
    }
}

/// An error and its causes, without those that repeat the text before them.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}
