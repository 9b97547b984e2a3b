//! PostgreSQL 15 or newer, which several replicas can share. Nothing outlives a transaction: there are no session
//! settings and no advisory locks.

mod accounts;
mod causes;
mod clock;
mod mail;
mod migration;
mod pool;
mod pooler;
mod sessions;
mod transaction;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    ConnectOptions, Connection, PgConnection,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions, PgRow, PgSslMode},
};
use time::OffsetDateTime;
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
};

use crate::{
    domain::ports::{AccountCreation, Connections, NewAccount, SealedSigningKey, Store},
    error::StoreError,
    this_machine::is_loopback,
};

use self::{
    clock::SharedClock,
    pool::{Lease, Pool, Purpose},
    transaction::{REVOCATIONS, Tx},
};
use super::{
    opening::{Migrate, OpenError},
    purges::{Purges, purge, purges},
    rows::{StoredRow, audit_events, user_columns},
    shared::{Stamp, first_pending, migrator, run_to_completion},
    statement::Statement,
    steps::{self, Backend, Dialect, WriteTransaction as _, first_signing_key},
};

/// The files below `migrations/postgres`, with their names.
const MIGRATIONS: [(&str, &str); 13] = [
    ("0001_accounts_and_sessions.sql", include_str!("../../../migrations/postgres/0001_accounts_and_sessions.sql")),
    ("0002_mail.sql", include_str!("../../../migrations/postgres/0002_mail.sql")),
    ("0003_administration.sql", include_str!("../../../migrations/postgres/0003_administration.sql")),
    ("0004_attempts_under_way.sql", include_str!("../../../migrations/postgres/0004_attempts_under_way.sql")),
    ("0005_reset_limits.sql", include_str!("../../../migrations/postgres/0005_reset_limits.sql")),
    ("0006_notice_limits.sql", include_str!("../../../migrations/postgres/0006_notice_limits.sql")),
    ("0007_clocks.sql", include_str!("../../../migrations/postgres/0007_clocks.sql")),
    ("0008_names_in_any_locale.sql", include_str!("../../../migrations/postgres/0008_names_in_any_locale.sql")),
    ("0009_open_sessions.sql", include_str!("../../../migrations/postgres/0009_open_sessions.sql")),
    ("0010_seen_generations.sql", include_str!("../../../migrations/postgres/0010_seen_generations.sql")),
    ("0011_service_accounts.sql", include_str!("../../../migrations/postgres/0011_service_accounts.sql")),
    ("0012_key_rotation.sql", include_str!("../../../migrations/postgres/0012_key_rotation.sql")),
    ("0013_traces_of_mails.sql", include_str!("../../../migrations/postgres/0013_traces_of_mails.sql")),
];

/// How long connecting may take for the first ping, or for the first one after a failed ping.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a ping may take before the database counts as unavailable.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// How long after it was lost the connection for notifications is opened again.
const LISTEN_RETRY: Duration = Duration::from_secs(2);

