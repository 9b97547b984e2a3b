//! gRPC-Web for scripts in browsers, which cannot speak gRPC: the RPCs of the contract, in the binary and in the text
//! mode. tonic-web translates, and the calls pass the same layers as those of gRPC clients.

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::post,
};
use http::{HeaderName, HeaderValue, header};
use prost_reflect::DescriptorPool;
use tonic_web::GrpcWebLayer;
use tower::{Layer as _, ServiceExt as _};

use super::refusal::ErrorResponse;

/// The content types of the protocol ("Protocol differences vs gRPC over HTTP2", grpc/grpc PROTOCOL-WEB.md).
const CONTENT_TYPES: [&str; 4] = [
    "application/grpc-web",
    "application/grpc-web+proto",
    "application/grpc-web-text",
    "application/grpc-web-text+proto",
];

/// What clients send with a call, beside the headers that REST uses too.
pub const REQUEST_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("x-grpc-web"),
    HeaderName::from_static("x-user-agent"),
    HeaderName::from_static("grpc-timeout"),
];

/// Where clients find the status of a call that failed before its first message.
pub const RESPONSE_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status-details-bin"),
];

/// A router that serves the services of a contract through the gRPC layers.
pub fn router(contract: &DescriptorPool, grpc: &Router) -> Router {
    contract.services().fold(Router::new(), |router, service| {
        router.route(&format!("/{}/{{method}}", service.full_name()), post(serve).with_state(grpc.clone()))
    })
}

async fn serve(State(grpc): State<Router>, request: Request) -> Response {
    let content_type = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    // Plain gRPC has its own address.
    if !CONTENT_TYPES.iter().any(|known| content_type == Some(known.as_bytes())) {
        return ErrorResponse::not_found().into_response();
    }
    let answer = GrpcWebLayer::new().layer(grpc).oneshot(request).await.unwrap_or_else(|never| match never {});
    answer.map(Body::new)
}
