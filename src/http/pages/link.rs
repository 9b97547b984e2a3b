//! The links that mails carry: where each points, and what its page does. Who writes mails may not look in here, so the
//! paths are said once more there; a platform with pages of its own points the links at those.

/// What a link is for. Each is a page of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    VerifyEmail,
    ResetPassword,
    ConfirmEmailChange,
}

impl Link {
    pub const ALL: [Self; 3] = [Self::VerifyEmail, Self::ResetPassword, Self::ConfirmEmailChange];

    /// Where the link points to.
    pub fn path(self) -> &'static str {
        match self {
            Self::VerifyEmail => "/verify-email",
            Self::ResetPassword => "/reset-password",
            Self::ConfirmEmailChange => "/confirm-email-change",
        }
    }

    /// What the button calls.
    pub fn rpc_path(self) -> &'static str {
        match self {
            Self::VerifyEmail => "/postern.auth.v1.AccountService/VerifyEmail",
            Self::ResetPassword => "/postern.auth.v1.AccountService/ResetPassword",
            Self::ConfirmEmailChange => "/postern.auth.v1.AccountService/ConfirmEmailChange",
        }
    }
}