/// A handle to the database.
#[derive(Debug, Clone)]
pub struct PostgresStore {
    pool: Pool,
    /// The options of new connections.
    options: PgConnectOptions,
    /// A connection for pings only, so that a busy pool does not look like a database that is down.
    probe: Arc<Mutex<Option<PgConnection>>>,
    /// The result of the last ping. While it is false, every step fails at once.
    reachable: Arc<AtomicBool>,
    /// Whether new connections take writes, as far as is known.
    takes_writes: Arc<AtomicBool>,
    /// The clock of the database, as the last poll of the log found it.
    clock: Arc<SharedClock>,
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
        let options = connect_options(url.expose_secret())?
            .application_name("postern")
            .log_statements(tracing::log::LevelFilter::Trace);
        let opened = Self::connect(&options, max_connections, notifications, migrate).await;
        opened.map_err(|error| causes::explain(error, &options))
    }

    async fn connect(
        options: &PgConnectOptions,
        max_connections: u32,
        notifications: bool,
        migrate: Migrate,
    ) -> Result<Self, OpenError> {
        with_timeout(CONNECT_TIMEOUT, pooler::check(options)).await?;
        let pool = Pool::new(options.clone(), max_connections)?;
        let revocation_written = Arc::new(Notify::new());
        let listening = listen(options.clone(), Arc::clone(&revocation_written));
        let listener = notifications.then(|| Arc::new(AbortOnDrop(tokio::spawn(listening))));
        let store = Self {
            pool,
            options: options.clone(),
            probe: Arc::default(),
            reachable: Arc::new(AtomicBool::new(true)),
            takes_writes: Arc::new(AtomicBool::new(true)),
            clock: Arc::default(),
            revocation_written,
            mail_queued: Arc::default(),
            _listener: listener,
        };
        store.check_encoding().await?;
        match migrate {
            Migrate::Apply => migration::apply(migrator(&MIGRATIONS), &store.options).await?,
            Migrate::Check => store.check_schema().await?,
        }
        let connection = store.connect_for_writing().await?;
        *store.probe.lock().await = Some(connection);
        Ok(store)
    }

    /// Text from callers can have every character.
    async fn check_encoding(&self) -> Result<(), OpenError> {
        let query = Statement::new("SELECT current_setting('server_encoding')");
        match self.rows::<(String,)>(query).await?.pop() {
            Some((encoding,)) if encoding != "UTF8" => Err(OpenError::Encoding(encoding)),
            Some(_) | None => Ok(()),
        }
    }

    async fn check_schema(&self) -> Result<(), OpenError> {
        let known = Statement::new("SELECT to_regclass('_sqlx_migrations') IS NOT NULL");
        let applied = if self.rows::<(bool,)>(known).await?.contains(&(true,)) {
            let versions = Statement::new("SELECT version FROM _sqlx_migrations WHERE success");
            self.rows::<(i64,)>(versions).await?.into_iter().map(|(version,)| version).collect()
        } else {
            Vec::new()
        };
        first_pending(&migrator(&MIGRATIONS), &applied)
            .map_or(Ok(()), |version| Err(OpenError::SchemaOutdated(version)))
    }

    /// A connection of the pool, unless the database is known to be down.
    async fn connection(&self, purpose: Purpose) -> Result<Lease, StoreError> {
        self.ensure_reachable()?;
        self.pool.take(purpose).await
    }

    /// Runs one statement outside a transaction, to its end, even if its caller goes away. Returns its rows.
    async fn all_rows(&self, purpose: Purpose, statement: Statement) -> Result<Vec<PgRow>, StoreError> {
        let store = self.clone();
        run_to_completion(async move {
            let mut connection = store.connection(purpose).await?;
            let rows = statement.into_query().fetch_all(connection.get()?).await;
            connection.give_back_after(rows)
        })
        .await
    }

    /// Runs a statement that writes and returns at most one row.
    async fn written<R: StoredRow>(&self, statement: Statement) -> Result<Option<R>, StoreError> {
        let rows = self.all_rows(Purpose::Write, statement).await?;
        Ok(rows.first().map(R::from_row).transpose()?)
    }

    /// Runs a statement that writes and always returns one row.
    async fn written_row(&self, statement: Statement) -> Result<PgRow, StoreError> {
        let row = self.all_rows(Purpose::Write, statement).await?.pop();
        row.ok_or_else(|| StoreError::broken("a statement returned no row"))
    }

    /// Pings on its own connection, which it opens first if necessary. Opening gets more time than the ping itself:
    /// authentication costs thousands of hash rounds, and retrying a slow one from the start might never succeed.
    async fn probe(&self) -> Result<(), StoreError> {
        let mut probe = self.probe.lock().await;
        let usable = probe.take().filter(|_| self.takes_writes.load(Ordering::Relaxed));
        let connection = match usable {
            Some(mut connection) => {
                with_timeout(PING_TIMEOUT, connection.ping()).await?;
                connection
            }
            None => self.connect_for_writing().await?,
        };
        *probe = Some(connection);
        Ok(())
    }

    /// A database that takes no writes does not count as reachable: that is what a switchover leaves behind. The setting is
    /// one of the connection, so only a new one tells whether that is over, and the others are closed.
    fn found_read_only(&self) {
        self.takes_writes.store(false, Ordering::Relaxed);
        self.pool.close_idle();
    }

    /// A new connection, if the database takes writes. Reads the database's clock too.
    async fn connect_for_writing(&self) -> Result<PgConnection, StoreError> {
        let mut connection = with_timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&self.options)).await?;
        let asked_at = Instant::now();
        let query = sqlx::query_as::<_, (Stamp, bool)>(
            "SELECT clock_timestamp(), current_setting('transaction_read_only')::boolean",
        );
        let (time, takes_no_writes) = with_timeout(PING_TIMEOUT, query.fetch_one(&mut connection)).await?;
        self.clock.set(time.0, asked_at.elapsed());
        self.takes_writes.store(!takes_no_writes, Ordering::Relaxed);
        if takes_no_writes {
            return Err(StoreError::Unavailable("the database takes no writes: it is read-only".into()));
        }
        Ok(connection)
    }
}

/// The options in a URL. Beyond this machine the certificate of the server is verified, unless the URL or `PGSSLMODE` asks
/// for another `sslmode`: with the default of the protocol, whoever stands in between can turn TLS off.
fn connect_options(url: &str) -> Result<PgConnectOptions, OpenError> {
    let options: PgConnectOptions = url.parse().map_err(|error| OpenError::Url(innermost(&error)))?;
    let parameters = url.split_once('?').map_or("", |(_, parameters)| parameters);
    for (name, file) in form_urlencoded::parse(parameters.as_bytes()) {
        // The driver would read it after it has connected, and say neither which file nor which parameter.
        if matches!(
            name.as_ref(),
            "sslrootcert" | "ssl-root-cert" | "ssl-ca" | "sslcert" | "ssl-cert" | "sslkey" | "ssl-key"
        ) {
            let read = std::fs::File::open(file.as_ref());
            read.map_err(|error| OpenError::Url(format!("{name}={file} cannot be read: {error}")))?;
        }
    }
    // `prefer` is the default, which `PGSSLMODE` changes.
    let is_chosen = !matches!(options.get_ssl_mode(), PgSslMode::Prefer)
        || form_urlencoded::parse(parameters.as_bytes()).any(|(name, _)| name == "sslmode" || name == "ssl-mode");
    let host = options.get_host();
    let is_local =
        options.get_socket().is_some() || host.starts_with('/') || is_loopback(host.trim_matches(['[', ']']));
    Ok(if is_chosen || is_local { options } else { options.ssl_mode(PgSslMode::VerifyFull) })
}

