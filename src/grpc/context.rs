//! The layers around every call: its request id, its span and its metrics. Panics and tonic's own errors become
//! statuses of the contract here.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::OnceLock,
    time::{Duration, Instant},
};

use axum::{
    extract::Request,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt as _;
use http::{HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE};
use metrics::{Counter, Histogram, Label, SharedString};
use tonic::{Code, Status};
use tracing::Instrument;

use crate::{
    domain::env::Env,
    error::{Error, FieldReason},
    listen::{MAX_HEAD, OversizedHead},
    trace::{self, Span},
};

use super::{
    access::AccessRules,
    call_log::{Unanswered, note_call},
    ext_authz::CHECK,
    limits::MAX_MESSAGE,
    next::Next,
    response::respond,
    status::{code_name, is_own, mark_own},
};

/// The header that carries the id of a request, in requests and responses.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The start of the paths of health checks, which come every few seconds.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// The longest request id that is accepted from a caller, in bytes.
const MAX_REQUEST_ID: usize = 128;

/// Gives a request its id: the caller's if it is valid, otherwise a new one. The response carries the same id.
///
/// The request-id layers of tower-http accept every id of a caller. This id is written to the log, so it is checked.
pub async fn assign_request_id(env: &Env, mut request: Request, next: impl Next) -> Response {
    let sent = request.headers().get(&REQUEST_ID).filter(|id| is_valid(id)).cloned();
    let Some(id) = sent.or_else(|| HeaderValue::try_from(env.uuid().ok()?.to_string()).ok()) else {
        return next.run(request).await;
    };
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Runs the call in a span, and its log lines in one with its request id and the trace id, so that the lines can be found
/// from a trace. Counts and times the call under the name of its RPC. Health checks are in no trace and not in the access log.
pub async fn request_context(measured: &MeasuredRpcs, request: Request, next: impl Next) -> Response {
    let started = Instant::now();
    note_call();
    let is_probe = request.uri().path().starts_with(HEALTH);
    let meters = measured.of(request.uri().path());
    let span = if is_probe { Span::NONE } else { Span::of_request(&meters.method, request.headers()) };
    span.set("rpc.system.name", "grpc");
    let id = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default();
    let lines = tracing::info_span!(
        "call",
        method = &*meters.method,
        request_id = id,
        trace_id = span.trace_id().or_else(|| trace::trace_id(request.headers()))
    );
    let mut unanswered = Unanswered::rpc(started, request.extensions(), &lines);
    if is_probe {
        unanswered.forget();
    }
    let call = async {
        let response = next.run(request).await;
        // A streamed response has no status in its headers. Its code is in the trailers.
        let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
        meters.record(code, started.elapsed());
        unanswered.answered(code_name(code));
        span.set("rpc.response.status_code", code_name(code));
        if is_fault(code) {
            span.failed();
        }
        response
    };
    span.run(call.instrument(lines)).await
}

/// Whether a code stands for a failure of the server, as OpenTelemetry's conventions have it.
fn is_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

/// The name of every path that is no RPC of the contract.
const OTHER: SharedString = SharedString::const_str("other");

/// The RPCs that are measured by name: those of the contract, and Check. Every other path is measured as `other`, so that clients
/// cannot create any number of labels.
#[derive(Debug)]
pub struct MeasuredRpcs {
    by_path: HashMap<String, Meters>,
    other: Meters,
}

impl MeasuredRpcs {
    pub fn new(rules: &AccessRules) -> Self {
        let paths = rules.iter().map(|(path, _)| path).chain([CHECK]);
        let meters = |path: &str| Meters::new(path.trim_start_matches('/').to_owned().into());
        Self { by_path: paths.map(|path| (path.to_owned(), meters(path))).collect(), other: Meters::new(OTHER) }
    }

    fn of(&self, path: &str) -> &Meters {
        self.by_path.get(path).unwrap_or(&self.other)
    }
}

/// The metrics of one RPC.
#[derive(Debug)]
struct Meters {
    method: SharedString,
    /// Those of calls that succeed, which are nearly all. It takes a microsecond to find them by their labels.
    succeeded: OnceLock<(Counter, Histogram)>,
}

impl Meters {
    /// Counts the errors from 0, so that the first one is a rise.
    fn new(method: SharedString) -> Self {
        let meters = Self { method, succeeded: OnceLock::new() };
        metrics::counter!("postern_rpcs_total", meters.labels(Code::Internal).iter()).increment(0);
        meters
    }

    fn labels(&self, code: Code) -> [Label; 2] {
        [Label::new("method", self.method.clone()), Label::from_static_parts("code", code_name(code))]
    }

    fn record(&self, code: Code, time: Duration) {
        let found = || {
            let labels = self.labels(code);
            let calls = metrics::counter!("postern_rpcs_total", labels.iter());
            (calls, metrics::histogram!("postern_rpc_duration_seconds", labels.iter()))
        };
        let of_error;
        let (calls, times) = if code == Code::Ok {
            self.succeeded.get_or_init(found)
        } else {
            of_error = found();
            &of_error
        };
        calls.increment(1);
        times.record(time);
    }
}

fn is_valid(id: &HeaderValue) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// Refuses a call whose headers were larger than they may be.
pub async fn refuse_oversized_head(request: Request, next: impl Next) -> Response {
    if request.extensions().get::<OversizedHead>().is_none() {
        return next.run(request).await;
    }
    respond(oversized_head())
}

/// The status of a call whose headers were too large.
pub fn oversized_head() -> Status {
    mark_own(Status::resource_exhausted(format!("the headers of the request are larger than {MAX_HEAD} bytes")))
}

/// Answers 415 to a request that is not gRPC, as the gRPC protocol requires ("Requests", on Content-Type).
pub async fn require_grpc_content_type(request: Request, next: impl Next) -> Response {
    let content_type = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    // `application/grpc-web` is another protocol, which the HTTP address serves.
    let rest = content_type.strip_prefix(b"application/grpc");
    if rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' '))) {
        next.run(request).await
    } else {
        StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response()
    }
}

