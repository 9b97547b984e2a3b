//! The heads of requests. A head beyond [`MAX_HEAD`] is refused, but only its own request: it is read to its end, up to
//! [`LONGEST_HEAD`], because HTTP/2 would otherwise lose the whole connection with the calls of everybody else on it.
//! What heads take in memory stays bounded: so many long ones may be unfinished at the same time, and a long one is
//! dropped as soon as it is complete.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderName, Request, Uri};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take};

use crate::shares::{Share, Shares, client_of};

use super::connections::Activity;

/// The largest head of a request that is served, in bytes as HTTP/2 counts them (RFC 9113 §6.5.2): the names and the
/// values, and 32 for each header.
pub const MAX_HEAD: usize = 16 * 1024;
/// The largest head that is read, in the same bytes. A longer one costs its stream on HTTP/2. Four times as much, or more
/// than 12 frames, costs its connection: the library takes CONTINUATION frames of 16 KiB for 1.25 times this limit, and at
/// least five.
pub(super) const LONGEST_HEAD: u32 = 128 * 1024;
/// How many heads beyond [`MAX_HEAD`] may be unfinished at the same time, at each address. One takes up to 0.5 MiB.
pub(super) const LONG_HEADS_AT_ONCE: usize = 128;
/// The most that is read at once, in bytes.
const READ_AT_ONCE: u64 = 8 * 1024;
/// How much is read before the requests in it are looked at, in bytes. A few bytes of HPACK are many headers.
const READ_BEFORE_PAUSE: usize = 16 * 1024;
/// The longest path that a refused request keeps, for its log line.
const LONGEST_REFUSED_PATH: usize = 1024;
/// The header by which the log line of a refused request is found.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The head of the request was larger than [`MAX_HEAD`]. Its headers have been dropped, and it must be refused. An
/// extension of the request.
#[derive(Debug, Clone, Copy)]
pub struct OversizedHead;

/// Drops the headers of a request whose head is too large, and marks it.
pub(super) fn drop_oversized<B>(request: &mut Request<B>) {
    if size(request) <= MAX_HEAD {
        return;
    }
    let id = request.headers_mut().remove(REQUEST_ID);
    let id = id.filter(|id| id.len() <= LONGEST_REFUSED_PATH).map(|id| (REQUEST_ID, id));
    *request.headers_mut() = HeaderMap::from_iter(id);
    if request.uri().path_and_query().is_none_or(|path| path.as_str().len() > LONGEST_REFUSED_PATH) {
        *request.uri_mut() = Uri::from_static("/");
    }
    request.extensions_mut().insert(OversizedHead);
}

fn size<B>(request: &Request<B>) -> usize {
    let of = |name: &str, value: usize| name.len() + value + 32;
    let uri = request.uri();
    let pseudo = of(":method", request.method().as_str().len())
        + of(":path", uri.path_and_query().map_or(1, |path| path.as_str().len()))
        + uri.scheme_str().map_or(0, |scheme| of(":scheme", scheme.len()))
        + uri.authority().map_or(0, |authority| of(":authority", authority.as_str().len()));
    request.headers().iter().fold(pseudo, |sum, (name, value)| sum + of(name.as_str(), value.len()))
}

