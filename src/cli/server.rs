//! The settings that commands which act on the database share with `serve`.

use clap::Args;

use crate::config::Config;

/// The settings of the server, so that a command runs with the server's environment variables.
#[derive(Debug, Args)]
pub struct Server {
    #[command(flatten)]
    pub(super) config: Config,
}
