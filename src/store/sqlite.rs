//! SQLite: the embedded default, for one process. One connection writes, with `BEGIN IMMEDIATE`, so every step that
//! writes is alone from its first statement to its commit; a few others read beside it (WAL). `synchronous = FULL`:
//! what was acknowledged survives a kill and a power cut.

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use sqlx::{
    ConnectOptions, Executor, Sqlite, SqlitePool, Transaction,
    migrate::Migrator,
    pool::PoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use time::OffsetDateTime;

use crate::domain::{
    SessionId, UserId,
    account::{Email, User},
    keyring::SealedSigningKey,
    token::RefreshGrant,
};

use super::{
    AccountCreation, Connections, Credentials, Logout, LogoutOutcome, Migrate, NewAccount, NewSession, OpenError,
    Presented, RevokeReason, Rotation, RotationOutcome, SessionOpening, Store, StoreError, first_missing,
    rows::{CredentialsRow, LeavingRow, PresentedRow, SigningKeyRow, UserRow, user_columns},
    to_the_end,
};

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

    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let created = sqlx::query(
                "INSERT INTO users (id, username, email, password_hash, create_time, update_time) \
                 VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT DO NOTHING",
            )
            .bind(account.id.0)
            .bind(account.username.as_str())
            .bind(account.email.as_str())
            .bind(account.password_hash.as_str())
            .bind(microseconds(account.create_time))
            .execute(&mut *tx)
            .await?
            .rows_affected();
            if created == 0 {
                let email_taken: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users WHERE email = $1)")
                    .bind(account.email.as_str())
                    .fetch_one(&mut *tx)
                    .await?;
                return Ok(if email_taken { AccountCreation::EmailTaken } else { AccountCreation::UsernameTaken });
            }
            sqlx::query("INSERT INTO user_roles (user_id, role) VALUES ($1, 'user')")
                .bind(account.id.0)
                .execute(&mut *tx)
                .await?;
            let user = user_by_id(&mut tx, account.id).await?;
            tx.commit().await?;
            Ok(AccountCreation::Created(user))
        })
        .await
    }

    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError> {
        sqlx::query_as::<_, CredentialsRow<Time>>(concat!(
            "SELECT ",
            user_columns!(),
            ", u.password_hash, u.password_version FROM users u WHERE u.email = $1"
        ))
        .bind(email.as_str())
        .fetch_optional(&self.readers)
        .await?
        .map(CredentialsRow::into_credentials)
        .transpose()
    }

    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let unchanged: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT 1 FROM users u WHERE u.id = $1 AND u.password_version = $2 AND NOT u.disabled)",
            )
            .bind(session.grant.user_id.0)
            .bind(session.password_version)
            .fetch_one(&mut *tx)
            .await?;
            if !unchanged {
                return Ok(SessionOpening::Refused);
            }
            if let Some(rehash) = &session.rehash {
                sqlx::query("UPDATE users SET password_hash = $2 WHERE id = $1 AND password_hash = $3")
                    .bind(session.grant.user_id.0)
                    .bind(rehash.to.as_str())
                    .bind(rehash.from.as_str())
                    .execute(&mut *tx)
                    .await?;
            }
            sqlx::query(
                "INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
                 refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $3, $9, $10)",
            )
            .bind(session.grant.session_id.0)
            .bind(session.grant.user_id.0)
            .bind(microseconds(session.create_time))
            .bind(microseconds(session.grant.session_end_time))
            .bind(session.grant.generation)
            .bind(session.refresh_hash.0.as_slice())
            .bind(microseconds(session.grant.issue_time))
            .bind(microseconds(session.grant.expire_time))
            .bind(session.client_ip.map(|ip| ip.to_string()))
            .bind(session.user_agent)
            .execute(&mut *tx)
            .await?;
            let user = user_by_id(&mut tx, session.grant.user_id).await?;
            tx.commit().await?;
            Ok(SessionOpening::Opened(user))
        })
        .await
    }

    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let Some(session) = sqlx::query_as::<_, PresentedRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                ", s.generation, s.refresh_hash, s.refresh_issue_time, ",
                "s.refresh_expire_time, s.revoke_time, $3 - s.last_refresh_time <= $4 AS within_retry_window ",
                "FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2"
            ))
            .bind(rotation.next.session_id.0)
            .bind(rotation.next.user_id.0)
            .bind(microseconds(rotation.now))
            .bind(i64::try_from(rotation.retry_window.as_micros()).unwrap_or(i64::MAX))
            .fetch_optional(&mut *tx)
            .await?
            else {
                return Ok(RotationOutcome::Dead);
            };
            let session = session.into_session()?;
            match session.state.judge(&rotation) {
                Presented::Live => {
                    rotate(&mut tx, &rotation).await?;
                    tx.commit().await?;
                    Ok(RotationOutcome::Rotated(session.user))
                }
                Presented::Previous => Ok(RotationOutcome::Retried {
                    grant: RefreshGrant {
                        generation: session.state.generation,
                        issue_time: session.refresh_issue_time,
                        expire_time: session.state.refresh_expire_time,
                        ..rotation.next
                    },
                    hash: session.state.refresh_hash,
                    user: session.user,
                }),
                Presented::UsedUp => {
                    // Committed before anybody is answered: the thief must not outlive the alarm.
                    revoke(&mut tx, rotation.next.session_id, rotation.now, RevokeReason::TokenReused).await?;
                    tx.commit().await?;
                    Ok(RotationOutcome::Reused)
                }
                Presented::OfDeadSession => Ok(RotationOutcome::Dead),
            }
        })
        .await
    }

    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let Some(session) = sqlx::query_as::<_, LeavingRow<Time>>(
                "SELECT generation, refresh_expire_time, revoke_reason FROM sessions WHERE id = $1 AND user_id = $2",
            )
            .bind(logout.session_id.0)
            .bind(logout.user_id.0)
            .fetch_optional(&mut *tx)
            .await?
            else {
                return Ok(LogoutOutcome::Refused);
            };
            let leaving = session.into_session()?.judge(&logout);
            revoke(&mut tx, logout.session_id, logout.now, leaving.reason).await?;
            if leaving.others_too {
                sqlx::query(
                    "UPDATE sessions SET revoke_time = $2, revoke_reason = $3 \
                     WHERE user_id = $1 AND revoke_time IS NULL",
                )
                .bind(logout.user_id.0)
                .bind(microseconds(logout.now))
                .bind(RevokeReason::EndedElsewhere.as_str())
                .execute(&mut *tx)
                .await?;
            }
            tx.commit().await?;
            Ok(leaving.outcome)
        })
        .await
    }

    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError> {
        sqlx::query_as::<_, UserRow<Time>>(concat!(
            "SELECT ",
            user_columns!(),
            " FROM users u JOIN sessions s ON s.user_id = u.id ",
            "WHERE s.id = $1 AND u.id = $2 AND s.revoke_time IS NULL AND NOT u.disabled"
        ))
        .bind(session.0)
        .bind(user.0)
        .fetch_optional(&self.readers)
        .await?
        .map(UserRow::into_user)
        .transpose()
    }

    async fn forget_ended_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let deleted = sqlx::query(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE end_time < $1 \
                 ORDER BY end_time LIMIT $2)",
            )
            .bind(microseconds(now))
            .bind(i64::from(limit))
            .execute(&writer)
            .await?;
            Ok(deleted.rows_affected())
        })
        .await
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

async fn user_by_id(tx: &mut Tx, id: UserId) -> Result<User, StoreError> {
    sqlx::query_as::<_, UserRow<Time>>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
        .bind(id.0)
        .fetch_one(&mut **tx)
        .await?
        .into_user()
}

/// Puts the next token in the place of the presented one, which was found to be the live one.
async fn rotate(tx: &mut Tx, rotation: &Rotation) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE sessions SET generation = $2, refresh_hash = $3, refresh_issue_time = $4, refresh_expire_time = $5, \
         last_refresh_time = $6 WHERE id = $1",
    )
    .bind(rotation.next.session_id.0)
    .bind(rotation.next.generation)
    .bind(rotation.next_hash.0.as_slice())
    .bind(microseconds(rotation.next.issue_time))
    .bind(microseconds(rotation.next.expire_time))
    .bind(microseconds(rotation.now))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn revoke(tx: &mut Tx, session: SessionId, now: OffsetDateTime, reason: RevokeReason) -> Result<(), StoreError> {
    sqlx::query("UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE id = $1 AND revoke_time IS NULL")
        .bind(session.0)
        .bind(microseconds(now))
        .bind(reason.as_str())
        .execute(&mut **tx)
        .await?;
    Ok(())
}
