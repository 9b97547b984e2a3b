//! Where accounts, sessions and keys are kept: the trait that the domain talks to, and what its steps mean.
//!
//! A method is one atomic business step with an outcome enum. Its transaction begins and ends inside, so nobody can
//! hold one across a hash or a mail. An `Err` says that the store failed, never that a rule was broken.
//!
//! The steps stand with their types in `accounts.rs`, `sessions.rs` and `mail.rs`, and so do the rules that are decided on
//! a locked row, alike on every backend. Each backend has a file of the same name for each.
//!
//! # How to add a backend
//! Implement [`Store`] in a directory beside `postgres` and `sqlite`, give it migrations of the same numbers and names,
//! add its scheme to [`connect`], and add it to the engines of `tests/store`: the conformance suite runs every method,
//! races included, on each. Then see that each write ends even if its caller goes away ([`to_the_end`]).

mod accounts;
mod admin;
mod mail;
pub mod postgres;
mod rows;
mod sessions;
pub mod sqlite;

use std::{fmt, future::Future, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::domain::keyring::SealedSigningKey;

pub use accounts::*;
pub use admin::*;
pub use mail::*;
pub use sessions::*;

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

/// Everything that is kept. Its steps are in the traits that it is made of.
#[async_trait]
pub trait Store: AccountStore + AdminStore + SessionStore + MailStore + Send + Sync + 'static {
    /// Whether the store can be reached now: asks it. Backends that can lose their database also let every other step fail at
    /// once from a failed ping until the next good one, so that callers do not queue up for a database that is away.
    async fn ping(&self) -> Result<(), StoreError>;

    /// What the last ping found, without asking: for whoever is about to spend something on a step that would fail.
    fn known_reachable(&self) -> Result<(), StoreError>;

    /// How many connections are open, and how many of them are idle.
    fn connections(&self) -> Connections;

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

/// Which database, as `POSTERN_DATABASE_URL` says.
#[derive(Debug, Clone)]
pub enum Location {
    /// A SQLite file, created where missing.
    Sqlite(PathBuf),
    /// A `postgres://` URL, which may hold a password; the most connections to open; whether to listen for what other
    /// replicas write.
    Postgres { url: secrecy::SecretString, max_connections: u32, notifications: bool },
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
        Location::Postgres { url, max_connections, notifications } => {
            Ok(Arc::new(postgres::PostgresStore::open(url, *max_connections, *notifications, migrate).await?))
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
