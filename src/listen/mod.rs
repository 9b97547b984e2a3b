//! Listening: accepts connections, limits what each may use, and lets calls finish when the server stops. It knows
//! nothing of the calls themselves.

mod connections;
mod handshake;
mod heads;
mod leftover;
mod progress;
mod wire;

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::Router;
use http::{HeaderMap, HeaderValue, Version, header::CONNECTION};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulConnection},
    service::TowerToHyperService,
};
use ipnet::IpNet;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use crate::{shares::Shares, tls::Tls};

pub use self::heads::{MAX_HEAD, OversizedHead};
use self::{
    connections::{Activity, Connection, Connections},
    handshake::{Handshakes, Stream},
    heads::Heads,
    leftover::Leftovers,
    progress::Progress,
    wire::Wire,
};

/// The most open streams of one connection.
const MAX_STREAMS: u32 = 200;
/// How many streams a client may reset before they are handled. One more closes its connection. The library's default
/// of 20 is reached by a proxy when many of its clients hang up at once, and all other clients of the proxy would lose
/// their calls. Each such stream costs one entry in a queue.
const MAX_PENDING_RESETS: usize = 1_000;
/// How often an idle connection is pinged.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long the answer to a ping may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that takes nothing that is sent to it for this long is closed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(45);
/// The most open connections of an address, if there are enough file descriptors.
const MAX_CONNECTIONS: usize = 10_000;
/// The most open connections of the operations address.
const MAX_OPS_CONNECTIONS: usize = 64;
/// File descriptors for everything but connections of clients and of the database: listeners, files, mail.
const OTHER_DESCRIPTORS: usize = 96;
/// How long an answer may wait until its client takes more of it. Then the connection is closed.
const LONGEST_STANDSTILL: Duration = Duration::from_secs(30);
/// How often that is looked for.
const STANDSTILL_INTERVAL: Duration = Duration::from_secs(10);
/// How long a connection that has to give way may still take to end.
const GIVING_WAY: Duration = Duration::from_secs(1);
/// How often the log says that connections are refused.
const COMPLAINT_INTERVAL: Duration = Duration::from_mins(1);
/// How long calls may take to finish after their connection has reached its age.
const AGE_GRACE: Duration = Duration::from_secs(30);
/// How long calls may take to finish after the server has stopped accepting.
const DRAIN: Duration = Duration::from_secs(30);
/// The age of connections that may get as old as they like.
const FOR_EVER: Duration = Duration::from_hours(24 * 365);
/// How long to wait before accepting again when the machine has no file descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// The address of the client of a call: the peer of its connection, or the client that a trusted proxy names.
#[derive(Debug, Clone, Copy)]
pub struct ClientAddr(pub SocketAddr);

/// Cancelled when the connection of a call is to end, and streams that would go on for ever should.
#[derive(Debug, Clone)]
pub struct ConnectionEnds(pub CancellationToken);

/// CIDR ranges of proxies whose `X-Forwarded-For` is trusted.
#[derive(Debug, Clone, Default)]
pub struct TrustedProxies(Arc<[IpNet]>);

impl TrustedProxies {
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self(networks.into())
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// The client of a request. Every proxy appends the address of its own client to X-Forwarded-For, so the entries
    /// are read from the end, as long as the proxy that wrote one is trusted. Earlier entries may be forged, and need not
    /// be text. Several lines are one list, and empty elements of a list count for nothing (RFC 9110 §5.3, §5.6.1.2).
    fn caller(&self, peer: SocketAddr, headers: &HeaderMap) -> SocketAddr {
        if !self.trusts(peer.ip()) {
            return peer;
        }
        let mut caller = peer.ip();
        let lines = headers.get_all("x-forwarded-for").iter().rev();
        let entries = lines.flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
        for entry in entries.filter(|entry| !entry.is_empty()) {
            let Some(address) = str::from_utf8(entry).ok().and_then(forwarded_address) else {
                break;
            };
            caller = address;
            if !self.trusts(address) {
                break;
            }
        }
        SocketAddr::new(caller, peer.port())
    }
}

