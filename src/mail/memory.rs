//! The mailer of tests: it collects mails in memory, and tests can make it fail. No setting selects it.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::domain::{account::Email, ids::MailId};

use super::{
    error::{SendError, SendErrorKind},
    messages::MailContent,
};

/// A mail in a [`MemoryOutbox`].
#[derive(Clone)]
pub struct Sent {
    pub id: MailId,
    pub to: Email,
    pub content: MailContent,
    /// The whole message, as it would be sent to a mail server.
    pub message: String,
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, to, content, message: _ } = self;
        f.debug_struct("Sent").field("id", id).field("to", to).field("content", content).finish_non_exhaustive()
    }
}

/// The mails that a test's mailer has collected.
#[derive(Debug, Clone, Default)]
pub struct MemoryOutbox(Arc<Mutex<MemoryState>>);

#[derive(Debug, Default)]
struct MemoryState {
    sent: Vec<Sent>,
    failure: Option<SendErrorKind>,
}

impl MemoryOutbox {
    /// The mails that were sent so far, oldest first.
    pub fn sent(&self) -> Vec<Sent> {
        self.state().sent.clone()
    }

    /// Removes and returns the mails that were sent so far, oldest first.
    pub fn take(&self) -> Vec<Sent> {
        std::mem::take(&mut self.state().sent)
    }

    /// From now on, every mail fails in this way; with `None`, no mail fails.
    pub fn fail_with(&self, failure: Option<SendErrorKind>) {
        self.state().failure = failure;
    }

    fn state(&self) -> MutexGuard<'_, MemoryState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, mail: Sent) -> Result<(), SendError> {
        let mut state = self.state();
        if let Some(kind) = state.failure {
            return Err(SendError { kind, detail: "requested by the test".to_owned() });
        }
        state.sent.push(mail);
        Ok(())
    }
}
