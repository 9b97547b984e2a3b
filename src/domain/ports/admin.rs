//! The steps of administration, and of a person's own sessions.

use async_trait::async_trait;

use crate::{
    domain::{
        account::User,
        audit::AuditContext,
        ids::{SessionId, UserId},
        role::Role,
    },
    error::StoreError,
};

/// Changes to accounts and sessions, and the retention of the audit log.
///
/// No step removes the last enabled admin. A step that could remove one checks this while it holds the row of every
/// admin, so that of two admins who disable each other, the second sees the work of the first.
#[async_trait]
pub trait AdminStore {
    /// Replaces the roles of the account.
    async fn set_roles(&self, user: UserId, roles: Vec<Role>, context: AuditContext) -> Result<UserChange, StoreError>;

    /// Disables the account and ends its sessions. `reason` is written to the audit log.
    async fn disable_user(
        &self,
        user: UserId,
        reason: Option<String>,
        context: AuditContext,
    ) -> Result<UserChange, StoreError>;

    /// Enables the account again.
    async fn enable_user(&self, user: UserId, context: AuditContext) -> Result<UserChange, StoreError>;

    /// Ends every session of the account and returns how many were open. `None` if there is no such account.
    async fn revoke_user_sessions(&self, user: UserId, context: AuditContext) -> Result<Option<u64>, StoreError>;

    /// Deletes the account and everything that belongs to it.
    async fn delete_user(&self, deletion: UserDeletion) -> Result<UserDeletionOutcome, StoreError>;

    /// Ends one session of an account. `false` if the account has no open session with this id.
    async fn revoke_session(&self, session: SessionId, user: UserId, context: AuditContext)
    -> Result<bool, StoreError>;
}

/// The result of a change to an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserChange {
    /// The account as it is now. Also returned where nothing had to change; nothing was written then.
    Changed(User),
    NoSuchUser,
    /// No enabled admin would be left. Nothing changed.
    LastAdmin,
}

/// An account to delete.
#[derive(Debug, Clone)]
pub struct UserDeletion {
    pub user: UserId,
    /// Set where the owner asked for it: the version of the password that was verified.
    pub password_version: Option<i64>,
    pub context: AuditContext,
}

/// The result of deleting an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserDeletionOutcome {
    Deleted,
    NoSuchUser,
    /// No enabled admin would be left. Nothing changed.
    LastAdmin,
    /// The password has changed since it was verified, or the account is disabled. Nothing changed.
    Refused,
}
