//! Settings of rate limits, trusted proxies, and audit retention.

use std::{num::NonZeroU32, time::Duration};

use clap::Args;
use ipnet::IpNet;

use crate::{domain::throttle::AttemptPolicy, listen::TrustedProxies};

use super::{
    error::ConfigError,
    value::{duration, in_range},
};

/// The pause after the failures that are allowed without one. Each further failure doubles it.
const FIRST_DELAY: Duration = Duration::from_secs(30);
/// The longest pause.
const LONGEST_DELAY: Duration = Duration::from_mins(15);
/// After this long without an attempt, earlier failures no longer count.
const ATTEMPT_WINDOW: Duration = Duration::from_hours(1);
/// The least and the most time for which audit events are kept.
const SHORTEST_RETENTION: Duration = Duration::from_hours(24);
const LONGEST_RETENTION: Duration = Duration::from_hours(100 * 366 * 24);
const _: () = assert!(LONGEST_DELAY.as_secs() < ATTEMPT_WINDOW.as_secs(), "failures count until the pause is over");
const _: () = assert!(
    FIRST_DELAY.as_secs() == 30 && LONGEST_DELAY.as_secs() == 15 * 60,
    "the help text of --login-max-failures names both"
);

/// Limits on password attempts, and the audit log.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits and audit")]
pub struct LimitSettings {
    /// How many wrong passwords in a row are allowed for one email address before a pause of 30 s; each further wrong
    /// password doubles the pause, up to 15 min
    #[arg(long, env = "POSTERN_LOGIN_MAX_FAILURES", default_value_t = 10, value_name = "COUNT",
        value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub login_max_failures: u16,
    /// How many passwords one client address may try per minute, at each replica; 0 for no limit
    #[arg(long, env = "POSTERN_LOGIN_LIMIT_PER_CLIENT", default_value_t = 3_000, value_name = "COUNT")]
    pub login_limit_per_client: u32,
    /// How many accounts one client address may ask for per minute, at each replica; 0 for no limit
    #[arg(long, env = "POSTERN_SIGN_UP_LIMIT_PER_CLIENT", default_value_t = 3_000, value_name = "COUNT")]
    pub sign_up_limit_per_client: u32,
    /// Networks of proxies whose X-Forwarded-For is trusted, as CIDRs separated by commas [default: none]
    #[arg(long, env = "POSTERN_TRUSTED_PROXIES", value_name = "CIDRS", value_delimiter = ',', value_parser = network)]
    pub trusted_proxies: Vec<IpNet>,
    /// How long audit events are kept; 1d to 100y
    #[arg(long, env = "POSTERN_AUDIT_RETENTION", default_value = "365d", value_parser = duration, value_name = "DURATION")]
    pub audit_retention: Duration,
}

/// Parses a CIDR or a single address.
fn network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    text.parse()
        .or_else(|_| text.parse().map(|address: std::net::IpAddr| address.into()))
        .map_err(|_| "a network is written like 10.0.0.0/8 or 2001:db8::/32".to_owned())
}

impl LimitSettings {
    /// Checks how long audit events are kept.
    pub fn validate(&self) -> Result<(), ConfigError> {
        in_range("POSTERN_AUDIT_RETENTION", self.audit_retention, SHORTEST_RETENTION, LONGEST_RETENTION)
    }

    pub fn attempt_policy(&self) -> AttemptPolicy {
        AttemptPolicy {
            max_failures: self.login_max_failures.into(),
            first_delay: FIRST_DELAY,
            longest_delay: LONGEST_DELAY,
            window: ATTEMPT_WINDOW,
        }
    }

    /// How many passwords one client address may try per minute. `None` means no limit.
    pub fn client_limit(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.login_limit_per_client)
    }

    /// How many accounts one client address may ask for per minute. `None` means no limit.
    pub fn sign_up_limit(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.sign_up_limit_per_client)
    }

    pub fn trusted_proxies(&self) -> TrustedProxies {
        TrustedProxies::new(self.trusted_proxies.clone())
    }
}
