//! Errors of calls to Postern by their reason, and those of a token that is refused here.

use std::{convert::Infallible, str::FromStr, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// The domain of Postern's reasons in `google.rpc.ErrorInfo`.
pub(crate) const DOMAIN: &str = "postern.auth.v1";

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a call failed. `docs/errors.md` explains each.
        ///
        /// Reasons are added in later releases: decide by the gRPC code for those that this one does not know.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $name,)*
            /// A reason that this release of the library does not know.
            Other(String),
        }

        impl Reason {
            /// The reason as it is sent, such as `TOKEN_EXPIRED`.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Other(text) => text,
                }
            }
        }

        impl FromStr for Reason {
            type Err = Infallible;

            fn from_str(text: &str) -> Result<Self, Infallible> {
                Ok(match text {
                    $($text => Self::$name,)*
                    other => Self::Other(other.to_owned()),
                })
            }
        }
    };
}

reasons! {
    /// A field is malformed, missing or refused; [`CallError::violations`] names each one.
    InvalidField = "INVALID_FIELD",
    /// Another account has this address.
    EmailTaken = "EMAIL_TAKEN",
    /// Another account has this name.
    UsernameTaken = "USERNAME_TAKEN",
    /// Wrong password, unknown address or disabled account.
    InvalidCredentials = "INVALID_CREDENTIALS",
    /// The call needs an access token, and has none.
    TokenMissing = "TOKEN_MISSING",
    /// The token is malformed, forged or meant for somebody else.
    TokenInvalid = "TOKEN_INVALID",
    /// The access token has expired.
    TokenExpired = "TOKEN_EXPIRED",
    /// The session has ended, or its account was disabled or deleted.
    SessionRevoked = "SESSION_REVOKED",
    /// The refresh token is expired, revoked, reused or unknown: log in again.
    RefreshTokenInvalid = "REFRESH_TOKEN_INVALID",
    /// The address has to be verified first.
    EmailNotVerified = "EMAIL_NOT_VERIFIED",
    /// A token from a mail is wrong, used, replaced or expired.
    OneTimeTokenInvalid = "ONE_TIME_TOKEN_INVALID",
    /// The caller lacks the role.
    RoleRequired = "ROLE_REQUIRED",
    /// No enabled admin would be left.
    LastAdmin = "LAST_ADMIN",
    /// There is no such thing that the caller may see.
    NotFound = "NOT_FOUND",
    /// A limit was reached: wait.
    Throttled = "THROTTLED",
    /// The replica is overloaded: wait.
    Overloaded = "OVERLOADED",
    /// The database is not available: wait.
    StoreUnavailable = "STORE_UNAVAILABLE",
    /// The call is for people.
    UserRequired = "USER_REQUIRED",
    /// The call is for services.
    ServiceRequired = "SERVICE_REQUIRED",
    /// The credentials of the service are not accepted.
    InvalidClient = "INVALID_CLIENT",
    /// The cursor of the stream is too old: begin again.
    CursorExpired = "CURSOR_EXPIRED",
}

/// A field that Postern refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field, as in the proto.
    pub field: String,
    /// A reason for programs, such as `TOO_SHORT`. Empty if the server gives none.
    pub reason: String,
    /// An explanation for people.
    pub description: String,
}

/// A call to Postern that failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message} ({code:?}{})", reason.as_ref().map(|reason| format!(", {}", reason.as_str())).unwrap_or_default())]
pub struct CallError {
    /// The gRPC code.
    pub code: Code,
    /// The reason, if Postern answered. Proxies and broken connections give none.
    pub reason: Option<Reason>,
    /// An explanation for people. It may change.
    pub message: String,
    /// The fields that were refused.
    pub violations: Vec<FieldViolation>,
    /// How long to wait before the call may succeed.
    pub retry_after: Option<Duration>,
}

impl CallError {
    /// Whether it is not known if the call was carried out, or the same call may succeed later.
    pub fn is_temporary(&self) -> bool {
        matches!(
            self.code,
            Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Cancelled | Code::Unknown
        )
    }

    pub(crate) fn is(&self, reason: &Reason) -> bool {
        self.reason.as_ref() == Some(reason)
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN);
        let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
        Self {
            code: status.code(),
            reason: info.and_then(|info| info.reason.parse().ok()),
            message: status.message().to_owned(),
            violations: violations
                .into_iter()
                .map(|one| FieldViolation { field: one.field, reason: one.reason, description: one.description })
                .collect(),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
        }
    }
}

/// Why a token, or a call with it, is refused by this service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The call has no access token.
    #[error("this call needs an access token")]
    TokenMissing,
    /// The token is malformed, forged, or for another service.
    #[error("the access token is not valid")]
    TokenInvalid,
    /// The token has expired.
    #[error("the access token has expired")]
    TokenExpired,
    /// The session has ended, or its account was disabled or deleted.
    #[error("the session has ended")]
    SessionRevoked,
    /// The method is for people.
    #[error("this call is for people")]
    UserRequired,
    /// The method is for services.
    #[error("this call is for services")]
    ServiceRequired,
    /// The caller lacks the role.
    #[error("the caller lacks a role that this call needs")]
    RoleRequired,
    /// The caller's address is not verified.
    #[error("this call needs a verified address")]
    EmailNotVerified,
    /// Nothing is declared for the method, so nobody may call it.
    #[error("nobody may call this method")]
    MethodNotDeclared,
    /// The public keys could not be fetched, so nothing is known about the token.
    #[error("the keys of the issuer are not available")]
    KeysUnavailable,
    /// It is not known what was revoked, and [`crate::WhenUnknown::Refuse`] was chosen.
    #[error("what was revoked is not known at the moment")]
    RevocationsUnknown,
}

impl VerifyError {
    /// The gRPC code.
    pub fn code(self) -> Code {
        match self {
            Self::TokenMissing | Self::TokenInvalid | Self::TokenExpired | Self::SessionRevoked => {
                Code::Unauthenticated
            }
            Self::EmailNotVerified => Code::FailedPrecondition,
            Self::UserRequired | Self::ServiceRequired | Self::RoleRequired | Self::MethodNotDeclared => {
                Code::PermissionDenied
            }
            Self::KeysUnavailable | Self::RevocationsUnknown => Code::Unavailable,
        }
    }

    /// The HTTP status.
    pub fn http_status(self) -> u16 {
        match self.code() {
            Code::Unauthenticated => 401,
            Code::Unavailable => 503,
            _ => 403,
        }
    }

    /// The reason, as Postern itself would give it.
    pub fn reason(self) -> Reason {
        match self {
            Self::TokenMissing => Reason::TokenMissing,
            Self::TokenInvalid => Reason::TokenInvalid,
            Self::TokenExpired => Reason::TokenExpired,
            Self::SessionRevoked => Reason::SessionRevoked,
            Self::UserRequired => Reason::UserRequired,
            Self::ServiceRequired => Reason::ServiceRequired,
            // Postern refuses an RPC without a declaration in the same way.
            Self::RoleRequired | Self::MethodNotDeclared => Reason::RoleRequired,
            Self::EmailNotVerified => Reason::EmailNotVerified,
            Self::KeysUnavailable | Self::RevocationsUnknown => Reason::StoreUnavailable,
        }
    }
}

impl From<VerifyError> for Status {
    fn from(error: VerifyError) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason().as_str(), DOMAIN, std::collections::HashMap::new());
        if error.code() == Code::Unavailable {
            details.set_retry_info(Some(Duration::from_secs(1)));
        }
        Status::with_error_details(error.code(), error.to_string(), details)
    }
}
