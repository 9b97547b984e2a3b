//! What goes into the audit: which events there are, and the circumstances of a step that the store writes into its row.
//! The rows are written by the store, in the transaction of what they tell.

use std::net::IpAddr;

use time::OffsetDateTime;

use crate::error::Error;

use super::{AuditEventId, Postern, SessionId, UserId};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    SignUp,
    Login,
    LoginFailed,
    /// A used refresh token came back: its session was ended.
    RefreshReused,
    Logout,
    LogoutEverywhere,
    EmailVerified,
    /// A link to reset the password was made on the command line.
    ResetLinkIssued,
    PasswordReset,
    PasswordChanged,
    EmailChangeRequested,
    EmailChanged,
    /// One session, by its owner.
    SessionRevoked,
    /// All sessions, by an admin.
    SessionsRevoked,
    RolesChanged,
    UserDisabled,
    UserEnabled,
    UserDeleted,
}

impl Action {
    pub const ALL: [Self; 18] = [
        Self::SignUp,
        Self::Login,
        Self::LoginFailed,
        Self::RefreshReused,
        Self::Logout,
        Self::LogoutEverywhere,
        Self::EmailVerified,
        Self::ResetLinkIssued,
        Self::PasswordReset,
        Self::PasswordChanged,
        Self::EmailChangeRequested,
        Self::EmailChanged,
        Self::SessionRevoked,
        Self::SessionsRevoked,
        Self::RolesChanged,
        Self::UserDisabled,
        Self::UserEnabled,
        Self::UserDeleted,
    ];

    /// The action as the database and the contract have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SignUp => "sign_up",
            Self::Login => "login",
            Self::LoginFailed => "login_failed",
            Self::RefreshReused => "refresh_reused",
            Self::Logout => "logout",
            Self::LogoutEverywhere => "logout_everywhere",
            Self::EmailVerified => "email_verified",
            Self::ResetLinkIssued => "reset_link_issued",
            Self::PasswordReset => "password_reset",
            Self::PasswordChanged => "password_changed",
            Self::EmailChangeRequested => "email_change_requested",
            Self::EmailChanged => "email_changed",
            Self::SessionRevoked => "session_revoked",
            Self::SessionsRevoked => "sessions_revoked",
            Self::RolesChanged => "roles_changed",
            Self::UserDisabled => "user_disabled",
            Self::UserEnabled => "user_enabled",
            Self::UserDeleted => "user_deleted",
        }
    }

    /// The action of that name, if it is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.as_str() == name)
    }
}

/// When, by whom and from where a step is made: what its audit row and its revocations say beside what was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occasion {
    /// The id that the audit row gets.
    pub event: AuditEventId,
    pub now: OffsetDateTime,
    /// `None` where nobody is known by the time of the step, and for the command line.
    pub actor: Option<UserId>,
    pub client_ip: Option<IpAddr>,
    /// Until when access tokens from before the step may be presented.
    pub forget_time: OffsetDateTime,
}

impl Occasion {
    /// The same, by whoever turned out to do it.
    #[must_use]
    pub fn by(self, actor: UserId) -> Self {
        Self { actor: Some(actor), ..self }
    }
}

/// A row of the audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEvent {
    pub id: AuditEventId,
    pub create_time: OffsetDateTime,
    /// Also one that another release wrote and this one does not know.
    pub action: String,
    pub actor: Option<UserId>,
    pub user: Option<UserId>,
    pub session: Option<SessionId>,
    pub client_ip: Option<String>,
    pub detail: Option<String>,
}

impl Postern {
    /// The circumstances of a step that is made now.
    pub(super) fn occasion(&self, actor: Option<UserId>, client_ip: Option<IpAddr>) -> Result<Occasion, Error> {
        let now = self.env.now();
        let event = AuditEventId(self.env.uuid()?);
        Ok(Occasion { event, now, actor, client_ip, forget_time: now + self.tokens.longest_access() })
    }
}
