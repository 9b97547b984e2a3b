//! The composition root: the only module that knows every concrete component. [`build`] creates the components and
//! binds the addresses. [`App::run`] serves until it is stopped.

use std::{
    net::SocketAddr,
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::Router;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{self, Checked, Config, ConfigError, ListenSettings},
    database_url::DatabaseUrl,
    domain::{
        demands::DemandWarnings,
        env::Env,
        hasher::Hasher,
        keyring::Keyring,
        mail::MailPolicy,
        master_key::{MasterKey, MasterKeys},
        one_time::OneTimeTokens,
        page_token::PageTokens,
        ports::Store,
        revocation::Revocations,
        seen::SeenGenerations,
        service::{Service, count_from_zero},
        service_account::{MOST_REVOKED_TOKENS, VerifiedSecrets},
        streams::Streams,
        throttle::{LoginAttempts, RateLimiter},
        token::Tokens,
    },
    error::Error,
    grpc::{self, Health},
    http::{self, HttpOptions, ops::Readiness, pages::PageOptions},
    listen::{self, Bounds, ConnectionLimits, Protocol, TrustedProxies},
    mail::{
        self, Mailer,
        outbox::{self, Outbox},
    },
    store::{self, Migrate, OpenError},
    telemetry::{Metrics, TelemetryError, Traces, start_traces},
    tls::{self, Tls},
};

/// How long `serve` and `migrate` wait for a database that cannot be reached: it is often started at the same time.
const STORE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the other commands wait: an operator can try again. A server that starts now may have the file for a moment.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause before it tries again to connect.
const STORE_RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How often the store's health is checked.
const PING_INTERVAL: Duration = Duration::from_millis(250);
/// How long closing the database may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// The background tasks, by the names under which their failures are counted.
const TASKS: [&str; 8] = ["health", "revocations", "keys", "seen", "purge", "limits", "metrics", "tls"];
/// The pause before a background task that failed starts again.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// How long mails in flight may still take after the last call has ended.
const MAIL_DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the service could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error(transparent)]
    Mail(#[from] mail::SetupError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("{variable}={address}: cannot listen there: {source}{}", listen_remedy(.source))]
    Listen { variable: &'static str, address: SocketAddr, source: std::io::Error },
    /// The message is the cause, which only an operator may see.
    #[error("{}", .0.for_operators())]
    Domain(#[from] Error),
}

fn listen_remedy(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => ": stop the process that has this port, or choose another one",
        std::io::ErrorKind::AddrNotAvailable => ": this machine has no such address",
        std::io::ErrorKind::PermissionDenied => ": choose a port above 1023, or give the process CAP_NET_BIND_SERVICE",
        _ => "",
    }
}

/// The service, built and bound to its addresses, but not yet serving.
#[derive(Debug)]
pub struct App {
    surfaces: Vec<Surface>,
    addresses: Addresses,
    proxies: TrustedProxies,
    tls: Option<Tls>,
    health: Health,
    readiness: Arc<Readiness>,
    metrics: Metrics,
    store: Arc<dyn Store>,
    service: Arc<Service>,
    outbox: Outbox,
    http_idle_timeout: Duration,
    /// How long the service goes on answering after it has reported NOT_SERVING.
    lame_duck: Duration,
    max_connection_age: Option<Duration>,
    traces: Option<Traces>,
}

/// The addresses that the service listens on.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    pub ops: SocketAddr,
}

/// A bound address and what it serves.
#[derive(Debug)]
struct Surface {
    listener: TcpListener,
    protocol: Protocol,
    most_connections: usize,
    router: Router,
}

/// Builds the service: checks the configuration, opens the store and its keys, starts the hashing threads, and binds
/// the addresses.
pub async fn build(config: &Config, env: Env) -> Result<App, BuildError> {
    let checked = config.check()?;
    let mailer = Mailer::new(checked.mail_transport.clone(), checked.mail_from.clone())?;
    build_checked(config, checked, env, mailer).await
}

/// Builds the service with another mailer than the configured one: tests collect mails in memory.
pub async fn build_with(config: &Config, env: Env, mailer: Mailer) -> Result<App, BuildError> {
    build_checked(config, config.check()?, env, mailer).await
}

