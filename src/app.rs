//! The composition root: the one place that sees everything concrete. [`build`] puts the parts together and binds the
//! addresses, [`App::run`] serves until it is told to stop.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{self, Config, ConfigError},
    domain::{
        Postern,
        env::Env,
        hasher::Hasher,
        keyring::{Keyring, MasterKey},
        mail::MailPolicy,
        one_time::OneTimeTokens,
        page::PageTokens,
        revocation::Revocations,
        throttle::{ClientLimit, Guesses},
        token::Tokens,
    },
    error::Error,
    grpc::{self, Health},
    http::{self, HttpOptions, ops::Readiness, pages::PageOptions},
    listen::{self, Protocol, TrustedProxies},
    mail::{self, Mailer, outbox::Outbox},
    store::{self, Location, Migrate, OpenError, Store, StoreError},
    telemetry::Metrics,
};

/// How long `serve` waits for its database when it starts.
const STORE_PATIENCE: Duration = Duration::from_secs(30);
/// How often it asks meanwhile.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// How often the store's health is checked.
const PING_INTERVAL: Duration = Duration::from_millis(500);
/// How long the server goes on answering after it said NOT_SERVING, so that balancers can look elsewhere first.
const LAME_DUCK: Duration = Duration::from_secs(1);
/// How long mails that are being sent when the last call is over may still take.
const LAST_MAILS: Duration = Duration::from_secs(5);

/// Why the service could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error(transparent)]
    Mail(#[from] mail::SetupError),
    #[error("{0} cannot be listened on: {1}")]
    Listen(SocketAddr, std::io::Error),
    /// The detail is in the source.
    #[error("{}", detail(.0))]
    Domain(#[from] Error),
}

fn detail(error: &Error) -> String {
    match error {
        Error::Internal(cause) => cause.to_string(),
        Error::StoreUnavailable(cause) => cause.to_string(),
        other => other.to_string(),
    }
}

/// The service, put together and listening, not yet serving.
#[derive(Debug)]
pub struct App {
    surfaces: Vec<Surface>,
    addresses: Addresses,
    proxies: TrustedProxies,
    health: Health,
    readiness: Arc<Readiness>,
    store: Arc<dyn Store>,
    postern: Arc<Postern>,
    outbox: Outbox,
}

/// Where the service listens.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    pub ops: SocketAddr,
}

/// One bound address and what it serves.
#[derive(Debug)]
struct Surface {
    listener: TcpListener,
    protocol: Protocol,
    router: Router,
}

/// Puts the service together: checks the configuration, opens the store and its keys, starts the hashing threads, binds
/// the addresses.
pub async fn build(config: &Config, env: Env) -> Result<App, BuildError> {
    let mailer = Mailer::new(config.mail.transport()?, config.mail.from(config.public_url())?)?;
    build_with(config, env, mailer).await
}

/// The same with mail that goes elsewhere than the configuration says: for tests, into their memory.
pub async fn build_with(config: &Config, env: Env, mailer: Mailer) -> Result<App, BuildError> {
    config.listen.validate()?;
    let wording = config.mail.wording(config.public_url())?;
    if mailer.is_log_only() && matches!(config.store.location()?, Location::Postgres { .. }) {
        tracing::warn!("mail is only written to the log: set POSTERN_MAIL_URL to have it sent");
    }
    let postern = domain(config, env.clone()).await?;
    postern.catch_up_on_revocations().await?;
    postern.passwords.warm_up();
    let metrics = Metrics::of_process();
    let readiness = Arc::new(Readiness::default());
    let (grpc_router, health) = grpc::router(Arc::clone(&postern), env.clone(), config.listen.reflection).await?;
    let http_options = HttpOptions {
        public_url: config.public_url().to_owned(),
        cors_origins: config.listen.cors_origins.clone(),
        pages: PageOptions {
            service_name: config.mail.service_name.clone(),
            min_password_length: config.passwords.password_min_length.into(),
        },
        env: env.clone(),
    };
    let http_router = http::router(&grpc_router, Arc::clone(&postern), &http_options)?;
    let ops_router = http::ops::router(Arc::clone(&readiness), metrics);

    let (grpc, grpc_address) = listen_on(config.listen.grpc_addr, Protocol::Http2, grpc_router).await?;
    let (http, http_address) = listen_on(config.listen.http_addr, Protocol::Http1AndHttp2, http_router).await?;
    let (ops, ops_address) = listen_on(config.listen.ops_addr, Protocol::Http1AndHttp2, ops_router).await?;
    let addresses = Addresses { grpc: grpc_address, http: http_address, ops: ops_address };
    let store = Arc::clone(&postern.store);
    let outbox = Outbox { store: Arc::clone(&store), tokens: Arc::clone(&postern.one_time), mailer, wording, env };
    let proxies = config.limits.trusted_proxies();
    Ok(App { surfaces: vec![grpc, http, ops], addresses, proxies, health, readiness, store, postern, outbox })
}