/// The cause of an error without what the errors around it say.
fn innermost(error: &sqlx::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
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

impl Backend for PostgresStore {
    type Transaction = Tx;
    // `COLLATE "C"` makes the order and the index ranges independent of the database's locale.
    const DIALECT: Dialect = Dialect {
        users_by_email: concat!(
            "SELECT ",
            user_columns!(),
            " FROM users u WHERE u.email COLLATE \"C\" > $2 AND u.email COLLATE \"C\" >= $3 ",
            "AND u.email COLLATE \"C\" < $4 ORDER BY u.email COLLATE \"C\" LIMIT $1"
        ),
        users_by_username: concat!(
            "SELECT ",
            user_columns!(),
            " FROM users u WHERE lower(u.username COLLATE \"C\") > $2 AND lower(u.username COLLATE \"C\") >= $3 ",
            "AND lower(u.username COLLATE \"C\") < $4 ",
            "AND NOT (u.email COLLATE \"C\" >= $3 AND u.email COLLATE \"C\" < $4) ",
            "ORDER BY lower(u.username COLLATE \"C\") LIMIT $1"
        ),
        audit_events_of_user_with_action: audit_events!(" AND user_id = $3 AND action = $4"),
        purges: purges!(" FOR UPDATE SKIP LOCKED", "least($3, clock_timestamp())"),
    };

    async fn begin(&self) -> Result<Tx, StoreError> {
        Tx::begin(self.connection(Purpose::Write).await?, Arc::clone(&self.mail_queued)).await
    }

    async fn execute(&self, statement: Statement) -> Result<u64, StoreError> {
        let store = self.clone();
        run_to_completion(async move {
            let mut connection = store.connection(Purpose::Write).await?;
            let done = statement.into_query().execute(connection.get()?).await;
            Ok(connection.give_back_after(done)?.rows_affected())
        })
        .await
    }

    async fn rows<R: StoredRow>(&self, query: Statement) -> Result<Vec<R>, StoreError> {
        let rows = self.all_rows(Purpose::Read, query).await?;
        Ok(rows.iter().map(R::from_row).collect::<Result<_, _>>()?)
    }

    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError> {
        self.sign_up(account).await
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn ping(&self) -> Result<(), StoreError> {
        let outcome = self.probe().await;
        let was_reachable = self.reachable.swap(outcome.is_ok(), Ordering::Relaxed);
        if outcome.is_ok() && !was_reachable {
            self.pool.close_idle();
        }
        outcome
    }

    fn time(&self, now: OffsetDateTime) -> OffsetDateTime {
        self.clock.correct(now)
    }

    fn ensure_reachable(&self) -> Result<(), StoreError> {
        if self.reachable.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err(StoreError::Unavailable("the database did not answer the last ping".into()))
        }
    }

    fn connections(&self) -> Connections {
        self.pool.connections()
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.pool.close_idle();
        Ok(())
    }

    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError> {
        steps::write(self, move |mut tx| async move {
            // Replicas that start together take turns. Readers do not wait.
            tx.run(Statement::new("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE")).await?;
            tx.run(first_signing_key(key)).await?;
            tx.commit().await
        })
        .await
    }
}

/// Runs a step on one connection, with a time limit.
async fn with_timeout<T>(limit: Duration, step: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(limit, step).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(StoreError::Unavailable(format!("no answer within {limit:?}").into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verifies(url: &str) -> bool {
        matches!(connect_options(url).expect("a URL").get_ssl_mode(), PgSslMode::VerifyFull)
    }

    #[test]
    fn the_certificate_is_verified_beyond_this_machine_unless_the_url_says_otherwise() {
        for remote in [
            "postgres://u:p@db.example/postern",
            "postgres://u@192.0.2.1:5433/x?application_name=a",
            "postgres://[2001:db8::1]/x",
        ] {
            assert!(verifies(remote), "{remote}");
        }
        let local = [
            "postgres://localhost/x",
            "postgres://u@127.0.0.1:5433/x",
            "postgres://[::1]/x",
            "postgres:///x?host=/var/run/postgresql",
        ];
        let chosen = ["postgres://db.example/x?sslmode=disable", "postgres://db.example/x?a=b&ssl-mode=require"];
        for other in local.iter().chain(&chosen) {
            assert!(!verifies(other), "{other}");
        }
    }
}
