//! The error of a command.

/// Any error. A command only prints its message.
pub type CliError = Box<dyn std::error::Error + Send + Sync>;
