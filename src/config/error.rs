//! The errors of a configuration.

use std::{net::SocketAddr, path::PathBuf};

use crate::domain::master_key::MasterKeyError;

/// Why the configuration cannot be used. Each message names the setting to change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("unknown environment variable {0}: no setting of that name exists (see `postern serve --help`)")]
    UnknownVariable(String),
    #[error("environment variable {0}: this version of Postern does not implement this setting; remove the variable")]
    NotImplemented(String),
    #[error("POSTERN_MASTER_KEY{suffix} {source}", suffix = if *.from_file { "_FILE" } else { "" })]
    MasterKey { from_file: bool, source: MasterKeyError },
    #[error(
        "POSTERN_MASTER_KEY or POSTERN_MASTER_KEY_FILE is required with PostgreSQL; create a key with: openssl rand -base64 32"
    )]
    MasterKeyMissing,
    #[error("{variable}: {path} cannot be read: {source}")]
    Unreadable { variable: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path} cannot be created: {source}")]
    Unwritable { path: PathBuf, source: std::io::Error },
    #[error(
        "{database} exists, but its master key {key} does not: restore the key, or set POSTERN_MASTER_KEY to it; \
         without the key, the signing keys in the database cannot be decrypted"
    )]
    MasterKeyLost { database: PathBuf, key: PathBuf },
    #[error("POSTERN_DATABASE_URL must begin with postgres://, postgresql:// or sqlite:")]
    DatabaseUrl,
    #[error(
        "{0}={1} is not loopback, and passwords would cross the network in plain text: set \
         POSTERN_ALLOW_PLAINTEXT=true if a proxy in front of Postern provides TLS"
    )]
    Plaintext(&'static str, SocketAddr),
    #[error(
        "POSTERN_HASH_THREADS and POSTERN_ARGON2_MEMORY_KIB: {threads} hashes at a time need {needed} bytes, but this \
         process may use only {limit}"
    )]
    TooLittleMemory { threads: u64, needed: u64, limit: u64 },
    #[error("{0} must not be {1}")]
    OutOfRange(&'static str, String),
    /// The setting and the problem with it. The value is not included, because it may be secret.
    #[error("{0} {1}")]
    Unusable(&'static str, String),
    #[error(transparent)]
    Domain(#[from] crate::error::Error),
}
