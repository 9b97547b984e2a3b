//! What is mailed, to whom and why. How it is worded and sent is the `mail` room's; what the token in it is worth is
//! `one_time.rs`.

use time::OffsetDateTime;

use super::{MailId, UserId, account::Email, one_time::Purpose};

/// What a mail says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailKind {
    /// Prove that you read mail at this address.
    VerifyEmail,
    /// Choose a new password.
    ResetPassword,
    /// Make this address that of your account: to the new address.
    ConfirmEmailChange,
    /// A change of address was asked for: to the address as it is.
    EmailChangeRequested,
    /// The address was changed: to the one before.
    EmailChanged,
    /// The password was changed or reset.
    PasswordChanged,
    /// Somebody wanted to sign up, or to change to, an address that has an account: to its owner.
    AccountExists,
}

impl MailKind {
    pub const ALL: [Self; 7] = [
        Self::VerifyEmail,
        Self::ResetPassword,
        Self::ConfirmEmailChange,
        Self::EmailChangeRequested,
        Self::EmailChanged,
        Self::PasswordChanged,
        Self::AccountExists,
    ];

    /// The kind as the database and the metrics have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VerifyEmail => "verify_email",
            Self::ResetPassword => "reset_password",
            Self::ConfirmEmailChange => "confirm_email_change",
            Self::EmailChangeRequested => "email_change_requested",
            Self::EmailChanged => "email_changed",
            Self::PasswordChanged => "password_changed",
            Self::AccountExists => "account_exists",
        }
    }

    /// The kind of that name, if it is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// What the token in such a mail is good for; `None` where there is none.
    pub fn purpose(self) -> Option<Purpose> {
        match self {
            Self::VerifyEmail => Some(Purpose::VerifyEmail),
            Self::ResetPassword => Some(Purpose::ResetPassword),
            Self::ConfirmEmailChange => Some(Purpose::ChangeEmail),
            Self::EmailChangeRequested | Self::EmailChanged | Self::PasswordChanged | Self::AccountExists => None,
        }
    }
}

/// A mail to put into the outbox. It holds no token: that is made when the mail is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMail {
    pub id: MailId,
    pub kind: MailKind,
    pub recipient: Email,
    /// Whose mail it is. `None` where somebody unknown asked for it by the address alone: whether an account has that
    /// address is then found out when it is sent, so that the asking tells nothing.
    pub user_id: Option<UserId>,
    /// The address that is changed to, where the mail is about that.
    pub new_email: Option<Email>,
    pub create_time: OffsetDateTime,
}
