//! Configuration: one struct for each concern, each value a flag and an environment variable. `--help` is the
//! reference. Secrets come from the environment or from files, and never print. Mail's settings are in `mail.rs`.

mod limits;
mod mail;
mod mail_url;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{ArgAction, Args, CommandFactory, ValueEnum};
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    domain::{
        env::Env,
        hasher::HasherConfig,
        keyring::{MasterKey, MasterKeyError},
        password::PasswordPolicy,
        session::SessionPolicy,
        token::TokenConfig,
    },
    store::{Location, Migrate},
};

pub use self::{limits::LimitSettings, mail::MailConfig};

/// Why the configuration cannot be used. Each names what to change.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("unknown environment variable {0}: no setting of that name exists (see `postern serve --help`)")]
    UnknownVariable(String),
    #[error("environment variable {0}: this version of Postern does not implement it yet, and will not ignore it")]
    NotImplemented(String),
    #[error("POSTERN_MASTER_KEY{suffix} {source}", suffix = if *.from_file { "_FILE" } else { "" })]
    MasterKey { from_file: bool, source: MasterKeyError },
    #[error(
        "POSTERN_MASTER_KEY or POSTERN_MASTER_KEY_FILE is required with PostgreSQL; make a key with: openssl rand -base64 32"
    )]
    MasterKeyMissing,
    #[error("{variable}: {path} cannot be read: {source}")]
    Unreadable { variable: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path} cannot be made: {source}")]
    Unwritable { path: PathBuf, source: std::io::Error },
    #[error(
        "{database} is there but its master key {key} is not: restore the key, or give it as POSTERN_MASTER_KEY; \
         without it the signing keys in the database cannot be read"
    )]
    MasterKeyLost { database: PathBuf, key: PathBuf },
    #[error("POSTERN_DATABASE_URL must begin with postgres://, postgresql:// or sqlite:")]
    DatabaseUrl,
    #[error(
        "{0}={1} is not loopback, and passwords would cross the network in plain text: set \
         POSTERN_ALLOW_PLAINTEXT=true if something in front of Postern speaks TLS"
    )]
    Plaintext(&'static str, SocketAddr),
    #[error("{0} must not be {1}")]
    OutOfRange(&'static str, String),
    /// The setting, and what is wrong with it; never its value, which may be secret.
    #[error("{0} {1}")]
    Unusable(&'static str, String),
    #[error(transparent)]
    Domain(#[from] crate::error::Error),
}

/// Everything that `postern serve` takes.
#[derive(Debug, Clone, Args)]
pub struct Config {
    #[command(flatten)]
    pub listen: ListenConfig,
    #[command(flatten)]
    pub store: StoreConfig,
    #[command(flatten)]
    pub master_key: MasterKeyConfig,
    #[command(flatten)]
    pub tokens: TokenSettings,
    #[command(flatten)]
    pub passwords: PasswordSettings,
    #[command(flatten)]
    pub mail: MailConfig,
    #[command(flatten)]
    pub limits: LimitSettings,
}

impl Config {
    /// Where the HTTP address is reached from outside.
    pub fn public_url(&self) -> &str {
        self.listen.public_url.as_deref().unwrap_or(&self.tokens.issuer)
    }
}

/// Where to listen, and what is served there.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Listening")]
pub struct ListenConfig {
    /// Address for gRPC; port 0 picks a free one
    #[arg(long, env = "POSTERN_GRPC_ADDR", default_value = "127.0.0.1:50051", value_name = "IP:PORT")]
    pub grpc_addr: SocketAddr,
    /// Address for REST, the public keys and discovery
    #[arg(long, env = "POSTERN_HTTP_ADDR", default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub http_addr: SocketAddr,
    /// Address for probes and metrics; nothing secret, but not for the network at large
    #[arg(long, env = "POSTERN_OPS_ADDR", default_value = "127.0.0.1:9090", value_name = "IP:PORT")]
    pub ops_addr: SocketAddr,
    /// Where the HTTP address is reached from outside [default: the issuer]
    #[arg(long, env = "POSTERN_PUBLIC_URL", value_name = "URL")]
    pub public_url: Option<String>,
    /// Origins whose web pages may call the REST API, separated by commas [default: none]
    #[arg(long, env = "POSTERN_CORS_ORIGINS", value_name = "ORIGINS", value_delimiter = ',', value_parser = origin)]
    pub cors_origins: Vec<HeaderValue>,
    /// Serve plaintext on an address that is not loopback: for when a proxy or a mesh speaks TLS in front
    #[arg(long, env = "POSTERN_ALLOW_PLAINTEXT", default_value_t = false, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub allow_plaintext: bool,
    /// Serve gRPC reflection (v1 and v1alpha), which tells clients the contract
    #[arg(long, env = "POSTERN_REFLECTION", default_value_t = true, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub reflection: bool,
}

/// Which database.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Database")]
pub struct StoreConfig {
    /// Directory of the embedded database and its generated master key; made with mode 0700
    #[arg(long, env = "POSTERN_DATA_DIR", default_value = "./postern-data", value_name = "DIR")]
    pub data_dir: PathBuf,
    /// postgres://… for production, sqlite:PATH for a chosen file [default: the embedded SQLite]
    #[arg(long, env = "POSTERN_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<SecretString>,
    /// File that holds the URL
    #[arg(long, env = "POSTERN_DATABASE_URL_FILE", value_name = "FILE", conflicts_with = "database_url")]
    pub database_url_file: Option<PathBuf>,
    /// The most connections to open to PostgreSQL
    #[arg(long, env = "POSTERN_DATABASE_MAX_CONNECTIONS", default_value_t = 16, value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub database_max_connections: u32,
    /// Have PostgreSQL tell replicas of revocations at once; without, and through PgBouncer, they ask twice a second
    #[arg(long, env = "POSTERN_DATABASE_NOTIFICATIONS", default_value_t = true, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub database_notifications: bool,
}

/// The master key, under which signing keys lie encrypted and from which the refresh-token key is derived.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Keys")]
pub struct MasterKeyConfig {
    /// 32 bytes in base64; required with PostgreSQL [default with SQLite: generated beside the database]
    #[arg(long, env = "POSTERN_MASTER_KEY", hide_env_values = true, value_name = "BASE64")]
    pub master_key: Option<SecretString>,
    /// File that holds the master key
    #[arg(long, env = "POSTERN_MASTER_KEY_FILE", value_name = "FILE", conflicts_with = "master_key")]
    pub master_key_file: Option<PathBuf>,
}

/// What tokens say and how long they live.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tokens and sessions")]
pub struct TokenSettings {
    /// `iss` of every token: the URL that the service is known by
    #[arg(long, env = "POSTERN_ISSUER", default_value = "http://localhost:8080", value_name = "URL")]
    pub issuer: String,
    /// `aud` of access tokens
    #[arg(long, env = "POSTERN_AUDIENCE", default_value = "postern", value_name = "NAME")]
    pub audience: String,
    /// How long an access token lives
    #[arg(long, env = "POSTERN_ACCESS_TOKEN_TTL", default_value = "15m", value_parser = duration, value_name = "DURATION")]
    pub access_token_ttl: Duration,
    /// How long a refresh token lives, from its minting
    #[arg(long, env = "POSTERN_REFRESH_TOKEN_TTL", default_value = "7d", value_parser = duration, value_name = "DURATION")]
    pub refresh_token_ttl: Duration,
    /// How long a session lives, however often it is refreshed
    #[arg(long, env = "POSTERN_SESSION_MAX_LIFETIME", default_value = "90d", value_parser = duration, value_name = "DURATION")]
    pub session_max_lifetime: Duration,
    /// How long a used refresh token still yields the same answer, for clients that lost it; 0s to 60s
    #[arg(long, env = "POSTERN_REFRESH_RETRY_WINDOW", default_value = "10s", value_parser = duration, value_name = "DURATION")]
    pub refresh_retry_window: Duration,
    /// Refuse to log in an account whose email address is not verified
    #[arg(long, env = "POSTERN_REQUIRE_VERIFIED_EMAIL", default_value_t = false, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub require_verified_email: bool,
}

/// How passwords are judged and hashed.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Passwords")]
pub struct PasswordSettings {
    /// Memory of one Argon2id hash, in KiB
    #[arg(long, env = "POSTERN_ARGON2_MEMORY_KIB", default_value_t = 19_456, value_name = "KIB",
        value_parser = clap::value_parser!(u32).range(8..=1_048_576))]
    pub argon2_memory_kib: u32,
    /// Iterations of one Argon2id hash
    #[arg(long, env = "POSTERN_ARGON2_ITERATIONS", default_value_t = 2, value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub argon2_iterations: u32,
    /// Hashes that run at once [default: the cores]
    #[arg(long, env = "POSTERN_HASH_THREADS", value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub hash_threads: Option<u16>,
    /// Hashes that may wait, over all threads [default: 16 per thread]
    #[arg(long, env = "POSTERN_HASH_QUEUE", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub hash_queue: Option<u32>,
    /// The shortest new password, in characters; NIST SP 800-63B-4 asks for 15 where the password is the only factor
    #[arg(long, env = "POSTERN_PASSWORD_MIN_LENGTH", default_value_t = 8, value_name = "COUNT",
        value_parser = clap::value_parser!(u16).range(1..=256))]
    pub password_min_length: u16,
    /// The least zxcvbn score of a new password, 0 (guessed at once) to 4
    #[arg(long, env = "POSTERN_PASSWORD_MIN_SCORE", default_value_t = 2, value_name = "SCORE",
        value_parser = clap::value_parser!(u8).range(0..=4))]
    pub password_min_score: u8,
}