/// A connection whose unfinished heads are watched.
#[derive(Debug)]
pub(super) struct Heads<S> {
    stream: Take<S>,
    reader: Reader,
    activity: Arc<Activity>,
    places: Shares,
    client: std::net::IpAddr,
    /// Taken while a long head is unfinished.
    place: Option<Share>,
    read_since_pause: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Heads<S> {
    /// `places` are those for long heads.
    pub(super) fn new(stream: S, activity: Arc<Activity>, places: Shares, client: std::net::IpAddr) -> Self {
        let (stream, reader) = (stream.take(READ_AT_ONCE), Reader::default());
        Self { stream, reader, activity, places, client: client_of(client), place: None, read_since_pause: 0 }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Heads<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read_since_pause >= READ_BEFORE_PAUSE {
            // The server would otherwise read all that has come before it takes the first request of it.
            self.read_since_pause = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.stream.set_limit(READ_AT_ONCE);
        let before = into.filled().len();
        let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(context, into) else {
            self.read_since_pause = 0;
            return Poll::Pending;
        };
        read?;
        let new = into.filled().get(before..).unwrap_or_default();
        self.read_since_pause += new.len();
        let calls = Calls { begun: self.activity.begun(), is_idle: self.activity.is_idle() };
        let is_unfinished = self.reader.read(new, calls);
        if matches!(self.reader, Reader::Http1 { .. }) {
            self.activity.set_http1();
        }
        if !is_unfinished {
            self.place = None;
        } else if self.place.is_none() {
            let place = self.places.take(Some(self.client));
            self.place = Some(place.ok_or_else(|| io::Error::other("too many long heads are unfinished"))?);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Heads<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(self.stream.get_mut()).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream.get_mut()).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream.get_mut()).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream.get_mut()).poll_shutdown(context)
    }
}

/// The calls of a connection at the moment of a read.
#[derive(Debug, Clone, Copy)]
struct Calls {
    begun: u64,
    is_idle: bool,
}

/// Where the bytes of a connection are.
#[derive(Debug)]
enum Reader {
    /// In the preface of HTTP/2, if they go on like it: how many have come.
    Start(usize),
    /// HTTP/1.1: how many have come while no call was under way, since so many calls had begun.
    Http1 {
        unfinished: usize,
        begun: u64,
    },
    Http2(Frames),
}

/// Where the bytes are between the frames of HTTP/2.
#[derive(Debug, Default)]
struct Frames {
    head: [u8; FRAME_HEAD],
    head_length: usize,
    payload_left: usize,
    /// A list of headers goes on in further frames.
    continues: bool,
    /// The list ends with the payload of this frame.
    ends: bool,
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length (3), type, flags and stream (4) of a frame (RFC 9113 §4.1).
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;

impl Default for Reader {
    fn default() -> Self {
        Self::Start(0)
    }
}

impl Reader {
    /// Takes note of bytes that have come. Returns whether a long head is unfinished.
    fn read(&mut self, mut bytes: &[u8], calls: Calls) -> bool {
        if let Self::Start(matched) = self {
            let expected = PREFACE.get(*matched..).unwrap_or_default();
            let length = expected.len().min(bytes.len());
            let (first, rest) = bytes.split_at(length);
            if expected.get(..length) != Some(first) {
                *self = Self::Http1 { unfinished: *matched, begun: 0 };
            } else if length == expected.len() {
                bytes = rest;
                *self = Self::Http2(Frames::default());
            } else {
                *matched += length;
                return false;
            }
        }
        match self {
            Self::Start(_) => false,
            Self::Http1 { unfinished, begun } => {
                if *begun != calls.begun {
                    (*unfinished, *begun) = (0, calls.begun);
                }
                if calls.is_idle {
                    *unfinished += bytes.len();
                }
                *unfinished > MAX_HEAD
            }
            Self::Http2(frames) => frames.read(bytes),
        }
    }
}

impl Frames {
    /// Returns whether a list of headers goes on in further frames. A list that is not long fits into one.
    fn read(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            bytes = bytes.get(self.skip_payload(bytes.len())..).unwrap_or_default();
            if bytes.is_empty() {
                return self.continues;
            }
            let (head, rest) = bytes.split_at(bytes.len().min(FRAME_HEAD - self.head_length));
            self.head.iter_mut().skip(self.head_length).zip(head).for_each(|(place, byte)| *place = *byte);
            self.head_length += head.len();
            if self.head_length == FRAME_HEAD {
                self.begin_frame();
            }
            bytes = rest;
        }
    }

    fn skip_payload(&mut self, most: usize) -> usize {
        let skipped = self.payload_left.min(most);
        self.payload_left -= skipped;
        if self.payload_left == 0 && self.ends {
            (self.continues, self.ends) = (false, false);
        }
        skipped
    }

