//! Why a mail was not sent.

use std::fmt;

/// Why a mail was not sent. It contains neither the recipient nor any content of the mail, even if the server quoted
/// them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {detail}")]
pub struct SendError {
    pub kind: SendErrorKind,
    /// The cause, for the log.
    pub detail: String,
}

/// The kind of a failure. `Permanent` is only a hint, because servers also answer a wrong
/// password with 5xx.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendErrorKind {
    /// The server refused the mail with a 5xx reply.
    Permanent,
    /// The server refused the mail with a 4xx reply.
    Transient,
    /// The server could not be reached, took too long, or did not follow the protocol.
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
            Self::Permanent => "the mail server rejected the mail permanently",
            Self::Transient => "the mail server rejected the mail temporarily",
            Self::Connection => "the mail server could not be used",
            Self::Local => "the mail could not be written",
        })
    }
}

impl SendError {
    pub(super) fn local(cause: impl fmt::Display) -> Self {
        Self { kind: SendErrorKind::Local, detail: cause.to_string() }
    }
}