async fn build_checked(config: &Config, checked: Checked, env: Env, mailer: Mailer) -> Result<App, BuildError> {
    let (templates, tls) = (checked.mail_templates.clone(), checked.tls.clone());
    let traces = checked.collector.clone().map(start_traces).transpose()?;
    if mailer.is_log_only() && matches!(checked.database, DatabaseUrl::Postgres { .. }) {
        tracing::warn!("mails are only written to the log: set POSTERN_MAIL_URL to send them");
    }
    let service = open(config, checked, env, Opening { creates: true, patience: STORE_TIMEOUT }).await?;
    let env = service.env.clone();
    service.load_revocations().await?;
    let metrics = Metrics::of_process();
    count_from_zero();
    outbox::count_from_zero();
    listen::count_from_zero();
    tls::count_from_zero();
    if let Some(tls) = &tls {
        tls.announce();
    }
    for task in TASKS {
        metrics::counter!("postern_task_failures_total", "task" => task).increment(0);
    }
    let readiness = Arc::new(Readiness::default());
    let (grpc_router, health) =
        grpc::router(Arc::clone(&service), env.clone(), config.listen.serves_reflection()).await?;
    let http_options = HttpOptions {
        public_url: config.public_url().to_owned(),
        cors_origins: config.listen.cors_origins.clone(),
        pages: PageOptions {
            service_name: config.mail.service_name.clone(),
            min_password_length: config.passwords.password_min_length.into(),
        },
        env: env.clone(),
    };
    let http_router = http::router(&grpc_router, Arc::clone(&service), &http_options)?;
    let ops_router = http::ops::router(Arc::clone(&readiness), metrics.clone());

    let limits = ConnectionLimits::of_process(config.store.database_max_connections);
    let (calls, ops) = (limits.calls, limits.ops);
    let ListenSettings { grpc_addr, http_addr, ops_addr, .. } = config.listen;
    let (grpc, grpc_address) = listen_on(("POSTERN_GRPC_ADDR", grpc_addr), Protocol::Http2, calls, grpc_router).await?;
    let both = Protocol::Http1AndHttp2;
    let (http, http_address) = listen_on(("POSTERN_HTTP_ADDR", http_addr), both, calls, http_router).await?;
    let (ops, ops_address) = listen_on(("POSTERN_OPS_ADDR", ops_addr), both, ops, ops_router).await?;
    let addresses = Addresses { grpc: grpc_address, http: http_address, ops: ops_address };
    let store = Arc::clone(&service.store);
    let outbox = Outbox { store: Arc::clone(&store), tokens: Arc::clone(&service.one_time), mailer, templates, env };
    let proxies = config.limits.trusted_proxies();
    Ok(App {
        surfaces: vec![grpc, http, ops],
        addresses,
        proxies,
        tls,
        health,
        readiness,
        metrics,
        store,
        service,
        outbox,
        http_idle_timeout: config.listen.http_idle_timeout,
        lame_duck: config.listen.lame_duck,
        max_connection_age: config.listen.connection_age(),
        traces,
    })
}

/// How a command opens the store.
#[derive(Debug, Clone, Copy)]
struct Opening {
    /// Whether a database and keys that are missing are created.
    creates: bool,
    /// How long to wait for a database that cannot be reached.
    patience: Duration,
}

/// Builds the domain's service on the configured store, without network addresses, for a command that may be the first
/// one on a new database.
pub async fn domain(config: &Config, env: Env) -> Result<Arc<Service>, BuildError> {
    open(config, config.check()?, env, Opening { creates: true, patience: COMMAND_TIMEOUT }).await
}

/// The same for a command that only makes sense on a database in use. It creates nothing.
pub async fn existing_domain(config: &Config, env: Env) -> Result<Arc<Service>, BuildError> {
    open(config, config.check()?, env, Opening { creates: false, patience: COMMAND_TIMEOUT }).await
}

/// The store alone, for a command that reads. It creates nothing.
pub async fn existing_store(database: &DatabaseUrl) -> Result<Arc<dyn Store>, BuildError> {
    Ok(open_store(database, Migrate::Check, COMMAND_TIMEOUT).await?)
}

