//! The settings of the master key, and the key file beside a SQLite database.

use std::path::{Path, PathBuf};

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    database_url::{DatabaseUrl, key_beside},
    domain::{env::Env, master_key::MasterKey},
    private_file,
};

use super::{error::ConfigError, value::read_secret};

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
        MasterKey::parse(&text).map(Some).map_err(|source| ConfigError::MasterKey { from_file, source })
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
