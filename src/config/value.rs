//! Parsers of values that several settings use.

use std::{fs, path::Path, time::Duration};

use zeroize::Zeroizing;

use crate::private_file;

use super::error::ConfigError;

/// Parses durations such as `15m`, `7d` or `1h 30m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 15m, 7d or 1h 30m"))
}

/// Checks that a duration is within a range.
pub(super) fn in_range(
    variable: &'static str,
    value: Duration,
    least: Duration,
    most: Duration,
) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let [value, least, most] = [value, least, most].map(|it| humantime::format_duration(it).to_string());
    Err(ConfigError::OutOfRange(variable, format!("{value} ({least} to {most})")))
}

/// Reads a file that contains a secret. `variable` is the setting that names the file, for the error.
pub(super) fn read_secret(variable: &'static str, path: &Path) -> Result<Zeroizing<String>, ConfigError> {
    let read = private_file::keep_secret(path).and_then(|()| fs::read_to_string(path));
    read.map(Zeroizing::new).map_err(|source| ConfigError::Unreadable {
        variable,
        path: path.to_owned(),
        source: private_file::explain(path, source),
    })
}
