//! The response of a call that a layer refuses.

use axum::response::Response;
use tonic::Status;

/// The response of a failed call: a status and no body.
pub fn respond(status: Status) -> Response {
    status.into_http::<tonic::body::Body>().map(axum::body::Body::new)
}
