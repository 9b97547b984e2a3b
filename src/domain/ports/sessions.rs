//! The steps of a session's life, of password attempts, and of the log of revocations.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::{Email, User},
        audit::AuditContext,
        ids::{AuditEventId, SessionId, UserId},
        password::PasswordHash,
        seen::SeenGeneration,
        session::{RefreshGrant, RefreshHash},
        throttle::{AttemptPolicy, AttemptSubject},
    },
    error::StoreError,
};

use super::{queries::Credentials, revocations::Revocation};

/// How many entries of the log of revocations are read at once.
pub const REVOCATIONS_AT_ONCE: u32 = 10_000;

/// The steps of a session's life.
#[async_trait]
pub trait SessionStore {
    /// Opens a session, if the account is still enabled and its password is still the one that was verified. Replaces
    /// the hash of the password in the same step where a rehash is due.
    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError>;

    /// Ends the sessions of a user that were not used for the longest time, while there are more open ones than allowed.
    /// `true` if there still are.
    async fn end_surplus_sessions(&self, surplus: SurplusSessions) -> Result<bool, StoreError>;

    /// Classifies a presented refresh token and continues or ends its session. At most one caller rotates any one
    /// generation.
    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError>;

    /// Writes which generations were seen; a session's number only grows. Returns the sessions whose rows another step has
    /// locked: they are still to be written. If the database crashes, the last second of this may be lost.
    async fn write_seen(&self, seen: &[SeenGeneration]) -> Result<Vec<SessionId>, StoreError>;

    /// Ends a session, or all sessions of its user.
    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError>;

    /// Reserves one attempt at the password of an address, before anything is hashed for it, and looks the account up.
    async fn start_login(&self, attempt: LoginAttempt, email: &Email) -> Result<LoginStart, StoreError>;

    /// Reserves one attempt at a password. Of attempts at the same time, on any number of replicas, no more are under
    /// way than could all fail within the policy. Whoever reserves one settles it with one of the next three steps; one
    /// that nobody settles is forgotten after [`ATTEMPT_LIFETIME`](super::ATTEMPT_LIFETIME).
    async fn reserve_attempt(&self, attempt: LoginAttempt) -> Result<Reservation, StoreError>;

    /// The password of a reserved attempt was right: earlier failures no longer count.
    async fn attempt_succeeded(&self, subject: AttemptSubject) -> Result<(), StoreError>;

    /// A reserved attempt was never made, because the hasher had no time or no room: it does not count.
    async fn attempt_abandoned(&self, subject: AttemptSubject) -> Result<(), StoreError>;

    /// The password of a reserved attempt was wrong: it counts as a failure, and is written to the audit log.
    async fn attempt_failed(
        &self,
        attempt: LoginAttempt,
        user: Option<UserId>,
        context: AuditContext,
    ) -> Result<(), StoreError>;

    /// The log of revocations in the order of its numbers: the next [`REVOCATIONS_AT_ONCE`] entries after number `after`,
    /// and the entries with the numbers in `wanted`.
    async fn revocations(&self, after: i64, wanted: &[i64]) -> Result<Vec<Revocation>, StoreError>;

    /// Waits until the log may have a new entry; for ever where the backend has no way to tell.
    async fn revocation_written(&self);
}

/// A session to open.
#[derive(Debug, Clone)]
pub struct NewSession {
    /// Of generation 0.
    pub grant: RefreshGrant,
    pub refresh_hash: RefreshHash,
    /// The version of the password that was verified.
    /// How many open sessions the user may have.
    pub most: u32,
    pub password_version: i64,
    /// The hash that the password was verified against and its replacement, where one is due.
    pub rehash: Option<Rehash>,
    pub user_agent: Option<String>,
    /// The attempt that succeeded: earlier failures no longer count.
    pub attempt: Option<AttemptSubject>,
    /// Its client address becomes the session's.
    pub context: AuditContext,
}

/// A new hash of the same password, with the current parameters.
#[derive(Debug, Clone)]
pub struct Rehash {
    pub from: PasswordHash,
    pub to: PasswordHash,
}

/// Sessions that a user has too many.
#[derive(Debug, Clone)]
pub struct SurplusSessions {
    pub user: UserId,
    /// How many may be open.
    pub most: u32,
    pub context: AuditContext,
    /// The ids of the audit rows. No more sessions end in one step.
    pub events: Vec<AuditEventId>,
}

/// The result of opening a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionOpening {
    Opened(User),
    /// The same, and the user has more open sessions now than one may have: the surplus has to end.
    OpenedTooMany(User),
    /// The account is deleted or disabled, or its password has changed since it was verified.
    Refused,
}

/// A presented refresh token, and the token that replaces it.
#[derive(Debug, Clone)]
pub struct Rotation {
    pub presented_generation: i64,
    pub presented_hash: RefreshHash,
    pub presented_expire_time: OffsetDateTime,
    /// Its generation is the presented one plus one.
    pub next: RefreshGrant,
    pub next_hash: RefreshHash,
    /// Its time decides expiry. The windows are measured by the database's own clock where it has one.
    pub context: AuditContext,
    pub retry_window: Duration,
    pub lost_answer_window: Duration,
    /// The newest generation of the session that this replica has seen and not written yet; 0 if there is none.
    pub seen_generation: i64,
}

/// The result of presenting a refresh token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RotationOutcome {
    /// The token was the current one. Now `next` is.
    Rotated(User),
    /// The token was the previous one, and may be presented again: this is the successor that it was exchanged for, to be
    /// returned again. Nothing changed.
    Replayed { user: User, grant: RefreshGrant, hash: RefreshHash },
    /// The token was consumed long ago: it was stolen, or its client lost count. The session was ended, durably.
    Reused,
    /// There is no such session, or it has ended, or its user is disabled. Nothing changed.
    Invalid,
}

impl RotationOutcome {
    /// The outcome as metrics name it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Rotated(_) => "rotated",
            Self::Replayed { .. } => "retried",
            Self::Reused => "reused",
            Self::Invalid => "dead",
        }
    }
}

/// A refresh token that was presented to log out.
#[derive(Debug, Clone)]
pub struct Logout {
    pub session_id: SessionId,
    pub user_id: UserId,
    pub presented_generation: i64,
    /// Whether every session of the user is to end.
    pub everywhere: bool,
    pub context: AuditContext,
}

/// The result of a logout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogoutOutcome {
    /// What was to end has ended, now or before.
    LoggedOut,
    /// There is no such session; or a consumed token was presented to end other sessions than its own, which it cannot
    /// do. Its own session has ended all the same.
    Refused,
}

/// A password attempt to reserve.
#[derive(Debug, Clone, Copy)]
pub struct LoginAttempt {
    pub subject: AttemptSubject,
    pub policy: AttemptPolicy,
    /// Used where the database has no clock of its own.
    pub now: OffsetDateTime,
}

/// The result of reserving an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reservation {
    Reserved,
    /// Too many attempts have failed: there is a pause.
    Blocked {
        retry_after: Duration,
    },
    /// So many attempts are under way that one more could be one too many. They end soon.
    Busy,
}

/// The result of starting a login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoginStart {
    /// An attempt is reserved; the account with the address, if there is one.
    Reserved(Option<Credentials>),
    /// As [`Reservation::Blocked`].
    Blocked { retry_after: Duration },
    /// As [`Reservation::Busy`].
    Busy,
}
