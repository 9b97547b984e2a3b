//! What the domain asks of a store: traits whose methods are the steps, and the types of those steps.
//!
//! A method is one atomic step with an outcome enum. Its transaction begins and ends inside, so nobody can hold one
//! during a hash or while a mail is sent. `Err` means that the store failed, never that a rule was broken.
//!
//! `crate::store` implements these traits. `tests/store` runs every method on every backend.

mod accounts;
mod admin;
mod keys;
mod mail;
mod purge;
mod queries;
mod revocations;
mod services;
mod sessions;

use std::{fmt, time::Duration};

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::error::StoreError;

pub use accounts::*;
pub use admin::*;
pub use keys::*;
pub use mail::*;
pub use purge::*;
pub use queries::*;
pub use revocations::*;
pub use services::*;
pub use sessions::*;

/// The longest that a write may take. A store gives a slower one up, so what was not committed by then never will be.
pub const LONGEST_WRITE: Duration = Duration::from_secs(20);

/// How long an attempt that nobody settles is held against its account: longer than a call and its last write may take.
pub const ATTEMPT_LIFETIME: Duration = Duration::from_secs(40);
const _: () = assert!(ATTEMPT_LIFETIME.as_secs() > LONGEST_WRITE.as_secs() + 10, "a call takes up to 10 s before it");

/// A store: all its steps, and what belongs to the store as a whole.
#[async_trait]
pub trait Store:
    AccountStore
    + AdminStore
    + SessionStore
    + ServiceStore
    + KeyStore
    + MailStore
    + PurgeStore
    + Queries
    + Send
    + Sync
    + 'static
{
    /// Asks the database whether it answers. A backend whose database can go away fails every other step at once from a
    /// failed ping until the next successful one, so that callers do not queue for a database that is down.
    async fn ping(&self) -> Result<(), StoreError>;

    /// The time by the clock that all replicas share, when it is `now` by the clock of this process. The clock of a replica
    /// may be wrong.
    fn time(&self, now: OffsetDateTime) -> OffsetDateTime;

    /// The result of the last ping, without asking the database. Lets callers skip work that would fail.
    fn ensure_reachable(&self) -> Result<(), StoreError>;

    /// How many connections are open, and how many of them are idle.
    fn connections(&self) -> Connections;

    /// Closes the store, when nothing uses it any more. An embedded database is one whole file afterwards.
    async fn close(&self) -> Result<(), StoreError>;

    /// Stores the key if the store has none yet. Of several callers at the same time, one wins.
    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError>;
}

impl fmt::Debug for dyn Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

/// The state of a connection pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    /// All connections, busy or idle.
    pub open: u32,
    pub idle: usize,
}
