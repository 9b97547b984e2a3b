//! The errors of a configuration.

use std::{net::SocketAddr, path::PathBuf};

use crate::{domain::master_key::MasterKeyError, tls::TlsError};

/// Why the configuration cannot be used. Each message names the setting to change, its value unless that may be secret,
/// and what to do. `docs/errors.md` lists the messages.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{name}: no setting has this name{}; `postern serve --help` lists them", suggestion(nearest.as_ref()))]
    UnknownVariable { name: String, nearest: Option<String> },
    /// The value of a variable that cannot be parsed. The value is left out where it may be secret.
    #[error("{variable}{}: {problem}", value.as_ref().map(|value| format!("={}", value.escape_debug())).unwrap_or_default())]
    Malformed { variable: String, value: Option<String>, problem: String },
    /// Two ways to give the same setting.
    #[error("{0} and {1} are both set: remove one of them")]
    Both(String, String),
    /// A secret as an argument, with what to do instead.
    #[error("{0}")]
    SecretArgument(String),
    #[error("{name} {source}")]
    MasterKey { name: &'static str, source: MasterKeyError },
    #[error("the master key {path} {source}: restore this file", path = .path.display())]
    MasterKeyBeside { path: PathBuf, source: MasterKeyError },
    #[error(
        "POSTERN_MASTER_KEY or POSTERN_MASTER_KEY_FILE is required with PostgreSQL; create a key with: openssl rand -base64 32"
    )]
    MasterKeyMissing,
    #[error("{variable}: {path} cannot be read: {source}")]
    Unreadable { variable: &'static str, path: PathBuf, source: std::io::Error },
    /// With the setting that names the path.
    #[error("{path} cannot be created: {source}; the setting is {variable}", path = .path.display())]
    Unwritable { variable: &'static str, path: PathBuf, source: std::io::Error },
    #[error(
        "{database} exists, but its master key {key} does not: restore the key, or set POSTERN_MASTER_KEY to it; \
         without the key, the signing keys in the database cannot be decrypted"
    )]
    MasterKeyLost { database: PathBuf, key: PathBuf },
    #[error("POSTERN_DATABASE_URL must begin with postgres://, postgresql:// or sqlite:")]
    DatabaseUrl,
    #[error(
        "{0}={1} is not loopback, and passwords would cross the network in plain text: set POSTERN_TLS_CERT and \
         POSTERN_TLS_KEY, or POSTERN_ALLOW_PLAINTEXT=true if a proxy in front of Postern provides TLS"
    )]
    Plaintext(&'static str, SocketAddr),
    #[error(
        "POSTERN_HASH_THREADS and POSTERN_ARGON2_MEMORY_KIB: {threads} hashes at a time need {} MiB, but this process \
         may use only {} MiB: lower one of the two, or raise the memory limit of the control group (the container)",
        needed.div_ceil(MIB), limit / MIB
    )]
    TooLittleMemory { threads: u64, needed: u64, limit: u64 },
    #[error("{0} must not be {1}")]
    OutOfRange(&'static str, String),
    /// The setting and the problem with it. The value is not included, because it may be secret.
    #[error("{0} {1}")]
    Unusable(&'static str, String),
    /// Two settings that cannot both be meant. The text names both with their values, and what is wrong.
    #[error("{0}")]
    Contradiction(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// At least two errors.
    #[error("{} settings are wrong:\n  {}", .0.len(), lines(.0))]
    Several(Vec<ConfigError>),
    #[error("{}", .0.for_operators())]
    Domain(#[from] crate::error::Error),
}

const MIB: u64 = 1024 * 1024;

fn lines(errors: &[ConfigError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  ")
}

fn suggestion(nearest: Option<&String>) -> String {
    nearest.map(|name| format!(" (is {name} meant?)")).unwrap_or_default()
}

impl ConfigError {
    /// A value that is not secret, and what is wrong with it.
    pub(super) fn malformed(variable: &'static str, value: &str, problem: &str) -> Self {
        Self::Malformed { variable: variable.to_owned(), value: Some(value.to_owned()), problem: problem.to_owned() }
    }

    /// The single errors that this one consists of.
    pub fn into_each(self) -> Vec<Self> {
        match self {
            Self::Several(errors) => errors.into_iter().flat_map(Self::into_each).collect(),
            single => vec![single],
        }
    }

    /// Errors of values that cannot be parsed, and those that the other settings have. Where a value could not be parsed,
    /// the default took its place, so what the second part says about that setting is left out.
    pub fn with_more(mut malformed: Vec<Self>, others: Option<Self>) -> Self {
        let names: Vec<_> = malformed.iter().flat_map(Self::variables).collect();
        let is_about_others = |error: &Self| {
            let text = error.to_string();
            let mut words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            !words.any(|word| names.iter().any(|name| name == word))
        };
        malformed.extend(others.into_iter().flat_map(Self::into_each).filter(is_about_others));
        Faults(malformed).into_error()
    }

    /// The variables whose values were not used.
    fn variables(&self) -> Vec<String> {
        match self {
            Self::Malformed { variable, .. } => vec![variable.clone()],
            Self::Both(one, other) => vec![one.clone(), other.clone()],
            _ => Vec::new(),
        }
    }

    /// Whether a setting or an argument is wrong, rather than something that it names.
    pub fn is_wrong_setting(&self) -> bool {
        match self {
            Self::MasterKeyBeside { .. } | Self::Unwritable { .. } | Self::MasterKeyLost { .. } | Self::Domain(_) => {
                false
            }
            Self::UnknownVariable { .. }
            | Self::Malformed { .. }
            | Self::Both(..)
            | Self::SecretArgument(_)
            | Self::MasterKey { .. }
            | Self::MasterKeyMissing
            | Self::Unreadable { .. }
            | Self::DatabaseUrl
            | Self::Plaintext(..)
            | Self::TooLittleMemory { .. }
            | Self::OutOfRange(..)
            | Self::Unusable(..)
            | Self::Contradiction(_)
            | Self::Tls(_)
            | Self::Several(_) => true,
        }
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<ConfigError>);

impl Faults {
    /// The value of a part, or `None` if the part is wrong.
    pub(super) fn take<T>(&mut self, part: Result<T, ConfigError>) -> Option<T> {
        part.map_err(|error| self.0.extend(error.into_each())).ok()
    }

    /// Adds an error.
    pub(super) fn add(&mut self, error: ConfigError) {
        self.0.push(error);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them as one error.
    pub(super) fn into_error(mut self) -> ConfigError {
        match self.0.pop() {
            Some(only) if self.0.is_empty() => only,
            Some(last) => {
                self.0.push(last);
                ConfigError::Several(self.0)
            }
            None => ConfigError::Several(Vec::new()),
        }
    }

    /// Fails if there are any.
    pub(super) fn into_result(self) -> Result<(), ConfigError> {
        if self.is_empty() { Ok(()) } else { Err(self.into_error()) }
    }
}
