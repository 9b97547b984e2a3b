//! The settings of the master key and of the signing keys, and the key file beside a SQLite database.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser as _},
};
use humantime::format_duration;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    database_url::{DatabaseUrl, key_beside},
    domain::{
        env::Env, key_schedule::KeySchedule, keyring::KeyPolicy, master_key::MasterKey, signing_key::SigningAlgorithm,
    },
    private_file,
};

use super::{
    error::{ConfigError, Faults},
    value::{duration, in_range, read_secret},
};

/// How the keys that sign access tokens are made and rotated.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Keys")]
pub struct SigningKeySettings {
    /// Algorithm of access tokens; a change takes effect with the next key
    #[arg(long, env = "POSTERN_SIGNING_ALGORITHM", default_value = "ES256", value_name = "NAME",
        value_parser = PossibleValuesParser::new(SigningAlgorithm::ALL.map(SigningAlgorithm::as_str))
            .map(|name| SigningAlgorithm::parse(&name).unwrap_or(SigningAlgorithm::Es256)))]
    pub signing_algorithm: SigningAlgorithm,
    /// How long a key signs access tokens before the next one does
    #[arg(long, env = "POSTERN_SIGNING_KEY_ROTATION", default_value = "90d", value_parser = duration, value_name = "DURATION")]
    pub signing_key_rotation: Duration,
    /// How long a key is published before it signs, at least 5s; verifiers may keep the published keys for a quarter of this, and
    /// for 5 minutes at most
    #[arg(long, env = "POSTERN_SIGNING_KEY_PUBLISH_AHEAD", default_value = "24h", value_parser = duration, value_name = "DURATION")]
    pub signing_key_publish_ahead: Duration,
}

impl SigningKeySettings {
    /// Checks that verifiers know a key before it signs, and that a key does sign.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut faults = Faults::default();
        let (rotation, ahead) = (self.signing_key_rotation, self.signing_key_publish_ahead);
        let least = KeySchedule::SHORTEST_PUBLISH_AHEAD;
        if ahead < least {
            faults.add(ConfigError::Contradiction(format!(
                "POSTERN_SIGNING_KEY_PUBLISH_AHEAD={} must not be shorter than {}: services that verify tokens keep the \
                 published keys for a moment, and would refuse tokens of a key that they do not know yet",
                format_duration(ahead),
                format_duration(least),
            )));
        } else {
            let most = Duration::from_hours(30 * 24);
            faults.take(in_range("POSTERN_SIGNING_KEY_PUBLISH_AHEAD", ahead, least, most));
        }
        faults.take(in_range("POSTERN_SIGNING_KEY_ROTATION", rotation, least, Duration::from_hours(3_650 * 24)));
        if faults.is_empty() && rotation < ahead {
            faults.add(ConfigError::Contradiction(format!(
                "POSTERN_SIGNING_KEY_ROTATION={} must not be shorter than POSTERN_SIGNING_KEY_PUBLISH_AHEAD={}: a key is \
                 published for so long before it signs",
                format_duration(rotation),
                format_duration(ahead),
            )));
        }
        faults.into_result()
    }

    /// The policy, with the longest time that a token is accepted.
    pub fn policy(&self, token_lifetime: Duration) -> KeyPolicy {
        let schedule = KeySchedule {
            rotation: self.signing_key_rotation,
            publish_ahead: Duration::from_secs(self.signing_key_publish_ahead.as_secs()),
            token_lifetime,
        };
        KeyPolicy { algorithm: self.signing_algorithm, schedule }
    }
}

