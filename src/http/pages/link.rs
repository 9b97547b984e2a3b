//! The links that mails contain: the path of each, and the RPC that its page calls.

use crate::domain::one_time::Purpose;

/// The purpose of a link. Each has its own page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    VerifyEmail,
    ResetPassword,
    ConfirmEmailChange,
}

impl Link {
    pub const ALL: [Self; 3] = [Self::VerifyEmail, Self::ResetPassword, Self::ConfirmEmailChange];

    /// The path of the page.
    pub fn path(self) -> &'static str {
        let purpose = match self {
            Self::VerifyEmail => Purpose::VerifyEmail,
            Self::ResetPassword => Purpose::ResetPassword,
            Self::ConfirmEmailChange => Purpose::ChangeEmail,
        };
        purpose.page_path()
    }

    /// The RPC that the button calls.
    pub fn rpc_path(self) -> &'static str {
        match self {
            Self::VerifyEmail => "/postern.auth.v1.AccountService/VerifyEmail",
            Self::ResetPassword => "/postern.auth.v1.AccountService/ResetPassword",
            Self::ConfirmEmailChange => "/postern.auth.v1.AccountService/ConfirmEmailChange",
        }
    }
}
