//! Listening: accepts connections, limits what each may use, and lets calls finish when the server stops. It knows
//! nothing of the calls themselves.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use http::HeaderMap;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use ipnet::IpNet;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// The most open streams of one connection.
const MAX_STREAMS: u32 = 200;
/// The largest size of the headers of one request, in bytes.
const MAX_HEADERS: u32 = 16 * 1024;
/// How many streams a client may reset before they are handled. One more closes its connection. The library's default
/// of 20 is reached by a proxy when many of its clients hang up at once, and all other clients of the proxy would lose
/// their calls. Each such stream costs one entry in a queue.
const MAX_PENDING_RESETS: usize = 1_000;
/// How often an idle connection is pinged.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long the answer to a ping may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that sends nothing for this long is closed. A working HTTP/2 client answers pings, so this closes
/// connections that never send a request, stop in the middle of a header, or are dead.
const IDLE_TIMEOUT: Duration = Duration::from_secs(45);
/// How long the headers of an HTTP/1.1 request may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The most open connections. Further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 10_000;
/// How long calls may take to finish after the server has stopped accepting.
const DRAIN: Duration = Duration::from_secs(30);
/// How long to wait before accepting again when the machine has no file descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// The address of the client of a call: the peer of its connection, or the client that a trusted proxy names.
#[derive(Debug, Clone, Copy)]
pub struct ClientAddr(pub SocketAddr);

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
    /// are read from the end, as long as the proxy that wrote one is trusted. Earlier entries may be forged.
    fn caller(&self, peer: SocketAddr, headers: &HeaderMap) -> SocketAddr {
        if !self.trusts(peer.ip()) {
            return peer;
        }
        let mut caller = peer.ip();
        let lines = headers.get_all("x-forwarded-for").iter().rev();
        for entry in lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(',')) {
            let Some(address) = forwarded_address(entry.trim()) else {
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

/// Parses an address of X-Forwarded-For. Some proxies add the port, and put an IPv6 address in brackets then.
fn forwarded_address(text: &str) -> Option<IpAddr> {
    let address: IpAddr = match text.parse() {
        Ok(address) => address,
        Err(_) => text.parse::<SocketAddr>().ok()?.ip(),
    };
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

/// Serves until `stop`. Then it sends GOAWAY or `connection: close`, lets calls finish for at most `DRAIN`, and
/// returns.
pub async fn serve(
    listener: TcpListener,
    protocol: Protocol,
    proxies: TrustedProxies,
    router: Router,
    stop: CancellationToken,
) {
    let mut connections = auto::Builder::new(TokioExecutor::new());
    if protocol == Protocol::Http2 {
        connections = connections.http2_only();
    }
    connections.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEADERS as usize);
    connections
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let connections = Arc::new(connections);
    let graceful = GracefulShutdown::new();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));

    while let Some((stream, peer, slot)) = accept(&listener, &slots, &stop).await {
        let (router, proxies) = (router.clone(), proxies.clone());
        let service = tower::service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
            let caller = proxies.caller(peer, request.headers());
            request.extensions_mut().insert(ClientAddr(caller));
            let call = router.clone().oneshot(request.map(axum::body::Body::new));
            async move { Ok::<_, Infallible>(call.await.unwrap_or_else(|never| match never {})) }
        });
        let connection = connections
            .serve_connection(TokioIo::new(with_idle_timeout(stream)), TowerToHyperService::new(service))
            .into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "a connection ended with an error");
            }
            drop(slot);
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("some calls did not finish in {DRAIN:?} and were cut off");
    }
}

/// The next connection, or `None` once the server stops.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    stop: &CancellationToken,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let next = async {
        // The semaphore is never closed, so this never fails.
        let slot = Arc::clone(slots).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    // Small answers should be sent at once. If the socket refuses the option, they are only slower.
                    let _ = stream.set_nodelay(true);
                    return Some((stream, SocketAddr::new(peer.ip().to_canonical(), peer.port()), slot));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => None,
        connection = next => connection,
    }
}

fn with_idle_timeout(stream: TcpStream) -> std::pin::Pin<Box<TimeoutStream<TcpStream>>> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_read_timeout(Some(IDLE_TIMEOUT));
    stream.set_write_timeout(Some(IDLE_TIMEOUT));
    Box::pin(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(trusted: &[&str], peer: &str, lines: &[&str]) -> String {
        let networks = trusted.iter().map(|network| network.parse().expect("a network")).collect();
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append("x-forwarded-for", line.parse().expect("a header value"));
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
    }
}
