//! Plain SQL on the database of a test, on its own connections: to prepare what no RPC can do, and to check what was
//! written. Statements are built as text, because ids look different on each engine.

use std::path::Path;

use sqlx::{
    AssertSqlSafe, ConnectOptions as _, PgPool, SqlitePool,
    postgres::{PgConnectOptions, PgPoolOptions},
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};

/// Connections to the database of a test.
pub enum Sql {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl Sql {
    pub fn sqlite(file: &Path) -> Self {
        let options = SqliteConnectOptions::new().filename(file).foreign_keys(true).disable_statement_logging();
        Self::Sqlite(SqlitePoolOptions::new().max_connections(2).connect_lazy_with(options))
    }

    pub fn postgres(url: &str) -> Self {
        let options: PgConnectOptions = url.parse().expect("a PostgreSQL URL");
        let options = options.application_name("postern-test").disable_statement_logging();
        Self::Postgres(PgPoolOptions::new().max_connections(2).connect_lazy_with(options))
    }

    /// Runs statements and returns the number of changed rows.
    pub async fn execute(&self, statements: &str) -> u64 {
        let statements = sqlx::raw_sql(AssertSqlSafe(statements.to_owned()));
        match self {
            Self::Sqlite(pool) => statements.execute(pool).await.expect("SQL").rows_affected(),
            Self::Postgres(pool) => statements.execute(pool).await.expect("SQL").rows_affected(),
        }
    }

    /// The number that a query returns.
    pub async fn number(&self, query: &str) -> i64 {
        let query = AssertSqlSafe(query.to_owned());
        match self {
            Self::Sqlite(pool) => sqlx::query_scalar(query).fetch_one(pool).await.expect("a number"),
            Self::Postgres(pool) => sqlx::query_scalar(query).fetch_one(pool).await.expect("a number"),
        }
    }

    /// The text that a query returns.
    pub async fn text(&self, query: &str) -> String {
        let query = AssertSqlSafe(query.to_owned());
        match self {
            Self::Sqlite(pool) => sqlx::query_scalar(query).fetch_one(pool).await.expect("a text"),
            Self::Postgres(pool) => sqlx::query_scalar(query).fetch_one(pool).await.expect("a text"),
        }
    }

    /// Whether no transaction is open. On SQLite: whether the write lock is free.
    pub async fn at_rest(&self) -> bool {
        match self {
            Self::Sqlite(pool) => sqlx::raw_sql("BEGIN IMMEDIATE; ROLLBACK").execute(pool).await.is_ok(),
            Self::Postgres(_) => {
                self.number(
                    "SELECT count(*) FROM pg_stat_activity \
                     WHERE datname = current_database() AND state LIKE 'idle in transaction%'",
                )
                .await
                    == 0
            }
        }
    }
}
