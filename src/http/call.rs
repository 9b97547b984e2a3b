//! A call from the HTTP address to the gRPC layers in this process: it sends one framed message and returns one message
//! or status. `gateway.rs`, `oauth` and `pages` use it.

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use http::{Extensions, HeaderMap, HeaderValue, Method, header};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use prost::Message;
use tonic::{Code, Status};
use tower::ServiceExt;
use zeroize::Zeroizing;

use crate::{
    body::{self, ReadError, guarded},
    error::Error,
    grpc::{FRAME_HEADER, LONGEST_CALL, MAX_MESSAGE, OVERLOAD_RETRY},
    listen::{ClientAddr, OversizedHead},
    shares::Shares,
};

use super::refusal::ErrorResponse;

/// Refuses a request with a body if there is no place for another body of its client. The place is free again when the
/// body has been read.
pub async fn bound_receiving(State(places): State<Shares>, request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let client = request.extensions().get::<ClientAddr>().map(|client| client.0.ip());
    match places.take(client) {
        Some(share) => next.run(request.map(|body| guarded(body, share))).await,
        None => ErrorResponse::from(Error::Overloaded { retry_after: OVERLOAD_RETRY }).into_response(),
    }
}

/// Refuses a request whose headers were larger than they may be.
pub async fn refuse_oversized_head(request: Request, next: Next) -> Response {
    if request.extensions().get::<OversizedHead>().is_none() {
        return next.run(request).await;
    }
    ErrorResponse::oversized_head().into_response()
}

/// Reads the body of a request, up to the size of a message.
pub async fn read_body(body: Body) -> Result<Bytes, ReadError> {
    body::read(body, MAX_MESSAGE, LONGEST_CALL).await
}

/// Calls an RPC by its path (`/package.Service/Method`) and returns the bytes of its reply. Passes on `metadata` and
/// the address of the client.
pub async fn call(
    grpc: Router,
    rpc_path: &str,
    message: &impl Message,
    metadata: HeaderMap,
    peer: Option<ClientAddr>,
) -> Result<Bytes, Status> {
    let mut extensions = Extensions::new();
    if let Some(peer) = peer {
        extensions.insert(peer);
    }
    call_with(grpc, rpc_path, message, metadata, extensions).await
}

/// The same with everything that layers of this process are to know of the call, such as the address of the client.
pub async fn call_with(
    grpc: Router,
    rpc_path: &str,
    message: &impl Message,
    metadata: HeaderMap,
    extensions: Extensions,
) -> Result<Bytes, Status> {
    let mut call = Request::new(Body::from(frame(message)));
    *call.method_mut() = Method::POST;
    *call.uri_mut() = rpc_path.parse().map_err(Error::internal)?;
    *call.headers_mut() = metadata;
    call.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    call.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    *call.extensions_mut() = extensions;
    let answer = grpc.oneshot(call).await.unwrap_or_else(|never| match never {});

    // A call that fails before its first message has its status in the headers, otherwise in the trailers.
    if let Some(status) = Status::from_header_map(answer.headers()) {
        // The one that was written into the headers is here too, and knows what is not sent.
        let written = answer.extensions().get::<Status>().filter(|written| written.code() == status.code());
        return Err(written.cloned().unwrap_or(status));
    }
    let collected = answer.into_body().collect().await.map_err(Error::internal)?;
    let status = collected.trailers().and_then(Status::from_header_map);
    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
        return Err(status);
    }
    let mut bytes = collected.to_bytes();
    if bytes.len() < FRAME_HEADER {
        return Err(Error::internal("an RPC answered without a message").into());
    }
    Ok(bytes.split_off(FRAME_HEADER))
}

/// A message as the body of a gRPC request: one frame, uncompressed. It may contain a password, so it is wiped
/// afterwards.
fn frame(message: &impl Message) -> Bytes {
    let bytes = Zeroizing::new(message.encode_to_vec());
    // The body is far smaller than 4 GiB.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    Bytes::from_owner(Zeroizing::new([&[0][..], &length.to_be_bytes(), &bytes].concat()))
}
