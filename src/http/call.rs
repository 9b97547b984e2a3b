//! A call from the HTTP address into the gRPC stack, in this process: one framed message there, one message or status
//! back. `gateway.rs` and `pages.rs` both come through here; what they ask and how they tell the answer is theirs.

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::Request,
};
use http::{HeaderMap, HeaderValue, Method, header};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use prost::Message;
use tonic::{Code, Status};
use tower::ServiceExt;
use zeroize::Zeroizing;

use crate::{
    error::Error,
    grpc::{LONGEST_CALL, MAX_MESSAGE},
    listen::ClientAddr,
};

/// Length of the flag and the size before each gRPC message.
const FRAME_HEADER: usize = 5;

/// Why a request's body could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyError {
    /// Larger than [`MAX_MESSAGE`].
    TooLarge,
    /// Its sender went away.
    BrokeOff,
    /// It was not there after [`LONGEST_CALL`].
    TooSlow,
}

/// Reads a request's body, as long as a message may be.
pub async fn read_body(body: Body) -> Result<Bytes, BodyError> {
    // Known before a byte of it was read, where the client said so.
    if body.size_hint().lower() > MAX_MESSAGE as u64 {
        return Err(BodyError::TooLarge);
    }
    match tokio::time::timeout(LONGEST_CALL, to_bytes(body, MAX_MESSAGE)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_length_limit(&error) => Err(BodyError::TooLarge),
        Ok(Err(_)) => Err(BodyError::BrokeOff),
        Err(_) => Err(BodyError::TooSlow),
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<http_body_util::LengthLimitError>)
}

/// Calls an RPC by its path (`/package.Service/Method`) and returns the bytes of its answer's message. `metadata` goes
/// along, and so does where the request came from.
pub async fn call(
    grpc: Router,
    rpc_path: &str,
    message: &impl Message,
    metadata: HeaderMap,
    peer: Option<ClientAddr>,
) -> Result<Bytes, Status> {
    let mut call = Request::new(Body::from(frame(message)));
    *call.method_mut() = Method::POST;
    *call.uri_mut() = rpc_path.parse().map_err(Error::internal)?;
    *call.headers_mut() = metadata;
    call.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    call.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    if let Some(peer) = peer {
        call.extensions_mut().insert(peer);
    }
    let answer = grpc.oneshot(call).await.unwrap_or_else(|never| match never {});

    // A call that failed before it answered anything says so in the headers, else in the trailers.
    if let Some(status) = Status::from_header_map(answer.headers()) {
        return Err(status);
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

/// A message as a gRPC request body: uncompressed, one frame. It may bear a password, so it is wiped once it was read.
fn frame(message: &impl Message) -> Bytes {
    let bytes = Zeroizing::new(message.encode_to_vec());
    // Far below 4 GiB: the body was.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    Bytes::from_owner(Zeroizing::new([&[0][..], &length.to_be_bytes(), &bytes].concat()))
}
