//! Standard output. `println!` panics where nobody reads it any more, or where a disk is full.

use std::io::{self, Write as _};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{domain::token::whole_seconds, error::Error};

use super::error::CliError;

/// Prints a line.
pub(super) fn line(text: &str) -> Result<(), CliError> {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints what is no text.
pub(super) fn bytes(bytes: &[u8]) -> Result<(), CliError> {
    let mut output = io::stdout().lock();
    output.write_all(bytes).and_then(|()| output.flush()).map_err(|error| CliError::output(&error))
}

/// Prints a line for the operator to standard error, apart from the result. It is no failure if nobody reads it.
pub(super) fn note(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// A time to the second, as RFC 3339 has it.
pub(super) fn time(time: OffsetDateTime) -> Result<String, CliError> {
    Ok(whole_seconds(time).format(&Rfc3339).map_err(Error::internal)?)
}
