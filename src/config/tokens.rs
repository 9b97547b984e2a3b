//! Settings of tokens and sessions.

use std::time::Duration;

use clap::{ArgAction, Args};
use humantime::format_duration;

use crate::domain::{session::SessionPolicy, token::TokenConfig};

use super::{
    error::{ConfigError, Faults},
    value::{duration, in_range},
    web_url,
};

/// How long an access token is valid, unless that is set.
const ACCESS_TOKEN_TTL: Duration = Duration::from_mins(15);
/// How long a used refresh token is answered again while its answer may have been lost, unless that is set.
const LOST_ANSWER_WINDOW: Duration = Duration::from_hours(24);

/// Claims and lifetimes of tokens and sessions.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Tokens and sessions")]
pub struct TokenSettings {
    /// `iss` of every token: the URL of the service, without query and fragment (RFC 8414)
    #[arg(long, env = "POSTERN_ISSUER", default_value = "http://localhost:8080", value_name = "URL")]
    pub issuer: String,
    /// `aud` of access tokens
    #[arg(long, env = "POSTERN_AUDIENCE", default_value = "postern", value_name = "NAME")]
    pub audience: String,
    /// How long an access token is valid; not longer than a refresh token
    #[arg(long, env = "POSTERN_ACCESS_TOKEN_TTL", default_value = "15m", value_parser = duration, value_name = "DURATION")]
    pub access_token_ttl: Duration,
    /// How long the access token of a service account is valid
    #[arg(long, env = "POSTERN_SERVICE_TOKEN_TTL", default_value = "15m", value_parser = duration, value_name = "DURATION")]
    pub service_token_ttl: Duration,
    /// How long a refresh token is valid after it was issued
    #[arg(long, env = "POSTERN_REFRESH_TOKEN_TTL", default_value = "7d", value_parser = duration, value_name = "DURATION")]
    pub refresh_token_ttl: Duration,
    /// Maximum age of a session, however often it is refreshed
    #[arg(long, env = "POSTERN_SESSION_MAX_LIFETIME", default_value = "90d", value_parser = duration, value_name = "DURATION")]
    pub session_max_lifetime: Duration,
    /// How long a refresh with a used token returns the same answer again in any case, for calls that raced; 0s to 60s
    #[arg(long, env = "POSTERN_REFRESH_RETRY_WINDOW", default_value = "10s", value_parser = duration, value_name = "DURATION")]
    pub refresh_retry_window: Duration,
    /// How long it does so while nobody has used that answer, for clients that lost it. Without this setting, 24h; or 0s, which
    /// means never, if POSTERN_REFRESH_RETRY_WINDOW is 0s
    #[arg(long, env = "POSTERN_REFRESH_LOST_ANSWER_WINDOW", value_parser = duration, value_name = "DURATION")]
    pub refresh_lost_answer_window: Option<Duration>,
    /// How many sessions an account may have at a time; the one that was not used for the longest time ends first
    #[arg(long, env = "POSTERN_MAX_SESSIONS_PER_USER", default_value_t = 100, value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub max_sessions_per_user: u32,
    /// Refuse login to accounts whose email address is not verified
    #[arg(long, env = "POSTERN_REQUIRE_VERIFIED_EMAIL", default_value_t = false, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub require_verified_email: bool,
}

impl TokenSettings {
    /// Checks the issuer alone, from which other settings are derived.
    pub(super) fn validate_issuer(&self) -> Result<(), ConfigError> {
        web_url::check(&self.issuer).map_err(|problem| ConfigError::malformed("POSTERN_ISSUER", &self.issuer, problem))
    }

    /// Checks the ranges of the lifetimes and that they go together, the issuer, and that the audience is not empty and
    /// contains no white space.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut faults = Faults::default();
        let (second, day) = (Duration::from_secs(1), Duration::from_hours(24));
        let access = ("POSTERN_ACCESS_TOKEN_TTL", self.access_token_ttl, second, day);
        let service = ("POSTERN_SERVICE_TOKEN_TTL", self.service_token_ttl, second, day);
        let refresh = ("POSTERN_REFRESH_TOKEN_TTL", self.refresh_token_ttl, second, 3_650 * day);
        let session = ("POSTERN_SESSION_MAX_LIFETIME", self.session_max_lifetime, second, 3_650 * day);
        let retry = ("POSTERN_REFRESH_RETRY_WINDOW", self.refresh_retry_window, Duration::ZERO, Duration::from_mins(1));
        for (variable, value, least, most) in [access, service, refresh, session, retry] {
            faults.take(in_range(variable, value, least, most));
        }
        // A refresh token ends with its session at the latest. An access token does not, because others verify it.
        // The default is not meant so: whoever shortens the others alone contradicts nothing.
        let is_set = self.access_token_ttl != ACCESS_TOKEN_TTL;
        for (variable, value, ..) in [refresh, session] {
            if is_set && faults.is_empty() && self.access_token_ttl > value {
                faults.add(ConfigError::Contradiction(format!(
                    "POSTERN_ACCESS_TOKEN_TTL={} must not be longer than {variable}={}: an access token would outlive \
                     what it comes from",
                    format_duration(self.access_token_ttl),
                    format_duration(value),
                )));
            }
        }
        faults.take(self.validate_issuer());
        let lost = ("POSTERN_REFRESH_LOST_ANSWER_WINDOW", self.lost_answer_window());
        faults.take(in_range(lost.0, lost.1, Duration::ZERO, 3_650 * day));
        if self.audience.is_empty() || self.audience.chars().any(|c| c.is_whitespace() || c.is_control()) {
            let problem = "must not be empty or contain white space";
            faults.add(ConfigError::malformed("POSTERN_AUDIENCE", &self.audience, problem));
        }
        faults.into_result()
    }

    pub fn token_config(&self) -> TokenConfig {
        TokenConfig {
            issuer: self.issuer.clone(),
            audience: self.audience.clone(),
            access_ttl: self.access_token_ttl,
            service_ttl: self.service_token_ttl,
        }
    }

    /// Whoever has switched the retry window off wants each refresh token to work once.
    fn lost_answer_window(&self) -> Duration {
        let default = if self.refresh_retry_window.is_zero() { Duration::ZERO } else { LOST_ANSWER_WINDOW };
        self.refresh_lost_answer_window.unwrap_or(default)
    }

    pub fn session_policy(&self) -> SessionPolicy {
        SessionPolicy {
            refresh_ttl: self.refresh_token_ttl,
            max_lifetime: self.session_max_lifetime,
            retry_window: self.refresh_retry_window,
            lost_answer_window: self.lost_answer_window(),
            most_per_user: self.max_sessions_per_user,
            require_verified_email: self.require_verified_email,
        }
    }
}