/// Parses an address of X-Forwarded-For. Some proxies add the port, put an IPv6 address in brackets, or quote it as in
/// `Forwarded` (RFC 7239 §6).
fn forwarded_address(text: &str) -> Option<IpAddr> {
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse().map(|address: SocketAddr| address.ip())).ok()?;
    Some(address.to_canonical())
}

/// The protocol of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 with prior knowledge, as gRPC clients use it.
    Http2,
    /// HTTP/1.1, or HTTP/2 with prior knowledge.
    Http1AndHttp2,
}

/// How many connections each address may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Of an address that serves calls.
    pub calls: usize,
    /// Of the operations address, in addition.
    pub ops: usize,
}

impl ConnectionLimits {
    /// What the file descriptors allow, beside so many connections to the database. Raises the soft limit of the process
    /// to the hard one first.
    pub fn of_process(database_connections: u32) -> Self {
        Self::within(raise_descriptor_limit(), database_connections)
    }

    fn within(descriptors: usize, database_connections: u32) -> Self {
        let database = usize::try_from(database_connections).unwrap_or(usize::MAX);
        let left = descriptors.saturating_sub(OTHER_DESCRIPTORS).saturating_sub(database);
        let ops = MAX_OPS_CONNECTIONS.min(left / 8).max(4);
        // Two addresses serve calls: gRPC and HTTP.
        Self { calls: (left.saturating_sub(ops) / 2).clamp(4, MAX_CONNECTIONS), ops }
    }
}

/// Returns how many file descriptors the process may have.
fn raise_descriptor_limit() -> usize {
    let limits = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limits.maximum, ..limits };
    let allowed = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limits.maximum,
        Err(error) => {
            tracing::debug!(%error, "the limit of file descriptors could not be raised");
            limits.current
        }
    };
    allowed.and_then(|allowed| usize::try_from(allowed).ok()).unwrap_or(usize::MAX)
}

/// The bounds of the connections of an address.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// How many there may be.
    pub connections: usize,
    /// How old one may get.
    pub age: Option<Duration>,
    /// How long an HTTP/1.1 connection may wait for its next request.
    pub idle: Duration,
}

/// Starts the counters of connections, so that the first one is a rise.
pub fn count_from_zero() {
    metrics::counter!("postern_connections_refused_total").increment(0);
    handshake::count_from_zero();
}

/// Serves until `stop`, with TLS if there is any. Then it sends GOAWAY or `connection: close`, lets calls finish for at
/// most `DRAIN`, and returns. A connection that reaches its age ends in the same way.
pub async fn serve(
    listener: TcpListener,
    protocol: Protocol,
    bounds: Bounds,
    proxies: TrustedProxies,
    tls: Option<Tls>,
    router: Router,
    stop: CancellationToken,
) {
    let running = TaskTracker::new();
    let connections = Connections::new(bounds.connections);
    let refusals = metrics::counter!("postern_connections_refused_total");
    let mut complaints = Complaints::default();
    let mut number = 0;
    let address = Arc::new(Address {
        builder: builder(protocol),
        protocol,
        bounds,
        proxies,
        handshakes: Handshakes::new(tls, protocol == Protocol::Http2),
        leftovers: Leftovers::new(),
        long_heads: Shares::new(heads::LONG_HEADS_AT_ONCE),
        router,
        stop,
    });

    while let Some((stream, peer)) = accept(&listener, &address.stop, &mut complaints).await {
        number += 1;
        let Some(entered) = connections.enter(number, peer.ip()) else {
            refusals.increment(1);
            complaints.make(|refused| {
                tracing::warn!(refused, most_connections = bounds.connections, "connections were refused");
            });
            continue;
        };
        running.spawn(Arc::clone(&address).serve_connection(stream, peer, number, entered));
    }
    drop(listener);
    running.close();
    if tokio::time::timeout(DRAIN, running.wait()).await.is_err() {
        tracing::warn!("some calls did not finish in {DRAIN:?} and were cut off");
    }
}