/// What is logged, and how. Every command takes these.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogConfig {
    /// Which messages are logged: a level, or directives as in RUST_LOG
    #[arg(long, env = "POSTERN_LOG", default_value = "info", global = true, value_name = "FILTER")]
    pub log: String,
    /// How they are written to standard error [default: text on a terminal, else json]
    #[arg(long, env = "POSTERN_LOG_FORMAT", global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Reads durations such as `15m`, `7d` or `1h 30m`.
fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 15m, 7d or 1h 30m"))
}

/// Reads an origin (RFC 6454 §6.2): scheme, host and port, nothing behind.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or_default();
    if host.is_empty() || host.contains(['/', '?', '#', '@', '*', ' ']) {
        return Err("an origin is written like https://app.example.com, without a path".to_owned());
    }
    HeaderValue::from_str(text).map_err(|error| error.to_string())
}

/// Variables of the contract that protect something: ignoring them would be a lie.
const NOT_IMPLEMENTED: [&str; 6] = [
    "POSTERN_PREVIOUS_MASTER_KEY",
    "POSTERN_PREVIOUS_MASTER_KEY_FILE",
    "POSTERN_SIGNING_ALGORITHM",
    "POSTERN_TLS_CERT",
    "POSTERN_TLS_KEY",
    "POSTERN_TLS_CLIENT_CA",
];

