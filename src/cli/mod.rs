//! The command line: the commands, their arguments, and what each one runs.

mod error;
mod secrets;
mod signals;
mod user;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    app,
    config::{Config, LogSettings, MasterKeySettings, StoreSettings, check_variables},
    database_url::DatabaseUrl,
    domain::{env::Env, keyring::Keyring},
    http, store, telemetry,
};

use self::{error::CliError, secrets::secret_argument};

/// Accounts, passwords and JWT sessions behind gRPC
#[derive(Debug, Parser)]
#[command(name = "postern", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogSettings,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGINT, SIGTERM or SIGQUIT
    Serve(Box<Config>),
    /// Apply the missing database migrations; with SQLite, `serve` does this itself
    Migrate(StoreSettings),
    /// Copy the embedded database to a new file, also while a server uses it
    Backup(Backup),
    /// Ask a running server for its health; the exit code is 0 if it is SERVING
    Healthcheck(Healthcheck),
    /// Print the OpenAPI 3.1 description of the REST API
    Openapi,
    /// Manage accounts directly in the database, for example to create the first admin
    #[command(subcommand)]
    User(user::User),
    /// Show the keys that sign access tokens
    #[command(subcommand)]
    Keys(Keys),
}

#[derive(Debug, Args)]
struct Backup {
    /// The file to create. An existing file is left alone
    #[arg(value_name = "FILE")]
    to: PathBuf,
    #[command(flatten)]
    store: StoreSettings,
}

#[derive(Debug, Args)]
struct Healthcheck {
    /// gRPC address of the server
    #[arg(long, env = "POSTERN_GRPC_ADDR", default_value = "127.0.0.1:50051", value_name = "IP:PORT")]
    grpc_addr: SocketAddr,
}

#[derive(Debug, Subcommand)]
enum Keys {
    /// Print the public keys as a JWK Set (RFC 7517), for services that verify access tokens
    List {
        #[command(flatten)]
        store: StoreSettings,
        #[command(flatten)]
        master_key: MasterKeySettings,
    },
}

/// Runs the command line of this process. An error is printed to standard error. The runtime is made here, so that the
/// code of the service is compiled with the library and not once more with the binary.
pub fn main() -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return failure(&error),
    };
    let given = Cli::command().get_matches();
    if let Some(fault) = secret_argument(&given) {
        return failure(&fault);
    }
    let cli = Cli::from_arg_matches(&given).unwrap_or_else(|error| error.exit());
    runtime.block_on(execute(cli)).unwrap_or_else(|error| failure(&error))
}

fn failure(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("postern: {error}");
    ExitCode::FAILURE
}

async fn execute(cli: Cli) -> Result<ExitCode, CliError> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    check_variables::<Cli>(names)?;
    telemetry::start(&cli.log)?;
    match cli.command {
        Command::Serve(config) => serve(&config).await,
        Command::Migrate(config) => {
            app::migrate(&config).await?;
            tracing::info!("the database schema is up to date");
            Ok(ExitCode::SUCCESS)
        }
        Command::Backup(Backup { to, store }) => backup(&store, &to).await,
        Command::Healthcheck(arguments) => healthcheck(arguments.grpc_addr).await,
        Command::Openapi => {
            println!("{}", serde_json::to_string_pretty(&http::openapi::contract_document()?)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::User(command) => user::run(command).await,
        Command::Keys(Keys::List { store, master_key }) => list_keys(&store, &master_key).await,
    }
}

async fn serve(config: &Config) -> Result<ExitCode, CliError> {
    signals::ignore_others()?;
    let app = app::build(config, Env::system()).await?;
    let stop = CancellationToken::new();
    tokio::spawn(signals::stop_on_signal(stop.clone())?);
    let addresses = app.addresses();
    tracing::info!(
        grpc_addr = %addresses.grpc,
        http_addr = %addresses.http,
        ops_addr = %addresses.ops,
        "Postern is ready"
    );
    if config.listen.serves_reflection() {
        tracing::info!("next: grpcurl -plaintext {} describe postern.auth.v1.AuthService", addresses.grpc);
    }
    app.run(stop).await;
    Ok(ExitCode::SUCCESS)
}

async fn backup(store: &StoreSettings, to: &Path) -> Result<ExitCode, CliError> {
    let DatabaseUrl::Sqlite(database) = store.database()? else {
        return Err("this copies the embedded database only: use pg_dump for PostgreSQL".into());
    };
    store::sqlite::backup(&database, to).await?;
    println!("{}", to.display());
    eprintln!("Keep the master key too, and elsewhere: without it nobody can use this copy.");
    Ok(ExitCode::SUCCESS)
}

async fn healthcheck(address: SocketAddr) -> Result<ExitCode, CliError> {
    // A server that listens on all addresses also listens on loopback.
    let host = if address.ip().is_unspecified() { "127.0.0.1".to_owned() } else { address.ip().to_string() };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{host}:{}", address.port()))?
        .connect_timeout(Duration::from_secs(2))
        .timeout(Duration::from_secs(2))
        .connect()
        .await?;
    let request = HealthCheckRequest { service: String::new() };
    let status = HealthClient::new(channel).check(request).await?.into_inner().status();
    println!("{}", status.as_str_name());
    Ok(if status == ServingStatus::Serving { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn list_keys(store: &StoreSettings, master_key: &MasterKeySettings) -> Result<ExitCode, CliError> {
    let database = store.database()?;
    let env = Env::system();
    let configured = master_key.configured(&database)?;
    let store = store::connect(&database, store::Migrate::Check).await?;
    let master = app::master_key(configured, &database, store.as_ref(), &env).await?;
    let keyring = Keyring::read(store.as_ref(), &master).await?;
    println!("{}", serde_json::to_string_pretty(&keyring.jwks())?);
    Ok(ExitCode::SUCCESS)
}
