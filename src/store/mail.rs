//! What is still to be mailed, and the one-time tokens that mails carry.
//!
//! A mail is a row that joins the transaction of whatever causes it. Whoever sends it claims it for a while; a claim that
//! is not settled in that time lapses, so a replica that dies loses no mail. What a mail needs beyond its row is found
//! out when it is claimed: whose it is, whether it is still called for, and the token in it.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{
    MailId,
    account::{Email, User, Username},
    audit::Occasion,
    mail::{MailKind, NewMail},
    one_time::OneTimeGrant,
};

use super::StoreError;

/// How many mails an address gets that somebody else can cause: so many at once, then one for each interval. Kept in the
/// store, so that it holds over all replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressLimit {
    /// At least 1.
    pub burst: u32,
    pub interval: Duration,
}

impl AddressLimit {
    /// How far ahead of time an address may be with what it has had.
    pub(crate) fn tolerance(self) -> Duration {
        self.interval.saturating_mul(self.burst.saturating_sub(1))
    }
}

/// What became of a mail that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    Queued,
    /// The address has had too many; nothing was queued.
    OverLimit,
}

/// A mail to send, claimed by this caller for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimedMail {
    pub id: MailId,
    pub kind: MailKind,
    pub recipient: Email,
    /// Of the account that the mail is about.
    pub username: Username,
    /// The address that is changed to, where the mail is about that.
    pub new_email: Option<Email>,
    /// What the token in it is bound to, where it carries one.
    pub grant: Option<OneTimeGrant>,
    /// Counts from 1. With the id it names this claim: one that has lapsed settles nothing.
    pub attempt: i64,
    pub create_time: OffsetDateTime,
}

/// What was found when a mail was to be claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MailClaim {
    Claimed(ClaimedMail),
    /// The next one is not called for any more, or never was: nobody has that address, it is verified already, its
    /// token was superseded or has expired. It is gone. There may be others.
    Dropped(MailKind),
    /// None is due.
    NoneDue,
}

/// What becomes of a mail that could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailRetry {
    After(Duration),
    /// It is kept for a person to look at, and not tried again.
    Never,
}

/// How much mail is waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MailQueue {
    pub waiting: u64,
    pub dead: u64,
}

/// A one-time token's row, with the account as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OneTimeToken {
    pub grant: OneTimeGrant,
    pub expire_time: OffsetDateTime,
    pub user: User,
}

/// The steps of a mail on its way, and of the token in it.
#[async_trait]
pub trait MailStore {
    /// Puts a mail into the outbox that was asked for by its address alone. It is the same step, whoever has the address.
    async fn request_mail(&self, mail: NewMail, limit: AddressLimit) -> Result<Enqueued, StoreError>;

    /// Claims the mail that has been due longest, makes its token the account's one live token for its purpose, or
    /// drops it. `lease` is how long the claim holds.
    async fn claim_mail(&self, now: OffsetDateTime, lease: Duration) -> Result<MailClaim, StoreError>;

    /// The claimed mail was handed over: forgets it. `false` if the claim had lapsed.
    async fn mail_sent(&self, mail: MailId, attempt: i64) -> Result<bool, StoreError>;

    /// The claimed mail could not be handed over. `false` if the claim had lapsed.
    async fn mail_failed(
        &self,
        mail: MailId,
        attempt: i64,
        retry: MailRetry,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError>;

    async fn mail_queue(&self) -> Result<MailQueue, StoreError>;

    /// The token of that id, dead or alive, if there is one.
    async fn one_time_token(&self, token: MailId) -> Result<Option<OneTimeToken>, StoreError>;

    /// Makes a token its account's one live token for its purpose, without a mail. `false` if there is no such enabled
    /// account of that address.
    async fn issue_token(&self, token: OneTimeGrant, occasion: Occasion) -> Result<bool, StoreError>;

    /// Deletes what no longer matters: tokens past their expiry, address limits that are idle, dead mails older than
    /// `dead_before`.
    async fn forget_old_mail(&self, now: OffsetDateTime, dead_before: OffsetDateTime) -> Result<(), StoreError>;
}

/// Whether a mail is still called for when it is about to be sent, of the account as it is then.
pub(crate) fn is_wanted(kind: MailKind, recipient: &Email, user: &User) -> bool {
    match kind {
        MailKind::VerifyEmail => !user.email_verified && user.email == *recipient,
        MailKind::ResetPassword => !user.disabled && user.email == *recipient,
        MailKind::ConfirmEmailChange => !user.disabled && user.email != *recipient,
        MailKind::EmailChangeRequested
        | MailKind::EmailChanged
        | MailKind::PasswordChanged
        | MailKind::AccountExists => true,
    }
}
