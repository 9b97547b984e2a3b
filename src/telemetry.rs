//! Logging: to standard error, as text for people or as JSON for machines. Secrets do not reach it because their types
//! do not print; addresses are masked by theirs.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("POSTERN_LOG: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error("logging was begun already: {0}")]
    Twice(#[from] Box<dyn std::error::Error + Send + Sync>),
}

/// Begins to log.
pub fn start(config: &LogConfig) -> Result<(), TelemetryError> {
    let terminal = std::io::stderr().is_terminal();
    let format = config.log_format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(&config.log)?)
        .with_writer(std::io::stderr)
        .with_target(false);
    match format {
        LogFormat::Text => builder.with_ansi(terminal).try_init()?,
        LogFormat::Json => builder.json().flatten_event(true).with_span_list(false).try_init()?,
    }
    Ok(())
}
