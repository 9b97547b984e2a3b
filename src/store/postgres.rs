//! PostgreSQL 15 or newer: what several replicas share. Isolation is READ COMMITTED throughout; where two steps could
//! meet, the comment at the lock says which row decides. Nothing here outlives a transaction (no session settings, no
//! advisory locks), so PgBouncer in transaction mode may stand between.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    ConnectOptions, Connection, Executor, PgConnection, PgPool, Postgres, Transaction,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use time::OffsetDateTime;
use tokio::sync::Mutex;

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

static MIGRATOR: Migrator = sqlx::migrate!("migrations/postgres");

/// How long a call waits for a connection, be it for a free one or for a new one.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long it may take to connect for the first ping, or for the first after a failed one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a ping may take until the database counts as away.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a connection may take to forget its last user.
const RESET_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that lay idle longer than this is tested before it is used.
const TEST_AFTER_IDLE: Duration = Duration::from_secs(1);

type Tx = Transaction<'static, Postgres>;
type Time = OffsetDateTime;

/// A handle to the database.
#[derive(Debug, Clone)]
pub struct PostgresStore {
    pool: PgPool,
    /// What new connections are made from.
    options: PgConnectOptions,
    /// One connection for pings alone, so that a busy pool is not taken for a database that is away.
    probe: Arc<Mutex<Option<PgConnection>>>,
    /// What the last ping found. While it is false every step fails at once.
    reachable: Arc<AtomicBool>,
}

/// Whether an SQLSTATE is the database's trouble of the moment.
pub(super) fn is_transient(sqlstate: &str) -> bool {
    let class = sqlstate.get(..2).unwrap_or_default();
    // Connection, resources, operator and system; then serialization, deadlock, lock timeout, and the read-only
    // standby that a failover may leave us connected to.
    matches!(class, "08" | "53" | "57" | "58") || matches!(sqlstate, "40001" | "40P01" | "55P03" | "25006")
}

impl PostgresStore {
    /// Connects, and brings the schema up to date or checks that it is.
    pub async fn open(url: &SecretString, max_connections: u32, migrate: Migrate) -> Result<Self, OpenError> {
        let options: PgConnectOptions =
            url.expose_secret().parse().map_err(|error: sqlx::Error| OpenError::Url(error.to_string()))?;
        let options = options.application_name("postern").log_statements(tracing::log::LevelFilter::Trace);
        let pool = PgPoolOptions::new()
            .max_connections(max_connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .before_acquire(|connection, metadata| {
                Box::pin(async move {
                    // A stale connection is replaced instead of failing its next caller.
                    Ok(metadata.idle_for < TEST_AFTER_IDLE || connection.ping().await.is_ok())
                })
            })
            .after_release(|connection, _| {
                Box::pin(async move {
                    // Whatever state a dropped future left behind ends here (see `to_the_end`). The BEGIN is there
                    // because a ROLLBACK alone, outside a transaction, fills the server's log with warnings.
                    // One that does not answer is cut off: an error, where `false` would take leave of the server first.
                    let reset = tokio::time::timeout(RESET_TIMEOUT, connection.execute("BEGIN; ROLLBACK")).await;
                    reset.map_err(|_| sqlx::Error::PoolTimedOut)?.map(|_| true)
                })
            })
            .connect_lazy_with(options.clone());
        let store = Self { pool, options, probe: Arc::default(), reachable: Arc::new(AtomicBool::new(true)) };
        match migrate {
            Migrate::Apply => {
                // A replica of the release to come may have gone one step ahead.
                let migrator = Migrator { ignore_missing: true, ..borrowed(&MIGRATOR) };
                migrator.run(&store.pool).await?;
            }
            Migrate::Check => store.check_schema().await?,
        }
        Ok(store)
    }

    async fn check_schema(&self) -> Result<(), OpenError> {
        let known: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
            .fetch_one(&self.pool)
            .await
            .map_err(StoreError::from)?;
        let applied: Vec<i64> = if known {
            sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success")
                .fetch_all(&self.pool)
                .await
                .map_err(StoreError::from)?
        } else {
            Vec::new()
        };
        first_missing(&MIGRATOR, &applied).map_or(Ok(()), |version| Err(OpenError::SchemaOutdated(version)))
    }

    /// The pool, unless the database is known to be away.
    fn pool(&self) -> Result<&PgPool, StoreError> {
        self.known_reachable().map(|()| &self.pool)
    }

    /// Asks on the connection that is there for it, or makes that first. Signing in gets more time than an answer: it
    /// costs thousands of hash rounds, and to break off a slow one only to begin anew might never end.
    async fn probe(&self) -> Result<(), StoreError> {
        let mut probe = self.probe.lock().await;
        let mut connection = match probe.take() {
            Some(connection) => connection,
            None => within(CONNECT_TIMEOUT, PgConnection::connect_with(&self.options)).await?,
        };
        within(PING_TIMEOUT, connection.ping()).await?;
        *probe = Some(connection);
        Ok(())
    }
}

/// `Migrator` is not `Clone`; its migrations are static.
fn borrowed(migrator: &'static Migrator) -> Migrator {
    Migrator { migrations: migrator.migrations.as_ref().into(), ..Migrator::DEFAULT }
}

#[async_trait]
impl Store for PostgresStore {
    async fn ping(&self) -> Result<(), StoreError> {
        let outcome = self.probe().await;
        self.reachable.store(outcome.is_ok(), Ordering::Relaxed);
        outcome
    }

