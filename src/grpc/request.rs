//! Conversions between messages and the domain that several RPCs need.

use std::{str::FromStr, time::Instant};

use http::header::USER_AGENT;
use prost_types::Timestamp;
use time::OffsetDateTime;
use tonic::{Request, Status};

use crate::{
    domain::{
        account::User,
        env::Deadline,
        role::{Caller, Person},
        session::Client,
        token::TokenPair,
    },
    error::{Error, FieldReason, FieldViolation},
    listen::ClientAddr,
    proto,
};

use super::limits::LONGEST_CALL;

/// The longest stored user agent, in characters.
const MAX_USER_AGENT: usize = 256;

/// Collects the violations of a request, so that one error reports all of them.
#[derive(Debug, Default)]
pub struct Violations(Vec<FieldViolation>);

impl Violations {
    pub fn collect<T>(&mut self, parsed: Result<T, FieldViolation>) -> Option<T> {
        parsed.map_err(|violation| self.0.push(violation)).ok()
    }

    pub fn into_status(self) -> Status {
        Error::InvalidFields(self.0).into()
    }
}

/// A field that must not be empty. The domain checks its value.
pub fn required(field: &'static str, value: String) -> Result<String, FieldViolation> {
    if value.is_empty() { Err(FieldViolation::required(field)) } else { Ok(value) }
}

/// Parses an id.
pub fn id<T: FromStr>(field: &'static str, text: &str) -> Result<T, FieldViolation> {
    if text.is_empty() {
        return Err(FieldViolation::required(field));
    }
    text.parse().map_err(|_| FieldViolation::new(field, FieldReason::Malformed, "must be a UUID"))
}

/// The result of a request with a single field to check.
pub fn single_field<T>(parsed: Result<T, FieldViolation>) -> Result<T, Error> {
    parsed.map_err(|violation| Error::InvalidFields(vec![violation]))
}

/// The deadline of the call, which the limits layer has set.
pub fn deadline<T>(request: &Request<T>) -> Deadline {
    request.extensions().get().copied().unwrap_or_else(|| Deadline(Instant::now() + LONGEST_CALL))
}

/// The caller, which the access layer has set.
pub fn caller<T>(request: &Request<T>) -> Result<&Caller, Error> {
    optional_caller(request).ok_or_else(|| Error::internal("the access layer passed a call on without its caller"))
}

/// The caller of an RPC about the caller's own account.
pub fn person<T>(request: &Request<T>) -> Result<&Person, Error> {
    match caller(request)? {
        Caller::Person(person) => Ok(person),
        Caller::Service(_) => Err(Error::UserRequired),
    }
}

/// The person who calls a public RPC, if a valid access token of a person came with the call.
pub fn optional_person<T>(request: &Request<T>) -> Option<&Person> {
    match optional_caller(request)? {
        Caller::Person(person) => Some(person),
        Caller::Service(_) => None,
    }
}

/// The caller, if the call has a token that is valid.
pub fn optional_caller<T>(request: &Request<T>) -> Option<&Caller> {
    request.extensions().get()
}

/// The client of a call: its address and user agent.
pub fn client<T>(request: &Request<T>) -> Client {
    let user_agent = request.metadata().get(USER_AGENT.as_str()).and_then(|value| value.to_str().ok());
    Client {
        ip: request.extensions().get::<ClientAddr>().map(|peer| peer.0.ip()),
        user_agent: user_agent.map(|text| text.chars().filter(|c| !c.is_control()).take(MAX_USER_AGENT).collect()),
    }
}

impl From<User> for proto::User {
    fn from(user: User) -> Self {
        Self {
            id: user.id.to_string(),
            username: user.username.as_str().to_owned(),
            email: user.email.as_str().to_owned(),
            email_verified: user.email_verified,
            roles: user.roles.iter().map(|role| role.as_str().to_owned()).collect(),
            disabled: user.disabled,
            create_time: Some(timestamp(user.create_time)),
            update_time: Some(timestamp(user.update_time)),
        }
    }
}

impl From<TokenPair> for proto::TokenPair {
    fn from(tokens: TokenPair) -> Self {
        Self {
            access_token: tokens.access.token,
            access_token_expire_time: Some(timestamp(tokens.access.expire_time)),
            refresh_token: tokens.refresh.token,
            refresh_token_expire_time: Some(timestamp(tokens.refresh.expire_time)),
            token_type: "Bearer".to_owned(),
        }
    }
}

/// A time in a request, in whole microseconds, which is what the stores keep.
pub fn moment(field: &'static str, time: Timestamp) -> Result<OffsetDateTime, FieldViolation> {
    let nanoseconds = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos / 1_000 * 1_000);
    let is_valid = (0..1_000_000_000).contains(&time.nanos);
    let parsed = OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok();
    parsed.filter(|_| is_valid).ok_or_else(|| FieldViolation::new(field, FieldReason::OutOfRange, "must be a time"))
}

pub fn timestamp(time: OffsetDateTime) -> Timestamp {
    Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() }
}