/// What the connections of an address have in common.
struct Address {
    builder: auto::Builder<TokioExecutor>,
    protocol: Protocol,
    bounds: Bounds,
    proxies: TrustedProxies,
    handshakes: Handshakes,
    leftovers: Leftovers,
    long_heads: Shares,
    router: Router,
    /// Cancelled when the server stops.
    stop: CancellationToken,
}

impl Address {
    /// Serves one connection to its end.
    async fn serve_connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, number: u64, entered: Connection) {
        let begun = tokio::select! {
            begun = self.handshakes.run(stream, peer) => begun,
            () = entered.close.cancelled() => None,
            () = self.stop.cancelled() => None,
        };
        let Some((stream, certificate)) = begun else {
            return;
        };
        let life = Life {
            peer,
            activity: entered.activity(),
            max_age: self.bounds.age.map(|age| jittered(age, number)),
            give_way: entered.close.clone(),
            progress: Progress::default(),
            stop: self.stop.clone(),
            ends: self.stop.child_token(),
        };
        let is_http2_only = self.protocol == Protocol::Http2;
        let wire = Wire::new(stream, is_http2_only, self.bounds.idle, entered.activity(), entered.close.clone());
        let stream = Heads::new(with_write_timeout(wire), entered.activity(), self.long_heads.clone(), peer.ip());
        let (router, proxies, entered) = (self.router.clone(), self.proxies.clone(), Arc::new(entered));
        let (answers, ends, leftovers) = (life.progress.clone(), life.ends.clone(), self.leftovers.clone());
        let service = tower::service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
            let caller = proxies.caller(peer, request.headers());
            request.extensions_mut().insert(ClientAddr(caller));
            request.extensions_mut().insert(ConnectionEnds(ends.clone()));
            // The certificate of a proxy is no credential of its clients.
            if let Some(certificate) = certificate.as_ref().filter(|_| caller == peer) {
                request.extensions_mut().insert(certificate.clone());
            }
            heads::drop_oversized(&mut request);
            let under_way = entered.call();
            let version = request.version();
            let (request, unread) = leftovers.follow(request, caller.ip());
            let call = router.clone().oneshot(request);
            let (answers, ends) = (answers.clone(), ends.clone());
            async move {
                let mut response = call.await.unwrap_or_else(|never| match never {});
                unread.announce(version, &mut response);
                if version < Version::HTTP_2 && ends.is_cancelled() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response.map(|body| answers.follow(body, under_way)))
            }
        });
        let service = TowerToHyperService::new(service);
        let connection = self.builder.serve_connection(TokioIo::new(stream), service).into_owned();
        life.run(connection).await;
    }
}

fn builder(protocol: Protocol) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    if protocol == Protocol::Http2 {
        builder = builder.http2_only();
    }
    // `wire.rs` has the time-outs of HTTP/1.1.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(heads::LONGEST_HEAD as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(heads::LONGEST_HEAD)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}

/// The maximum age of a connection: up to a tenth less or more, so that connections that began together do not end
/// together. The steps of the golden ratio spread numbers that follow each other evenly.
fn jittered(age: Duration, number: u64) -> Duration {
    let step = u32::try_from(number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32).unwrap_or_default();
    age.mul_f64(0.9 + 0.2 * f64::from(step) / f64::from(u32::MAX))
}

/// What decides when a connection ends.
struct Life {
    peer: SocketAddr,
    activity: Arc<Activity>,
    max_age: Option<Duration>,
    /// Cancelled when it has to give way to another connection.
    give_way: CancellationToken,
    progress: Progress,
    /// Cancelled when the server stops.
    stop: CancellationToken,
    /// Cancelled when it is too old, and when the server stops.
    ends: CancellationToken,
}