    fn known_reachable(&self) -> Result<(), StoreError> {
        if self.reachable.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err(StoreError::Unavailable("it did not answer the last ping".into()))
        }
    }

    fn connections(&self) -> Connections {
        Connections { open: self.pool.size(), idle: self.pool.num_idle() }
    }

    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            // Waits for a sign-up of the same address or name that has not committed yet.
            let created = sqlx::query(
                "INSERT INTO users (id, username, email, password_hash, create_time, update_time) \
                 VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT DO NOTHING",
            )
            .bind(account.id.0)
            .bind(account.username.as_str())
            .bind(account.email.as_str())
            .bind(account.password_hash.as_str())
            .bind(account.create_time)
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
        .fetch_optional(self.pool()?)
        .await?
        .map(CredentialsRow::into_credentials)
        .transpose()
    }

    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            // The user's row decides between this and whatever ends all of the user's sessions: that takes the same
            // row FOR NO KEY UPDATE first, so it either sees this session or has this see its work. Logins share the
            // lock among themselves, unless one is to write the row.
            let lock = if session.rehash.is_some() {
                "SELECT u.id FROM users u WHERE u.id = $1 AND u.password_version = $2 AND NOT u.disabled \
                 FOR NO KEY UPDATE"
            } else {
                "SELECT u.id FROM users u WHERE u.id = $1 AND u.password_version = $2 AND NOT u.disabled FOR SHARE"
            };
            let locked = sqlx::query(lock)
                .bind(session.grant.user_id.0)
                .bind(session.password_version)
                .fetch_optional(&mut *tx)
                .await?;
            if locked.is_none() {
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
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp(), $9, $10)",
            )
            .bind(session.grant.session_id.0)
            .bind(session.grant.user_id.0)
            .bind(session.create_time)
            .bind(session.grant.session_end_time)
            .bind(session.grant.generation)
            .bind(session.refresh_hash.0.as_slice())
            .bind(session.grant.issue_time)
            .bind(session.grant.expire_time)
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
        let pool = self.pool()?.clone();
        to_the_end(async move {
            // Nearly every refresh ends here, in one round trip. Of several that present one generation the first
            // takes the row; the others wait for it and then find another generation.
            if let Some(user) = rotate(&pool, &rotation).await? {
                return Ok(RotationOutcome::Rotated(user));
            }
            let mut tx = pool.begin().await?;
            let Some(session) = sqlx::query_as::<_, PresentedRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                ", s.generation, s.refresh_hash, s.refresh_issue_time, ",
                "s.refresh_expire_time, s.revoke_time, ",
                "clock_timestamp() - s.last_refresh_time <= make_interval(secs => $3) AS within_retry_window ",
                "FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2 FOR UPDATE OF s"
            ))
            .bind(rotation.next.session_id.0)
            .bind(rotation.next.user_id.0)
            .bind(rotation.retry_window.as_secs_f64())
            .fetch_optional(&mut *tx)
            .await?
            else {
                return Ok(RotationOutcome::Dead);
            };
            let session = session.into_session()?;
            match session.state.judge(&rotation) {
                // It was not live a moment ago: its user was enabled since.
                Presented::Live => {
                    let rotated = rotate(&mut *tx, &rotation).await?;
                    tx.commit().await?;
                    Ok(rotated.map_or(RotationOutcome::Dead, RotationOutcome::Rotated))
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
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            if logout.everywhere {
                // First the user, then the sessions: a login that has the user's row commits before, and its session
                // is among those that end.
                sqlx::query("SELECT u.id FROM users u WHERE u.id = $1 FOR NO KEY UPDATE")
                    .bind(logout.user_id.0)
                    .execute(&mut *tx)
                    .await?;
            }
            let Some(session) = sqlx::query_as::<_, LeavingRow<Time>>(
                "SELECT generation, refresh_expire_time, revoke_reason FROM sessions WHERE id = $1 AND user_id = $2 FOR UPDATE",
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
                .bind(logout.now)
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
        .fetch_optional(self.pool()?)
        .await?
        .map(UserRow::into_user)
        .transpose()
    }

    async fn forget_ended_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let deleted = sqlx::query(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE end_time < $1 \
                 ORDER BY end_time LIMIT $2 FOR UPDATE SKIP LOCKED)",
            )
            .bind(now)
            .bind(i64::from(limit))
            .execute(&pool)
            .await?;
            Ok(deleted.rows_affected())
        })
        .await
    }

    async fn signing_keys(&self) -> Result<Vec<SealedSigningKey>, StoreError> {
        sqlx::query_as::<_, SigningKeyRow<Time>>(
            "SELECT kid, algorithm, sealed_private_key, create_time FROM signing_keys",
        )
        .fetch_all(self.pool()?)
        .await?
        .into_iter()
        .map(SigningKeyRow::into_key)
        .collect()
    }

    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            // Replicas that start together come one after the other; readers are not held up.
            sqlx::query("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE").execute(&mut *tx).await?;
            sqlx::query(
                "INSERT INTO signing_keys (kid, algorithm, sealed_private_key, create_time) \
                 SELECT $1, $2, $3, $4 WHERE NOT EXISTS (SELECT 1 FROM signing_keys)",
            )
            .bind(key.kid)
            .bind(key.algorithm)
            .bind(key.sealed_private_key)
            .bind(key.create_time)
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }
}

