//! SQLite: the embedded default, for one process. One connection writes, with `BEGIN IMMEDIATE`, so every step that
//! writes is alone from its first statement to its commit; a few others read beside it (WAL). `synchronous = FULL`:
//! what was acknowledged survives a kill and a power cut.

mod accounts;
mod admin;
mod audit;
mod mail;
mod sessions;

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use sqlx::{
    ConnectOptions, Executor, Sqlite, SqlitePool, Transaction,
    migrate::Migrator,
    pool::PoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use time::OffsetDateTime;

use crate::domain::keyring::SealedSigningKey;

use super::{Connections, Migrate, OpenError, Store, StoreError, first_missing, rows::SigningKeyRow, to_the_end};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/sqlite");

/// How long a write waits for its turn.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long SQLite waits for another process's lock, such as a backup's.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);
const READERS: u32 = 4;
/// How often migrations are tried, and how long apart.
const MIGRATION_ATTEMPTS: u32 = 10;
const MIGRATION_PAUSE: Duration = Duration::from_millis(100);

type Tx = Transaction<'static, Sqlite>;
/// Microseconds since the Unix epoch.
type Time = i64;

/// A handle to the database file.
#[derive(Debug, Clone)]
pub struct SqliteStore {
    writer: SqlitePool,
    readers: SqlitePool,
}

/// Whether a SQLite result code is the machine's trouble of the moment.
pub(super) fn is_transient(code: &str) -> bool {
    // The low byte is the primary code: BUSY, LOCKED, READONLY, IOERR, FULL, CANTOPEN, PROTOCOL.
    code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6 | 8 | 10 | 13 | 14 | 15))
}

impl SqliteStore {
    /// Opens the file, creating it where missing, and brings the schema up to date or checks that it is.
    pub async fn open(path: &Path, migrate: Migrate) -> Result<Self, OpenError> {
        if migrate == Migrate::Apply {
            make_private(path).map_err(|error| StoreError::from(sqlx::Error::Io(error)))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT)
            .log_statements(tracing::log::LevelFilter::Trace);
        let writer = pool().max_connections(1).connect_with(options.clone()).await.map_err(StoreError::from)?;
        match migrate {
            Migrate::Apply => {
                apply_migrations(&writer).await?;
            }
            Migrate::Check => check_schema(&writer).await?,
        }
        let readers = pool().max_connections(READERS).connect_lazy_with(options.pragma("query_only", "ON"));
        Ok(Self { writer, readers })
    }

    /// Begins a step that writes. No other step writes until it ends.
    async fn begin(writer: &SqlitePool) -> Result<Tx, StoreError> {
        Ok(writer.begin_with("BEGIN IMMEDIATE").await?)
    }
}

/// Makes the file where it is missing, for its owner alone; SQLite gives the files beside it the same mode.
fn make_private(path: &Path) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    // Only a new file: to open and close one that SQLite has open in this process would drop SQLite's locks on it.
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn pool() -> PoolOptions<Sqlite> {
    SqlitePoolOptions::new().acquire_timeout(ACQUIRE_TIMEOUT).after_release(|connection, _| {
        Box::pin(async move {
            // Whatever state a dropped future left behind ends here (see `to_the_end`); where there is none, as nearly
            // always, SQLite says so and nothing is lost.
            let _ = connection.execute("ROLLBACK").await;
            Ok(true)
        })
    })
}

/// Brings the schema up to date. sqlx takes no lock for it on SQLite, so of several processes that start on one new file
/// all but the first may stumble over its tables; a moment later they find nothing left to do.
async fn apply_migrations(writer: &SqlitePool) -> Result<(), OpenError> {
    let migrations = MIGRATOR.migrations.as_ref().into();
    let migrator = Migrator { migrations, ignore_missing: true, ..Migrator::DEFAULT };
    for _ in 1..MIGRATION_ATTEMPTS {
        match migrator.run(writer).await {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!(%error, "the migrations could not be applied; trying again"),
        }
        tokio::time::sleep(MIGRATION_PAUSE).await;
    }
    Ok(migrator.run(writer).await?)
}

async fn check_schema(writer: &SqlitePool) -> Result<(), OpenError> {
    let known: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE name = '_sqlx_migrations')")
        .fetch_one(writer)
        .await
        .map_err(StoreError::from)?;
    let applied: Vec<i64> = if known {
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success")
            .fetch_all(writer)
            .await
            .map_err(StoreError::from)?
    } else {
        Vec::new()
    };
    first_missing(&MIGRATOR, &applied).map_or(Ok(()), |version| Err(OpenError::SchemaOutdated(version)))
}

fn microseconds(time: OffsetDateTime) -> i64 {
    // 292,000 years on either side of 1970; `OffsetDateTime` ends before.
    i64::try_from(time.unix_timestamp_nanos() / 1_000).unwrap_or(i64::MAX)
}

/// A length of time as the database keeps it, in microseconds.
fn span(length: Duration) -> i64 {
    i64::try_from(length.as_micros()).unwrap_or(i64::MAX)
}

#[async_trait]
impl Store for SqliteStore {
    async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&self.readers).await?;
        Ok(())
    }

    fn known_reachable(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn connections(&self) -> Connections {
        Connections {
            open: self.writer.size() + self.readers.size(),
            idle: self.writer.num_idle() + self.readers.num_idle(),
        }
    }

    async fn signing_keys(&self) -> Result<Vec<SealedSigningKey>, StoreError> {
        sqlx::query_as::<_, SigningKeyRow<Time>>(
            "SELECT kid, algorithm, sealed_private_key, create_time FROM signing_keys",
        )
        .fetch_all(&self.readers)
        .await?
        .into_iter()
        .map(SigningKeyRow::into_key)
        .collect()
    }

    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            sqlx::query(
                "INSERT INTO signing_keys (kid, algorithm, sealed_private_key, create_time) \
                 SELECT $1, $2, $3, $4 WHERE NOT EXISTS (SELECT 1 FROM signing_keys)",
            )
            .bind(key.kid)
            .bind(key.algorithm)
            .bind(key.sealed_private_key)
            .bind(microseconds(key.create_time))
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }
}