impl Life {
    /// Runs a connection to its end: until its client ends it, until it is too old, until it has to give way, or until
    /// its client takes no more of an answer.
    async fn run<C: GracefulConnection<Error: std::fmt::Display>>(self, connection: C) {
        let peer = self.peer;
        let mut connection = pin!(connection);
        let (mut is_stopping, mut is_old) = (false, false);
        let mut age = pin!(tokio::time::sleep(self.max_age.unwrap_or(FOR_EVER)));
        let mut look = tokio::time::interval_at((Instant::now() + STANDSTILL_INTERVAL).into(), STANDSTILL_INTERVAL);
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%peer, %error, "a connection ended with an error");
                    }
                    return;
                }
                () = self.stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = &mut age => {
                    if is_old {
                        tracing::debug!(%peer, "a connection was closed at its age, with calls that did not finish");
                        return;
                    }
                    is_old = true;
                    self.ends.cancel();
                    if self.activity.is_http1() {
                        // A request may be on its way: the answer to the next one says that it was the last.
                        age.as_mut().reset((Instant::now() + FOR_EVER).into());
                    } else {
                        connection.as_mut().graceful_shutdown();
                        age.as_mut().reset((Instant::now() + AGE_GRACE).into());
                    }
                }
                () = self.give_way.cancelled() => {
                    // It was idle. A call that has begun in this moment may still end.
                    connection.as_mut().graceful_shutdown();
                    let _ = tokio::time::timeout(GIVING_WAY, &mut connection).await;
                    tracing::debug!(%peer, "an idle connection gave way to another one");
                    return;
                }
                _ = look.tick() => {
                    if self.progress.is_stuck(LONGEST_STANDSTILL) {
                        tracing::debug!(%peer, "a connection was closed because its client did not take an answer");
                        return;
                    }
                }
            }
        }
    }
}

/// What the log says at most once in [`COMPLAINT_INTERVAL`].
#[derive(Debug, Default)]
struct Complaints {
    last: Option<Instant>,
    count: u64,
}

impl Complaints {
    /// Calls `log` with the number of complaints since it was called last, if that was long enough ago.
    fn make(&mut self, log: impl FnOnce(u64)) {
        self.count += 1;
        if self.last.is_none_or(|last| last.elapsed() >= COMPLAINT_INTERVAL) {
            log(std::mem::take(&mut self.count));
            self.last = Some(Instant::now());
        }
    }
}

/// The next connection, or `None` once the server stops.
async fn accept(
    listener: &TcpListener,
    stop: &CancellationToken,
    complaints: &mut Complaints,
) -> Option<(TcpStream, SocketAddr)> {
    let next = async {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    // Small answers should be sent at once. If the socket refuses the option, they are only slower.
                    let _ = stream.set_nodelay(true);
                    return (stream, SocketAddr::new(peer.ip().to_canonical(), peer.port()));
                }
                Err(error) => {
                    complaints.make(|times| tracing::warn!(%error, times, "a connection could not be accepted"));
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => None,
        connection = next => Some(connection),
    }
}

