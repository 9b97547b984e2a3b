//! A statement with its values, before it is bound to the types of a database. A verb whose SQL is the same in every
//! dialect is written once with it.

use sqlx::{Database, Encode, Type, query::Query};
use time::OffsetDateTime;
use uuid::Uuid;

use super::shared::Stamp;

/// Static SQL with the values of its parameters `$1`, `$2` and so on.
#[derive(Debug)]
pub(super) struct Statement {
    sql: &'static str,
    values: Vec<Value>,
}

/// The value of a parameter.
#[derive(Debug)]
pub(super) enum Value {
    Id(Option<Uuid>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
    Flag(bool),
    Integer(i64),
    Real(f64),
    Time(OffsetDateTime),
}

impl Statement {
    pub(super) fn new(sql: &'static str) -> Self {
        Self { sql, values: Vec::new() }
    }

    /// Adds the value of the next parameter.
    pub(super) fn bind(mut self, value: impl Into<Value>) -> Self {
        self.values.push(value.into());
        self
    }

    /// The statement as a query of a database.
    pub(super) fn into_query<DB>(self) -> Query<'static, DB, DB::Arguments>
    where
        DB: Database,
        Option<Uuid>: Encode<'static, DB> + Type<DB>,
        Option<String>: Encode<'static, DB> + Type<DB>,
        Option<Vec<u8>>: Encode<'static, DB> + Type<DB>,
        bool: Encode<'static, DB> + Type<DB>,
        i64: Encode<'static, DB> + Type<DB>,
        f64: Encode<'static, DB> + Type<DB>,
        Stamp: Encode<'static, DB> + Type<DB>,
    {
        self.values.into_iter().fold(sqlx::query(self.sql), |query, value| match value {
            Value::Id(id) => query.bind(id),
            Value::Text(text) => query.bind(text),
            Value::Bytes(bytes) => query.bind(bytes),
            Value::Flag(flag) => query.bind(flag),
            Value::Integer(number) => query.bind(number),
            Value::Real(number) => query.bind(number),
            Value::Time(time) => query.bind(Stamp(time)),
        })
    }
}

impl From<Uuid> for Value {
    fn from(id: Uuid) -> Self {
        Self::Id(Some(id))
    }
}

impl From<Option<Uuid>> for Value {
    fn from(id: Option<Uuid>) -> Self {
        Self::Id(id)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(Some(text.to_owned()))
    }
}

impl From<Option<String>> for Value {
    fn from(text: Option<String>) -> Self {
        Self::Text(text)
    }
}

impl From<[u8; 32]> for Value {
    fn from(bytes: [u8; 32]) -> Self {
        Self::Bytes(Some(bytes.to_vec()))
    }
}

impl From<Option<[u8; 32]>> for Value {
    fn from(bytes: Option<[u8; 32]>) -> Self {
        Self::Bytes(bytes.map(|bytes| bytes.to_vec()))
    }
}

impl From<Vec<u8>> for Value {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(Some(bytes))
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

impl From<OffsetDateTime> for Value {
    fn from(time: OffsetDateTime) -> Self {
        Self::Time(time)
    }
}
