//! Settings of the database.

use std::path::PathBuf;

use clap::{ArgAction, Args};
use secrecy::{ExposeSecret, SecretString};

use crate::database_url::DatabaseUrl;

use super::{error::ConfigError, value::read_secret};

/// The database.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Database")]
pub struct StoreSettings {
    /// Directory of the embedded database and its generated master key; created with mode 0700
    #[arg(long, env = "POSTERN_DATA_DIR", default_value = "./postern-data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// postgres://… for production, or sqlite:PATH [default: the embedded SQLite]
    #[arg(long, env = "POSTERN_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<SecretString>,
    /// File that contains the URL
    #[arg(long, env = "POSTERN_DATABASE_URL_FILE", value_name = "FILE", conflicts_with = "database_url")]
    pub database_url_file: Option<PathBuf>,
    /// Maximum number of connections to PostgreSQL
    #[arg(long, env = "POSTERN_DATABASE_MAX_CONNECTIONS", default_value_t = 16, value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub database_max_connections: u32,
    /// Let PostgreSQL notify replicas of revocations (LISTEN); without it they poll every 0.7 s
    #[arg(long, env = "POSTERN_DATABASE_NOTIFICATIONS", default_value_t = true, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub database_notifications: bool,
}

impl StoreSettings {
    /// The database that the settings name.
    pub fn database(&self) -> Result<DatabaseUrl, ConfigError> {
        let url = match (&self.database_url, &self.database_url_file) {
            (Some(url), _) => url.clone(),
            (None, Some(path)) => {
                let text = read_secret("POSTERN_DATABASE_URL_FILE", path)?;
                SecretString::from(text.trim())
            }
            (None, None) => return Ok(DatabaseUrl::Sqlite(self.data_dir.join("postern.db"))),
        };
        let text = url.expose_secret();
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(DatabaseUrl::Postgres {
                url,
                max_connections: self.database_max_connections,
                notifications: self.database_notifications,
            });
        }
        let path = text.strip_prefix("sqlite:").ok_or(ConfigError::DatabaseUrl)?;
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() || path.contains('?') || path == ":memory:" {
            return Err(ConfigError::DatabaseUrl);
        }
        Ok(DatabaseUrl::Sqlite(PathBuf::from(path)))
    }
}
