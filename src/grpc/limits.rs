//! Limits on calls: how many run at the same time, for how long, and what their messages and streams may take.
//!
//! A call takes a place among those that run when its message is there, so whoever sends headers alone takes nothing
//! from the others. Places are shared fairly between clients: see `shares`.

use std::{
    net::IpAddr,
    pin::Pin,
    task::Context,
    time::{Duration, Instant},
};

use axum::{body::Body, extract::Request, response::Response};
use http::HeaderMap;
use http_body_util::Limited;
use tonic::Status;

use crate::{
    body::{self, Guard, ReadError, guarded},
    domain::env::Deadline,
    error::{Error, FieldReason},
    listen::{ClientAddr, ConnectionEnds},
    shares::{Share, Shares},
};

use super::{next::Next, response::respond};

/// The longest that a call may take, even if its client would wait longer.
pub const LONGEST_CALL: Duration = Duration::from_secs(10);
/// The largest request message, in bytes. Valid messages of the contract are much smaller.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The length of the prefix of a message: a flag and the size, in bytes.
pub const FRAME_HEADER: usize = 5;
/// How long a message may take to arrive.
const LONGEST_RECEIVING: Duration = Duration::from_secs(5);
/// The most requests of gRPC reflection on one stream, in bytes. A client asks for a few names.
pub const MAX_REFLECTION: usize = 3 * 1024;
/// The start of the path of every RPC in our own package.
const OWN_SERVICES: &str = "/postern.auth.v1.";
/// The start of the paths of gRPC reflection.
const REFLECTION: &str = "/grpc.reflection.";
/// The RPC that reports the health again and again.
const WATCH: &str = "/grpc.health.v1.Health/Watch";
/// The number of calls whose message is on its way, at each of the addresses for gRPC and for HTTP.
pub const RECEIVED_AT_ONCE: usize = 1_024;
/// The number of calls that run at the same time in the process. A further one is refused, not queued.
const CALLS_AT_ONCE: usize = 2_048;
/// The number of streams that watch the health, and how long one may last. Clients then begin another one.
const WATCHES_AT_ONCE: usize = 1_024;
const LONGEST_WATCH: Duration = Duration::from_hours(1);
/// The same for gRPC reflection.
const REFLECTIONS_AT_ONCE: usize = 64;
const LONGEST_REFLECTION: Duration = Duration::from_mins(1);
/// When to retry a call that was refused for overload.
pub const OVERLOAD_RETRY: Duration = Duration::from_secs(1);

/// The places for calls.
#[derive(Debug, Clone)]
pub struct Places {
    receiving: Shares,
    running: Shares,
    watching: Shares,
    reflecting: Shares,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            receiving: Shares::new(RECEIVED_AT_ONCE),
            running: Shares::new(CALLS_AT_ONCE),
            watching: Shares::new(WATCHES_AT_ONCE),
            reflecting: Shares::new(REFLECTIONS_AT_ONCE),
        }
    }
}

/// Receives the message of a call, and then takes a place for the call. Refuses the call if there is none for its client.
/// Health checks pass while too many calls run, because a busy replica is healthy.
pub async fn bound_calls(places: &Places, request: Request, next: impl Next) -> Response {
    let client = request.extensions().get::<ClientAddr>().map(|client| client.0.ip());
    match admit(places, client, request, next).await {
        Ok(response) => response,
        Err(refusal) => respond(refusal.into()),
    }
}

async fn admit(places: &Places, client: Option<IpAddr>, request: Request, next: impl Next) -> Result<Response, Error> {
    let path = request.uri().path();
    let ends = request.extensions().get::<ConnectionEnds>().cloned();
    if path.starts_with(REFLECTION) {
        let share = take(&places.reflecting, client)?;
        let request = request.map(|body| Body::new(Limited::new(body, MAX_REFLECTION)));
        return Ok(next.run(request).await.map(|body| guarded(body, Lifetime::new(LONGEST_REFLECTION, ends, share))));
    }
    let (runs, watches) = (path.starts_with(OWN_SERVICES), path == WATCH);
    let receiving = take(&places.receiving, client)?;
    let request = receive(request).await?;
    drop(receiving);
    if watches {
        let share = take(&places.watching, client)?;
        return Ok(next.run(request).await.map(|body| guarded(body, Lifetime::new(LONGEST_WATCH, ends, share))));
    }
    let _running = if runs { Some(take(&places.running, client)?) } else { None };
    Ok(next.run(request).await)
}

fn take(shares: &Shares, client: Option<IpAddr>) -> Result<Share, Error> {
    shares.take(client).ok_or(Error::Overloaded { retry_after: OVERLOAD_RETRY })
}

/// Reads the body of a request, which then needs nothing more from its client.
async fn receive(request: Request) -> Result<Request, Error> {
    let (parts, body) = request.into_parts();
    let message =
        body::read(body, FRAME_HEADER + MAX_MESSAGE, LONGEST_RECEIVING).await.map_err(|fault| match fault {
            ReadError::TooLarge => {
                Error::field("", FieldReason::TooLong, format!("the request is larger than {MAX_MESSAGE} bytes"))
            }
            ReadError::Disconnected => Error::field("", FieldReason::Malformed, "the request is incomplete"),
            ReadError::TooSlow => Error::DeadlineExceeded,
        })?;
    Ok(Request::from_parts(parts, Body::from(message)))
}

/// The time of a response that goes on until somebody ends it, and its place. When the time is over, or its connection
/// is to end, it ends with UNAVAILABLE, upon which clients begin another one.
struct Lifetime {
    end: Pin<Box<dyn Future<Output = ()> + Send>>,
    _share: Share,
}

impl Lifetime {
    fn new(longest: Duration, ends: Option<ConnectionEnds>, share: Share) -> Self {
        let over = tokio::time::sleep(longest);
        let end: Pin<Box<dyn Future<Output = ()> + Send>> = match ends {
            None => Box::pin(over),
            Some(ConnectionEnds(ends)) => Box::pin(async move {
                tokio::select! {
                    () = over => {}
                    () = ends.cancelled() => {}
                }
            }),
        };
        Self { end, _share: share }
    }
}

impl Guard for Lifetime {
    fn end(&mut self, context: &mut Context<'_>) -> Option<HeaderMap> {
        self.end.as_mut().poll(context).is_ready().then(|| {
            let mut trailers = HeaderMap::new();
            let over = Status::unavailable("the stream has lasted as long as one may: begin another one");
            // Fails for a message that is no header value, which this one is.
            let _ = over.add_header(&mut trailers);
            trailers
        })
    }
}

/// Ends a call with DEADLINE_EXCEEDED at the client's deadline or after [`LONGEST_CALL`], whichever is first. The
/// hasher gets the deadline from the request's [`Deadline`]. A response stream that has started is not limited.
pub async fn bound_time(mut request: Request, next: impl Next) -> Response {
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
