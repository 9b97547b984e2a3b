//! The store: keeps accounts, sessions, mail and keys in PostgreSQL or SQLite. It implements the traits of
//! `domain::ports`, which say what each step means.
//!
//! * `steps` has the steps whose statements are the same on every backend. What ends a session, voids a token or is
//!   audited is decided there, once. The steps use the verbs of a `WriteTransaction`.
//! * `queries` has the queries, likewise.
//! * Each backend implements the verbs whose static SQL depends on the database. It also has the steps that run on every
//!   login and refresh, whose locks and statements depend on the database.
//! * `traced` stands around a backend where the steps are parts of traces.
//!
//! # How to add a backend
//! Make a directory beside `postgres` and `sqlite`. Implement `Backend`, `WriteTransaction`, `SessionStore`, `MailStore`
//! and `Store` in it. Give it migrations with the same numbers and names. Add its URL scheme to [`connect`]
//! and to the engines of `tests/store`: the conformance suite runs every method on every backend, races included.

mod opening;
pub mod postgres;
mod purges;
mod queries;
mod rows;
mod shared;
pub mod sqlite;
mod statement;
mod steps;
mod traced;

use std::sync::Arc;

use crate::{database_url::DatabaseUrl, domain::ports::Store, trace};

use self::traced::Traced;

pub use opening::{Migrate, OpenError};

/// Opens the store that a URL names.
pub async fn connect(url: &DatabaseUrl, migrate: Migrate) -> Result<Arc<dyn Store>, OpenError> {
    let (store, system): (Arc<dyn Store>, _) = match url {
        DatabaseUrl::Sqlite(path) => (Arc::new(sqlite::SqliteStore::open(path, migrate).await?), "sqlite"),
        DatabaseUrl::Postgres { url, max_connections, notifications } => {
            let opening = postgres::PostgresStore::open(url, *max_connections, *notifications, migrate);
            (Arc::new(opening.await?), "postgresql")
        }
    };
    Ok(if trace::is_on() { Arc::new(Traced { store, system }) } else { store })
}
