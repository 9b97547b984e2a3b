//! What a page shows: the state of its form, or the result of the action behind it.

use http::StatusCode;

use super::{
    form::{FormError, PasswordError},
    link::Link,
};

/// How a form is shown.
#[derive(Debug)]
pub enum FormState {
    /// As the link opens it.
    Fresh,
    /// The passwords are to be typed again.
    Refused(PasswordError),
    /// The call failed for now. `seconds` says when to repeat it.
    TryAgain { status: StatusCode, seconds: u64 },
}

/// A page without a form.
#[derive(Debug)]
pub enum Notice<'a> {
    EmailVerified { email: Option<String> },
    PasswordReset,
    EmailChanged { email: Option<String> },
    InvalidLink(Link),
    EmailTaken,
    Failed { request_id: Option<&'a str> },
    Unreadable(FormError),
    MethodNotAllowed,
}
