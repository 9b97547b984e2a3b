//! Parsers of values that several settings use.

use std::{fs, path::Path, time::Duration};

use zeroize::Zeroizing;

use super::error::ConfigError;

/// Parses durations such as `15m`, `7d` or `1h 30m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 15m, 7d or 1h 30m"))
}

/// Reads a file that contains a secret. `variable` is the setting that names the file, for the error.
pub(super) fn read_secret(variable: &'static str, path: &Path) -> Result<Zeroizing<String>, ConfigError> {
    fs::read_to_string(path).map(Zeroizing::new).map_err(|source| ConfigError::Unreadable {
        variable,
        path: path.to_owned(),
        source,
    })
}
