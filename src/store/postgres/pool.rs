//! The pool of connections. A connection goes back only when its step has ended cleanly, so nothing has to be sent to
//! the server when it is released. Any other connection is closed.
//!
//! A quarter of the connections is for reads. Writes wait for the disk or for a locked row, and without this share a slow
//! disk would stop the reads too.

use std::{sync::Arc, time::Duration};

use deadpool::managed::{self, Metrics, Object, PoolError, QueueMode, RecycleError, RecycleResult};
use sqlx::{ConnectOptions as _, Connection as _, PgConnection, postgres::PgConnectOptions};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{domain::ports::Connections, error::StoreError};

/// How long a step waits for a connection, free or new.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that was not used for longer than this is tested before it is used.
const TEST_AFTER_IDLE: Duration = Duration::from_secs(1);
/// How long the test may take.
const TEST_TIMEOUT: Duration = Duration::from_secs(2);

/// What a connection is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A statement that only reads.
    Read,
    /// Everything else.
    Write,
}

/// A handle to the pool.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    connections: managed::Pool<Connector>,
    /// The connections that writes may take.
    for_writes: Arc<Semaphore>,
}

impl Pool {
    /// A pool that connects when the first connection is needed.
    pub(super) fn new(options: PgConnectOptions, max_connections: u32) -> Result<Self, StoreError> {
        // The connection that was used last is taken first: its statements are prepared, and it needs no test.
        let max_size = usize::try_from(max_connections).unwrap_or(usize::MAX);
        let pool = managed::Pool::builder(Connector { options }).max_size(max_size).queue_mode(QueueMode::Lifo).build();
        let for_writes = Arc::new(Semaphore::new((max_size - max_size.div_ceil(4)).max(1)));
        Ok(Self { connections: pool.map_err(StoreError::broken)?, for_writes })
    }

    /// Takes a connection, a free one if there is one.
    pub(super) async fn take(&self, purpose: Purpose) -> Result<Lease, StoreError> {
        let taking = async {
            let write = match purpose {
                Purpose::Read => None,
                Purpose::Write => Some(Arc::clone(&self.for_writes).acquire_owned().await.map_err(StoreError::broken)?),
            };
            match self.connections.get().await {
                Ok(connection) => Ok(Lease { connection, is_clean: false, _write: write }),
                Err(PoolError::Backend(error)) => Err(error.into()),
                Err(other) => Err(StoreError::Unavailable(Box::new(other))),
            }
        };
        match tokio::time::timeout(ACQUIRE_TIMEOUT, taking).await {
            Ok(taken) => taken,
            Err(elapsed) => Err(StoreError::Unavailable(Box::new(elapsed))),
        }
    }

    /// Closes the connections that nobody uses now. New ones have the database's settings of today.
    pub(super) fn close_idle(&self) {
        self.connections.retain(|_, _| false);
    }

    pub(super) fn connections(&self) -> Connections {
        let status = self.connections.status();
        Connections { open: u32::try_from(status.size).unwrap_or(u32::MAX), idle: status.available }
    }
}

/// A connection that a step has taken. It is closed when this is dropped, unless it was given back.
#[derive(Debug)]
pub(super) struct Lease {
    connection: Object<Connector>,
    is_clean: bool,
    /// The share of a write. It is free again when the connection has gone back.
    _write: Option<OwnedSemaphorePermit>,
}

impl Lease {
    pub(super) fn get(&mut self) -> Result<&mut PgConnection, StoreError> {
        Option::as_mut(&mut *self.connection).ok_or_else(|| StoreError::broken("the connection is closed"))
    }

    /// Gives the connection back to the pool: nothing is under way on it, and it is in no transaction.
    pub(super) fn give_back(mut self) {
        self.is_clean = true;
    }

    /// Gives the connection back after a statement outside a transaction, unless the connection may be broken.
    pub(super) fn give_back_after<T>(self, outcome: Result<T, sqlx::Error>) -> Result<T, StoreError> {
        let outcome = outcome.map_err(StoreError::from);
        if !matches!(outcome, Err(StoreError::Unavailable(_))) {
            self.give_back();
        }
        outcome
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.is_clean {
            // Dropping the connection closes its socket, and the server then ends what was under way on it.
            *self.connection = None;
        }
    }
}

/// Opens the connections of the pool.
#[derive(Debug)]
struct Connector {
    options: PgConnectOptions,
}

impl managed::Manager for Connector {
    /// `None` once it was closed.
    type Type = Option<PgConnection>;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Option<PgConnection>, sqlx::Error> {
        self.options.connect().await.map(Some)
    }

    async fn recycle(&self, connection: &mut Option<PgConnection>, metrics: &Metrics) -> RecycleResult<sqlx::Error> {
        let Some(connection) = connection else {
            return Err(RecycleError::message("the connection was closed"));
        };
        if metrics.last_used() < TEST_AFTER_IDLE {
            return Ok(());
        }
        // A stale connection is replaced, so that its next caller does not fail.
        match tokio::time::timeout(TEST_TIMEOUT, connection.ping()).await {
            Ok(outcome) => Ok(outcome?),
            Err(_) => Err(RecycleError::message("the connection did not answer")),
        }
    }
}
