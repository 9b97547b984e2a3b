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
    Body::new(Guarded { body, rest: Bytes::new(), guard, has_ended: false })
}

/// The largest piece of a body that is handed on at once, in bytes. HTTP/2 takes a whole piece into memory as soon as the
/// client has room for one byte, and would otherwise be done with the body then.
const LARGEST_PIECE: usize = 4 * 1024;

struct Guarded<G> {
    body: Body,
    /// What is left of a frame that is handed on in pieces.
    rest: Bytes,
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
        let frame = if self.rest.is_empty() {
            Pin::new(&mut self.body).poll_frame(context).map_ok(|frame| self.first_piece(frame))
        } else {
            Poll::Ready(Some(Ok(Frame::data(self.next_piece()))))
        };
        self.guard.asked(matches!(frame, Poll::Ready(Some(Ok(_)))));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended || self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (body, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower().saturating_add(rest));
        if let Some(upper) = body.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint
    }
}

impl<G> Guarded<G> {
    fn first_piece(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        match frame.into_data() {
            Ok(data) => {
                self.rest = data;
                Frame::data(self.next_piece())
            }
            Err(trailers) => trailers,
        }
    }

    fn next_piece(&mut self) -> Bytes {
        let length = self.rest.len().min(LARGEST_PIECE);
        self.rest.split_to(length)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    impl Guard for () {}

    #[tokio::test]
    async fn a_body_is_handed_on_in_small_pieces() {
        let text = "0123456789".repeat(1_000);
        let mut body = guarded(Body::from(text.clone()), ());
        assert_eq!(body.size_hint().exact(), Some(10_000));
        let mut taken = Vec::new();
        while let Some(frame) = body.frame().await {
            let piece = frame.expect("no error").into_data().expect("data");
            assert!(!piece.is_empty() && piece.len() <= LARGEST_PIECE);
            taken.extend_from_slice(&piece);
            assert_eq!(body.size_hint().exact(), Some(10_000 - taken.len() as u64));
            assert_eq!(body.is_end_stream(), taken.len() == text.len());
        }
        assert_eq!(taken, text.as_bytes());
    }
}
