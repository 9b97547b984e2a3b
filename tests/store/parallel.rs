//! Steps that meet: from several replicas, at the same time, or with one of them held up in the middle.

use std::sync::Arc;

use futures_util::future::join_all;
use postern::domain::ports::Store;
use sqlx::AssertSqlSafe;
use tokio::task::JoinHandle;

use crate::support::{Database, Engine, Sql, wait_until};

pub type Stores = [Arc<dyn Store>; 2];

/// Two replicas, where the engine has any; SQLite is for one process.
pub async fn replicas(database: &Database) -> Stores {
    let first = database.store().await;
    match database.engine {
        Engine::Sqlite => [Arc::clone(&first), first],
        Engine::Postgres => [first, database.store().await],
    }
}

/// Starts everything at once, and waits for all of it.
pub async fn all_at_once<T: Send + 'static>(
    attempts: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let tasks: Vec<_> = attempts.map(tokio::spawn).collect();
    join_all(tasks).await.into_iter().map(|outcome| outcome.expect("no panic")).collect()
}

/// A little time, another in each round.
pub async fn stagger(round: usize) {
    for _ in 0..round * 3 {
        tokio::task::yield_now().await;
    }
}

/// A transaction of somebody else on the same database, with one statement done.
pub async fn begin(database: &Database, statement: String) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let Sql::Postgres(pool) = &database.sql else {
        panic!("only PostgreSQL has row locks");
    };
    let mut transaction = pool.begin().await.expect("a transaction");
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *transaction).await.expect("SQL");
    transaction
}

/// Waits until the step waits for a lock.
pub async fn assert_waits<T>(database: &Database, step: &JoinHandle<T>) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    wait_until("the step waits for the other transaction", async || {
        assert!(!step.is_finished(), "it did not wait for the other transaction");
        (database.sql.number(waiting).await > 0).then_some(())
    })
    .await;
}
