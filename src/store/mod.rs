//! Where accounts, sessions and keys are kept: the trait that the domain talks to, and what its steps mean.
//!
//! A method is one atomic business step with an outcome enum. Its transaction begins and ends inside, so nobody can
//! hold one across a hash or a mail. An `Err` says that the store failed, never that a rule was broken.
//!
//! # How to add a backend
//! Implement [`Store`] in a file beside `postgres.rs` and `sqlite.rs`, give it migrations of the same numbers and names,
//! add its scheme to [`connect`], and add it to the engines of `tests/store`: the conformance suite runs every method,
//! races included, on each. Then see that each write ends even if its caller goes away ([`to_the_end`]).

pub mod mail;
pub mod postgres;
mod rows;
pub mod sqlite;

use std::{fmt, future::Future, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{
    SessionId, UserId,
    account::{Email, User, Username},
    keyring::SealedSigningKey,
    password::PasswordHash,
    token::RefreshGrant,
};

/// Longer than any caller waits: what is not written by then never will be.
const LONGEST_WRITE: Duration = Duration::from_secs(20);

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It is away, full or too busy. Nothing is known to have been written; trying again is safe and may help.
    #[error("the database is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It is there and does not hold what this version expects: a missing table, a row that makes no sense.
    #[error("the database is broken: {0}")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StoreError {
    pub(crate) fn broken(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Broken(cause.into())
    }
}

/// The steps that the domain is made of. See the types for what each needs and can end in.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Whether the store can be reached now: asks it. Backends that can lose their database also let every other step fail at
    /// once from a failed ping until the next good one, so that callers do not queue up for a database that is away.
    async fn ping(&self) -> Result<(), StoreError>;

    /// What the last ping found, without asking: for whoever is about to spend something on a step that would fail.
    fn known_reachable(&self) -> Result<(), StoreError>;

    /// How many connections are open, and how many of them are idle.
    fn connections(&self) -> Connections;

    /// Creates an account with the role `user`.
    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError>;

    /// The account of an address with its password hash.
    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError>;

    /// Opens a session, if the account is still enabled and its password still the one that was verified; replaces the
    /// password's hash on the way where a rehash is due.
    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError>;

    /// Decides what a presented refresh token is, and carries its session on or ends it. At most one caller ever
    /// rotates one generation.
    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError>;

    /// Ends a session, or all of its user's.
    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError>;

    /// The user of a session; `None` once the session was ended or its user disabled or deleted.
    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError>;

    /// Deletes the sessions whose absolute end is past, at most `limit` of them. Returns how many.
    async fn forget_ended_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError>;

    /// Every signing key, in no order.
    async fn signing_keys(&self) -> Result<Vec<SealedSigningKey>, StoreError>;

    /// Keeps the key if there is none yet: of several callers at once, one wins.
    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError>;
}

impl fmt::Debug for dyn Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

/// What a pool of connections is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    pub open: u32,
    pub idle: usize,
}

/// An account to create.
#[derive(Debug, Clone)]
pub struct NewAccount {
    pub id: UserId,
    pub username: Username,
    pub email: Email,
    pub password_hash: PasswordHash,
    pub create_time: OffsetDateTime,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccountCreation {
    Created(User),
    /// Said before `UsernameTaken` where both hold.
    EmailTaken,
    UsernameTaken,
}

/// What a login is checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    pub user: User,
    pub password_hash: PasswordHash,
    /// Counts the changes of the password; a rehash is none.
    pub password_version: i64,
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
}

impl RevokeReason {
    /// The reason as the database keeps it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Logout => "logout",
            Self::LogoutEverywhere => "logout_everywhere",
            Self::EndedElsewhere => "ended_elsewhere",
            Self::TokenReused => "token_reused",
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

/// Which database, as `POSTERN_DATABASE_URL` says.
#[derive(Debug, Clone)]
pub enum Location {
    /// A SQLite file, created where missing.
    Sqlite(PathBuf),
    /// A `postgres://` URL, which may hold a password, and the most connections to open.
    Postgres { url: secrecy::SecretString, max_connections: u32 },
}

/// Whether opening a store may change its schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migrate {
    /// Bring the schema up to date.
    Apply,
    /// Fail unless it is: `postern migrate` has to run first.
    Check,
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the database schema is not up to date (it lacks migration {0}): run `postern migrate` first")]
    SchemaOutdated(i64),
    #[error("the migrations could not be applied: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("POSTERN_DATABASE_URL is not a usable PostgreSQL URL: {0}")]
    Url(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Opens the store at a location.
pub async fn connect(location: &Location, migrate: Migrate) -> Result<Arc<dyn Store>, OpenError> {
    match location {
        Location::Sqlite(path) => Ok(Arc::new(sqlite::SqliteStore::open(path, migrate).await?)),
        Location::Postgres { url, max_connections } => {
            Ok(Arc::new(postgres::PostgresStore::open(url, *max_connections, migrate).await?))
        }
    }
}

/// Runs a write in a task of its own, to its end, whether or not its caller still waits.
///
/// Dropping a sqlx transaction's future half-way can hand its connection back to the pool inside an open transaction;
/// later writes on it would be acknowledged and never committed (transact-rs/sqlx#4385). A write that a silent network
/// holds up is given up in the end, so that it does not keep its connection until TCP notices.
pub(crate) async fn to_the_end<T: Send + 'static>(
    write: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::spawn(tokio::time::timeout(LONGEST_WRITE, write)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(elapsed)) => Err(StoreError::Unavailable(Box::new(elapsed))),
        Err(panicked_or_shutting_down) => Err(StoreError::broken(panicked_or_shutting_down)),
    }
}

/// The first migration of `migrator` that is not among the applied ones. Later ones are welcome: every release runs
/// with the schema of the next.
pub(crate) fn first_missing(migrator: &sqlx::migrate::Migrator, applied: &[i64]) -> Option<i64> {
    migrator.iter().map(|migration| migration.version).find(|version| !applied.contains(version))
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let away = match &error {
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::BeginFailed => true,
            sqlx::Error::Database(error) => error.code().is_some_and(|code| {
                if error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>().is_some() {
                    postgres::is_transient(&code)
                } else {
                    sqlite::is_transient(&code)
                }
            }),
            // The library's enum may grow; what is not known to pass by itself is a fault to be looked at.
            _ => false,
        };
        if away { Self::Unavailable(Box::new(error)) } else { Self::Broken(Box::new(error)) }
    }
}
