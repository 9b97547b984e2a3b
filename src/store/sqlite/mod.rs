//! SQLite, the embedded default, for one serving process. One connection writes, with `BEGIN IMMEDIATE`, so a step that
//! writes is alone from its first statement to its commit. Other connections read at the same time (WAL).
//! `synchronous = FULL`: what was acknowledged survives a kill and a power cut.

mod mail;
mod sessions;
mod transaction;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{
    ConnectOptions, Connection as _, Executor, Sqlite, SqlitePool,
    pool::PoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use time::OffsetDateTime;
use tokio::sync::Notify;

use crate::{
    database_url,
    domain::ports::{AccountCreation, Connections, NewAccount, SealedSigningKey, Store},
    error::StoreError,
    private_file,
};

use self::transaction::Tx;
use super::{
    opening::{Migrate, OpenError},
    purges::{Purges, purge, purges},
    rows::{StoredRow, audit_events, user_columns},
    shared::{first_pending, migrator, run_to_completion},
    statement::Statement,
    steps::{self, Backend, Dialect, first_signing_key},
};

/// The files below `migrations/sqlite`, with their names.
const MIGRATIONS: [(&str, &str); 13] = [
    ("0001_accounts_and_sessions.sql", include_str!("../../../migrations/sqlite/0001_accounts_and_sessions.sql")),
    ("0002_mail.sql", include_str!("../../../migrations/sqlite/0002_mail.sql")),
    ("0003_administration.sql", include_str!("../../../migrations/sqlite/0003_administration.sql")),
    ("0004_attempts_under_way.sql", include_str!("../../../migrations/sqlite/0004_attempts_under_way.sql")),
    ("0005_reset_limits.sql", include_str!("../../../migrations/sqlite/0005_reset_limits.sql")),
    ("0006_notice_limits.sql", include_str!("../../../migrations/sqlite/0006_notice_limits.sql")),
    ("0007_clocks.sql", include_str!("../../../migrations/sqlite/0007_clocks.sql")),
    ("0008_names_in_any_locale.sql", include_str!("../../../migrations/sqlite/0008_names_in_any_locale.sql")),
    ("0009_open_sessions.sql", include_str!("../../../migrations/sqlite/0009_open_sessions.sql")),
    ("0010_seen_generations.sql", include_str!("../../../migrations/sqlite/0010_seen_generations.sql")),
    ("0011_service_accounts.sql", include_str!("../../../migrations/sqlite/0011_service_accounts.sql")),
    ("0012_key_rotation.sql", include_str!("../../../migrations/sqlite/0012_key_rotation.sql")),
    ("0013_traces_of_mails.sql", include_str!("../../../migrations/sqlite/0013_traces_of_mails.sql")),
];

/// How long a write waits for its turn.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long SQLite waits for another process's lock, such as a backup's.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);
const READERS: u32 = 4;
/// How often the migrations are tried.
const MIGRATION_ATTEMPTS: u32 = 10;
/// The pause between two tries.
const MIGRATION_PAUSE: Duration = Duration::from_millis(100);

/// A handle to the database file.
#[derive(Debug, Clone)]
pub struct SqliteStore {
    writer: SqlitePool,
    readers: SqlitePool,
    /// Woken when this process has queued mail.
    mail_queued: Arc<Notify>,
}

impl SqliteStore {
    /// Opens the file and brings the schema up to date, or checks that it is. Only the former creates a missing file.
    pub async fn open(path: &Path, migrate: Migrate) -> Result<Self, OpenError> {
        let key = database_url::key_beside(path);
        // Asked first: another process that starts at the same time makes the key after the tables.
        let has_key = exists(&key)?;
        let has_database = exists(path)?;
        let lost = || OpenError::DatabaseLost { database: path.to_owned(), key: key.clone() };
        if has_key && !has_database {
            return Err(lost());
        }
        if migrate == Migrate::Apply {
            make_private(path).map_err(|error| unusable(path, error))?;
        } else if !has_database {
            return Err(no_database(path));
        }
        if path.is_dir() {
            return Err(OpenError::NotADatabase(path.to_owned()));
        }
        private_file::check_access(path).map_err(|error| unusable(path, error))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT)
            .log_statements(tracing::log::LevelFilter::Trace);
        let in_words = |error| explain(path, error);
        let writer = pool().max_connections(1).connect_with(options.clone()).await.map_err(in_words)?;
        let (is_ours, is_empty) = content(&writer).await.map_err(in_words)?;
        if !is_ours && !is_empty {
            return Err(OpenError::NotADatabase(path.to_owned()));
        }
        // Not before it is known that this is our file.
        for suffix in ["", "-wal", "-shm"] {
            let mut file = path.as_os_str().to_owned();
            file.push(suffix);
            private_file::keep_private(Path::new(&file)).map_err(OpenError::Exposed)?;
        }
        if has_key && !is_ours {
            return Err(lost());
        }
        match migrate {
            Migrate::Apply => {
                apply_migrations(&writer).await?;
            }
            Migrate::Check => {
                let applied = if is_ours { applied(&writer).await.map_err(in_words)? } else { Vec::new() };
                if let Some(version) = first_pending(&migrator(&MIGRATIONS), &applied) {
                    return Err(OpenError::SchemaOutdated(version));
                }
            }
        }
        let readers = pool().max_connections(READERS).connect_lazy_with(options.pragma("query_only", "ON"));
        Ok(Self { writer, readers, mail_queued: Arc::default() })
    }
}