/// The outcome of a step on one connection, or that it took too long.
async fn within<T>(limit: Duration, step: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(limit, step).await {
        Ok(outcome) => Ok(outcome?),
        Err(elapsed) => Err(StoreError::Unavailable(Box::new(elapsed))),
    }
}

async fn user_by_id(tx: &mut Tx, id: UserId) -> Result<User, StoreError> {
    sqlx::query_as::<_, UserRow<Time>>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
        .bind(id.0)
        .fetch_one(&mut **tx)
        .await?
        .into_user()
}

/// Puts the next token in the place of the presented one, if that is the live one of a live session.
async fn rotate(
    executor: impl Executor<'_, Database = Postgres>,
    rotation: &Rotation,
) -> Result<Option<User>, StoreError> {
    sqlx::query_as::<_, UserRow<Time>>(concat!(
        "UPDATE sessions s SET generation = $4, refresh_hash = $5, refresh_issue_time = $6, ",
        "refresh_expire_time = $7, last_refresh_time = clock_timestamp() FROM users u ",
        "WHERE s.id = $1 AND s.user_id = $9 AND s.generation = $2 AND s.refresh_hash = $3 AND s.revoke_time IS NULL ",
        "AND s.refresh_expire_time > $8 AND u.id = s.user_id AND NOT u.disabled RETURNING ",
        user_columns!()
    ))
    .bind(rotation.next.session_id.0)
    .bind(rotation.presented_generation)
    .bind(rotation.presented_hash.0.as_slice())
    .bind(rotation.next.generation)
    .bind(rotation.next_hash.0.as_slice())
    .bind(rotation.next.issue_time)
    .bind(rotation.next.expire_time)
    .bind(rotation.now)
    .bind(rotation.next.user_id.0)
    .fetch_optional(executor)
    .await?
    .map(UserRow::into_user)
    .transpose()
}

async fn revoke(tx: &mut Tx, session: SessionId, now: OffsetDateTime, reason: RevokeReason) -> Result<(), StoreError> {
    sqlx::query("UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE id = $1 AND revoke_time IS NULL")
        .bind(session.0)
        .bind(now)
        .bind(reason.as_str())
        .execute(&mut **tx)
        .await?;
    Ok(())
}
