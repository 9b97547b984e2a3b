//! Why a mail was not sent.

use std::fmt;

/// Why a mail was not sent. It contains neither the recipient nor any content of the mail, even if the server quoted
/// them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {detail}")]
pub struct SendError {
    pub kind: SendErrorKind,
    /// For the log.
    pub detail: String,
}

/// The kind of a failure. "Permanent" is only a hint: a wrong password is a 5xx too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendErrorKind {
    /// The server refused with a 5xx.
    Permanent,
    /// The server refused with a 4xx.
    Transient,
    /// The server could not be reached or understood, or took too long.
    Connection,
    /// The mail could not be built, or its file could not be written.
    Local,
}

impl SendErrorKind {
    /// The name of the kind in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permanent => "permanent",
            Self::Transient => "transient",
            Self::Connection => "connection",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for SendErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Permanent => "the mail server refused for good",
            Self::Transient => "the mail server refused for now",
            Self::Connection => "no mail server could be talked to",
            Self::Local => "the mail could not be written",
        })
    }
}

impl SendError {
    pub(super) fn local(cause: impl fmt::Display) -> Self {
        Self { kind: SendErrorKind::Local, detail: cause.to_string() }
    }
}