/// Looks through the names of the environment's variables: an unknown `POSTERN_*` is an error, because a misspelt
/// setting must not pass for one that holds.
pub fn check_variables<C: CommandFactory>(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let known = known_variables(&C::command());
    for name in names.filter(|name| name.starts_with("POSTERN_")) {
        if NOT_IMPLEMENTED.contains(&name.as_str()) {
            return Err(ConfigError::NotImplemented(name));
        } else if !known.contains(&name) && !is_kubernetes_service_link(&name) {
            return Err(ConfigError::UnknownVariable(name));
        }
    }
    Ok(())
}

fn known_variables(command: &clap::Command) -> Vec<String> {
    let own = command.get_arguments().filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()));
    own.chain(command.get_subcommands().flat_map(known_variables)).collect()
}

/// Kubernetes tells every pod about the services beside it: one called `postern` gives `POSTERN_SERVICE_HOST`,
/// `POSTERN_PORT`, `POSTERN_PORT_50051_TCP_ADDR` and so on. Nobody set those.
fn is_kubernetes_service_link(name: &str) -> bool {
    name == "POSTERN_PORT"
        || ["POSTERN_PORT_", "POSTERN_SERVICE_HOST", "POSTERN_SERVICE_PORT"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

impl ListenConfig {
    /// Refuses plaintext where others could listen in, unless it was allowed.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (variable, address) in [("POSTERN_GRPC_ADDR", self.grpc_addr), ("POSTERN_HTTP_ADDR", self.http_addr)] {
            if !address.ip().is_loopback() && !self.allow_plaintext {
                return Err(ConfigError::Plaintext(variable, address));
            }
        }
        let url = self.public_url.as_deref().unwrap_or("https://");
        if !(url.starts_with("https://") || url.starts_with("http://")) || url.contains(char::is_whitespace) {
            return Err(ConfigError::OutOfRange(
                "POSTERN_PUBLIC_URL",
                "anything but an http:// or https:// URL".to_owned(),
            ));
        }
        Ok(())
    }
}

