//! PostgreSQL 15 or newer: what several replicas share. Isolation is READ COMMITTED throughout; where two steps could
//! meet, the comment at the lock says which row decides. Nothing here outlives a transaction (no session settings, no
//! advisory locks), so PgBouncer in transaction mode may stand between.

mod accounts;
mod admin;
mod audit;
mod mail;
mod sessions;

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
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use time::OffsetDateTime;
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
};

use crate::domain::keyring::SealedSigningKey;

use super::{Connections, Migrate, OpenError, Store, StoreError, first_missing, rows::SigningKeyRow, to_the_end};

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
/// The channel on which replicas tell each other that there is something new in the log of revocations.
const REVOCATIONS: &str = "postern_revocations";
/// How long after it was lost the connection for notifications is made anew.
const LISTEN_RETRY: Duration = Duration::from_secs(2);

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
    /// Woken by whatever replica writes a revocation, where the connection passes notifications on.
    revocation_written: Arc<Notify>,
    /// Ends with the store.
    _listener: Option<Arc<AbortOnDrop>>,
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
    pub async fn open(
        url: &SecretString,
        max_connections: u32,
        notifications: bool,
        migrate: Migrate,
    ) -> Result<Self, OpenError> {
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
        let revocation_written = Arc::new(Notify::new());
        let listening = listen(options.clone(), Arc::clone(&revocation_written));
        let listener = notifications.then(|| Arc::new(AbortOnDrop(tokio::spawn(listening))));
        let store = Self {
            pool,
            options,
            probe: Arc::default(),
            reachable: Arc::new(AtomicBool::new(true)),
            revocation_written,
            _listener: listener,
        };
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

/// A task that ends with what it works for.
#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Listens on a connection of its own. It only shortens a wait: through PgBouncer in transaction mode nothing arrives,
/// and polling does as well.
async fn listen(options: PgConnectOptions, written: Arc<Notify>) {
    loop {
        let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options.clone());
        let outcome: Result<(), sqlx::Error> = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(REVOCATIONS).await?;
            loop {
                listener.recv().await?;
                written.notify_one();
            }
        }
        .await;
        if let Err(error) = outcome {
            tracing::debug!(%error, "notifications of the database are not heard; polling");
        }
        tokio::time::sleep(LISTEN_RETRY).await;
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