/// The signing keys of a store. It creates nothing.
pub async fn existing_keys(config: &Config, env: &Env) -> Result<Keyring, BuildError> {
    let checked = config.check()?;
    let store = existing_store(&checked.database).await?;
    Ok(keys(config, checked, store.as_ref(), env, false).await?.1)
}

async fn open(config: &Config, checked: Checked, env: Env, opening: Opening) -> Result<Arc<Service>, BuildError> {
    let migrate = if opening.creates {
        create_directory(&checked.database)?;
        migrate_on_serve(&checked.database)
    } else {
        Migrate::Check
    };
    let store = open_store(&checked.database, migrate, opening.patience).await?;
    let env = env.corrected({
        let store = Arc::clone(&store);
        move |now| store.time(now)
    });
    let (masters, keyring) = keys(config, checked, store.as_ref(), &env, opening.creates).await?;
    let keyring = Arc::new(keyring);
    let tokens = Tokens::new(config.tokens.token_config(), Arc::clone(&keyring), &masters)?;
    Ok(Arc::new(Service {
        store,
        revocations: Revocations::new(tokens.max_access_token_lifetime()),
        seen: SeenGenerations::default(),
        tokens,
        keyring,
        hasher: Hasher::start(&config.passwords.hasher_config(config.limits.login_max_failures), env.clone())?,
        env,
        reserved_usernames: config.accounts.reserved_usernames.clone(),
        passwords: Arc::new(config.passwords.policy(&config.mail.service_name)),
        sessions: config.tokens.session_policy(),
        one_time: Arc::new(OneTimeTokens::new(&masters)?),
        mails: MailPolicy {
            per_address: config.mail.address_limit(),
            limiter: RateLimiter::per_minute(config.mail.client_limit()),
            sign_up_limiter: RateLimiter::per_minute(config.mail.client_limit()),
            conceal_existing_accounts: config.mail.conceal_existing_accounts,
        },
        login_attempts: LoginAttempts::new(config.limits.attempt_policy(), &masters)?,
        login_limiter: RateLimiter::per_minute(config.limits.client_limit()),
        sign_up_limiter: RateLimiter::per_minute(config.limits.sign_up_limit()),
        token_revocation_limiter: RateLimiter::per_minute(NonZeroU32::new(MOST_REVOKED_TOKENS)),
        verified_secrets: VerifiedSecrets::default(),
        pages: PageTokens::new(&masters)?,
        streams: Streams::new(&masters)?,
        audit_retention: config.limits.audit_retention,
        demand_warnings: DemandWarnings::default(),
    }))
}

