//! Why a command failed.

/// Any error. A command only prints its message.
pub type CliError = Box<dyn std::error::Error + Send + Sync>;
