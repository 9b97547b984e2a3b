//! How a store is opened, and why that can fail.

use std::{path::PathBuf, time::Duration};

use crate::error::StoreError;

/// Whether opening a store may change its schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migrate {
    /// Apply the migrations that are missing.
    Apply,
    /// Fail if a migration is missing: `postern migrate` has to run first.
    Check,
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// With the number of the first missing migration.
    #[error("the database schema is not up to date (it lacks migration {0}): run `postern migrate` first")]
    SchemaOutdated(i64),
    #[error("the migrations could not be applied: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error("POSTERN_DATABASE_URL is not a usable PostgreSQL URL: {0}")]
    Url(String),
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
