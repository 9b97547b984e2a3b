//! Limits on calls: how many run at the same time, and for how long.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::HeaderMap;
use tokio::sync::Semaphore;

use crate::{domain::env::Deadline, error::Error};

use super::response::respond;

/// The longest that a call may take, even if its client would wait longer.
pub const LONGEST_CALL: Duration = Duration::from_secs(10);
/// The largest request message, in bytes. Valid messages of the contract are much smaller.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The start of the path of every RPC in our own package.
const OWN_SERVICES: &str = "/postern.auth.v1.";
/// The number of calls that run at the same time in the process. A further one is refused, not queued.
const CALLS_AT_ONCE: usize = 2_048;
/// When to retry a call that was refused for overload.
const OVERLOAD_RETRY: Duration = Duration::from_secs(1);

/// The free slots for calls.
#[derive(Debug, Clone)]
pub struct CallSlots(Arc<Semaphore>);

impl Default for CallSlots {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(CALLS_AT_ONCE)))
    }
}

/// Refuses calls to our own services while too many run. Health checks still pass, because a busy replica is healthy.
pub async fn bound_concurrency(State(slots): State<CallSlots>, request: Request, next: Next) -> Response {
    if !request.uri().path().starts_with(OWN_SERVICES) {
        return next.run(request).await;
    }
    match slots.0.try_acquire() {
        Ok(_slot) => next.run(request).await,
        Err(_) => respond(Error::Overloaded { retry_after: OVERLOAD_RETRY }.into()),
    }
}

/// Ends a call with DEADLINE_EXCEEDED at the client's deadline or after [`LONGEST_CALL`], whichever is first. The
/// hasher gets the deadline from the request's [`Deadline`]. A response stream that has started is not limited.
pub async fn bound_time(mut request: Request, next: Next) -> Response {
    let allowed = client_timeout(request.headers()).map_or(LONGEST_CALL, |timeout| timeout.min(LONGEST_CALL));
    request.extensions_mut().insert(Deadline(Instant::now() + allowed));
    match tokio::time::timeout(allowed, next.run(request)).await {
        Ok(response) => response,
        Err(_) => respond(Error::DeadlineExceeded.into()),
    }
}

/// The value of `grpc-timeout`: 1 to 8 digits and a unit (gRPC over HTTP/2, "Timeout"). A malformed value counts as
/// absent.
fn client_timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3_600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn timeout(value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", HeaderValue::from_str(value).expect("a header value"));
        client_timeout(&headers)
    }

    #[test]
    fn every_unit_of_the_protocol_is_read() {
        assert_eq!(timeout("2H"), Some(Duration::from_hours(2)));
        assert_eq!(timeout("3M"), Some(Duration::from_mins(3)));
        assert_eq!(timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(timeout("99999999u"), Some(Duration::from_micros(99_999_999)));
        assert_eq!(timeout("1n"), Some(Duration::from_nanos(1)));
    }

    #[test]
    fn a_malformed_timeout_counts_as_absent() {
        for value in ["", "S", "5", "-5S", "+5S", "5s", "123456789S", "5 S", "5.0S"] {
            assert_eq!(timeout(value), None, "{value:?}");
        }
        assert_eq!(client_timeout(&HeaderMap::new()), None);
    }
}
