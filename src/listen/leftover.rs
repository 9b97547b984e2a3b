//! What is left of the body of a request that was answered without it. If it were not read, HTTP/1.1 would have to close
//! the connection while its client still sends, and the kernel would reset it: a proxy then answers 502, and not why the
//! request was refused. HTTP/2 would reset the stream, and some clients lose the answer too.

use std::{
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, Bytes};
use http::{HeaderValue, Request, Response, Version, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

use crate::shares::Shares;

/// How much of a body is read after the answer, and for how long. Together with what `wire.rs` then adds it is a second.
const MOST_READ: u64 = 1024 * 1024;
const LONGEST: Duration = Duration::from_millis(900);
/// How many such bodies are read at the same time, at each address.
const READ_AT_ONCE: usize = 1_024;

/// The places for bodies that are read after the answer, shared fairly between clients.
#[derive(Debug, Clone)]
pub(super) struct Leftovers(Shares);

/// Whether the body of one request is left over, and is not sure to be read to its end.
#[derive(Debug, Clone, Default)]
pub(super) struct Unread(Arc<AtomicBool>);

impl Leftovers {
    pub(super) fn new() -> Self {
        Self(Shares::new(READ_AT_ONCE))
    }

    /// The request with a body of which the rest is read when it is dropped.
    pub(super) fn follow(&self, request: Request<Incoming>, client: IpAddr) -> (Request<Body>, Unread) {
        let unread = Unread::default();
        if request.body().is_end_stream() {
            return (request.map(Body::new), unread);
        }
        // Its client only sends the body when it is asked for.
        let is_awaited = request.headers().contains_key(header::EXPECT);
        let (leftovers, flag) = (self.clone(), unread.clone());
        let follow =
            |body| Body::new(Followed { body: Some(body), is_requested: !is_awaited, client, leftovers, unread: flag });
        (request.map(follow), unread)
    }

    fn read(&self, mut body: Incoming, client: IpAddr) {
        let (Some(share), Ok(runtime)) = (self.0.take(Some(client)), tokio::runtime::Handle::try_current()) else {
            return;
        };
        runtime.spawn(async move {
            let read = async {
                let mut left = MOST_READ;
                while let Some(Ok(frame)) = body.frame().await {
                    let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                    match left.checked_sub(length) {
                        Some(rest) => left = rest,
                        // Nothing more is read, but a connection that is closed now would be reset. Its client has the
                        // time that is left to read the answer.
                        None => std::future::pending().await,
                    }
                }
            };
            // Whatever is left then is not read any more.
            let _ = tokio::time::timeout(LONGEST, read).await;
            drop(share);
        });
    }
}

impl Unread {
    /// Tells the client of an HTTP/1.1 connection that it ends after this answer, where the body may go on.
    pub(super) fn announce<B>(&self, version: Version, response: &mut Response<B>) {
        if version <= Version::HTTP_11 && self.0.load(Ordering::Acquire) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

struct Followed {
    body: Option<Incoming>,
    /// The client sends it, or was told to.
    is_requested: bool,
    client: IpAddr,
    leftovers: Leftovers,
    unread: Unread,
}

impl HttpBody for Followed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.is_requested = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = Pin::new(body).poll_frame(context);
        if !matches!(frame, Poll::Pending | Poll::Ready(Some(Ok(_)))) {
            // It has ended, or its client has gone.
            self.body = None;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) else { return };
        let is_short = body.size_hint().upper().is_some_and(|length| length <= MOST_READ);
        self.unread.0.store(!is_short || !self.is_requested, Ordering::Release);
        if self.is_requested {
            self.leftovers.read(body, self.client);
        }
    }
}