/// The master key. Signing keys are encrypted with it, and the key of refresh tokens is derived from it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Keys")]
pub struct MasterKeySettings {
    /// 32 bytes in base64, from the environment alone (an argument is refused); required with PostgreSQL [default with SQLite: generated beside the
    /// database]
    #[arg(long, env = "POSTERN_MASTER_KEY", hide = true, hide_env_values = true, value_name = "BASE64")]
    pub master_key: Option<SecretString>,
    /// File that contains the master key, if it is not in the environment as POSTERN_MASTER_KEY
    #[arg(long, env = "POSTERN_MASTER_KEY_FILE", value_name = "FILE", conflicts_with = "master_key")]
    pub master_key_file: Option<PathBuf>,
    /// The master key before this one, from the environment alone, until nothing that was made with it is in use any more
    #[arg(long, env = "POSTERN_PREVIOUS_MASTER_KEY", hide = true, hide_env_values = true, value_name = "BASE64")]
    pub previous_master_key: Option<SecretString>,
    /// File that contains the master key before this one, while the master key is changed
    #[arg(long, env = "POSTERN_PREVIOUS_MASTER_KEY_FILE", value_name = "FILE", conflicts_with = "previous_master_key")]
    pub previous_master_key_file: Option<PathBuf>,
}

impl MasterKeySettings {
    /// The configured master key. `None` stands for the key beside a SQLite file. With PostgreSQL a key is required.
    pub fn configured(&self, database: &DatabaseUrl) -> Result<Option<MasterKey>, ConfigError> {
        let (text, from_file) = match (&self.master_key, &self.master_key_file, database) {
            (Some(key), _, _) => (Zeroizing::new(key.expose_secret().to_owned()), false),
            (None, Some(path), _) => (read_secret("POSTERN_MASTER_KEY_FILE", path)?, true),
            (None, None, DatabaseUrl::Sqlite(_)) => return Ok(None),
            (None, None, DatabaseUrl::Postgres { .. }) => return Err(ConfigError::MasterKeyMissing),
        };
        let name = if from_file { "POSTERN_MASTER_KEY_FILE" } else { "POSTERN_MASTER_KEY" };
        MasterKey::parse(&text).map(Some).map_err(|source| ConfigError::MasterKey { name, source })
    }

    /// The master key before the configured one.
    pub fn previous(&self) -> Result<Option<MasterKey>, ConfigError> {
        let (text, name) = match (&self.previous_master_key, &self.previous_master_key_file) {
            (Some(key), _) => (Zeroizing::new(key.expose_secret().to_owned()), "POSTERN_PREVIOUS_MASTER_KEY"),
            (None, Some(path)) => {
                let name = "POSTERN_PREVIOUS_MASTER_KEY_FILE";
                (read_secret(name, path)?, name)
            }
            (None, None) => return Ok(None),
        };
        MasterKey::parse(&text).map(Some).map_err(|source| ConfigError::MasterKey { name, source })
    }
}

/// Reads the master key beside a SQLite file. A new key is created if there is none, unless the database contains
/// signing keys: those were encrypted with a key that is now missing.
pub fn master_key_beside(database: &Path, has_signing_keys: bool, env: &Env) -> Result<MasterKey, ConfigError> {
    const NAME: &str = "the master key";
    let path = key_beside(database);
    let unreadable = |source| ConfigError::Unreadable { variable: NAME, path: path.clone(), source };
    if !path.try_exists().map_err(|error| unreadable(private_file::explain(&path, error)))? {
        if has_signing_keys {
            return Err(ConfigError::MasterKeyLost { database: database.to_owned(), key: path });
        }
        write_new_secret(&path, &MasterKey::generate(env)?)?;
    }
    private_file::keep_private(&path).map_err(unreadable)?;
    MasterKey::parse(&read_secret(NAME, &path)?).map_err(|source| ConfigError::MasterKeyBeside { path, source })
}

/// Writes a secret to a new file, which only its owner can read, and syncs it to disk. If another process has made the file
/// meanwhile, that one stays: a file is whole as soon as it has its name.
fn write_new_secret(path: &Path, secret: &str) -> Result<(), ConfigError> {
    use std::io::Write as _;
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}", std::process::id()));
    let draft = PathBuf::from(draft);
    let write = || -> std::io::Result<()> {
        let mut file = private_file::options().create_new(true).open(&draft)?;
        file.write_all(secret.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        match std::fs::hard_link(&draft, path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    };
    let written = write();
    // What is left after a crash is a key that nothing was encrypted with.
    let removed = std::fs::remove_file(&draft);
    written.and(removed).map_err(|source| ConfigError::Unwritable {
        variable: "POSTERN_DATA_DIR or POSTERN_DATABASE_URL",
        path: path.to_owned(),
        source: private_file::explain(path, source),
    })
}
