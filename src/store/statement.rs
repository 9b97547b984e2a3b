//! A statement with its values, before it is bound to the types of a database. A verb whose SQL is the same in every
//! dialect is written once with it.

use std::time::Duration;

use sqlx::{Database, Encode, Type, query::Query};
use time::OffsetDateTime;
use uuid::Uuid;

use super::shared::{Span, Stamp};

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
    Integer(Option<i64>),
    Real(f64),
    Time(Option<OffsetDateTime>),
    Span(Duration),
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
        Option<i64>: Encode<'static, DB> + Type<DB>,
        f64: Encode<'static, DB> + Type<DB>,
        Option<Stamp>: Encode<'static, DB> + Type<DB>,
        Span: Encode<'static, DB> + Type<DB>,
    {
        self.values.into_iter().fold(sqlx::query(self.sql), |query, value| match value {
            Value::Id(id) => query.bind(id),
            Value::Text(text) => query.bind(text),
            Value::Bytes(bytes) => query.bind(bytes),
            Value::Flag(flag) => query.bind(flag),
            Value::Integer(number) => query.bind(number),
            Value::Real(number) => query.bind(number),
            Value::Time(time) => query.bind(time.map(Stamp)),
            Value::Span(length) => query.bind(Span(length)),
        })
    }
}

/// What can be the value of a parameter.
macro_rules! values {
    ($($type:ty: |$value:ident| $parameter:expr;)+) => {
        $(impl From<$type> for Value {
            fn from($value: $type) -> Self {
                $parameter
            }
        })+
    };
}

values! {
    Uuid: |id| Self::Id(Some(id));
    Option<Uuid>: |id| Self::Id(id);
    &str: |text| Self::Text(Some(text.to_owned()));
    Option<String>: |text| Self::Text(text);
    Vec<u8>: |bytes| Self::Bytes(Some(bytes));
    [u8; 32]: |bytes| Self::Bytes(Some(bytes.to_vec()));
    Option<[u8; 32]>: |bytes| Self::Bytes(bytes.map(|bytes| bytes.to_vec()));
    bool: |flag| Self::Flag(flag);
    i64: |number| Self::Integer(Some(number));
    Option<i64>: |number| Self::Integer(number);
    f64: |number| Self::Real(number);
    OffsetDateTime: |time| Self::Time(Some(time));
    Option<OffsetDateTime>: |time| Self::Time(time);
    Duration: |length| Self::Span(length);
}
