//! Reads that decide nothing: each is one statement, and none writes.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::{Email, User},
        audit::{Action, AuditEvent},
        ids::{AuditEventId, MailId, SessionId, UserId},
        one_time::OneTimeGrant,
        password::PasswordHash,
        session::SessionSummary,
    },
    error::StoreError,
};

use super::revocations::Revocation;

/// What the domain reads from a store.
#[async_trait]
pub trait Queries {
    /// The account with this id.
    async fn user(&self, id: UserId) -> Result<Option<User>, StoreError>;

    /// The user of a session. `None` once the session has ended or its user was disabled or deleted.
    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError>;

    /// The account with this address and its password hash.
    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError>;

    /// The account of a live session and its password hash.
    async fn credentials_of_session(&self, session: SessionId, user: UserId)
    -> Result<Option<Credentials>, StoreError>;

    /// A page of accounts.
    async fn list_users(&self, page: UserPage) -> Result<Vec<User>, StoreError>;

    /// A page of the sessions of an account that can still be refreshed, newest first.
    async fn list_sessions(&self, page: SessionPage) -> Result<Vec<SessionSummary>, StoreError>;

    /// A page of the audit log, newest first.
    async fn list_audit_events(&self, page: AuditPage) -> Result<Vec<AuditEvent>, StoreError>;

    /// The first `limit` entries of the log of revocations with numbers after `after`, up to `up_to`, in the order of their
    /// numbers.
    async fn revocation_page(&self, after: i64, up_to: i64, limit: u32) -> Result<Vec<Revocation>, StoreError>;

    /// The one-time token with this id, if it is stored, also when it has expired.
    async fn one_time_token(&self, token: MailId) -> Result<Option<OneTimeToken>, StoreError>;

    /// The parameters that stored passwords were hashed with, each once: their PHC strings up to the salt. Reads every
    /// account.
    async fn password_parameters(&self) -> Result<Vec<String>, StoreError>;

    /// How many mails the outbox holds.
    async fn mail_queue(&self) -> Result<MailQueue, StoreError>;
}

/// An account with what a password is verified against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    pub user: User,
    pub password_hash: PasswordHash,
    /// Goes up by one with each change of the password. A rehash of the same password does not change it.
    pub password_version: i64,
}

/// A page of accounts. Its cost is one range of an index, no matter how far down the list it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserPage {
    pub order: UserOrder,
    /// The most accounts to return.
    pub limit: u32,
}

/// The order of a list of accounts, and the account after which the page starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserOrder {
    /// All accounts, oldest first.
    ById { after: Option<UserId> },
    /// The accounts whose address starts with `prefix`, by address.
    ByEmail { prefix: String, after: Option<String> },
    /// The accounts whose username in lower case starts with `prefix` and whose address does not, by that username.
    ByUsername { prefix: String, after: Option<String> },
}

impl UserOrder {
    /// The beginning of a list of all accounts, or of those that a query finds.
    pub fn of_query(query: &str) -> Self {
        if query.is_empty() {
            Self::ById { after: None }
        } else {
            Self::ByEmail { prefix: query.to_owned(), after: None }
        }
    }

    /// Where the list goes on after a page, with the last account of that page. `None` if it has ended.
    #[must_use]
    pub fn after_page(self, last: Option<&User>) -> Option<Self> {
        match (self, last) {
            (Self::ById { .. }, Some(user)) => Some(Self::ById { after: Some(user.id) }),
            (Self::ByEmail { prefix, .. }, Some(user)) => {
                Some(Self::ByEmail { prefix, after: Some(user.email.as_str().to_owned()) })
            }
            (Self::ByUsername { prefix, .. }, Some(user)) => {
                Some(Self::ByUsername { prefix, after: Some(user.username.as_str().to_ascii_lowercase()) })
            }
            (Self::ByEmail { prefix, .. }, None) => Some(Self::ByUsername { prefix, after: None }),
            (Self::ById { .. } | Self::ByUsername { .. }, None) => None,
        }
    }
}

/// A page of the sessions of an account.
#[derive(Debug, Clone, Copy)]
pub struct SessionPage {
    pub user: UserId,
    pub now: OffsetDateTime,
    /// The last session of the page before.
    pub before: Option<SessionId>,
    pub limit: u32,
}

/// A page of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditPage {
    /// Only events about this account.
    pub user: Option<UserId>,
    pub action: Option<Action>,
    /// Only events older than this one.
    pub before: Option<AuditEventId>,
    /// The most events to return.
    pub limit: u32,
}

/// The row of a one-time token, with the account as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OneTimeToken {
    pub grant: OneTimeGrant,
    pub expire_time: OffsetDateTime,
    pub user: User,
}

/// How many mails the outbox holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MailQueue {
    /// To be sent.
    pub waiting: u64,
    /// Given up and kept for an operator to look at.
    pub dead: u64,
}
