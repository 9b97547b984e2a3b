//! The command line: the commands, their arguments, and what each one runs.

mod arguments;
mod error;
mod keys;
mod output;
mod secrets;
mod server;
mod service;
mod settings;
mod signals;
mod user;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{ArgMatches, Args, CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    app,
    config::{Config, ConfigError, LogSettings, StoreSettings},
    database_url::DatabaseUrl,
    domain::env::Env,
    error::Error,
    grpc, http, store, telemetry, tls,
};

use self::{
    arguments::{Given, Unusable},
    error::CliError,
};

const NAME: &str = "postern";

/// Accounts, passwords and JWT sessions behind gRPC
#[derive(Debug, Parser)]
#[command(name = NAME, version, about, max_term_width = 100)]
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
    /// Look at the settings without a start
    #[command(subcommand, name = "config")]
    Settings(settings::Settings),
    /// Apply the missing database migrations; with SQLite, `serve` does this itself
    Migrate(StoreSettings),
    /// Copy the embedded database to a new file, also while a server uses it
    Backup(Backup),
    /// Ask a running server for its health; the exit code is 0 if it is SERVING
    Healthcheck(Healthcheck),
    /// Print the OpenAPI 3.1 description of the REST API
    Openapi,
    /// Print the gRPC API as a binary FileDescriptorSet, for tools that do not read .proto files or are too old for ours
    Descriptor,
    /// Print the completions of the command line for a shell
    Completions { shell: Shell },
    /// Write a manual page for each command to a directory
    Man {
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Manage accounts directly in the database, for example to create the first admin
    #[command(subcommand)]
    User(user::User),
    /// Manage service accounts directly in the database: how other services prove who they are
    #[command(subcommand)]
    Service(service::Service),
    /// Show and change the keys that sign access tokens
    #[command(subcommand)]
    Keys(keys::Keys),
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
    /// Ask with TLS, because the server has this certificate. It is not compared with the one that the server shows,
    /// and nothing secret is sent
    #[arg(long, env = "POSTERN_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Succeed if the server answers, also while it is not SERVING because its database is away: for those who restart
    /// what fails
    #[arg(long)]
    live: bool,
}

/// Runs the command line of this process. An error is printed to standard error. The runtime is made here, so that the
/// code of the service is compiled with the library and not once more with the binary.
pub fn main() -> ExitCode {
    let given = match arguments::given::<Cli>() {
        Ok(given) => given,
        Err(Unusable::Usage(error)) => error.exit(),
        Err(Unusable::Config(error)) => return CliError::from(error).report(),
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return CliError::with_causes("this process cannot start its threads", &error).report(),
    };
    runtime.block_on(execute(given)).unwrap_or_else(|error| error.report())
}

