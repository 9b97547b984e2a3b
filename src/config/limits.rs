//! How much is let through, whom a call counts for, and how long what was done is remembered.

use std::{num::NonZeroU32, time::Duration};

use clap::Args;
use ipnet::IpNet;

use crate::{domain::throttle::AttemptPolicy, listen::TrustedProxies};

use super::value::duration;

/// After the last guess that is let through without a pause. Each further failure doubles it.
const FIRST_DELAY: Duration = Duration::from_secs(30);
const LONGEST_DELAY: Duration = Duration::from_mins(15);
/// Without a guess for so long, it is as if there had been none.
const GUESS_WINDOW: Duration = Duration::from_hours(1);

/// Limits on guessing, and the audit.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits and audit")]
pub struct LimitSettings {
    /// Wrong passwords in a row for one address until there is a pause: 30 s, then twice as long each time, at most
    /// 15 min
    #[arg(long, env = "POSTERN_LOGIN_MAX_FAILURES", default_value_t = 10, value_name = "COUNT",
        value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub login_max_failures: u16,
    /// Passwords that one client address may try in a minute, per replica; 0 for no limit
    #[arg(long, env = "POSTERN_LOGIN_LIMIT_PER_CLIENT", default_value_t = 3_000, value_name = "COUNT")]
    pub login_limit_per_client: u32,
    /// Networks whose X-Forwarded-For says who calls, as CIDRs separated by commas [default: none]
    #[arg(long, env = "POSTERN_TRUSTED_PROXIES", value_name = "CIDRS", value_delimiter = ',', value_parser = network)]
    pub trusted_proxies: Vec<IpNet>,
    /// How long the audit is kept
    #[arg(long, env = "POSTERN_AUDIT_RETENTION", default_value = "365d", value_parser = duration, value_name = "DURATION")]
    pub audit_retention: Duration,
}

/// Reads a CIDR, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    text.parse()
        .or_else(|_| text.parse().map(|address: std::net::IpAddr| address.into()))
        .map_err(|_| "a network is written like 10.0.0.0/8 or 2001:db8::/32".to_owned())
}

impl LimitSettings {
    pub fn attempt_policy(&self) -> AttemptPolicy {
        AttemptPolicy {
            max_failures: self.login_max_failures.into(),
            first_delay: FIRST_DELAY,
            longest_delay: LONGEST_DELAY,
            window: GUESS_WINDOW,
        }
    }

    pub fn client_limit(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.login_limit_per_client)
    }

    pub fn trusted_proxies(&self) -> TrustedProxies {
        TrustedProxies::new(self.trusted_proxies.clone())
    }
}
