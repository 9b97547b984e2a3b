//! What an error means that the driver reports while the store is opened, for the operator who reads it: which server,
//! what it refuses, and what to do. Only here is it known whether waiting can help.

use sqlx::{error::DatabaseError, migrate::MigrateError, postgres::PgConnectOptions};

use crate::{error::StoreError, store::opening::OpenError};

use super::pooler;

/// The error with its cause in plain words.
pub(super) fn explain(error: OpenError, options: &PgConnectOptions) -> OpenError {
    if pooler::has_lost_statement(&error) {
        return OpenError::TransactionPooling;
    }
    let cause = match &error {
        OpenError::Store(StoreError::Unavailable(cause) | StoreError::Broken(cause)) => cause.downcast_ref(),
        OpenError::Migration(MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _)) => Some(cause),
        _ => None,
    };
    let refusal = cause.and_then(sqlx::Error::as_database_error).and_then(|cause| refusal(cause, options));
    match (refusal, error) {
        (Some(refusal), _) => refusal,
        (None, OpenError::Store(StoreError::Unavailable(cause))) => {
            let cause = cause.downcast_ref().map_or_else(|| cause.to_string(), in_words);
            OpenError::Unreachable { server: server(options), cause }
        }
        (None, other) => other,
    }
}

/// What the server refuses, unless that can change while one waits.
fn refusal(error: &dyn DatabaseError, options: &PgConnectOptions) -> Option<OpenError> {
    let (server, user) = (server(options), options.get_username());
    let database = options.get_database().unwrap_or(user);
    let said = error.message();
    let (problem, remedy) = match error.code()?.as_ref() {
        "28P01" => (
            format!("{server} refuses the password of user {user}"),
            "correct the user or the password in POSTERN_DATABASE_URL".to_owned(),
        ),
        "28000" => (
            format!("{server} does not let user {user} in ({said})"),
            "correct the user in POSTERN_DATABASE_URL, create it (CREATE ROLE … LOGIN), or let it in with pg_hba.conf"
                .to_owned(),
        ),
        "3D000" => (
            format!("{server} has no database {database}"),
            format!(
                "correct POSTERN_DATABASE_URL, or create it: CREATE DATABASE {database} OWNER {user} ENCODING 'UTF8' \
                 TEMPLATE template0"
            ),
        ),
        "42501" => (
            format!("user {user} lacks rights in database {database} at {server} ({said})"),
            format!("make {user} the owner of the database (ALTER DATABASE {database} OWNER TO {user}), or grant them"),
        ),
        _ => return None,
    };
    Some(OpenError::Refused { problem, remedy })
}

/// The server that the options name.
fn server(options: &PgConnectOptions) -> String {
    match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    }
}

/// Why there is no connection.
fn in_words(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            "connection refused: is PostgreSQL running there?".to_owned()
        }
        // This text is tokio's. The resolver has no error kind of its own.
        sqlx::Error::Io(error) if error.to_string().starts_with("failed to lookup address") => {
            format!("the name of the host cannot be resolved ({error})")
        }
        // A certificate that is not accepted. The driver calls it an error of the connection.
        sqlx::Error::Io(error)
            if error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<rustls::Error>) =>
        {
            of_tls(error)
        }
        sqlx::Error::Io(error) => error.to_string(),
        sqlx::Error::Tls(error) => of_tls(error),
        sqlx::Error::Database(error) => error.message().to_owned(),
        other => other.to_string(),
    }
}

fn of_tls(error: &dyn std::fmt::Display) -> String {
    format!("TLS: {error}; the operations page has what sslmode and sslrootcert in POSTERN_DATABASE_URL mean")
}
