//! The mails that the service sends: which kinds there are, to whom, and how many. What a mail says and how it is sent
//! is the business of `crate::mail`; the token in it is described in `one_time.rs`.

use time::OffsetDateTime;

use crate::trace::TraceParent;

use super::{
    account::{Email, User},
    ids::{MailId, UserId},
    one_time::Purpose,
    throttle::{AddressLimit, RateLimiter},
};

/// The kind of a mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailKind {
    /// Asks the reader to prove that the address is theirs.
    VerifyEmail,
    /// Lets the reader choose a new password.
    ResetPassword,
    /// Asks for confirmation of a change of address; sent to the new address.
    ConfirmEmailChange,
    /// Tells the current address that a change of address was requested.
    EmailChangeRequested,
    /// Tells the old address that the address was changed.
    EmailChanged,
    /// Tells the owner that the password was changed or reset.
    PasswordChanged,
    /// Tells the owner of an address that somebody tried to sign up with it, or to change to it.
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

    /// The name of the kind in the database and in metrics.
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

    /// The kind with this name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// The purpose of the token in such a mail; `None` if it carries none.
    pub fn purpose(self) -> Option<Purpose> {
        match self {
            Self::VerifyEmail => Some(Purpose::VerifyEmail),
            Self::ResetPassword => Some(Purpose::ResetPassword),
            Self::ConfirmEmailChange => Some(Purpose::ChangeEmail),
            Self::EmailChangeRequested | Self::EmailChanged | Self::PasswordChanged | Self::AccountExists => None,
        }
    }

    /// The kind of mail that carries a token for this purpose.
    pub fn carrying(purpose: Purpose) -> Self {
        match purpose {
            Purpose::VerifyEmail => Self::VerifyEmail,
            Purpose::ResetPassword => Self::ResetPassword,
            Purpose::ChangeEmail => Self::ConfirmEmailChange,
        }
    }

    /// Whether a mail to `recipient` is still wanted when it is about to be sent, given the account as it is then.
    pub(crate) fn is_wanted(self, recipient: &Email, user: &User) -> bool {
        match self {
            Self::VerifyEmail => !user.email_verified && user.email == *recipient,
            Self::ResetPassword => !user.disabled && user.email == *recipient,
            Self::ConfirmEmailChange => !user.disabled && user.email != *recipient,
            Self::EmailChangeRequested | Self::EmailChanged | Self::PasswordChanged | Self::AccountExists => true,
        }
    }
}

/// A mail to put into the outbox. It holds no token: the token is made when the mail is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMail {
    pub id: MailId,
    pub kind: MailKind,
    pub recipient: Email,
    /// The account that the mail is for. `None` for mail that an anonymous caller requested for an address: the account
    /// is then looked up when the mail is sent, so that the request reveals nothing.
    pub user_id: Option<UserId>,
    /// The address to change to, where the mail is about a change of address.
    pub new_email: Option<Email>,
    pub create_time: OffsetDateTime,
    /// Where the trace of the call that causes it goes on.
    pub trace: Option<TraceParent>,
}

/// How much mail may be caused, and whether it hides which accounts exist.
#[derive(Debug)]
pub struct MailPolicy {
    /// For each address, over all replicas.
    pub per_address: AddressLimit,
    /// For each client, at this replica.
    pub limiter: RateLimiter,
    /// The same for the mails of sign-ups. They count on their own, so that nobody who signs up many accounts keeps others
    /// behind the same address from a reset.
    pub sign_up_limiter: RateLimiter,
    /// Whether sign-up and change of address hide that an address is taken.
    pub conceal_existing_accounts: bool,
}