fn no_database(path: &Path) -> OpenError {
    OpenError::NoDatabase(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
}

fn exists(path: &Path) -> Result<bool, OpenError> {
    path.try_exists().map_err(|error| unusable(path, private_file::explain(path, error)))
}

/// Why a file cannot be used.
fn unusable(path: &Path, source: std::io::Error) -> OpenError {
    let source = private_file::explain(path, source);
    let path = path.to_owned();
    if source.kind() == std::io::ErrorKind::PermissionDenied {
        OpenError::Denied { path, source }
    } else {
        OpenError::File { path, source }
    }
}

/// Why SQLite cannot use the file. Waiting only helps where another process has it.
fn explain(path: &Path, error: sqlx::Error) -> OpenError {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    match code.and_then(|code| code.parse::<u32>().ok()).map(|code| code & 0xff) {
        // BUSY, LOCKED, PROTOCOL
        Some(5 | 6 | 15) => StoreError::from(error).into(),
        // NOTADB
        Some(26) => OpenError::NotADatabase(path.to_owned()),
        None if matches!(error, sqlx::Error::PoolTimedOut) => {
            let told = format!("another process has locked {} for {ACQUIRE_TIMEOUT:?}", path.display());
            StoreError::Unavailable(told.into()).into()
        }
        Some(_) | None => OpenError::Sqlite { path: path.to_owned(), source: error },
    }
}

/// Copies a database that may be in use to a new file, which only its owner can read: everything that was committed before
/// the call.
pub async fn backup(database: &Path, to: &Path) -> Result<(), BackupError> {
    if !exists(database)? {
        return Err(no_database(database).into());
    }
    // An empty file is one that SQLite may write to. Nothing is ever written over.
    let file = private_file::options().create_new(true).open(to).map_err(|error| BackupError::file(to, error))?;
    let copied = copy(database, to).await;
    if copied.is_err() {
        let _ = std::fs::remove_file(to);
        return copied;
    }
    file.sync_all().map_err(|error| BackupError::file(to, error))
}

async fn copy(database: &Path, to: &Path) -> Result<(), BackupError> {
    let options = SqliteConnectOptions::new().filename(database).busy_timeout(BUSY_TIMEOUT);
    let mut connection = options.connect().await.map_err(StoreError::from)?;
    let to = to.to_str().ok_or_else(|| BackupError::file(to, std::io::ErrorKind::InvalidFilename.into()))?;
    sqlx::query("VACUUM INTO $1").bind(to).execute(&mut connection).await.map_err(StoreError::from)?;
    connection.close().await.map_err(StoreError::from)?;
    Ok(())
}

/// Why a backup was not made.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl BackupError {
    fn file(path: &Path, source: std::io::Error) -> Self {
        Self::File { path: path.to_owned(), source }
    }
}

impl SqliteStore {
    /// Moves what is in the log of writes into the file of the database, so that the file alone is the database.
    async fn checkpoint(&self) -> Result<(), StoreError> {
        self.execute(Statement::new("PRAGMA wal_checkpoint(TRUNCATE)")).await.map(drop)
    }
}