async fn execute(given: Given<Cli>) -> Result<ExitCode, CliError> {
    let Given { cli, matches, faults } = given;
    if !faults.is_empty() {
        return Err(ConfigError::with_more(faults, cli.command.check().err()).into());
    }
    // Dropped before an error is printed, which is the last line.
    let _last_lines = telemetry::start(&cli.log, matches!(cli.command, Command::Serve(_)))?;
    match cli.command {
        Command::Serve(config) => serve(&config).await,
        Command::Settings(settings) => {
            let (command, given) = innermost(Cli::command(), &matches);
            settings::run(&settings, &command, given)
        }
        Command::Migrate(config) => {
            app::migrate(&config).await?;
            tracing::info!("the database schema is up to date");
            Ok(ExitCode::SUCCESS)
        }
        Command::Backup(Backup { to, store }) => backup(&store, &to).await,
        Command::Healthcheck(arguments) => healthcheck(&arguments).await,
        Command::Openapi => {
            let document = http::openapi::contract_document()?;
            let text = serde_json::to_string_pretty(&document).map_err(Error::internal)?;
            output::line(&text)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Descriptor => {
            output::bytes(&grpc::contract()?.encode_to_vec())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
            output::line(String::from_utf8_lossy(&script).trim_end())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { directory } => {
            clap_mangen::generate_to(Cli::command(), &directory).map_err(|error| {
                CliError::with_causes(&format!("{} cannot be written to", directory.display()), &error)
            })?;
            Ok(ExitCode::SUCCESS)
        }
        Command::User(command) => user::run(command).await,
        Command::Service(command) => service::run(command).await,
        Command::Keys(command) => keys::run(command).await,
    }
}

impl Command {
    /// Checks the settings of a command.
    fn check(&self) -> Result<(), ConfigError> {
        match self {
            Self::Serve(config) => config.check().map(drop),
            Self::Settings(settings) => settings.config().check().map(drop),
            Self::Migrate(store) | Self::Backup(Backup { store, .. }) => store.database().map(drop),
            Self::Keys(command) => command.config().check().map(drop),
            Self::User(command) => command.config().check().map(drop),
            Self::Service(command) => command.config().check().map(drop),
            Self::Healthcheck(_) | Self::Openapi | Self::Descriptor | Self::Completions { .. } | Self::Man { .. } => {
                Ok(())
            }
        }
    }
}

/// The command that was given, and what was given to it.
fn innermost(mut command: clap::Command, mut given: &ArgMatches) -> (clap::Command, &ArgMatches) {
    // Gives each command the arguments that all commands have.
    command.build();
    while let Some((name, below)) = given.subcommand()
        && let Some(found) = command.find_subcommand(name).cloned()
    {
        (command, given) = (found, below);
    }
    (command, given)
}

async fn serve(config: &Config) -> Result<ExitCode, CliError> {
    let stop = CancellationToken::new();
    signals::handle(&stop).map_err(|error| CliError::with_causes("signals cannot be received", &error))?;
    // It can wait for its database for long. As the first process of a container it would ignore signals until then.
    let app = tokio::select! {
        app = app::build(config, Env::system()) => app?,
        () = stop.cancelled() => {
            tracing::info!("stopped before it was ready");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let addresses = app.addresses();
    tracing::info!(
        grpc_addr = %addresses.grpc,
        http_addr = %addresses.http,
        ops_addr = %addresses.ops,
        "Postern is ready"
    );
    if config.listen.serves_reflection() && !config.listen.tls.is_asked_for() {
        tracing::info!("next: grpcurl -plaintext {} describe postern.auth.v1.AuthService", addresses.grpc);
    }
    app.run(stop).await;
    Ok(ExitCode::SUCCESS)
}

async fn backup(store: &StoreSettings, to: &Path) -> Result<ExitCode, CliError> {
    let DatabaseUrl::Sqlite(database) = store.database()? else {
        let text =
            "POSTERN_DATABASE_URL names a PostgreSQL database, and this copies the embedded one only: use pg_dump";
        return Err(CliError::Settings(text.to_owned()));
    };
    store::sqlite::backup(&database, to).await?;
    output::line(&to.display().to_string())?;
    output::note("Keep the master key too, and elsewhere: without it nobody can use this copy.");
    Ok(ExitCode::SUCCESS)
}

async fn healthcheck(arguments: &Healthcheck) -> Result<ExitCode, CliError> {
    let address = arguments.grpc_addr;
    let ask = async {
        // A server that listens on all addresses also listens on loopback.
        let host = if address.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { address.ip() };
        let target = SocketAddr::new(host, address.port());
        let endpoint = Endpoint::from_shared(format!("http://{target}"))?
            .connect_timeout(Duration::from_secs(2))
            .timeout(Duration::from_secs(2));
        let channel = if arguments.tls_cert.is_some() {
            let tls = TlsConnector::from(tls::any_certificate()?);
            let connect = move |_| {
                let tls = tls.clone();
                async move {
                    let stream = TcpStream::connect(target).await?;
                    Ok::<_, std::io::Error>(TokioIo::new(tls.connect(target.ip().into(), stream).await?))
                }
            };
            endpoint.connect_with_connector(tower::service_fn(connect)).await?
        } else {
            endpoint.connect().await?
        };
        let request = HealthCheckRequest { service: String::new() };
        Ok::<_, Box<dyn std::error::Error>>(HealthClient::new(channel).check(request).await?.into_inner().status())
    };
    let status = ask.await.map_err(|error| {
        CliError::Failed(format!(
            "{address} does not answer: {}: is `postern serve` running, and is POSTERN_GRPC_ADDR its address?",
            crate::error::causes(error.as_ref())
        ))
    })?;
    output::line(status.as_str_name())?;
    let healthy = arguments.live || status == ServingStatus::Serving;
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
