//! Settings of the addresses that the service listens on.

use std::{net::SocketAddr, time::Duration};

use clap::{ArgAction, Args};
use http::HeaderValue;

use super::{
    error::{ConfigError, Faults},
    tls::TlsSettings,
    value::{duration, in_range},
    web_url,
};

/// The longest time that the service may go on after SIGTERM.
const MAX_LAME_DUCK: Duration = Duration::from_mins(5);
/// The greatest age that may be set for a connection.
const MAX_CONNECTION_AGE: Duration = Duration::from_hours(24);

/// The least and the most time that an idle connection may live.
const SHORTEST_IDLE: Duration = Duration::from_secs(1);
const LONGEST_IDLE: Duration = Duration::from_hours(1);

/// The addresses to listen on, and what is served there.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Listening")]
pub struct ListenSettings {
    /// Address for gRPC; port 0 picks a free one
    #[arg(long, env = "POSTERN_GRPC_ADDR", default_value = "127.0.0.1:50051", value_name = "IP:PORT")]
    pub grpc_addr: SocketAddr,
    /// Address for REST, the public keys and discovery
    #[arg(long, env = "POSTERN_HTTP_ADDR", default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    pub http_addr: SocketAddr,
    /// Address for probes and metrics, which contain no secrets but should not be public
    #[arg(long, env = "POSTERN_OPS_ADDR", default_value = "127.0.0.1:9090", value_name = "IP:PORT")]
    pub ops_addr: SocketAddr,
    /// URL at which clients reach the HTTP address [default: the issuer]
    #[arg(long, env = "POSTERN_PUBLIC_URL", value_name = "URL")]
    pub public_url: Option<String>,
    /// Origins whose web pages may call REST and gRPC-Web, separated by commas [default: none]
    #[arg(long, env = "POSTERN_CORS_ORIGINS", value_name = "ORIGINS", value_delimiter = ',', value_parser = origin)]
    pub cors_origins: Vec<HeaderValue>,
    /// Allow plaintext on an address that is not loopback, for use behind a proxy or a mesh that provides TLS
    #[arg(long, env = "POSTERN_ALLOW_PLAINTEXT", default_value_t = false, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub allow_plaintext: bool,
    /// How long to go on serving after SIGTERM while health is NOT_SERVING, so that load balancers stop sending calls
    #[arg(long, env = "POSTERN_LAME_DUCK", default_value = "1s", value_parser = duration, value_name = "DURATION")]
    pub lame_duck: Duration,
    /// How long an HTTP/1.1 connection may wait for its next request; longer than the pools of the balancers in front,
    /// which are 60 s at most by default; 1s to 1h
    #[arg(long, env = "POSTERN_HTTP_IDLE_TIMEOUT", default_value = "75s", value_parser = duration,
        value_name = "DURATION")]
    pub http_idle_timeout: Duration,
    /// How old a connection may get, so that clients find new replicas: up to a tenth less or more, then it takes no
    /// more calls, and those under way have 30s to finish. 0s is no limit
    #[arg(long, env = "POSTERN_MAX_CONNECTION_AGE", default_value = "5m", value_parser = duration,
        value_name = "DURATION")]
    pub max_connection_age: Duration,
    /// Serve gRPC reflection (v1 and v1alpha), so that clients such as grpcurl can read the API [default: only if the
    /// gRPC address is loopback]
    #[arg(long, env = "POSTERN_REFLECTION", action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub reflection: Option<bool>,
    #[command(flatten)]
    pub tls: TlsSettings,
}

impl ListenSettings {
    /// Whether to serve gRPC reflection. Other machines have no need to read the whole API.
    pub fn serves_reflection(&self) -> bool {
        self.reflection.unwrap_or_else(|| self.grpc_addr.ip().is_loopback())
    }

    /// How old a connection may get, if there is a limit.
    pub fn connection_age(&self) -> Option<Duration> {
        (!self.max_connection_age.is_zero()).then_some(self.max_connection_age)
    }

    /// Checks the times and that the addresses differ. Refuses plaintext on an address that other machines can reach, unless
    /// it is allowed. The operations address tells nothing that is secret.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut faults = Faults::default();
        let (grpc, http) = (("POSTERN_GRPC_ADDR", self.grpc_addr), ("POSTERN_HTTP_ADDR", self.http_addr));
        let ops = ("POSTERN_OPS_ADDR", self.ops_addr);
        for (variable, address) in [grpc, http] {
            if !address.ip().is_loopback() && !self.tls.is_asked_for() && !self.allow_plaintext {
                faults.add(ConfigError::Plaintext(variable, address));
            }
        }
        for ((one, first), (other, second)) in [(grpc, http), (grpc, ops), (http, ops)] {
            if collide(first, second) {
                faults.add(ConfigError::Contradiction(format!(
                    "{one}={first} and {other}={second} are the same port: give each its own"
                )));
            }
        }
        for (variable, value, least, most) in [
            ("POSTERN_LAME_DUCK", self.lame_duck, Duration::ZERO, MAX_LAME_DUCK),
            ("POSTERN_HTTP_IDLE_TIMEOUT", self.http_idle_timeout, SHORTEST_IDLE, LONGEST_IDLE),
            ("POSTERN_MAX_CONNECTION_AGE", self.max_connection_age, Duration::ZERO, MAX_CONNECTION_AGE),
        ] {
            faults.take(in_range(variable, value, least, most));
        }
        faults.into_result()
    }

    /// Checks the public URL, if it is set.
    pub(super) fn validate_public_url(&self) -> Result<(), ConfigError> {
        let Some(url) = &self.public_url else {
            return Ok(());
        };
        web_url::check(url).map_err(|problem| ConfigError::malformed("POSTERN_PUBLIC_URL", url, problem))
    }
}

/// Whether one process cannot listen on both addresses.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let is_everywhere = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && (is_everywhere || one.ip() == other.ip())
}

/// Parses an origin (RFC 6454 §6.2): scheme, host and port, and nothing after them.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or_default();
    if host.is_empty() || host.contains(['/', '?', '#', '@', '*', ' ']) {
        return Err("an origin is written like https://app.example.com, without a path".to_owned());
    }
    HeaderValue::from_str(text).map_err(|error| error.to_string())
}
