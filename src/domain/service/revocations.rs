//! Keeps the in-memory set of revocations in step with the store's log.

use std::{sync::Arc, time::Duration};

use crate::error::{Error, StoreError};

use super::Service;

/// How often the log is read if nothing wakes the reader earlier.
const POLL_INTERVAL: Duration = Duration::from_millis(700);

impl Service {
    /// Reads the log for ever: at once when the store reports a new entry, otherwise at an interval.
    pub async fn run_revocation_sync(self: Arc<Self>) {
        loop {
            if let Err(error) = self.poll_revocations().await {
                tracing::debug!(%error, "the log of revocations could not be read");
            }
            tokio::select! {
                () = self.store.revocation_written() => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    /// Reads the log once, before the first call is answered.
    pub async fn load_revocations(&self) -> Result<(), Error> {
        Ok(self.poll_revocations().await?)
    }

    /// Reads the new entries of the log. A step that revokes does this before it is answered, so that on this replica
    /// the revoked tokens are refused from then on.
    async fn poll_revocations(&self) -> Result<(), StoreError> {
        self.revocations.poll(self.store.as_ref(), self.env.now()).await?;
        self.keyring.drop_revoked(|id| self.revocations.has(id));
        Ok(())
    }

    /// Like `poll_revocations`, but a read error is only logged: the change is committed, and the next poll picks it
    /// up.
    pub(super) async fn sync_revocations(&self) {
        if let Err(error) = self.poll_revocations().await {
            tracing::debug!(%error, "the log of revocations could not be read after a revocation; the next poll reads it");
        }
    }
}