impl StoreConfig {
    /// The database that the settings name.
    pub fn location(&self) -> Result<Location, ConfigError> {
        let url = match (&self.database_url, &self.database_url_file) {
            (Some(url), _) => url.clone(),
            (None, Some(path)) => {
                let text = read_secret("POSTERN_DATABASE_URL_FILE", path)?;
                SecretString::from(text.trim())
            }
            (None, None) => return Ok(Location::Sqlite(self.data_dir.join("postern.db"))),
        };
        let text = url.expose_secret();
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Location::Postgres {
                url,
                max_connections: self.database_max_connections,
                notifications: self.database_notifications,
            });
        }
        let path = text.strip_prefix("sqlite:").ok_or(ConfigError::DatabaseUrl)?;
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() || path.contains('?') || path == ":memory:" {
            return Err(ConfigError::DatabaseUrl);
        }
        Ok(Location::Sqlite(PathBuf::from(path)))
    }
}

impl Location {
    /// A file of our own is brought up to date as it is opened; a database that others share, by `postern migrate`.
    pub fn migrate_on_serve(&self) -> Migrate {
        match self {
            Self::Sqlite(_) => Migrate::Apply,
            Self::Postgres { .. } => Migrate::Check,
        }
    }

    /// Makes the directory of a database file, for its owner alone.
    pub fn prepare(&self) -> Result<(), ConfigError> {
        let Self::Sqlite(path) = self else {
            return Ok(());
        };
        let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) else {
            return Ok(());
        };
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(directory).map_err(|source| ConfigError::Unwritable { path: directory.to_owned(), source })
    }
}

impl MasterKeyConfig {
    /// The master key that was given. `None` stands for the one beside a SQLite file; PostgreSQL has none of its own.
    pub fn given(&self, location: &Location) -> Result<Option<MasterKey>, ConfigError> {
        let (text, from_file) = match (&self.master_key, &self.master_key_file, location) {
            (Some(key), _, _) => (Zeroizing::new(key.expose_secret().to_owned()), false),
            (None, Some(path), _) => (read_secret("POSTERN_MASTER_KEY_FILE", path)?, true),
            (None, None, Location::Sqlite(_)) => return Ok(None),
            (None, None, Location::Postgres { .. }) => return Err(ConfigError::MasterKeyMissing),
        };
        MasterKey::parse(&text).map(Some).map_err(|source| ConfigError::MasterKey { from_file, source })
    }
}

