//! The audit log: which events there are, and the context that the store writes into each row. The store writes the row
//! in the transaction of the step that it describes.

use std::net::IpAddr;

use time::OffsetDateTime;

use super::ids::{ActorId, AuditEventId, SessionId, UserId};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    SignUp,
    Login,
    LoginFailed,
    /// A consumed refresh token was presented: its session was ended.
    RefreshReused,
    /// A session went on from a refresh token that a restored database did not know.
    RefreshAfterRestore,
    Logout,
    LogoutEverywhere,
    EmailVerified,
    /// A link that resets the password was issued on the command line.
    ResetLinkIssued,
    PasswordReset,
    PasswordChanged,
    EmailChangeRequested,
    EmailChanged,
    UsernameChanged,
    /// One session, by its owner.
    SessionRevoked,
    /// All sessions, by an admin.
    SessionsRevoked,
    RolesChanged,
    UserDisabled,
    UserEnabled,
    UserDeleted,
    ServiceCreated,
    ServiceDisabled,
    ServiceEnabled,
    ServiceDeleted,
    ServiceKeyCreated,
    ServiceKeyDeleted,
    /// One token of a service, by whoever had it.
    ServiceTokenRevoked,
    /// A signing key is published, and it was decided when it signs.
    SigningKeyScheduled,
    SigningKeyRevoked,
    /// A signing key was encrypted with another master key.
    SigningKeyRewrapped,
}

impl Action {
    pub const ALL: [Self; 30] = [
        Self::SignUp,
        Self::Login,
        Self::LoginFailed,
        Self::RefreshReused,
        Self::RefreshAfterRestore,
        Self::Logout,
        Self::LogoutEverywhere,
        Self::EmailVerified,
        Self::ResetLinkIssued,
        Self::PasswordReset,
        Self::PasswordChanged,
        Self::EmailChangeRequested,
        Self::EmailChanged,
        Self::UsernameChanged,
        Self::SessionRevoked,
        Self::SessionsRevoked,
        Self::RolesChanged,
        Self::UserDisabled,
        Self::UserEnabled,
        Self::UserDeleted,
        Self::ServiceCreated,
        Self::ServiceDisabled,
        Self::ServiceEnabled,
        Self::ServiceDeleted,
        Self::ServiceKeyCreated,
        Self::ServiceKeyDeleted,
        Self::ServiceTokenRevoked,
        Self::SigningKeyScheduled,
        Self::SigningKeyRevoked,
        Self::SigningKeyRewrapped,
    ];

    /// The name of the action in the database and in the contract.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SignUp => "sign_up",
            Self::Login => "login",
            Self::LoginFailed => "login_failed",
            Self::RefreshReused => "refresh_reused",
            Self::RefreshAfterRestore => "refresh_after_restore",
            Self::Logout => "logout",
            Self::LogoutEverywhere => "logout_everywhere",
            Self::EmailVerified => "email_verified",
            Self::ResetLinkIssued => "reset_link_issued",
            Self::PasswordReset => "password_reset",
            Self::PasswordChanged => "password_changed",
            Self::EmailChangeRequested => "email_change_requested",
            Self::EmailChanged => "email_changed",
            Self::UsernameChanged => "username_changed",
            Self::SessionRevoked => "session_revoked",
            Self::SessionsRevoked => "sessions_revoked",
            Self::RolesChanged => "roles_changed",
            Self::UserDisabled => "user_disabled",
            Self::UserEnabled => "user_enabled",
            Self::UserDeleted => "user_deleted",
            Self::ServiceCreated => "service_created",
            Self::ServiceDisabled => "service_disabled",
            Self::ServiceEnabled => "service_enabled",
            Self::ServiceDeleted => "service_deleted",
            Self::ServiceKeyCreated => "service_key_created",
            Self::ServiceKeyDeleted => "service_key_deleted",
            Self::ServiceTokenRevoked => "service_token_revoked",
            Self::SigningKeyScheduled => "signing_key_scheduled",
            Self::SigningKeyRevoked => "signing_key_revoked",
            Self::SigningKeyRewrapped => "signing_key_rewrapped",
        }
    }

    /// The action with this name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.as_str() == name)
    }
}

/// Who runs a step, when and from where: what its audit row and its revocations record besides the action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditContext {
    /// The id of the audit row.
    pub event: AuditEventId,
    pub now: OffsetDateTime,
    /// `None` for anonymous callers and for the command line.
    pub actor: Option<ActorId>,
    pub client_ip: Option<IpAddr>,
    /// When the last access token from before the step has expired.
    pub retain_until: OffsetDateTime,
}

impl AuditContext {
    /// The same context with the actor that the step has identified.
    #[must_use]
    pub fn by(self, actor: impl Into<ActorId>) -> Self {
        Self { actor: Some(actor.into()), ..self }
    }
}

/// What an audit row is about.
#[derive(Debug, Default)]
pub(crate) struct AuditTarget {
    pub user: Option<UserId>,
    pub session: Option<SessionId>,
    pub detail: Option<String>,
}

impl AuditTarget {
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

/// A row of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEvent {
    pub id: AuditEventId,
    pub create_time: OffsetDateTime,
    /// Text, because another release may have written an action that this one does not know.
    pub action: String,
    pub actor: Option<ActorId>,
    pub user: Option<UserId>,
    pub session: Option<SessionId>,
    pub client_ip: Option<String>,
    pub detail: Option<String>,
}