/// Binds an address. The second value is the bound address, with the real port if the configured port is 0.
async fn listen_on(
    (variable, address): (&'static str, SocketAddr),
    protocol: Protocol,
    most_connections: usize,
    router: Router,
) -> Result<(Surface, SocketAddr), BuildError> {
    let cannot_listen = |source| BuildError::Listen { variable, address, source };
    let listener = TcpListener::bind(address).await.map_err(cannot_listen)?;
    let bound = listener.local_addr().map_err(cannot_listen)?;
    Ok((Surface { listener, protocol, most_connections, router }, bound))
}

/// Whether `serve` applies migrations. A SQLite file belongs to one process and is migrated when it is opened. A
/// PostgreSQL database is shared, and `postern migrate` migrates it.
fn migrate_on_serve(database: &DatabaseUrl) -> Migrate {
    match database {
        DatabaseUrl::Sqlite(_) => Migrate::Apply,
        DatabaseUrl::Postgres { .. } => Migrate::Check,
    }
}

fn create_directory(database: &DatabaseUrl) -> Result<(), ConfigError> {
    let variable = "POSTERN_DATA_DIR or POSTERN_DATABASE_URL";
    database.create_directory().map_err(|(path, source)| ConfigError::Unwritable { variable, path, source })
}

/// Opens the store. Waits for a database that cannot be reached, because both are often started at the same time. What
/// waiting cannot mend ends it at once.
async fn open_store(database: &DatabaseUrl, migrate: Migrate, patience: Duration) -> Result<Arc<dyn Store>, OpenError> {
    let started = Instant::now();
    loop {
        match store::connect(database, migrate).await {
            Err(error) if error.may_pass() && started.elapsed() < patience => {
                tracing::warn!(cause = %error, "waiting for the database");
                tokio::time::sleep(STORE_RETRY_PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

/// The configured master key or the one beside the SQLite file, and the signing keys that it decrypts. Keys that are
/// missing are created, if that is asked for and the database has never had any.
async fn keys(
    config: &Config,
    checked: Checked,
    store: &dyn Store,
    env: &Env,
    creates: bool,
) -> Result<(Arc<MasterKeys>, Keyring), BuildError> {
    let Checked { database, master_key: configured, previous_master_key, .. } = checked;
    let has_signing_keys = !store.signing_keys().await.map_err(Error::from)?.is_empty();
    if !has_signing_keys && !creates {
        return Err(Error::internal("the database has no signing key yet: `postern serve` creates the first").into());
    }
    let master: MasterKey = match (configured, database) {
        (Some(key), _) => key,
        (None, DatabaseUrl::Sqlite(database)) => config::master_key_beside(&database, has_signing_keys, env)?,
        (None, DatabaseUrl::Postgres { .. }) => return Err(ConfigError::MasterKeyMissing.into()),
    };
    let masters = Arc::new(MasterKeys::new(master, previous_master_key));
    let (policy, for_keyring) = (config.key_policy(), Arc::clone(&masters));
    let keyring = if creates {
        Keyring::open(store, for_keyring, policy, env).await?
    } else {
        Keyring::read(store, for_keyring, policy).await?
    };
    Ok((masters, keyring))
}

/// Applies the missing migrations to a database.
pub async fn migrate(config: &crate::config::StoreSettings) -> Result<(), BuildError> {
    let database = config.database()?;
    create_directory(&database)?;
    // A store that is not closed leaves an SQLite log behind, and then the file alone is not the whole database.
    close_store(open_store(&database, Migrate::Apply, STORE_TIMEOUT).await?.as_ref()).await;
    Ok(())
}

impl App {
    /// The addresses that the service listens on, with the real ports instead of port 0.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until `stop` is cancelled. Then it reports NOT_SERVING, goes on serving for the lame duck time, sends
    /// GOAWAY, lets calls finish, and returns.
    pub async fn run(self, stop: CancellationToken) {
        let Self { surfaces, proxies, tls, health, readiness, metrics, store, service, outbox, lame_duck, .. } = self;
        let (age, idle, traces) = (self.max_connection_age, self.http_idle_timeout, self.traces);
        let close = CancellationToken::new();
        // The health is set before the first caller can ask for it.
        let reachable = store.ping().await.is_ok();
        report(reachable, &health, &readiness).await;
        let servers = TaskTracker::new();
        for Surface { listener, protocol, most_connections, router } in surfaces {
            let bounds = Bounds { connections: most_connections, age, idle };
            let (proxies, tls, close) = (proxies.clone(), tls.clone(), close.clone());
            servers.spawn(listen::serve(listener, protocol, bounds, proxies, tls, router, close));
        }
        servers.close();
        let monitor = supervise("health", {
            let (store, health, readiness) = (Arc::clone(&store), health.clone(), Arc::clone(&readiness));
            move || watch_store(Arc::clone(&store), health.clone(), Arc::clone(&readiness), reachable)
        });
        let revocation_sync = supervise("revocations", {
            let service = Arc::clone(&service);
            move || Arc::clone(&service).run_revocation_sync()
        });
        let key_rotation = supervise("keys", {
            let service = Arc::clone(&service);
            move || Arc::clone(&service).run_key_rotation()
        });
        let writing_seen = supervise("seen", {
            let service = Arc::clone(&service);
            move || Arc::clone(&service).run_writing_seen()
        });
        let housekeeping = [
            supervise("purge", {
                let service = Arc::clone(&service);
                move || Arc::clone(&service).run_purge()
            }),
            supervise("limits", {
                let service = Arc::clone(&service);
                move || Arc::clone(&service).run_forgetting()
            }),
            supervise("metrics", move || metrics.clone().run_upkeep()),
        ];
        let tls_reload = tls.map(|tls| supervise("tls", move || tls.clone().run_reload()));
        let stop_sending = CancellationToken::new();
        let sending = tokio::spawn(outbox.run(stop_sending.clone()));

        stop.cancelled().await;
        tracing::info!("stopping");
        readiness.set_stopping();
        monitor.abort();
        housekeeping.iter().for_each(JoinHandle::abort);
        stop_sending.cancel();
        health.set(false).await;
        tokio::time::sleep(lame_duck).await;
        close.cancel();
        servers.wait().await;
        revocation_sync.abort();
        key_rotation.abort();
        writing_seen.abort();
        tls_reload.iter().for_each(JoinHandle::abort);
        if let Err(error) = service.write_seen().await {
            tracing::debug!(%error, "what was seen of access tokens in the last second could not be written");
        }
        // Mails in flight had the same time as the calls. A mail that is not marked as sent by now is sent again later.
        if tokio::time::timeout(MAIL_DRAIN_TIMEOUT, sending).await.is_err() {
            tracing::warn!("stopping while a mail is being sent: it will be sent again");
        }
        close_store(store.as_ref()).await;
        if let Some(traces) = traces {
            traces.stop().await;
        }
        tracing::info!("stopped");
    }
}

/// Closes a store. A failure is only logged: everything that was acknowledged is in its files.
pub async fn close_store(store: &dyn Store) {
    match tokio::time::timeout(CLOSE_TIMEOUT, store.close()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the database could not be closed cleanly"),
        Err(_) => tracing::warn!("the database is still in use and was not closed cleanly"),
    }
}

/// Runs a task that never ends by itself. One that panics is logged and counted, and starts again after a pause.
fn supervise<F: Future<Output = ()> + Send + 'static>(
    name: &'static str,
    task: impl Fn() -> F + Send + 'static,
) -> JoinHandle<()> {
    let failures = metrics::counter!("postern_task_failures_total", "task" => name);
    tokio::spawn(async move {
        loop {
            // Aborted together with its supervisor.
            let mut running = tokio::task::JoinSet::new();
            running.spawn(task());
            if let Some(Err(error)) = running.join_next().await {
                tracing::error!(task = name, %error, "a background task failed; it starts again");
            }
            failures.increment(1);
            tokio::time::sleep(RESTART_PAUSE).await;
        }
    })
}

/// Reports and logs every change of the store's health.
async fn watch_store(store: Arc<dyn Store>, health: Health, readiness: Arc<Readiness>, mut was_reachable: bool) {
    let mut ticks = tokio::time::interval(PING_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let ping = store.ping().await;
        let reachable = ping.is_ok();
        measure(store.as_ref(), reachable);
        if reachable == was_reachable {
            continue;
        }
        was_reachable = reachable;
        report(reachable, &health, &readiness).await;
        match ping {
            Ok(()) => tracing::info!("the database answers again: serving"),
            Err(error) => tracing::error!(%error, "the database does not answer: not serving"),
        }
    }
}

async fn report(reachable: bool, health: &Health, readiness: &Readiness) {
    readiness.set_database(reachable);
    health.set(reachable).await;
}

#[expect(clippy::cast_precision_loss, reason = "a pool is far smaller than 2^52")]
fn measure(store: &dyn Store, reachable: bool) {
    let connections = store.connections();
    let idle = connections.idle as f64;
    metrics::gauge!("postern_database_up").set(f64::from(u8::from(reachable)));
    metrics::gauge!("postern_database_connections", "state" => "idle").set(idle);
    metrics::gauge!("postern_database_connections", "state" => "used").set(f64::from(connections.open) - idle);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_background_task_that_fails_starts_again() {
        let starts = Arc::new(AtomicU32::new(0));
        let supervisor = supervise("test", {
            let starts = Arc::clone(&starts);
            move || {
                let start = starts.fetch_add(1, Ordering::Relaxed);
                async move { if start == 0 { panic!("the first one fails") } else { std::future::pending().await } }
            }
        });
        while starts.load(Ordering::Relaxed) < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!supervisor.is_finished());
        supervisor.abort();
    }
}