/// The master key beside a SQLite file. Where there is none it is made, unless something lies in the database that only
/// the lost one opens.
pub fn master_key_beside(database: &Path, something_is_sealed: bool, env: &Env) -> Result<MasterKey, ConfigError> {
    let mut path = database.as_os_str().to_owned();
    path.push(".key");
    let path = PathBuf::from(path);
    if !path.exists() {
        if something_is_sealed {
            return Err(ConfigError::MasterKeyLost { database: database.to_owned(), key: path });
        }
        write_new_secret(&path, &MasterKey::generate(env)?)?;
    }
    MasterKey::parse(&read_secret("the master key", &path)?)
        .map_err(|source| ConfigError::MasterKey { from_file: true, source })
}

fn read_secret(variable: &'static str, path: &Path) -> Result<Zeroizing<String>, ConfigError> {
    fs::read_to_string(path).map(Zeroizing::new).map_err(|source| ConfigError::Unreadable {
        variable,
        path: path.to_owned(),
        source,
    })
}

/// Writes a secret to a file that does not exist yet, readable by its owner alone, and makes sure that it stays.
fn write_new_secret(path: &Path, secret: &str) -> Result<(), ConfigError> {
    use std::io::Write as _;
    let write = || -> std::io::Result<()> {
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path)?;
        file.write_all(secret.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()
    };
    write().map_err(|source| ConfigError::Unwritable { path: path.to_owned(), source })
}

impl TokenSettings {
    /// Refuses lifetimes that would make the rules of sessions meaningless.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let out_of_range = |variable, value: Duration, limit: &str| {
            Err(ConfigError::OutOfRange(variable, format!("{} ({limit})", humantime::format_duration(value))))
        };
        let (second, day) = (Duration::from_secs(1), Duration::from_hours(24));
        for (variable, value, most) in [
            ("POSTERN_ACCESS_TOKEN_TTL", self.access_token_ttl, day),
            ("POSTERN_REFRESH_TOKEN_TTL", self.refresh_token_ttl, 3_650 * day),
            ("POSTERN_SESSION_MAX_LIFETIME", self.session_max_lifetime, 3_650 * day),
        ] {
            if !(second..=most).contains(&value) {
                return out_of_range(variable, value, &format!("1s to {}", humantime::format_duration(most)));
            }
        }
        if self.refresh_retry_window > Duration::from_mins(1) {
            return out_of_range("POSTERN_REFRESH_RETRY_WINDOW", self.refresh_retry_window, "0s to 60s");
        }
        for (variable, value) in [("POSTERN_ISSUER", &self.issuer), ("POSTERN_AUDIENCE", &self.audience)] {
            if value.is_empty() || value.chars().any(|c| c.is_whitespace() || c.is_control()) {
                return Err(ConfigError::OutOfRange(variable, "empty or contain white space".to_owned()));
            }
        }
        Ok(())
    }

    pub fn token_config(&self) -> TokenConfig {
        TokenConfig { issuer: self.issuer.clone(), audience: self.audience.clone(), access_ttl: self.access_token_ttl }
    }

    pub fn session_policy(&self) -> SessionPolicy {
        SessionPolicy {
            refresh_ttl: self.refresh_token_ttl,
            max_lifetime: self.session_max_lifetime,
            retry_window: self.refresh_retry_window,
            require_verified_email: self.require_verified_email,
        }
    }
}

impl PasswordSettings {
    pub fn hasher_config(&self) -> HasherConfig {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.hash_threads.map_or_else(cores, usize::from);
        HasherConfig {
            memory_kib: self.argon2_memory_kib,
            iterations: self.argon2_iterations,
            threads,
            queue: self.hash_queue.map_or(16 * threads, |queue| usize::try_from(queue).unwrap_or(usize::MAX)),
        }
    }

    /// What a new password must satisfy. The words of the service's name are among the first that somebody would guess.
    pub fn policy(&self, service_name: &str) -> PasswordPolicy {
        let name = service_name.to_lowercase();
        let words = name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        PasswordPolicy {
            min_length: usize::from(self.password_min_length),
            min_score: self.password_min_score,
            common_words: std::iter::once("postern").chain(words).map(str::to_owned).collect(),
        }
    }
}