/// Answers INTERNAL if a handler panics. Without this layer the stream would be reset.
pub async fn catch_panics(request: Request, next: impl Next) -> Response {
    // What was under way when it panicked is dropped, and nobody looks at it again.
    let answered = AssertUnwindSafe(async { next.run(request).await }).catch_unwind().await;
    answered.unwrap_or_else(|_| respond(Error::internal("a handler panicked; the panic has its own log line").into()))
}

/// Turns the decoding errors of tonic into INVALID_ARGUMENT. tonic answers INTERNAL if it cannot decode a message, and
/// OUT_OF_RANGE if a message is too large, but both are bad input. One that is too large only after decompression keeps
/// its RESOURCE_EXHAUSTED, with a message of ours. Our own statuses are marked, and pass unchanged.
pub async fn normalize_errors(request: Request, next: impl Next) -> Response {
    let response = next.run(request).await;
    // tonic keeps the status that it wrote into the headers here too, with its source.
    let Some(status) = response.extensions().get::<Status>().filter(|status| !is_own(status)) else {
        return response;
    };
    match status.code() {
        Code::Internal => {
            respond(Error::field("", FieldReason::Malformed, "the request is not a valid message of this RPC").into())
        }
        Code::ResourceExhausted => respond(mark_own(Status::resource_exhausted(format!(
            "the request is larger than {MAX_MESSAGE} bytes when it is decompressed"
        )))),
        Code::OutOfRange => respond(
            Error::field("", FieldReason::TooLong, format!("the request is larger than {MAX_MESSAGE} bytes")).into(),
        ),
        _ => response,
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;
    use crate::grpc::status::INTERNAL_MESSAGE;

    async fn normalized(status: Status) -> Status {
        let response = normalize_errors(Request::new(Body::empty()), |_| async { respond(status) }).await;
        Status::from_header_map(response.headers()).expect("a status")
    }

    #[tokio::test]
    async fn decoding_errors_of_tonic_become_invalid_argument() {
        let too_large = normalized(Status::out_of_range("decoded message length too large")).await;
        assert_eq!(too_large.code(), Code::InvalidArgument);
        assert!(too_large.message().contains("65536"), "{too_large:?}");
        assert_eq!(normalized(Status::internal("failed to decode")).await.code(), Code::InvalidArgument);
    }

    #[tokio::test]
    async fn errors_of_our_own_pass_unchanged() {
        let ours = normalized(mark_own(Status::out_of_range("ours"))).await;
        assert_eq!((ours.code(), ours.message()), (Code::OutOfRange, "ours"));
        let ours = normalized(mark_own(Status::internal("ours"))).await;
        assert_eq!((ours.code(), ours.message()), (Code::Internal, "ours"));
        assert_eq!(normalized(Error::internal("a fault").into()).await.code(), Code::Internal);
    }

    #[tokio::test]
    async fn a_panic_becomes_internal() {
        let response = catch_panics(Request::new(Body::empty()), |_| async { panic!("on purpose") }).await;
        let status = Status::from_header_map(response.headers()).expect("a status");
        assert_eq!((status.code(), status.message()), (Code::Internal, INTERNAL_MESSAGE));
    }
}