/// Creates the file, readable by its owner only, if it does not exist. SQLite gives the files beside it the same mode.
fn make_private(path: &Path) -> std::io::Result<()> {
    // Only a new file is opened: closing a file that SQLite has open in this process would drop SQLite's locks on it.
    match private_file::options().create_new(true).open(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn pool() -> PoolOptions<Sqlite> {
    SqlitePoolOptions::new().acquire_timeout(ACQUIRE_TIMEOUT).after_release(|connection, _| {
        Box::pin(async move {
            // Ends a transaction that a dropped future left open (see `run_to_completion`). Nearly always there is
            // none, and SQLite reports that.
            let _ = connection.execute("ROLLBACK").await;
            Ok(true)
        })
    })
}

/// Applies the migrations. sqlx takes no lock on SQLite, so of several processes that start on one new file all but the
/// first may fail because a table exists. A moment later they find nothing left to do.
async fn apply_migrations(writer: &SqlitePool) -> Result<(), OpenError> {
    let migrator = migrator(&MIGRATIONS);
    for _ in 1..MIGRATION_ATTEMPTS {
        match migrator.run(writer).await {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(%error, "the migrations could not be applied; trying again"),
        }
        tokio::time::sleep(MIGRATION_PAUSE).await;
    }
    Ok(migrator.run(writer).await?)
}

/// Whether the database is one of Postern, and whether it has no tables at all.
async fn content(writer: &SqlitePool) -> Result<(bool, bool), sqlx::Error> {
    let query = "SELECT count(*) FILTER (WHERE name = '_sqlx_migrations') > 0, count(*) = 0 FROM sqlite_master";
    sqlx::query_as(query).fetch_one(writer).await
}

/// The migrations that were applied.
async fn applied(writer: &SqlitePool) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success").fetch_all(writer).await
}

impl Backend for SqliteStore {
    type Transaction = Tx;
    const DIALECT: Dialect = Dialect {
        users_by_email: concat!(
            "SELECT ",
            user_columns!(),
            " FROM users u WHERE u.email > $2 AND u.email >= $3 AND u.email < $4 ORDER BY u.email LIMIT $1"
        ),
        users_by_username: concat!(
            "SELECT ",
            user_columns!(),
            " FROM users u WHERE lower(u.username) > $2 AND lower(u.username) >= $3 AND lower(u.username) < $4 ",
            "AND NOT (u.email >= $3 AND u.email < $4) ORDER BY lower(u.username) LIMIT $1"
        ),
        // The plus makes SQLite use the index on the user. Without it SQLite may choose the index on the action and read
        // every event of that kind.
        audit_events_of_user_with_action: audit_events!(" AND user_id = $3 AND +action = $4"),
        purges: purges!("", "$3"),
    };

    /// No other step writes until this transaction ends.
    async fn begin(&self) -> Result<Tx, StoreError> {
        Ok(Tx::new(self.writer.begin_with("BEGIN IMMEDIATE").await?, Arc::clone(&self.mail_queued)))
    }

    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError> {
        steps::write(self, |tx| steps::create_account(tx, account)).await
    }

    async fn execute(&self, statement: Statement) -> Result<u64, StoreError> {
        let writer = self.writer.clone();
        run_to_completion(async move { Ok(statement.into_query().execute(&writer).await?.rows_affected()) }).await
    }

    async fn rows<R: StoredRow>(&self, query: Statement) -> Result<Vec<R>, StoreError> {
        let rows = query.into_query().fetch_all(&self.readers).await?;
        Ok(rows.iter().map(R::from_row).collect::<Result<_, _>>()?)
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&self.readers).await?;
        Ok(())
    }

    fn time(&self, now: OffsetDateTime) -> OffsetDateTime {
        now
    }

    fn ensure_reachable(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn connections(&self) -> Connections {
        Connections {
            open: self.writer.size() + self.readers.size(),
            idle: self.writer.num_idle() + self.readers.num_idle(),
        }
    }

    async fn close(&self) -> Result<(), StoreError> {
        // Readers keep the log in use.
        self.readers.close().await;
        let done = self.checkpoint().await;
        self.writer.close().await;
        done
    }

    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError> {
        self.execute(first_signing_key(key)).await?;
        // From now on a copy of the file without the log is no longer an empty database.
        self.checkpoint().await
    }
}