/// The service without its surfaces, on the store that the configuration names: what `serve` serves, and what the commands
/// work with that need no server.
pub async fn domain(config: &Config, env: Env) -> Result<Arc<Postern>, BuildError> {
    config.tokens.validate()?;
    let location = config.store.location()?;
    location.prepare()?;
    // Asked for before the database is waited for.
    let given = config.master_key.given(&location)?;
    let store = open_store(&location).await?;
    let master = master_key(given, &location, store.as_ref(), &env).await?;
    let keyring = Arc::new(Keyring::open(store.as_ref(), &master, &env).await?);
    Ok(Arc::new(Postern {
        store,
        tokens: Tokens::new(config.tokens.token_config(), keyring, &master)?,
        hasher: Hasher::start(&config.passwords.hasher_config(), env.clone())?,
        env,
        passwords: config.passwords.policy(&config.mail.service_name),
        sessions: config.tokens.session_policy(),
        one_time: Arc::new(OneTimeTokens::new(&master)?),
        mails: MailPolicy {
            per_address: config.mail.address_limit(),
            per_client: ClientLimit::per_minute(config.mail.client_limit()),
            conceal_existing_accounts: config.mail.conceal_existing_accounts,
        },
        guesses: Guesses::new(config.limits.attempt_policy(), &master)?,
        clients: ClientLimit::per_minute(config.limits.client_limit()),
        revocations: Revocations::default(),
        pages: PageTokens::new(&master)?,
        audit_retention: config.limits.audit_retention,
    }))
}

/// Binds an address; the second value is the real one, also where the first left the port to the system.
async fn listen_on(
    address: SocketAddr,
    protocol: Protocol,
    router: Router,
) -> Result<(Surface, SocketAddr), BuildError> {
    let cannot_listen = |error| BuildError::Listen(address, error);
    let listener = TcpListener::bind(address).await.map_err(cannot_listen)?;
    let bound = listener.local_addr().map_err(cannot_listen)?;
    Ok((Surface { listener, protocol, router }, bound))
}

/// Opens the store, waiting a while for a database that is not there yet: they are often started together.
async fn open_store(location: &Location) -> Result<Arc<dyn Store>, OpenError> {
    let started = Instant::now();
    loop {
        match store::connect(location, location.migrate_on_serve()).await {
            Err(OpenError::Store(StoreError::Unavailable(cause))) if started.elapsed() < STORE_PATIENCE => {
                tracing::warn!(%cause, "waiting for the database");
                tokio::time::sleep(STORE_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// The master key that was given, or the one beside the database.
pub async fn master_key(
    given: Option<MasterKey>,
    location: &Location,
    store: &dyn Store,
    env: &Env,
) -> Result<MasterKey, BuildError> {
    match (given, location) {
        (Some(key), _) => Ok(key),
        (None, Location::Sqlite(database)) => {
            let something_is_sealed = !store.signing_keys().await.map_err(Error::from)?.is_empty();
            Ok(config::master_key_beside(database, something_is_sealed, env)?)
        }
        (None, Location::Postgres { .. }) => Err(ConfigError::MasterKeyMissing.into()),
    }
}

/// Brings a database's schema up to date.
pub async fn migrate(config: &crate::config::StoreConfig) -> Result<(), BuildError> {
    let location = config.location()?;
    location.prepare()?;
    store::connect(&location, Migrate::Apply).await?;
    Ok(())
}

impl App {
    /// Where the service listens: the real ports, also where the configuration left the choice to the system.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until `stop`, then says NOT_SERVING, goes on for a moment, sends GOAWAY, lets calls finish and returns.
    pub async fn run(self, stop: CancellationToken) {
        let Self { surfaces, addresses: _, proxies, health, readiness, store, postern, outbox } = self;
        let close = CancellationToken::new();
        // Known to the callers before the first of them can ask.
        let reachable = store.ping().await.is_ok();
        report(reachable, &health, &readiness).await;
        let servers = TaskTracker::new();
        for Surface { listener, protocol, router } in surfaces {
            servers.spawn(listen::serve(listener, protocol, proxies.clone(), router, close.clone()));
        }
        servers.close();
        let monitor = tokio::spawn(watch_store(Arc::clone(&store), health.clone(), Arc::clone(&readiness), reachable));
        let follower = tokio::spawn({
            let postern = Arc::clone(&postern);
            async move { postern.follow_revocations().await }
        });
        let forgetter = tokio::spawn(async move { postern.forget_what_is_over().await });
        let stop_sending = CancellationToken::new();
        let sending = tokio::spawn(outbox.run(stop_sending.clone()));

        stop.cancelled().await;
        tracing::info!("stopping");
        readiness.set_stopping();
        monitor.abort();
        forgetter.abort();
        stop_sending.cancel();
        health.set(false).await;
        tokio::time::sleep(LAME_DUCK).await;
        close.cancel();
        servers.wait().await;
        follower.abort();
        // What is being sent has had as long as the calls; a mail that is not marked goes out again.
        if tokio::time::timeout(LAST_MAILS, sending).await.is_err() {
            tracing::warn!("stopping while a mail is being sent: it will be sent again");
        }
        tracing::info!("stopped");
    }
}

/// Keeps the reported health in step with the store, both ways, beginning with what was reported last.
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
            Ok(()) => tracing::info!("the database is back: serving"),
            Err(error) => tracing::error!(%error, "the database is away: not serving"),
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
