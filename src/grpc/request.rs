//! Between messages and the domain: what several RPCs take from a request, and the replies that several give.

use std::{str::FromStr, time::Instant};

use http::header::USER_AGENT;
use prost_types::Timestamp;
use time::OffsetDateTime;
use tonic::{Request, Status};

use crate::{
    domain::{account::User, env::Deadline, role::Caller, session::Client, token::TokenPair},
    error::{Error, FieldViolation},
    listen::ClientAddr,
    proto,
};

use super::limits::LONGEST_CALL;

/// The longest user agent that is kept, in characters.
const MAX_USER_AGENT: usize = 256;

/// Collects what is wrong with a request, so that all of it is said at once.
#[derive(Debug, Default)]
pub struct Violations(Vec<FieldViolation>);

impl Violations {
    pub fn take<T>(&mut self, parsed: Result<T, FieldViolation>) -> Option<T> {
        parsed.map_err(|violation| self.0.push(violation)).ok()
    }

    pub fn refuse(self) -> Status {
        Error::InvalidFields(self.0).into()
    }
}

/// A field that must be there; what it is worth, the domain judges.
pub fn required(field: &'static str, value: String) -> Result<String, FieldViolation> {
    if value.is_empty() { Err(FieldViolation::new(field, "is required")) } else { Ok(value) }
}

/// An id as it was given out.
pub fn id<T: FromStr>(field: &'static str, text: &str) -> Result<T, FieldViolation> {
    if text.is_empty() {
        return Err(FieldViolation::new(field, "is required"));
    }
    text.parse().map_err(|_| FieldViolation::new(field, "must be a UUID"))
}

/// The only field that can be wrong.
pub fn single_field<T>(parsed: Result<T, FieldViolation>) -> Result<T, Error> {
    parsed.map_err(|violation| Error::InvalidFields(vec![violation]))
}

/// By when the answer is wanted, as the limits layer found.
pub fn deadline<T>(request: &Request<T>) -> Deadline {
    request.extensions().get().copied().unwrap_or_else(|| Deadline(Instant::now() + LONGEST_CALL))
}

/// Whom the access layer let in.
pub fn caller<T>(request: &Request<T>) -> Result<&Caller, Error> {
    request.extensions().get().ok_or_else(|| Error::internal("the access layer let nobody in particular pass"))
}

/// Where a call comes from.
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

pub fn timestamp(time: OffsetDateTime) -> Timestamp {
    Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() }
}
