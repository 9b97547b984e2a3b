//! The database to open. The configuration reads it, and the store opens it.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::private_file;

/// The database that `POSTERN_DATABASE_URL` names.
#[derive(Debug, Clone)]
pub enum DatabaseUrl {
    /// A SQLite file. It is created if it does not exist.
    Sqlite(PathBuf),
    /// A `postgres://` URL, which may contain a password.
    Postgres {
        url: secrecy::SecretString,
        /// The maximum number of connections.
        max_connections: u32,
        /// Whether to LISTEN for the changes of other replicas.
        notifications: bool,
    },
}

impl DatabaseUrl {
    /// Creates the directory of a SQLite file, which only its owner can read. An error contains the directory.
    pub fn create_directory(&self) -> Result<(), (PathBuf, io::Error)> {
        let Self::Sqlite(path) = self else {
            return Ok(());
        };
        let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) else {
            return Ok(());
        };
        private_file::create_directory(directory).map_err(|error| (directory.to_owned(), error))
    }
}

/// The master key that is generated beside a SQLite database.
pub fn key_beside(database: &Path) -> PathBuf {
    let mut key = database.as_os_str().to_owned();
    key.push(".key");
    PathBuf::from(key)
}
