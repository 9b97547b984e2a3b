//! Finds out whether a connection pooler stands before the database that gives each transaction another connection.
//! Prepared statements do not survive that, unless the pooler keeps track of them.

use sqlx::{ConnectOptions as _, Connection as _, Executor as _, PgConnection, postgres::PgConnectOptions};

use crate::store::opening::OpenError;

/// How often it is tried. Other clients of the pooler can come in between.
const ROUNDS: u32 = 3;

/// Fails if prepared statements do not survive, with an error that [`has_lost_statement`] knows.
///
/// While one connection is in a transaction, a pooler cannot give its server to another one. So the second connection takes
/// the server that the first has just used, and the first then gets another one, which does not know its statement.
pub(super) async fn check(options: &PgConnectOptions) -> Result<(), sqlx::Error> {
    let mut first = options.connect().await?;
    let mut second = options.connect().await?;
    for _ in 0..ROUNDS {
        survives(&mut first, &mut second).await?;
    }
    for connection in [first, second] {
        connection.close().await?;
    }
    Ok(())
}

async fn survives(first: &mut PgConnection, second: &mut PgConnection) -> Result<(), sqlx::Error> {
    let ask = || sqlx::query("SELECT pg_backend_pid()");
    ask().execute(&mut *first).await?;
    second.execute("BEGIN").await?;
    ask().execute(&mut *second).await?;
    ask().execute(&mut *first).await?;
    second.execute("ROLLBACK").await?;
    Ok(())
}

/// Whether the cause is a prepared statement that does not exist on this server, or exists there from another connection.
pub(super) fn has_lost_statement(error: &OpenError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<sqlx::Error>().is_some_and(is_lost_statement) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn is_lost_statement(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| code == "26000" || code == "42P05")
}
