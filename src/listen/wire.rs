//! The bytes of one connection: how long it may be silent, and how it ends. hyper has a single time-out for the headers of
//! a request and for the pause before it, and closes a connection although its client still sends.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tokio_util::sync::CancellationToken;

use super::connections::Activity;

/// How long the headers of an HTTP/1.1 request may take, from their first byte.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// An HTTP/2 connection that sends nothing for this long is closed. A working client answers pings, so this closes
/// connections that stop in the middle of a frame, or are dead.
const HTTP2_SILENCE: Duration = Duration::from_secs(45);
/// How much is still read from a client when the server has ended its side of the connection, and for how long. The kernel
/// would otherwise reset the connection, and the client might lose the last answer. `leftover.rs` has read what it could of
/// a body before.
const MOST_DRAINED: usize = 64 * 1024;
const LONGEST_DRAIN: Duration = Duration::from_millis(100);
/// How an HTTP/2 connection begins, and no request of HTTP/1.1 that is served (RFC 9113 §3.4).
const HTTP2_PREFACE: &[u8] = b"PRI";

/// A connection that ends by itself if its client is silent for too long.
#[derive(Debug)]
pub(super) struct Wire<S> {
    stream: S,
    /// How long an HTTP/1.1 connection may wait for its next request.
    idle_timeout: Duration,
    activity: Arc<Activity>,
    /// Cancelled when the connection has to give way: it then ends at once.
    close: CancellationToken,
    protocol: Spoken,
    last_read: Instant,
    /// When the first bytes of a request came, and how many calls had begun by then.
    request: Option<(Instant, u64)>,
    timer: Pin<Box<Sleep>>,
    /// How much may still be drained, once the server has ended its side.
    left_to_drain: Option<usize>,
}

/// The protocol that a client uses, as far as its first bytes tell.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Spoken {
    /// These bytes could still begin either.
    Unknown(Vec<u8>),
    Http1,
    Http2,
}

impl Spoken {
    fn hear(&mut self, bytes: &[u8]) {
        let Self::Unknown(begun) = self else { return };
        begun.extend(bytes.iter().take(HTTP2_PREFACE.len() - begun.len()));
        if begun == HTTP2_PREFACE {
            *self = Self::Http2;
        } else if !HTTP2_PREFACE.starts_with(begun) {
            *self = Self::Http1;
        }
    }
}

impl<S> Wire<S> {
    /// A connection on which clients speak HTTP/2 only, or either protocol.
    pub(super) fn new(
        stream: S,
        is_http2_only: bool,
        idle_timeout: Duration,
        activity: Arc<Activity>,
        close: CancellationToken,
    ) -> Self {
        let now = Instant::now();
        let protocol = if is_http2_only { Spoken::Http2 } else { Spoken::Unknown(Vec::new()) };
        let timer = Box::pin(tokio::time::sleep_until(now.into()));
        Self {
            stream,
            idle_timeout,
            activity,
            close,
            protocol,
            last_read: now,
            request: None,
            timer,
            left_to_drain: None,
        }
    }

    fn heard(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.last_read = Instant::now();
        self.protocol.hear(bytes);
        if self.activity.is_idle() && !self.is_in_request() {
            self.request = Some((self.last_read, self.activity.begun()));
        }
    }

    /// Whether a request has begun whose headers are not complete.
    fn is_in_request(&self) -> bool {
        self.request.is_some_and(|(_, begun)| begun == self.activity.begun())
    }

    /// Until when the client may be silent.
    fn deadline(&self) -> Instant {
        match (&self.protocol, self.request) {
            (Spoken::Http2, _) => self.last_read + HTTP2_SILENCE,
            // What a call waits for has its own limits.
            _ if !self.activity.is_idle() => Instant::now() + self.idle_timeout,
            (_, Some((since, _))) if self.is_in_request() => since + HEADER_TIMEOUT,
            _ => self.last_read.max(self.activity.idle_since()) + self.idle_timeout,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let before = buffer.filled().len();
        if let Poll::Ready(outcome) = Pin::new(&mut wire.stream).poll_read(context, buffer) {
            wire.heard(buffer.filled().get(before..).unwrap_or_default());
            return Poll::Ready(outcome);
        }
        loop {
            let deadline = wire.deadline();
            if deadline <= Instant::now() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            wire.timer.as_mut().reset(deadline.into());
            ready!(wire.timer.as_mut().poll(context));
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    /// Ends the server's side, and then reads until the client has ended its own, within the bounds above. Meanwhile the
    /// connection counts as its client's, and is idle: it gives way to the next one.
    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = self.get_mut();
        let mut left = if let Some(left) = wire.left_to_drain {
            left
        } else {
            ready!(Pin::new(&mut wire.stream).poll_shutdown(context))?;
            wire.timer.as_mut().reset((Instant::now() + LONGEST_DRAIN).into());
            MOST_DRAINED
        };
        let mut space = [0; 8 * 1024];
        while left > 0 && !wire.close.is_cancelled() {
            let mut buffer = ReadBuf::new(&mut space);
            match Pin::new(&mut wire.stream).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => left = left.saturating_sub(buffer.filled().len()),
                Poll::Ready(_) => break,
                Poll::Pending => {
                    wire.left_to_drain = Some(left);
                    ready!(wire.timer.as_mut().poll(context));
                    break;
                }
            }
        }
        wire.left_to_drain = Some(0);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_tell_the_protocol_however_they_arrive() {
        for (parts, spoken) in [
            (&["PRI * HTTP/2.0\r\n"][..], Spoken::Http2),
            (&["P", "R", "I * HTTP/2.0"], Spoken::Http2),
            (&["GET / HTTP/1.1"], Spoken::Http1),
            (&["P", "OST / HTTP/1.1"], Spoken::Http1),
            (&["PR", "OPFIND"], Spoken::Http1),
            (&["PR"], Spoken::Unknown(b"PR".to_vec())),
        ] {
            let mut heard = Spoken::Unknown(Vec::new());
            for part in parts {
                heard.hear(part.as_bytes());
            }
            assert_eq!(heard, spoken, "{parts:?}");
        }
    }
}
