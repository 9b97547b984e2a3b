//! Applies the migrations, one process at a time.
//!
//! The lock ends with its transaction. One of a session could stay with a connection of a pooler, and the next migration
//! would wait for it for ever.

use std::time::{Duration, Instant};

use sqlx::{
    ConnectOptions as _, Connection as _, Executor as _, PgConnection, migrate::Migrator, postgres::PgConnectOptions,
};

use crate::{error::StoreError, store::opening::OpenError};

/// The advisory lock: "postern" in ASCII.
const LOCK: i64 = 0x0070_6f73_7465_726e;
/// How long to wait for another process that migrates, or for a table that a statement of it uses.
const PATIENCE: Duration = Duration::from_mins(1);
const PAUSE: Duration = Duration::from_millis(200);

/// Applies the missing migrations in one transaction.
pub(super) async fn apply(mut migrator: Migrator, options: &PgConnectOptions) -> Result<(), OpenError> {
    let mut connection = options.connect().await.map_err(StoreError::from)?;
    // The library's own lock is one of a session.
    migrator.set_locking(false);
    let started = Instant::now();
    while !apply_alone(&migrator, &mut connection).await? {
        if started.elapsed() > PATIENCE {
            let holders = holders(&mut connection).await.map_err(StoreError::from)?;
            return Err(OpenError::MigrationLocked(PATIENCE, holders));
        }
        tokio::time::sleep(PAUSE).await;
    }
    connection.close().await.map_err(StoreError::from)?;
    Ok(())
}

/// `false` if another process migrates now.
async fn apply_alone(migrator: &Migrator, connection: &mut PgConnection) -> Result<bool, OpenError> {
    let mut tx = connection.begin().await.map_err(StoreError::from)?;
    let lock = sqlx::query_scalar("SELECT pg_try_advisory_xact_lock($1)").bind(LOCK);
    if !lock.fetch_one(&mut *tx).await.map_err(StoreError::from)? {
        return Ok(false);
    }
    let limit = format!("SET LOCAL lock_timeout = {}", PATIENCE.as_millis());
    tx.execute(sqlx::AssertSqlSafe(limit)).await.map_err(StoreError::from)?;
    migrator.run(&mut *tx).await?;
    tx.commit().await.map_err(StoreError::from)?;
    Ok(true)
}

/// Who holds the lock.
async fn holders(connection: &mut PgConnection) -> Result<String, sqlx::Error> {
    let query = sqlx::query_scalar(
        "SELECT coalesce(string_agg(format('process %s of %s at %s, %s since %s', a.pid, a.usename, \
         coalesce(host(a.client_addr), 'this machine'), a.state, a.state_change), '; '), 'nobody now') \
         FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.locktype = 'advisory' AND l.granted \
         AND l.objsubid = 1 AND (l.classid::bigint << 32 | l.objid::bigint) = $1",
    );
    query.bind(LOCK).fetch_one(connection).await
}
