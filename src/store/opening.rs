//! How a store is opened, and why that can fail.

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
    /// With its encoding.
    #[error("the encoding of the database is {0}, and Postern needs UTF8: create it with ENCODING 'UTF8'")]
    Encoding(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}
