//! What a page shows: the state of its form, or the result of its action.

use http::StatusCode;

use super::{
    form::{FormError, PasswordError},
    link::Link,
};

/// The state of a form.
#[derive(Debug)]
pub enum FormState {
    /// Just opened.
    Fresh,
    /// The passwords have to be typed again.
    Refused(PasswordError),
    /// The call failed temporarily. A retry can succeed after `seconds`.
    TryAgain { status: StatusCode, seconds: u64 },
}

/// The state of the form that asks for a mail with a link for a new password.
#[derive(Debug)]
pub enum RequestState {
    /// Just opened.
    Fresh,
    /// The address has to be typed again.
    NoAddress,
    /// The call failed temporarily. A retry can succeed after `seconds`.
    TryAgain { status: StatusCode, seconds: u64 },
}

/// A page without a form.
#[derive(Debug)]
pub enum Notice<'a> {
    EmailVerified {
        email: Option<String>,
    },
    /// The link has verified the address before.
    EmailVerifiedBefore,
    ResetRequested,
    PasswordReset,
    EmailChanged {
        email: Option<String>,
    },
    InvalidLink(Link),
    EmailTaken,
    Failed {
        request_id: Option<&'a str>,
    },
    Unreadable(FormError),
    MethodNotAllowed,
}
