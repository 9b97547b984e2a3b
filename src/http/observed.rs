//! What is told of each request to the HTTP address: its span, and its line in the access log. Both name the route and
//! not the path, which a client makes up.

use std::time::Instant;

use axum::{
    extract::{MatchedPath, Request},
    middleware::Next,
    response::Response,
};
use http::Method;
use tracing::info_span;

use crate::{
    grpc::{self, Unanswered},
    trace::{self, Span},
};

/// Serves a request in a span, which continues the trace of its sender. The spans of the RPCs that are called for it
/// are parts of that.
pub async fn observe(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let name = format!("{} {}", method(request.method()), route(&request));
    let span = Span::of_request(&name, request.headers());
    span.set("http.request.method", method(request.method()));
    let answer = span.run(grpc::watch_calls(serve(request, next, started, &name, &span))).await;
    span.set("http.response.status_code", i64::from(answer.status().as_u16()));
    if answer.status().is_server_error() {
        span.failed();
    }
    answer
}

/// Serves a request and writes its line, unless RPCs were called for it.
async fn serve(request: Request, next: Next, started: Instant, name: &str, span: &Span) -> Response {
    let line = info_span!(
        "call",
        method = name,
        request_id = request.headers().get(&grpc::REQUEST_ID).and_then(|id| id.to_str().ok()),
        trace_id = span.trace_id().or_else(|| trace::trace_id(request.headers()))
    );
    let unanswered = Unanswered::http(started, request.extensions(), &line);
    let answer = next.run(request).await;
    unanswered.answered(answer.status().as_str());
    answer
}

/// The template of the route, or `other`.
fn route(request: &Request) -> &str {
    request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str)
}

/// The method, as OpenTelemetry's conventions have it: a client may make one up.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}
