//! The layers around every call: its request id, its span and its metrics. Panics and tonic's own errors become
//! statuses of the contract here.

use std::{any::Any, collections::HashMap, sync::Arc, time::Instant};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE};
use metrics::{Label, SharedString};
use tonic::{Code, Status};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;

use crate::{
    domain::env::Env,
    error::Error,
    listen::{MAX_HEAD, OversizedHead},
};

use super::{
    access::AccessRules,
    ext_authz::CHECK,
    limits::MAX_MESSAGE,
    response::respond,
    status::{code_name, is_own, mark_own},
};

/// The header that carries the id of a request, in requests and responses.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest request id that is accepted from a caller, in bytes.
const MAX_REQUEST_ID: usize = 128;

/// Gives a request its id: the caller's if it is valid, otherwise a new one. The response carries the same id.
///
/// The request-id layers of tower-http accept every id of a caller. This id is written to the log, so it is checked.
pub async fn assign_request_id(State(env): State<Env>, mut request: Request, next: Next) -> Response {
    let sent = request.headers().get(&REQUEST_ID).filter(|id| is_valid(id)).cloned();
    let Some(id) = sent.or_else(|| HeaderValue::try_from(env.uuid().ok()?.to_string()).ok()) else {
        return next.run(request).await;
    };
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Runs the call in a span with its request id. With a W3C `traceparent` the span carries the trace id too, so that log
/// lines can be found from a trace. Counts and times the call under the name of its RPC.
pub async fn request_context(State(measured): State<MeasuredRpcs>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default();
    let span = tracing::info_span!(
        "call",
        method = request.uri().path(),
        request_id = id,
        trace_id = trace_id(request.headers())
    );
    async move {
        let method = measured.of(request.uri().path());
        let response = next.run(request).await;
        // A streamed response has no status in its headers. Its code is in the trailers.
        let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
        let labels = [Label::new("method", method), Label::from_static_parts("code", code_name(code))];
        metrics::counter!("postern_rpcs_total", labels.iter()).increment(1);
        metrics::histogram!("postern_rpc_duration_seconds", labels.iter()).record(started.elapsed());
        tracing::debug!(code = code_name(code), "a call was answered");
        response
    }
    .instrument(span)
    .await
}

/// The name of every path that is no RPC of the contract.
const OTHER: SharedString = SharedString::const_str("other");

/// The RPCs that are measured by name: those of the contract, and Check. Every other path is measured as `other`, so that clients
/// cannot create any number of labels.
#[derive(Debug, Clone)]
pub struct MeasuredRpcs(Arc<HashMap<String, SharedString>>);

impl MeasuredRpcs {
    /// Counts the errors of each from 0, so that the first one is a rise.
    pub fn new(rules: &AccessRules) -> Self {
        let name = |path: &str| SharedString::from(path.trim_start_matches('/').to_owned());
        let paths = rules.iter().map(|(path, _)| path).chain([CHECK]);
        let measured = Self(Arc::new(paths.map(|path| (path.to_owned(), name(path))).collect()));
        for method in measured.0.values().cloned().chain([OTHER]) {
            let labels = [Label::new("method", method), Label::from_static_parts("code", code_name(Code::Internal))];
            metrics::counter!("postern_rpcs_total", labels.iter()).increment(0);
        }
        measured
    }

    fn of(&self, path: &str) -> SharedString {
        self.0.get(path).cloned().unwrap_or(OTHER)
    }
}

fn is_valid(id: &HeaderValue) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// The trace id of a W3C `traceparent` (version-traceid-parentid-flags, lower-case hexadecimal).
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get("traceparent")?.to_str().ok()?.split('-').nth(1)?;
    let is_hexadecimal = id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (id.len() == 32 && is_hexadecimal).then_some(id)
}

/// Refuses a call whose headers were larger than they may be.
pub async fn refuse_oversized_head(request: Request, next: Next) -> Response {
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
pub async fn require_grpc_content_type(request: Request, next: Next) -> Response {
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
pub fn catch_panics() -> CatchPanicLayer<fn(Box<dyn Any + Send>) -> Response> {
    CatchPanicLayer::custom(|_| respond(Error::internal("a handler panicked; the panic has its own log line").into()))
}

/// Turns the decoding errors of tonic into INVALID_ARGUMENT. tonic answers INTERNAL if it cannot decode a message, and
/// OUT_OF_RANGE if a message is too large, but both are bad input. One that is too large only after decompression keeps
/// its RESOURCE_EXHAUSTED, with a message of ours. Our own statuses are marked, and pass unchanged.
pub async fn normalize_errors(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    // tonic keeps the status that it wrote into the headers here too, with its source.
    let Some(status) = response.extensions().get::<Status>().filter(|status| !is_own(status)) else {
        return response;
    };
    match status.code() {
        Code::Internal => respond(Error::field("", "the request is not a valid message of this RPC").into()),
        Code::ResourceExhausted => respond(mark_own(Status::resource_exhausted(format!(
            "the request is larger than {MAX_MESSAGE} bytes when it is decompressed"
        )))),
        Code::OutOfRange => respond(Error::field("", format!("the request is larger than {MAX_MESSAGE} bytes")).into()),
        _ => response,
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Body, middleware::from_fn, routing::get};
    use tower::ServiceExt as _;

    use super::*;
    use crate::grpc::status::INTERNAL_MESSAGE;

    async fn normalized(status: Status) -> Status {
        let handler = || async { respond(status) };
        let router = Router::new().route("/", get(handler)).layer(from_fn(normalize_errors));
        let response = router.oneshot(Request::get("/").body(Body::empty()).expect("a request")).await;
        Status::from_header_map(response.expect("infallible").headers()).expect("a status")
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
        let panicking = async || -> Response { panic!("on purpose") };
        let router = Router::new().route("/", get(panicking)).layer(catch_panics());
        let response = router.oneshot(Request::get("/").body(Body::empty()).expect("a request")).await;
        let status = Status::from_header_map(response.expect("infallible").headers()).expect("a status");
        assert_eq!((status.code(), status.message()), (Code::Internal, INTERNAL_MESSAGE));
    }
}
