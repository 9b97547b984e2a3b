//! Settings of accounts.

use clap::Args;

use crate::domain::reserved::{DEFAULT_RESERVED, ReservedUsernames};

/// Rules for accounts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Accounts")]
pub struct AccountSettings {
    /// Usernames that nobody can choose over the network, separated by commas; upper and lower case are the same, and an
    /// empty value reserves none. `postern user create` can use them, and existing accounts keep theirs
    #[arg(long, env = "POSTERN_RESERVED_USERNAMES", default_value = DEFAULT_RESERVED, value_name = "NAMES")]
    pub reserved_usernames: ReservedUsernames,
}
