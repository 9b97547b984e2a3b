//! The steps of the outbox, and of the one-time tokens that mails carry.
//!
//! A mail is a row that is written in the transaction of whatever causes it. The replica that sends the mail claims it
//! for a limited time. A claim that is not settled in that time lapses, so a replica that dies loses no mail. Whose
//! mail it is, whether it is still wanted, and the token in it are decided when the mail is claimed.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::Email,
        audit::AuditContext,
        ids::MailId,
        mail::{MailKind, NewMail},
        one_time::OneTimeGrant,
        throttle::AddressLimit,
    },
    error::StoreError,
    trace::TraceParent,
};

/// The longest pause between two attempts to send a mail. One that waits longer was put off by a clock that was ahead, and
/// is due.
pub const LONGEST_BACKOFF: Duration = Duration::from_mins(15);

/// The steps of a mail on its way, and of the token in it.
#[async_trait]
pub trait MailStore {
    /// Queues a mail that was requested for an address. The step is the same whether or not an account has the address.
    async fn request_mail(&self, mail: NewMail, limit: AddressLimit) -> Result<Enqueued, StoreError>;

    /// Claims the mail that has been due longest. Makes its token the account's one live token for its purpose, or
    /// drops the mail if it is no longer wanted. The claim holds for `lease`.
    async fn claim_mail(&self, now: OffsetDateTime, lease: Duration) -> Result<MailClaim, StoreError>;

    /// Deletes a claimed mail that was sent. `false` if the claim had lapsed.
    async fn mail_sent(&self, mail: MailId, attempt: i64) -> Result<bool, StoreError>;

    /// Settles the claim of a mail that could not be sent. `false` if the claim had lapsed.
    async fn mail_failed(
        &self,
        mail: MailId,
        attempt: i64,
        retry: MailRetry,
        now: OffsetDateTime,
    ) -> Result<bool, StoreError>;

    /// Waits until this process has queued a mail since the last call. It only shortens a wait: mail that another
    /// process queued is found by polling.
    async fn mail_queued(&self);

    /// Makes a token its account's one live token for its purpose, without a mail. `false` if no enabled account has
    /// the token's id and address.
    async fn issue_token(&self, token: OneTimeGrant, context: AuditContext) -> Result<bool, StoreError>;
}

/// The result of requesting a mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    Queued,
    /// The address was sent too many mails; nothing was queued.
    OverLimit,
}

/// A mail to send, claimed by this caller for a limited time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimedMail {
    pub id: MailId,
    pub kind: MailKind,
    pub recipient: Email,
    /// The address to change to, where the mail is about a change of address.
    pub new_email: Option<Email>,
    /// What the token in the mail is bound to, where the mail carries one.
    pub grant: Option<OneTimeGrant>,
    /// Counts from 1. Together with the id it names this claim; a claim that has lapsed settles nothing.
    pub attempt: i64,
    pub create_time: OffsetDateTime,
    /// As in [`NewMail`].
    pub trace: Option<TraceParent>,
}

/// The result of trying to claim a mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MailClaim {
    Claimed(ClaimedMail),
    /// The next mail was not wanted and is deleted: nobody has that address, it is verified already, or its token was
    /// superseded or has expired. There may be other mails.
    Dropped(MailKind),
    /// No mail is due.
    NoneDue,
}

/// What to do with a mail that could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailRetry {
    After(Duration),
    /// Keep it for an operator to look at, and do not try again.
    Never,
}
