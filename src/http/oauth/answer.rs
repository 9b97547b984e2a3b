//! What every answer of the endpoints has in common.

use axum::{body::Body, response::Response};
use http::{HeaderMap, HeaderValue, header};
use serde_json::Value;

/// An answer with these members.
pub fn answer(members: &Value) -> Response {
    let mut response = Response::new(Body::from(members.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    uncached(response.headers_mut());
    response
}

/// An answer that says nothing but that it is done.
pub fn done() -> Response {
    let mut response = Response::default();
    uncached(response.headers_mut());
    response
}

/// Neither tokens nor what is said of them may be kept by a cache (RFC 6749 section 5.1).
fn uncached(headers: &mut HeaderMap) {
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::PRAGMA, HeaderValue::from_static("no-cache"));
}
