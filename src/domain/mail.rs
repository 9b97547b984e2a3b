//! What is mailed, to whom and why. How it is worded and sent is the `mail` room's; what the token in it is worth is
//! `one_time.rs`.

use std::net::IpAddr;

use time::OffsetDateTime;

use crate::{
    error::Error,
    store::{AddressLimit, Enqueued},
};

use super::{MailId, Postern, UserId, account::Email, one_time::Purpose, throttle::ClientLimit};

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

/// How mail is caused, and how much of it.
#[derive(Debug)]
pub struct MailPolicy {
    /// To one address, of what somebody else can cause. Over all replicas.
    pub per_address: AddressLimit,
    /// By one client. Of this replica.
    pub per_client: ClientLimit,
    /// Whether sign-up and change of address keep to themselves that an address is taken.
    pub conceal_existing_accounts: bool,
}

impl Postern {
    /// A mail of now.
    pub(super) fn mail_to(&self, kind: MailKind, recipient: Email, user_id: Option<UserId>) -> Result<NewMail, Error> {
        let id = MailId(self.env.uuid()?);
        Ok(NewMail { id, kind, recipient, user_id, new_email: None, create_time: self.env.now() })
    }

    /// The mail to an address's owner, where it is not to be told that there is one.
    pub(super) fn concealed(&self, email: &Email) -> Result<Option<NewMail>, Error> {
        let conceal = self.mails.conceal_existing_accounts;
        conceal.then(|| self.mail_to(MailKind::AccountExists, email.clone(), None)).transpose()
    }

    /// Queues a mail that was asked for by the address alone. Nothing is found out about the address here, so neither
    /// the answer nor its time tells anything; who asks too often gets the same answer and no mail.
    pub(super) async fn request_mail(
        &self,
        kind: MailKind,
        recipient: Email,
        client_ip: Option<IpAddr>,
    ) -> Result<(), Error> {
        self.store.known_reachable()?;
        if self.mails.per_client.take(client_ip).is_err() {
            withheld("client");
            return Ok(());
        }
        let mail = self.mail_to(kind, recipient, None)?;
        match self.store.request_mail(mail, self.mails.per_address).await? {
            Enqueued::Queued => {}
            Enqueued::OverLimit => withheld("address"),
        }
        Ok(())
    }
}

fn withheld(limit: &'static str) {
    metrics::counter!("postern_mails_withheld_total", "limit" => limit).increment(1);
    tracing::debug!(limit, "a mail was asked for too often and not queued");
}
