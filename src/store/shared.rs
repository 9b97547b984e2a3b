//! What both backends need: writes that run to completion, the meaning of the driver's errors, and times as columns.

use std::{future::Future, time::Duration};

use sqlx::{
    Decode, Encode, Postgres, SqlStr, Sqlite, Type,
    encode::IsNull,
    error::BoxDynError,
    migrate::{Migration, MigrationType, Migrator},
    postgres::{PgArgumentBuffer, PgDatabaseError, PgTypeInfo, PgValueRef},
    sqlite::{SqliteArgumentsBuffer, SqliteTypeInfo, SqliteValueRef},
};
use time::OffsetDateTime;

use crate::{domain::ports::LONGEST_WRITE, error::StoreError, trace};

/// Runs a write in its own task, to its end, even if its caller goes away.
///
/// If the future of a sqlx transaction is dropped half-way, its connection can return to the pool inside an open
/// transaction. Later writes on that connection would be acknowledged and never committed (transact-rs/sqlx#4385). A
/// write on a connection that no longer answers is given up after [`LONGEST_WRITE`], so that it does not keep the
/// connection until TCP notices.
pub(super) async fn run_to_completion<T: Send + 'static>(
    write: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    match trace::spawn(tokio::time::timeout(LONGEST_WRITE, write)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(elapsed)) => Err(StoreError::Unavailable(Box::new(elapsed))),
        Err(panicked_or_shutting_down) => Err(StoreError::broken(panicked_or_shutting_down)),
    }
}

/// The migrations in these files. A name is a number, and words joined by underscores.
pub(super) fn migrator(files: &[(&'static str, &'static str)]) -> Migrator {
    let migration = |(name, sql): &(&'static str, &'static str)| {
        let (version, words) = name.trim_end_matches(".sql").split_once('_').unwrap_or_default();
        let description = words.replace('_', " ");
        let sql = SqlStr::from_static(sql);
        Migration::new(version.parse().unwrap_or_default(), description.into(), MigrationType::Simple, sql, false)
    };
    // A replica of a newer release may have applied more of them.
    Migrator { migrations: files.iter().map(migration).collect(), ignore_missing: true, ..Migrator::DEFAULT }
}

/// The first migration of `migrator` that is not among the applied ones. Additional ones are fine: every release works
/// with the schema of the next.
pub(super) fn first_pending(migrator: &Migrator, applied: &[i64]) -> Option<i64> {
    migrator.iter().map(|migration| migration.version).find(|version| !applied.contains(version))
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let unavailable = match &error {
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::BeginFailed => true,
            sqlx::Error::Database(error) => error.code().is_some_and(|code| {
                if error.try_downcast_ref::<PgDatabaseError>().is_some() {
                    is_transient_sqlstate(&code)
                } else {
                    is_transient_sqlite_code(&code)
                }
            }),
            // The library may add variants. An unknown error is treated as one that does not pass by itself.
            _ => false,
        };
        if unavailable { Self::Unavailable(Box::new(error)) } else { Self::Broken(Box::new(error)) }
    }
}

/// Whether a PostgreSQL error is likely to pass by itself.
fn is_transient_sqlstate(sqlstate: &str) -> bool {
    let class = sqlstate.get(..2).unwrap_or_default();
    // Classes: connection, resources, operator intervention, system error. Codes: serialization failure, deadlock, lock
    // timeout, and the read-only standby that a failover may leave us connected to.
    matches!(class, "08" | "53" | "57" | "58") || matches!(sqlstate, "40001" | "40P01" | "55P03" | "25006")
}

/// Whether a SQLite error is likely to pass by itself.
fn is_transient_sqlite_code(code: &str) -> bool {
    // The low byte is the primary code: BUSY, LOCKED, READONLY, IOERR, FULL, CANTOPEN, PROTOCOL.
    code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6 | 8 | 10 | 13 | 14 | 15))
}

/// A time as a column holds it: `timestamptz` in PostgreSQL, microseconds since the Unix epoch in SQLite.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stamp(pub OffsetDateTime);

/// A time in SQLite's unit. `i64` reaches 292,000 years on either side of 1970; `OffsetDateTime` ends before that.
pub(super) fn microseconds(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1_000).unwrap_or(i64::MAX)
}

/// A length of time in SQLite's unit.
pub(super) fn span(length: Duration) -> i64 {
    i64::try_from(length.as_micros()).unwrap_or(i64::MAX)
}

/// A length of time as a parameter: seconds for `make_interval` in PostgreSQL, microseconds in SQLite.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span(pub Duration);

impl Type<Postgres> for Span {
    fn type_info() -> PgTypeInfo {
        <f64 as Type<Postgres>>::type_info()
    }
}

impl Encode<'_, Postgres> for Span {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        <f64 as Encode<Postgres>>::encode_by_ref(&self.0.as_secs_f64(), buffer)
    }
}

impl Type<Sqlite> for Span {
    fn type_info() -> SqliteTypeInfo {
        <i64 as Type<Sqlite>>::type_info()
    }
}

impl Encode<'_, Sqlite> for Span {
    fn encode_by_ref(&self, buffer: &mut SqliteArgumentsBuffer) -> Result<IsNull, BoxDynError> {
        <i64 as Encode<Sqlite>>::encode_by_ref(&span(self.0), buffer)
    }
}

impl Type<Postgres> for Stamp {
    fn type_info() -> PgTypeInfo {
        <OffsetDateTime as Type<Postgres>>::type_info()
    }
}

impl Encode<'_, Postgres> for Stamp {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        <OffsetDateTime as Encode<Postgres>>::encode_by_ref(&self.0, buffer)
    }
}

impl<'r> Decode<'r, Postgres> for Stamp {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        <OffsetDateTime as Decode<Postgres>>::decode(value).map(Self)
    }
}

impl Type<Sqlite> for Stamp {
    fn type_info() -> SqliteTypeInfo {
        <i64 as Type<Sqlite>>::type_info()
    }

    fn compatible(info: &SqliteTypeInfo) -> bool {
        <i64 as Type<Sqlite>>::compatible(info)
    }
}

impl Encode<'_, Sqlite> for Stamp {
    fn encode_by_ref(&self, buffer: &mut SqliteArgumentsBuffer) -> Result<IsNull, BoxDynError> {
        <i64 as Encode<Sqlite>>::encode_by_ref(&microseconds(self.0), buffer)
    }
}

impl<'r> Decode<'r, Sqlite> for Stamp {
    fn decode(value: SqliteValueRef<'r>) -> Result<Self, BoxDynError> {
        let microseconds = <i64 as Decode<Sqlite>>::decode(value)?;
        Ok(Self(OffsetDateTime::from_unix_timestamp_nanos(i128::from(microseconds) * 1_000)?))
    }
}
