//! Sessions, and what a refresh token is to its session.

use std::{net::IpAddr, time::Duration};

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{SessionId, UserId, account::User, password::PasswordHash, token::RefreshGrant};

use super::StoreError;

/// The steps of a session's life.
#[async_trait]
pub trait SessionStore {
    /// Opens a session, if the account is still enabled and its password still the one that was verified; replaces the
    /// password's hash on the way where a rehash is due.
    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError>;

    /// Decides what a presented refresh token is, and carries its session on or ends it. At most one caller ever
    /// rotates one generation.
    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError>;

    /// Ends a session, or all of its user's.
    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError>;

    /// Deletes the sessions whose absolute end is past, at most `limit` of them. Returns how many.
    async fn forget_ended_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError>;
}

/// The SHA-256 of a refresh token: all that the store keeps of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefreshHash(pub [u8; 32]);

impl RefreshHash {
    pub fn of(token: &str) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

/// A session to open.
#[derive(Debug, Clone)]
pub struct NewSession {
    /// Of generation 0.
    pub grant: RefreshGrant,
    pub refresh_hash: RefreshHash,
    pub create_time: OffsetDateTime,
    /// Of the password that was verified.
    pub password_version: i64,
    /// The hash that it was verified against and its replacement, where one is due.
    pub rehash: Option<Rehash>,
    pub client_ip: Option<IpAddr>,
    pub user_agent: Option<String>,
}

/// The same password under the live parameters.
#[derive(Debug, Clone)]
pub struct Rehash {
    pub from: PasswordHash,
    pub to: PasswordHash,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionOpening {
    Opened(User),
    /// The account is gone, disabled, or has another password by now.
    Refused,
}

/// A refresh token that was presented, and what is to take its place.
#[derive(Debug, Clone)]
pub struct Rotation {
    pub presented_generation: i64,
    pub presented_hash: RefreshHash,
    /// Of the presented generation plus one.
    pub next: RefreshGrant,
    pub next_hash: RefreshHash,
    /// For expiry. The retry window is measured by the database's own clock where it has one.
    pub now: OffsetDateTime,
    pub retry_window: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RotationOutcome {
    /// It was the live token, and `next` is now.
    Rotated(User),
    /// It was the one before, within the retry window: what it was exchanged for, to be given again. Nothing changed.
    Retried { user: User, grant: RefreshGrant, hash: RefreshHash },
    /// It was used up: theft, or a client that lost count. The session was ended, durably.
    Reused,
    /// No such session, or it is over, or its user is disabled. Nothing changed.
    Dead,
}

impl RotationOutcome {
    /// The outcome as metrics call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rotated(_) => "rotated",
            Self::Retried { .. } => "retried",
            Self::Reused => "reused",
            Self::Dead => "dead",
        }
    }
}

/// A refresh token that was presented to log out.
#[derive(Debug, Clone)]
pub struct Logout {
    pub session_id: SessionId,
    pub user_id: UserId,
    pub presented_generation: i64,
    pub everywhere: bool,
    pub now: OffsetDateTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogoutOutcome {
    /// What was to end has ended, now or before.
    LoggedOut,
    /// No such session; or a token that is used up was to end other sessions than its own, which it cannot. Its own
    /// session is over all the same.
    Refused,
}

/// Why a session was ended before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RevokeReason {
    /// Its client logged out.
    Logout,
    /// Its client logged out everywhere: this is the session that asked.
    LogoutEverywhere,
    /// Another session of its user logged out everywhere.
    EndedElsewhere,
    /// A used refresh token of it came back.
    TokenReused,
    /// The password was changed.
    PasswordChanged,
    /// The password was reset by mail.
    PasswordReset,
}

impl RevokeReason {
    /// The reason as the database keeps it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Logout => "logout",
            Self::LogoutEverywhere => "logout_everywhere",
            Self::EndedElsewhere => "ended_elsewhere",
            Self::TokenReused => "token_reused",
            Self::PasswordChanged => "password_changed",
            Self::PasswordReset => "password_reset",
        }
    }
}

/// A session as a backend finds it, locked, when a token of it is presented: what the rules below are decided on, alike
/// on every backend.
#[derive(Debug)]
pub(crate) struct PresentedTo {
    pub generation: i64,
    pub refresh_hash: RefreshHash,
    pub refresh_expire_time: OffsetDateTime,
    pub revoke_time: Option<OffsetDateTime>,
    pub user_disabled: bool,
    /// Whether the last rotation is at most the retry window old, by the database's clock.
    pub within_retry_window: bool,
}

/// What a presented refresh token is to its session.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Presented {
    /// The live one: rotate.
    Live,
    /// The one before, in time: give its successor again.
    Previous,
    /// Used up: end the session.
    UsedUp,
    /// Of a session that is over.
    OfDeadSession,
}

impl PresentedTo {
    pub(crate) fn judge(&self, rotation: &Rotation) -> Presented {
        let over = self.revoke_time.is_some() || self.user_disabled || self.refresh_expire_time <= rotation.now;
        // A generation that was never minted here is one from before the database was restored.
        if over || rotation.presented_generation > self.generation {
            return Presented::OfDeadSession;
        }
        if rotation.presented_generation == self.generation {
            // Of the live generation, and yet another token: two lineages, one of which is not ours.
            let same = rotation.presented_hash == self.refresh_hash;
            return if same { Presented::Live } else { Presented::UsedUp };
        }
        let retry = rotation.presented_generation == self.generation - 1
            && !rotation.retry_window.is_zero()
            && self.within_retry_window;
        if retry { Presented::Previous } else { Presented::UsedUp }
    }
}

/// A session as a backend finds it, locked, when a token of it is presented to log out.
#[derive(Debug)]
pub(crate) struct LeavingSession {
    pub generation: i64,
    pub refresh_expire_time: OffsetDateTime,
    pub revoked: bool,
    /// By a token of this very session.
    pub revoked_by_logout_everywhere: bool,
}

/// What a logout comes to. The session of the token ends in any case.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Leaving {
    /// Why its own session ends, if it has not ended before.
    pub reason: RevokeReason,
    /// Whether the user's other sessions end too.
    pub others_too: bool,
    pub outcome: LogoutOutcome,
}

impl LeavingSession {
    pub(crate) fn judge(&self, logout: &Logout) -> Leaving {
        let verdict = |reason, others_too, outcome| Leaving { reason, others_too, outcome };
        if !logout.everywhere {
            return verdict(RevokeReason::Logout, false, LogoutOutcome::LoggedOut);
        }
        // The live token speaks for its user, and so does the one before it: the client may never have received the
        // successor.
        let newest = [self.generation, self.generation - 1].contains(&logout.presented_generation);
        if self.revoked_by_logout_everywhere {
            // The same request again, whose answer was lost.
            verdict(RevokeReason::LogoutEverywhere, false, LogoutOutcome::LoggedOut)
        } else if self.revoked || self.refresh_expire_time <= logout.now {
            verdict(RevokeReason::Logout, false, LogoutOutcome::Refused)
        } else if newest {
            verdict(RevokeReason::LogoutEverywhere, true, LogoutOutcome::LoggedOut)
        } else {
            verdict(RevokeReason::TokenReused, false, LogoutOutcome::Refused)
        }
    }
}
