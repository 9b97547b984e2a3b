//! PostgreSQL 15 or newer, which several replicas can share. Nothing outlives a transaction: there are no session
//! settings and no advisory locks.

mod mail;
mod queries;
mod sessions;
mod transaction;

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
    ConnectOptions, Connection, Executor, PgConnection, PgPool,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
};

use crate::{
    domain::ports::{Connections, SealedSigningKey, Store},
    error::StoreError,
};

use self::transaction::{REVOCATIONS, Tx};
use super::{
    opening::{Migrate, OpenError},
    rows::SigningKeyRow,
    shared::{Stamp, first_pending, run_to_completion},
    steps::Backend,
};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/postgres");

/// How long a call waits for a connection, free or new.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long connecting may take for the first ping, or for the first one after a failed ping.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a ping may take before the database counts as unavailable.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// How long resetting a released connection may take.
const RESET_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that was idle for longer than this is tested before it is used.
const TEST_AFTER_IDLE: Duration = Duration::from_secs(1);
/// How long after it was lost the connection for notifications is opened again.
const LISTEN_RETRY: Duration = Duration::from_secs(2);

/// A handle to the database.
#[derive(Debug, Clone)]
pub struct PostgresStore {
    pool: PgPool,
    /// The options of new connections.
    options: PgConnectOptions,
    /// A connection for pings only, so that a busy pool does not look like a database that is down.
    probe: Arc<Mutex<Option<PgConnection>>>,
    /// The result of the last ping. While it is false, every step fails at once.
    reachable: Arc<AtomicBool>,
    /// Woken when a replica has written a revocation, where the connection passes notifications on.
    revocation_written: Arc<Notify>,
    /// Woken when this process has queued mail.
    mail_queued: Arc<Notify>,
    /// Stopped with the store.
    _listener: Option<Arc<AbortOnDrop>>,
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
                    // A stale connection is replaced, so that its next caller does not fail.
                    Ok(metadata.idle_for < TEST_AFTER_IDLE || connection.ping().await.is_ok())
                })
            })
            .after_release(|connection, _| {
                Box::pin(async move {
                    // Ends a transaction that a dropped future left open (see `run_to_completion`). The BEGIN is needed
                    // because a ROLLBACK outside a transaction writes a warning to the server's log. A connection that
                    // does not answer is cut off by returning an error; `false` would first say goodbye to the server.
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
            mail_queued: Arc::default(),
            _listener: listener,
        };
        match migrate {
            Migrate::Apply => {
                // A replica of a newer release may have applied more migrations.
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
        first_pending(&MIGRATOR, &applied).map_or(Ok(()), |version| Err(OpenError::SchemaOutdated(version)))
    }

    /// The pool, unless the database is known to be down.
    fn pool(&self) -> Result<&PgPool, StoreError> {
        self.ensure_reachable().map(|()| &self.pool)
    }

    /// Pings on its own connection, which it opens first if necessary. Opening gets more time than the ping itself:
    /// authentication costs thousands of hash rounds, and retrying a slow one from the start might never succeed.
    async fn probe(&self) -> Result<(), StoreError> {
        let mut probe = self.probe.lock().await;
        let mut connection = match probe.take() {
            Some(connection) => connection,
            None => with_timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&self.options)).await?,
        };
        with_timeout(PING_TIMEOUT, connection.ping()).await?;
        *probe = Some(connection);
        Ok(())
    }
}

/// A task that is aborted when its owner is dropped.
#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Listens on its own connection. It only shortens a wait: through PgBouncer in transaction mode nothing arrives, and
/// polling works without it.
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
            tracing::debug!(%error, "notifications from the database do not arrive; polling");
        }
        tokio::time::sleep(LISTEN_RETRY).await;
    }
}

/// `Migrator` is not `Clone`; its migrations are static.
fn borrowed(migrator: &'static Migrator) -> Migrator {
    Migrator { migrations: migrator.migrations.as_ref().into(), ..Migrator::DEFAULT }
}

impl Backend for PostgresStore {
    type Transaction = Tx;

    async fn begin(&self) -> Result<Tx, StoreError> {
        Ok(Tx::new(self.pool()?.begin().await?, Arc::clone(&self.mail_queued)))
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn ping(&self) -> Result<(), StoreError> {
        let outcome = self.probe().await;
        self.reachable.store(outcome.is_ok(), Ordering::Relaxed);
        outcome
    }

    fn ensure_reachable(&self) -> Result<(), StoreError> {
        if self.reachable.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err(StoreError::Unavailable("the database did not answer the last ping".into()))
        }
    }

    fn connections(&self) -> Connections {
        Connections { open: self.pool.size(), idle: self.pool.num_idle() }
    }

    async fn signing_keys(&self) -> Result<Vec<SealedSigningKey>, StoreError> {
        let query = sqlx::query_as::<_, SigningKeyRow>(
            "SELECT kid, algorithm, sealed_private_key, create_time FROM signing_keys",
        );
        Ok(query.fetch_all(self.pool()?).await?.into_iter().map(SigningKeyRow::into_key).collect())
    }

    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        run_to_completion(async move {
            let mut tx = pool.begin().await?;
            // Replicas that start together take turns. Readers do not wait.
            sqlx::query("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE").execute(&mut *tx).await?;
            sqlx::query(
                "INSERT INTO signing_keys (kid, algorithm, sealed_private_key, create_time) \
                 SELECT $1, $2, $3, $4 WHERE NOT EXISTS (SELECT 1 FROM signing_keys)",
            )
            .bind(key.kid)
            .bind(key.algorithm)
            .bind(key.sealed_private_key)
            .bind(Stamp(key.create_time))
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }
}

/// Runs a step on one connection, with a time limit.
async fn with_timeout<T>(limit: Duration, step: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(limit, step).await {
        Ok(outcome) => Ok(outcome?),
        Err(elapsed) => Err(StoreError::Unavailable(Box::new(elapsed))),
    }
}
