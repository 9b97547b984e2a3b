//! The only mapping from [`Error`] to a gRPC status. The cause of an internal error is logged here and not sent to the
//! caller. `docs/errors.md` contains the same table.

use std::{collections::HashMap, error::Error as _, sync::Arc, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::{
    error::{Error, MOST_VIOLATIONS, causes},
    proto::ErrorReason,
};

/// `google.rpc.ErrorInfo.domain` of every error.
pub const ERROR_DOMAIN: &str = "postern.auth.v1";
/// The fixed message of every internal error.
pub const INTERNAL_MESSAGE: &str = "internal error";
/// When to retry while the database is down.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// When to resume a stream that has ended.
const STREAM_RETRY: Duration = Duration::from_millis(100);

/// The longest message of an error with violations, in characters.
const LONGEST_MESSAGE: usize = 1_000;

/// The mark of a status that Postern made. It is the status's source, which is never sent.
#[derive(Debug, thiserror::Error)]
#[error("Postern made this status")]
struct OwnStatus {
    /// It is about a link that has done its work.
    is_spent: bool,
}

/// Marks a status as ours, so that [`is_own`] can tell it from a status that tonic made.
pub fn mark_own(mut status: Status) -> Status {
    status.set_source(Arc::new(OwnStatus { is_spent: false }));
    status
}

/// Whether a status is about a verification link that has done its work. Only code in this process can tell: the status is
/// sent like that of any other invalid link.
pub fn is_spent_link(status: &Status) -> bool {
    status.source().and_then(|own| own.downcast_ref::<OwnStatus>()).is_some_and(|own| own.is_spent)
}

/// Whether a status was made here, and not by tonic.
pub fn is_own(status: &Status) -> bool {
    status.source().is_some_and(<dyn std::error::Error>::is::<OwnStatus>)
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, reason, retry_after) = match &error {
            Error::InvalidFields(_) => (Code::InvalidArgument, ErrorReason::InvalidField, None),
            Error::EmailTaken => (Code::AlreadyExists, ErrorReason::EmailTaken, None),
            Error::UsernameTaken | Error::ServiceNameTaken => (Code::AlreadyExists, ErrorReason::UsernameTaken, None),
            Error::InvalidCredentials => (Code::Unauthenticated, ErrorReason::InvalidCredentials, None),
            Error::EmailNotVerified => (Code::FailedPrecondition, ErrorReason::EmailNotVerified, None),
            Error::TokenMissing => (Code::Unauthenticated, ErrorReason::TokenMissing, None),
            Error::TokenInvalid => (Code::Unauthenticated, ErrorReason::TokenInvalid, None),
            Error::TokenExpired => (Code::Unauthenticated, ErrorReason::TokenExpired, None),
            Error::SessionRevoked => (Code::Unauthenticated, ErrorReason::SessionRevoked, None),
            Error::RefreshTokenInvalid => (Code::Unauthenticated, ErrorReason::RefreshTokenInvalid, None),
            Error::OneTimeTokenInvalid | Error::OneTimeTokenSpent => {
                (Code::InvalidArgument, ErrorReason::OneTimeTokenInvalid, None)
            }
            Error::RoleRequired => (Code::PermissionDenied, ErrorReason::RoleRequired, None),
            Error::UserRequired => (Code::PermissionDenied, ErrorReason::UserRequired, None),
            Error::ServiceRequired => (Code::PermissionDenied, ErrorReason::ServiceRequired, None),
            Error::InvalidClient => (Code::Unauthenticated, ErrorReason::InvalidClient, None),
            Error::CursorExpired => (Code::OutOfRange, ErrorReason::CursorExpired, None),
            Error::Throttled { retry_after } => (Code::ResourceExhausted, ErrorReason::Throttled, Some(*retry_after)),
            Error::Overloaded { retry_after } => (Code::ResourceExhausted, ErrorReason::Overloaded, Some(*retry_after)),
            // The health monitor logs when the database goes down and comes back, so failed calls are only debug
            // messages.
            Error::StoreUnavailable(cause) => {
                tracing::debug!(%cause, "a call failed because the database is unavailable");
                (Code::Unavailable, ErrorReason::StoreUnavailable, Some(STORE_RETRY))
            }
            Error::RevocationsUnknown => (Code::Unavailable, ErrorReason::StoreUnavailable, Some(STORE_RETRY)),
            Error::NotFound(_) => (Code::NotFound, ErrorReason::NotFound, None),
            Error::LastAdmin => (Code::FailedPrecondition, ErrorReason::LastAdmin, None),
            Error::DeadlineExceeded => return mark_own(Self::deadline_exceeded("the deadline has passed")),
            Error::StreamEnded(_) => {
                let details = ErrorDetails::with_retry_info(Some(STREAM_RETRY));
                return mark_own(Self::with_error_details(Code::Unavailable, error.to_string(), details));
            }
            Error::Internal(cause) => {
                tracing::error!(cause = %causes(cause.as_ref()), "a call failed because of an internal error");
                return mark_own(Self::internal(INTERNAL_MESSAGE));
            }
        };
        let mut details = ErrorDetails::new();
        details.set_error_info(reason_name(reason), ERROR_DOMAIN, HashMap::new());
        let mut message = error.to_string();
        if let Error::InvalidFields(violations) = &error {
            let named = violations.get(..MOST_VIOLATIONS).unwrap_or(violations);
            let messages: Vec<_> = named.iter().map(ToString::to_string).collect();
            message = messages.join("; ");
            if violations.len() > named.len() {
                message.push_str("; and more");
            }
            // The names that a caller made up are in the details, and not a second time here.
            if let Some((end, _)) = message.char_indices().nth(LONGEST_MESSAGE) {
                message.truncate(end);
                message.push('…');
            }
            details.set_bad_request(
                named
                    .iter()
                    .map(|violation| FieldViolation {
                        field: violation.field.clone().into_owned(),
                        description: violation.description.clone(),
                        reason: violation.reason.as_str().to_owned(),
                        localized_message: None,
                    })
                    .collect::<Vec<_>>(),
            );
        }
        if let Some(delay) = retry_after {
            details.set_retry_info(Some(delay));
        }
        let mut status = Self::with_error_details(code, message, details);
        status.set_source(Arc::new(OwnStatus { is_spent: matches!(error, Error::OneTimeTokenSpent) }));
        status
    }
}

/// The name of a reason in `ErrorInfo`: the enum value without its prefix.
pub fn reason_name(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}

/// The name of a code in `google.rpc.Code`.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
