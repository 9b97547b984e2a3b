//! Sessions, and what a refresh token is to its session.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{
    SessionId, UserId,
    account::User,
    audit::{Action, Occasion},
    password::PasswordHash,
    role::Role,
    token::RefreshGrant,
};

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

    /// Reserves one guess at a password, before anything is hashed for it: of guesses that come at once, over whatever
    /// replicas, no more than the policy allows get through.
    async fn reserve_attempt(&self, attempt: LoginAttempt) -> Result<Reservation, StoreError>;

    /// A guess that was reserved was right: it and those before it do not count any more.
    async fn guess_was_right(&self, subject: AttemptSubject) -> Result<(), StoreError>;

    /// A guess that was reserved was not made, for want of time or room: it does not count.
    async fn guess_was_not_made(&self, subject: AttemptSubject) -> Result<(), StoreError>;

    /// A guess was wrong: writes it into the audit. It was counted when it was reserved.
    async fn login_failed(&self, user: Option<UserId>, occasion: Occasion) -> Result<(), StoreError>;

    /// The log of revocations: every line after that number, and those of these numbers, which the caller has missed.
    async fn revocations(&self, after: i64, missed: &[i64]) -> Result<Vec<Revocation>, StoreError>;

    /// Waits until there may be something new in the log; for ever where nobody would tell.
    async fn revocation_written(&self);

    /// Deletes revocations that no token can be affected by any more, and guesses that count no longer.
    async fn forget_revocations(&self, now: OffsetDateTime) -> Result<(), StoreError>;

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
    /// Of the password that was verified.
    pub password_version: i64,
    /// The hash that it was verified against and its replacement, where one is due.
    pub rehash: Option<Rehash>,
    pub user_agent: Option<String>,
    /// The guess that was right: it and those before it do not count any more.
    pub attempt: Option<AttemptSubject>,
    /// Its client address is the session's.
    pub occasion: Occasion,
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
    /// Its time is for expiry. The retry window is measured by the database's own clock where it has one.
    pub occasion: Occasion,
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
    pub occasion: Occasion,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogoutOutcome {
    /// What was to end has ended, now or before.
    LoggedOut,
    /// No such session; or a token that is used up was to end other sessions than its own, which it cannot. Its own
    /// session is over all the same.
    Refused,
}

/// Whose password is guessed at: a keyed hash of the address, so that what somebody typed is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptSubject(pub [u8; 32]);

/// A guess to reserve.
#[derive(Debug, Clone, Copy)]
pub struct LoginAttempt {
    pub subject: AttemptSubject,
    pub policy: AttemptPolicy,
    /// Where the database has no clock of its own.
    pub now: OffsetDateTime,
}

/// How many wrong guesses in a row are let through, and how long the pauses are after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptPolicy {
    /// Without a pause.
    pub max_failures: i64,
    /// After the last of them; each further failure doubles it.
    pub first_delay: Duration,
    pub longest_delay: Duration,
    /// Without a guess for so long, it is as if there had been none.
    pub window: Duration,
}

impl AttemptPolicy {
    /// The pause after that many failures in a row.
    pub(crate) fn delay_after(&self, failures: i64) -> Duration {
        let Ok(doublings) = u32::try_from(failures - self.max_failures) else {
            return Duration::ZERO;
        };
        self.longest_delay.min(self.first_delay.saturating_mul(2_u32.saturating_pow(doublings)))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reservation {
    Reserved,
    Blocked { retry_after: Duration },
}

/// A line of the log of revocations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// In the order in which they were written, which is not always that in which they are seen.
    pub number: i64,
    pub what: Revoked,
    /// When the last access token from before has expired.
    pub forget_time: OffsetDateTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revoked {
    /// The session ended.
    Session(SessionId),
    /// The account has these roles from now on.
    Roles(UserId, Vec<Role>),
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
    /// Its owner ended it from another session.
    EndedByOwner,
    /// An admin ended it.
    EndedByAdmin,
    /// Its user was disabled.
    UserDisabled,
    /// Its user was deleted, and it with it.
    UserDeleted,
}

impl RevokeReason {
    /// What the audit calls it when a client ends its session.
    pub(crate) fn action(self) -> Action {
        match self {
            Self::Logout => Action::Logout,
            Self::LogoutEverywhere | Self::EndedElsewhere => Action::LogoutEverywhere,
            Self::TokenReused => Action::RefreshReused,
            Self::PasswordChanged => Action::PasswordChanged,
            Self::PasswordReset => Action::PasswordReset,
            Self::EndedByOwner => Action::SessionRevoked,
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
            Self::EndedByOwner => "ended_by_owner",
            Self::EndedByAdmin => "ended_by_admin",
            Self::UserDisabled => "user_disabled",
            Self::UserDeleted => "user_deleted",
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
        let over =
            self.revoke_time.is_some() || self.user_disabled || self.refresh_expire_time <= rotation.occasion.now;
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

impl Leaving {
    /// The circumstances that its audit row tells: a token that is used up speaks for nobody.
    pub(crate) fn occasion(&self, logout: &Logout) -> Occasion {
        if self.reason == RevokeReason::TokenReused { logout.occasion } else { logout.occasion.by(logout.user_id) }
    }
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
        } else if self.revoked || self.refresh_expire_time <= logout.occasion.now {
            verdict(RevokeReason::Logout, false, LogoutOutcome::Refused)
        } else if newest {
            verdict(RevokeReason::LogoutEverywhere, true, LogoutOutcome::LoggedOut)
        } else {
            verdict(RevokeReason::TokenReused, false, LogoutOutcome::Refused)
        }
    }
}
