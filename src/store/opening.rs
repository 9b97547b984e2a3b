//! How a store is opened, and why that can fail.

use std::{path::PathBuf, time::Duration};

use crate::error::StoreError;

/// What opening a store may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migrate {
    /// Create a SQLite file that is missing, and apply the migrations that are.
    Apply,
    /// Fail if the file or a migration is missing: `postern migrate` has to run first.
    Check,
}

/// Why a store could not be opened. `docs/errors.md` lists the messages.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// With the number of the first missing migration.
    #[error("the database schema is not up to date (it lacks migration {0}): run `postern migrate` first")]
    SchemaOutdated(i64),
    #[error("the migrations could not be applied: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("POSTERN_DATABASE_URL is not a usable PostgreSQL URL: {0}")]
    Url(String),
    /// The database cannot be reached now. Waiting may help.
    #[error("the database at {server} cannot be used now: {cause}")]
    Unreachable { server: String, cause: String },
    /// The database refuses this process, and waiting does not help: what it refuses, and what to do.
    #[error("{problem}: {remedy}")]
    Refused { problem: String, remedy: String },
    /// No SQLite file, where none may be created.
    #[error(
        "there is no database {}: is POSTERN_DATA_DIR or POSTERN_DATABASE_URL right? `postern serve` and `postern migrate` \
         create a new database", .0.display()
    )]
    NoDatabase(PathBuf),
    /// The SQLite file or its directory cannot be used.
    #[error("the database {} cannot be used: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// The rights to the SQLite file or its directory are missing.
    #[error(
        "the database {} cannot be used: {source}: run Postern as the user whose files these are, or chown them",
        path.display()
    )]
    Denied { path: PathBuf, source: std::io::Error },
    #[error("{} is not a database of Postern: correct POSTERN_DATA_DIR or POSTERN_DATABASE_URL", .0.display())]
    NotADatabase(PathBuf),
    /// SQLite cannot use the file.
    #[error("the database {} cannot be used: {source}", path.display())]
    Sqlite { path: PathBuf, source: sqlx::Error },
    /// Other users can read the file of the database.
    #[error("the database is not private: {0}")]
    Exposed(#[source] std::io::Error),
    /// A key without its database: a copy that lacks a part, or a database that is gone.
    #[error(
        "{} exists, but the database {} beside it is missing or empty: restore the database, or remove the key to start \
         without accounts",
        key.display(), database.display()
    )]
    DatabaseLost { database: PathBuf, key: PathBuf },
    /// Statements of one connection reach several servers.
    #[error(
        "a connection pooler gives each transaction another connection to the database, and prepared statements are lost: \
         set pool_mode=session in PgBouncer, or connect to PostgreSQL directly"
    )]
    TransactionPooling,
    /// With what the database says of whoever holds the lock.
    #[error("another process migrates the database, and did not end within {0:?}: {1}")]
    MigrationLocked(Duration, String),
    /// With its encoding.
    #[error("the encoding of the database is {0}, and Postern needs UTF8: create it with ENCODING 'UTF8'")]
    Encoding(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl OpenError {
    /// Whether waiting may help: the cause can pass by itself.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Store(StoreError::Unavailable(_)))
    }
}
