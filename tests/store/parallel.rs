//! Concurrent steps: from several replicas, at the same time, or while another transaction holds a lock.

use std::sync::Arc;

use futures_util::future::join_all;
use postern::domain::ports::Store;
use sqlx::AssertSqlSafe;
use tokio::task::JoinHandle;

use crate::support::{Database, Engine, Sql, wait_until};

pub type Stores = [Arc<dyn Store>; 2];

/// Two replicas on PostgreSQL. SQLite serves one process, so both are the same store there.
pub async fn replicas(database: &Database) -> Stores {
    let first = database.store().await;
    match database.engine {
        Engine::Sqlite => [Arc::clone(&first), first],
        Engine::Postgres => [first, database.store().await],
    }
}

/// Runs all futures concurrently and waits for all of them.
pub async fn all_at_once<T: Send + 'static>(
    futures: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let tasks: Vec<_> = futures.map(tokio::spawn).collect();
    join_all(tasks).await.into_iter().map(|outcome| outcome.expect("the task did not panic")).collect()
}

/// Waits a short time, which differs from round to round.
pub async fn stagger(round: usize) {
    for _ in 0..round * 3 {
        tokio::task::yield_now().await;
    }
}

/// Begins another transaction on the same database and runs a statement in it.
pub async fn begin(database: &Database, statement: String) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let Sql::Postgres(pool) = &database.sql else {
        panic!("only PostgreSQL has row locks");
    };
    let mut transaction = pool.begin().await.expect("a transaction");
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *transaction).await.expect("valid SQL");
    transaction
}

/// Waits until the step waits for a lock. Fails if the step ends before that.
pub async fn assert_waits<T>(database: &Database, step: &JoinHandle<T>) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    wait_until("the step waits for the other transaction", async || {
        assert!(!step.is_finished(), "the step did not wait for the other transaction");
        (database.sql.number(waiting).await > 0).then_some(())
    })
    .await;
}
