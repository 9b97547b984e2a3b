//! Sessions: the types of a session and of the refresh tokens that belong to it. A session is one row with one live
//! refresh token. What a presented token means is decided in `refresh.rs`; the operations are in `service/sessions.rs`.

use std::{net::IpAddr, time::Duration};

use time::OffsetDateTime;

use super::{
    audit::Action,
    digest::sha256,
    ids::{SessionId, UserId},
};

/// How long sessions and their refresh tokens live.
#[derive(Debug, Clone)]
pub struct SessionPolicy {
    /// How long a refresh token lives from its minting.
    pub refresh_ttl: Duration,
    /// How long a session lives, however often it is refreshed.
    pub max_lifetime: Duration,
    /// How long after a rotation the previous token still yields the same answer, whatever was seen of it. All windows are
    /// measured by the database's clock.
    pub retry_window: Duration,
    /// How long it does so while no access token of that answer was seen.
    pub lost_answer_window: Duration,
    /// Whether login requires a verified address.
    pub require_verified_email: bool,
    /// How many open sessions a user may have.
    pub most_per_user: u32,
}

/// Where a request comes from. Shown to the account's owner, who may recognise it.
#[derive(Debug, Clone, Default)]
pub struct Client {
    pub ip: Option<IpAddr>,
    /// Printable, at most 256 characters.
    pub user_agent: Option<String>,
}

/// A session as its owner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionSummary {
    pub id: SessionId,
    pub create_time: OffsetDateTime,
    pub last_refresh_time: OffsetDateTime,
    pub expire_time: OffsetDateTime,
    pub client_ip: Option<String>,
    pub user_agent: Option<String>,
}

/// What a refresh token stands for. Minting from equal grants gives equal bytes, so an answer that was lost can be
/// repeated without being stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefreshGrant {
    pub session_id: SessionId,
    pub user_id: UserId,
    /// How many times the session had been rotated when this token was minted.
    pub generation: i64,
    /// Whole seconds.
    pub issue_time: OffsetDateTime,
    /// Whole seconds.
    pub expire_time: OffsetDateTime,
    /// When the session ends, however often it is refreshed; whole seconds. The token carries it so that the expiry of
    /// the next token is known before the store is asked.
    pub session_end_time: OffsetDateTime,
}

/// The SHA-256 of a refresh token. The store keeps nothing else of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefreshHash(pub [u8; 32]);

impl RefreshHash {
    pub fn of(token: &str) -> Self {
        Self(sha256(token.as_bytes()))
    }
}

/// Why a session ended before it expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevokeReason {
    /// Its client logged out.
    Logout,
    /// Its client logged out everywhere, with a token of this session.
    LogoutEverywhere,
    /// The user logged out everywhere from another session.
    EndedElsewhere,
    /// A consumed refresh token of it was presented.
    TokenReused,
    /// The password was changed.
    PasswordChanged,
    /// The password was reset by mail.
    PasswordReset,
    /// The address was verified without a proof that its owner had opened the session.
    EmailVerified,
    /// The user opened more sessions than one may have, and this one was not used for the longest time.
    TooMany,
    /// Its owner ended it from another session.
    EndedByOwner,
    /// An admin ended it.
    EndedByAdmin,
    /// Its user was disabled.
    UserDisabled,
    /// Its user was deleted.
    UserDeleted,
}

impl RevokeReason {
    /// The audit action of a step that ends a session for this reason.
    pub(crate) fn action(self) -> Action {
        match self {
            Self::Logout => Action::Logout,
            Self::LogoutEverywhere | Self::EndedElsewhere => Action::LogoutEverywhere,
            Self::TokenReused => Action::RefreshReused,
            Self::PasswordChanged => Action::PasswordChanged,
            Self::PasswordReset => Action::PasswordReset,
            Self::EmailVerified => Action::EmailVerified,
            Self::TooMany | Self::EndedByOwner => Action::SessionRevoked,
            Self::EndedByAdmin => Action::SessionsRevoked,
            Self::UserDisabled => Action::UserDisabled,
            Self::UserDeleted => Action::UserDeleted,
        }
    }

    /// The reason as the database keeps it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Logout => "logout",
            Self::LogoutEverywhere => "logout_everywhere",
            Self::EndedElsewhere => "ended_elsewhere",
            Self::TokenReused => "token_reused",
            Self::PasswordChanged => "password_changed",
            Self::PasswordReset => "password_reset",
            Self::EmailVerified => "email_verified",
            Self::TooMany => "too_many",
            Self::EndedByOwner => "ended_by_owner",
            Self::EndedByAdmin => "ended_by_admin",
            Self::UserDisabled => "user_disabled",
            Self::UserDeleted => "user_deleted",
        }
    }
}
