//! What goes around every call: its id and span, and the last word on what leaves. Panics and tonic's own complaints
//! become statuses of the contract here.

use std::{collections::HashMap, panic::AssertUnwindSafe, sync::Arc, time::Instant};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE};
use metrics::{Label, SharedString};
use tonic::{Code, Status};
use tracing::Instrument;

use crate::{domain::env::Env, error::Error};

use super::{
    access::AccessRules,
    response::respond,
    status::{INTERNAL_MESSAGE, code_name},
};

/// The header that carries a request's id, both ways.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest request id that is taken from a caller.
const MAX_REQUEST_ID: usize = 128;

/// Gives the call its id (the caller's, if it sent a sane one) and its span, and sends the id back. With a W3C
/// `traceparent` the span carries its trace id, so that a log line is found from a trace.
///
/// What a call took is measured here too, under the name of its RPC.
pub async fn request_context(
    State((env, measured)): State<(Env, MeasuredRpcs)>,
    request: Request,
    next: Next,
) -> Response {
    let request_id = request_id(request.headers(), &env);
    let shown_id = request_id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default();
    let started = Instant::now();
    let span = tracing::info_span!(
        "call",
        method = request.uri().path(),
        request_id = shown_id,
        trace_id = trace_id(request.headers())
    );
    async move {
        let method = measured.of(request.uri().path());
        let mut response = next.run(request).await;
        if let Some(id) = request_id {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        // Absent while a response streams: then its code is in the trailers.
        let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
        let labels = [Label::new("method", method), Label::from_static_parts("code", code_name(code))];
        metrics::counter!("postern_rpcs_total", labels.iter()).increment(1);
        metrics::histogram!("postern_rpc_duration_seconds", labels.iter()).record(started.elapsed());
        tracing::debug!(code = code_name(code), "answered");
        response
    }
    .instrument(span)
    .await
}

/// The caller's id for a request, if it sent a sane one, else a new one.
pub fn request_id(headers: &HeaderMap, env: &Env) -> Option<HeaderValue> {
    let sent = headers.get(&REQUEST_ID).filter(|id| is_sane(id)).cloned();
    sent.or_else(|| HeaderValue::try_from(env.uuid().ok()?.to_string()).ok())
}

/// The RPCs that are measured by name: those of the contract. Whatever else is called, and clients may call anything,
/// is one name together, so that labels stay bounded.
#[derive(Debug, Clone)]
pub struct MeasuredRpcs(Arc<HashMap<String, SharedString>>);

impl MeasuredRpcs {
    pub fn new(rules: &AccessRules) -> Self {
        let name = |path: &str| SharedString::from(path.trim_start_matches('/').to_owned());
        Self(Arc::new(rules.iter().map(|(path, _)| (path.to_owned(), name(path))).collect()))
    }

    fn of(&self, path: &str) -> SharedString {
        self.0.get(path).cloned().unwrap_or(SharedString::const_str("other"))
    }
}

fn is_sane(id: &HeaderValue) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// The trace id of a W3C `traceparent` (version-traceid-parentid-flags, lower-case hexadecimal).
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get("traceparent")?.to_str().ok()?.split('-').nth(1)?;
    let is_hexadecimal = id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (id.len() == 32 && is_hexadecimal).then_some(id)
}

/// Answers 415 to what is not gRPC at all, as its protocol asks ("Requests", on Content-Type).
pub async fn require_grpc_content_type(request: Request, next: Next) -> Response {
    let content_type = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    if content_type.starts_with(b"application/grpc") {
        next.run(request).await
    } else {
        StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response()
    }
}

/// Answers INTERNAL where a handler panics, instead of resetting the stream.
pub async fn catch_panics(request: Request, next: Next) -> Response {
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => respond(Error::internal("a handler panicked; the panic itself was logged where it happened").into()),
    }
}

/// tonic answers a request that it cannot decode with INTERNAL, and one that is too large with OUT_OF_RANGE. Both are
/// the caller's bad input, so they leave as INVALID_ARGUMENT. Our own INTERNAL is known by its fixed text.
pub async fn normalize_errors(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let Some(status) = Status::from_header_map(response.headers()) else {
        return response;
    };
    match status.code() {
        Code::Internal if status.message() != INTERNAL_MESSAGE => {
            respond(Error::field("", "the request is not a valid message of this RPC").into())
        }
        Code::OutOfRange => respond(Error::field("", "the request is larger than 65536 bytes").into()),
        _ => response,
    }
}
