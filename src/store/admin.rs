//! What is done to the accounts and sessions of others, and the audit of what was done.
//!
//! Nobody takes the last enabled admin away: whoever would makes sure first, holding every admin's row, so that of two who
//! take away each other the second sees the first.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{
    AuditEventId, SessionId, UserId,
    account::User,
    audit::{Action, AuditEvent, Occasion},
    mail::NewMail,
    role::Role,
    session::SessionSummary,
};

use super::StoreError;

/// The steps of administration, and of a person's own sessions.
#[async_trait]
pub trait AdminStore {
    /// A page of accounts.
    async fn list_users(&self, page: UserPage) -> Result<Vec<User>, StoreError>;

    async fn user(&self, id: UserId) -> Result<Option<User>, StoreError>;

    /// Puts these roles in the place of those that the account has.
    async fn set_roles(&self, user: UserId, roles: Vec<Role>, occasion: Occasion) -> Result<UserChange, StoreError>;

    /// Disables the account and ends its sessions. `reason` goes into the audit.
    async fn disable_user(
        &self,
        user: UserId,
        reason: Option<String>,
        occasion: Occasion,
    ) -> Result<UserChange, StoreError>;

    async fn enable_user(&self, user: UserId, occasion: Occasion) -> Result<UserChange, StoreError>;

    /// Ends every session of the account; the number is how many there were. `None` if there is no such account.
    async fn revoke_user_sessions(&self, user: UserId, occasion: Occasion) -> Result<Option<u64>, StoreError>;

    /// Deletes the account with all that is its own.
    async fn delete_user(&self, deletion: UserDeletion) -> Result<UserDeletionOutcome, StoreError>;

    /// The sessions of an account that can still be refreshed, newest first.
    async fn list_sessions(&self, user: UserId, now: OffsetDateTime) -> Result<Vec<SessionSummary>, StoreError>;

    /// Ends one session of an account. `false` if it has no open one of that id.
    async fn revoke_session(&self, session: SessionId, user: UserId, occasion: Occasion) -> Result<bool, StoreError>;

    /// A page of the audit, newest first.
    async fn list_audit_events(&self, page: AuditPage) -> Result<Vec<AuditEvent>, StoreError>;

    /// Deletes audit rows from before a moment, at most `limit` of them. Returns how many.
    async fn forget_audit_events(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError>;
}

/// Which accounts a page is of. Each costs a range of an index, however far it is down the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserPage {
    pub order: UserOrder,
    pub limit: u32,
}

/// In which order, and from where on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserOrder {
    /// All, oldest first, after this one.
    ById { after: Option<UserId> },
    /// Those whose address begins so, by address, after this one.
    ByEmail { prefix: String, after: Option<String> },
    /// Those whose username in lower case begins so and whose address does not, by that, after this one.
    ByUsername { prefix: String, after: Option<String> },
}

/// What became of a change to an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserChange {
    /// The account as it is now; also where it was so before, and then nothing was written.
    Changed(User),
    NoSuchUser,
    /// No enabled admin would be left. Nothing changed.
    LastAdmin,
}

/// An account to delete.
#[derive(Debug, Clone)]
pub struct UserDeletion {
    pub user: UserId,
    /// Where its owner asked for it: the version of the password that was verified.
    pub password_version: Option<i64>,
    pub occasion: Occasion,
    /// A last mail to its address.
    pub notice: Option<NewMail>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserDeletionOutcome {
    Deleted,
    NoSuchUser,
    /// No enabled admin would be left. Nothing changed.
    LastAdmin,
    /// The password is another by now. Nothing changed.
    Refused,
}

/// Which events a page is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditPage {
    pub user: Option<UserId>,
    pub action: Option<Action>,
    /// Only older ones than this.
    pub before: Option<AuditEventId>,
    pub limit: u32,
}

/// What an audit row is about, beside the circumstances.
#[derive(Debug, Default)]
pub(crate) struct About {
    pub user: Option<UserId>,
    pub session: Option<SessionId>,
    pub detail: Option<String>,
}

impl About {
    pub(crate) fn user(user: UserId) -> Self {
        Self { user: Some(user), ..Self::default() }
    }

    pub(crate) fn session(user: UserId, session: SessionId) -> Self {
        Self { user: Some(user), session: Some(session), detail: None }
    }

    pub(crate) fn detail(self, detail: String) -> Self {
        Self { detail: Some(detail), ..self }
    }
}