fn with_write_timeout(wire: Wire<Stream>) -> std::pin::Pin<Box<TimeoutStream<Wire<Stream>>>> {
    let mut stream = TimeoutStream::new(wire);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    Box::pin(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_file_descriptors_to_everything_else() {
        for (descriptors, calls, ops) in [(1_024, 424, 64), (65_536, 10_000, 64), (256, 63, 18), (0, 4, 4)] {
            let limits = ConnectionLimits::within(descriptors, 16);
            assert_eq!(limits, ConnectionLimits { calls, ops }, "{descriptors} descriptors");
        }
    }

    #[test]
    fn connections_that_began_together_do_not_end_together() {
        let age = Duration::from_secs(100);
        let mut ages: Vec<_> = (0..100).map(|number| jittered(age, number)).collect();
        ages.sort();
        assert!(ages[0] >= Duration::from_secs(90) && ages[99] <= Duration::from_secs(110));
        let widest = ages.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max();
        assert!(widest < Some(Duration::from_secs(1)), "{widest:?}");
    }

    fn caller(trusted: &[&str], peer: &str, lines: &[&str]) -> String {
        let networks = trusted.iter().map(|network| network.parse().expect("a network")).collect();
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append("x-forwarded-for", http::HeaderValue::from_str(line).expect("a header value"));
        }
        let peer = SocketAddr::new(peer.parse().expect("an address"), 4711);
        TrustedProxies::new(networks).caller(peer, &headers).ip().to_string()
    }

    #[test]
    fn the_header_of_an_untrusted_peer_is_ignored() {
        assert_eq!(caller(&[], "10.0.0.1", &["192.0.2.1"]), "10.0.0.1");
        assert_eq!(caller(&["10.0.0.0/8"], "192.0.2.9", &["192.0.2.1"]), "192.0.2.9");
    }

    #[test]
    fn the_header_is_read_back_to_the_first_untrusted_address() {
        let trusted = ["10.0.0.0/8", "2001:db8::/32"];
        assert_eq!(caller(&trusted, "10.0.0.1", &["192.0.2.1"]), "192.0.2.1");
        assert_eq!(caller(&trusted, "10.0.0.1", &["1.1.1.1, 192.0.2.1"]), "192.0.2.1", "the first entry may be forged");
        assert_eq!(
            caller(&trusted, "10.0.0.1", &["1.1.1.1", "192.0.2.1, 10.2.3.4"]),
            "192.0.2.1",
            "through two proxies"
        );
        assert_eq!(caller(&trusted, "2001:db8::1", &["[2001:db9::7]:443"]), "2001:db9::7");
        assert_eq!(caller(&trusted, "10.0.0.1", &["192.0.2.1:80"]), "192.0.2.1");
        assert_eq!(caller(&trusted, "10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(caller(&trusted, "10.0.0.1", &["unknown"]), "10.0.0.1");
        assert_eq!(caller(&trusted, "10.0.0.1", &["10.9.9.9"]), "10.9.9.9");
        assert_eq!(
            caller(&trusted, "10.0.0.1", &["\u{ff}, 203.0.113.9"]),
            "203.0.113.9",
            "what a client sent need not be text"
        );
        assert_eq!(
            caller(&trusted, "10.0.0.1", &["203.0.113.9", "\u{ff}"]),
            "10.0.0.1",
            "the last one that can be read"
        );
    }

    #[test]
    fn every_way_in_which_proxies_write_the_header_is_read() {
        let trusted = ["10.0.0.0/8", "127.0.0.1/32"];
        for (lines, expected) in [
            (&["[2001:db8::3]"][..], "2001:db8::3"),
            (&["[2001:db8::3]:443"], "2001:db8::3"),
            (&["\"[2001:db8::3]:443\""], "2001:db8::3"),
            (&["::ffff:192.0.2.7"], "192.0.2.7"),
            (&["192.0.2.4,"], "192.0.2.4"),
            (&[", 192.0.2.4 ,\t,"], "192.0.2.4"),
            (&["192.0.2.5, , 127.0.0.1"], "192.0.2.5"),
            (&["192.0.2.5", ""], "192.0.2.5"),
            (&["192.0.2.5", " , "], "192.0.2.5"),
            (&["1.1.1.1", "192.0.2.6"], "192.0.2.6"),
            (&["\u{e9}\u{ff}", "192.0.2.6, 10.1.1.1"], "192.0.2.6"),
            (&[""], "10.0.0.1"),
            (&[","], "10.0.0.1"),
            (&["[192.0.2.5"], "10.0.0.1"),
            (&["192.0.2.5, unknown"], "10.0.0.1"),
            (&["192.0.2.5, _hidden, 10.1.1.1"], "10.1.1.1"),
            (&["192.0.2.5:80:80"], "10.0.0.1"),
            (&["[]"], "10.0.0.1"),
        ] {
            assert_eq!(caller(&trusted, "10.0.0.1", lines), expected, "{lines:?}");
        }
    }
}
