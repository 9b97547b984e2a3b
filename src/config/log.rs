//! Settings of the log.

use clap::{ArgAction, Args, ValueEnum};
use tracing_subscriber::EnvFilter;

/// What is logged and in which format. Every command has these settings.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogSettings {
    /// Which messages are logged: a level, or directives in the syntax of RUST_LOG
    #[arg(long, env = "POSTERN_LOG", default_value = "info,h2=error", global = true, value_name = "FILTER",
        value_parser = filter)]
    pub log: String,
    /// Format of log lines on standard error [default: text on a terminal, else json]
    #[arg(long, env = "POSTERN_LOG_FORMAT", global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Log each call that was answered, at level `info`
    #[arg(long, env = "POSTERN_ACCESS_LOG", default_value_t = true, action = ArgAction::Set, global = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub access_log: bool,
}

/// Parses what is logged, to refuse what the log would refuse.
fn filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}