    fn begin_frame(&mut self) {
        let [high, middle, low, kind, flags, ..] = self.head;
        self.head_length = 0;
        self.payload_left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        if matches!(kind, HEADERS | CONTINUATION) {
            let is_last = flags & END_HEADERS != 0;
            self.ends = is_last && self.continues;
            self.continues |= !is_last;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Calls = Calls { begun: 0, is_idle: true };

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let length_bytes = u32::try_from(length).expect("a length").to_be_bytes();
        let head = [length_bytes[1], length_bytes[2], length_bytes[3], kind, flags, 0, 0, 0, 1];
        [&head[..], &vec![7; length]].concat()
    }

    /// Reads in pieces of one length, and returns after how many bytes a long head was unfinished, and until when.
    fn unfinished(bytes: &[u8], piece: usize) -> Option<(usize, usize)> {
        let mut reader = Reader::default();
        let mut read = 0;
        let mut seen = Vec::new();
        for part in bytes.chunks(piece) {
            read += part.len();
            if reader.read(part, IDLE) {
                seen.push(read);
            }
        }
        Some((*seen.first()?, *seen.last()?))
    }

    #[test]
    fn a_list_of_headers_is_unfinished_until_the_end_of_its_last_frame() {
        let parts = [
            PREFACE.to_vec(),
            frame(0x4, 0, 12),
            frame(HEADERS, END_HEADERS, 500),
            frame(0x0, 1, 900),
            frame(HEADERS, 0, 300),
            frame(CONTINUATION, 0, 0),
            frame(CONTINUATION, END_HEADERS, 40),
            frame(HEADERS, END_HEADERS, 10),
        ];
        let starts: Vec<_> =
            parts.iter().scan(0, |sum, part| Some(std::mem::replace(sum, *sum + part.len()))).collect();
        let bytes = parts.concat();
        assert_eq!(unfinished(&bytes, 1), Some((starts[4] + FRAME_HEAD, starts[7] - 1)));
        for piece in [2, 7, 9, 100] {
            let (first, last) = unfinished(&bytes, piece).expect("it was unfinished");
            assert!(first - starts[4] - FRAME_HEAD < piece && starts[7] - last <= piece, "{piece}: {first} {last}");
        }
        assert_eq!(unfinished(&bytes, bytes.len()), None, "all of it came at once");
    }

    #[test]
    fn what_comes_over_http_1_1_is_a_head_until_a_call_begins() {
        let mut reader = Reader::default();
        assert!(!reader.read(b"POST /v1/auth/login HTTP/1.1\r\n", IDLE));
        assert!(!reader.read(&vec![b'a'; MAX_HEAD - 100], IDLE));
        assert!(reader.read(&[b'a'; 100], IDLE));
        let busy = Calls { begun: 1, is_idle: false };
        assert!(!reader.read(&vec![b'a'; 5 * MAX_HEAD], busy), "a body");
        assert!(!reader.read(b"GET / HTTP/1.1\r\n", Calls { begun: 1, is_idle: true }));
    }

    #[test]
    fn an_oversized_head_is_dropped_but_for_the_id_of_its_request() {
        let request = |length: usize| {
            let builder = Request::builder().uri("/v1/me").header("x-request-id", "some id");
            builder.header("authorization", "a".repeat(length)).body(()).expect("a request")
        };
        let mut fine = request(MAX_HEAD - 300);
        drop_oversized(&mut fine);
        assert!(fine.headers().contains_key("authorization") && fine.extensions().get::<OversizedHead>().is_none());
        let mut oversized = request(MAX_HEAD);
        drop_oversized(&mut oversized);
        assert!(oversized.extensions().get::<OversizedHead>().is_some());
        assert_eq!(oversized.headers().keys().collect::<Vec<_>>(), ["x-request-id"]);
        assert_eq!(oversized.uri(), "/v1/me");
        let path = format!("/{}", "a".repeat(MAX_HEAD));
        let mut path = Request::builder().uri(path).body(()).expect("a request");
        drop_oversized(&mut path);
        assert_eq!(path.uri(), "/");
    }
}
