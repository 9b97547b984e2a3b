//! Settings of the log.

use clap::{Args, ValueEnum};
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
