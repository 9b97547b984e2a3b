//! The bodies of requests and responses: reading one within bounds, and keeping something for as long as one lives.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, Bytes, to_bytes};
use http::HeaderMap;
use http_body_util::LengthLimitError;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use crate::shares::Share;

/// Why a body could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadError {
    /// It is larger than allowed.
    TooLarge,
    /// The client disconnected before it was complete.
    Disconnected,
    /// It was not complete in time.
    TooSlow,
}

/// Reads a body of at most so many bytes, for at most so long.
pub async fn read(body: Body, most: usize, longest: Duration) -> Result<Bytes, ReadError> {
    // A client that sends its length is refused before the body is read.
    if body.size_hint().lower() > most as u64 {
        return Err(ReadError::TooLarge);
    }
    match tokio::time::timeout(longest, to_bytes(body, most)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_length_limit(&error) => Err(ReadError::TooLarge),
        Ok(Err(_)) => Err(ReadError::Disconnected),
        Err(_) => Err(ReadError::TooSlow),
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<LengthLimitError>)
}

/// What is kept until a body has been sent, read or dropped.
pub trait Guard: Send + Unpin + 'static {
    /// Ends the body with these trailers, if it is time.
    fn end(&mut self, _context: &mut Context<'_>) -> Option<HeaderMap> {
        None
    }

    /// Learns that the body was asked for its next frame, and whether there was one.
    fn asked(&mut self, _has_frame: bool) {}
}

impl Guard for Share {}

/// The same body, which keeps the guard.
pub fn guarded(body: Body, guard: impl Guard) -> Body {
    Body::new(Guarded { body, guard, has_ended: false })
}

struct Guarded<G> {
    body: Body,
    guard: G,
    /// The guard has ended it.
    has_ended: bool,
}

impl<G: Guard> HttpBody for Guarded<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.has_ended {
            return Poll::Ready(None);
        }
        if let Some(trailers) = self.guard.end(context) {
            self.has_ended = true;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let frame = Pin::new(&mut self.body).poll_frame(context);
        self.guard.asked(matches!(frame, Poll::Ready(Some(Ok(_)))));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
