//! The beginning of a connection: the TLS handshake, if the address has TLS. How long one may take and how many may be
//! under way is bounded. Meanwhile the connection counts as its client's, and gives way like an idle one.

use std::{io, net::SocketAddr, num::NonZeroU32, time::Duration};

use governor::{DefaultDirectRateLimiter, Quota};
use rustls::Error;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::either::Either;
use tracing::Instrument as _;

use crate::{
    shares::Shares,
    tls::{ServiceCertificate, Tls},
};

/// How long a handshake may take.
const LONGEST: Duration = Duration::from_secs(10);
/// How many handshakes may be under way at the same time, at each address. One holds up to 64 KiB of what its client
/// sends.
const AT_ONCE: usize = 1_024;
/// How many handshakes that fail are logged per minute. Whoever scans for open ports causes them too.
const LINES_A_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(59);
/// The values of the label of the counter.
const OUTCOMES: [&str; 5] = ["done", "failed", "certificate", "timed_out", "refused"];

/// A connection with or without TLS.
pub(super) type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// The handshakes of one address.
#[derive(Debug)]
pub(super) struct Handshakes {
    tls: Option<Tls>,
    is_http2_only: bool,
    places: Shares,
    log: DefaultDirectRateLimiter,
}

impl Handshakes {
    pub(super) fn new(tls: Option<Tls>, is_http2_only: bool) -> Self {
        let log = DefaultDirectRateLimiter::direct(Quota::per_minute(LINES_A_MINUTE));
        Self { tls, is_http2_only, places: Shares::new(AT_ONCE), log }
    }

    /// The connection after its handshake, and the service that its client certificate stands for. `None` if the
    /// handshake failed.
    pub(super) async fn run(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
    ) -> Option<(Stream, Option<ServiceCertificate>)> {
        let Some(tls) = &self.tls else {
            return Some((Either::Left(stream), None));
        };
        let Some(_place) = self.places.take(Some(peer.ip())) else {
            count("refused");
            return None;
        };
        let accepting = TlsAcceptor::from(tls.config(self.is_http2_only)).accept(stream);
        let handshake = async {
            match tokio::time::timeout(LONGEST, accepting).await {
                Ok(Ok(stream)) => {
                    count("done");
                    let service = tls.service(stream.get_ref().1.peer_certificates());
                    Some((Either::Right(Box::new(stream)), service))
                }
                Ok(Err(error)) => {
                    self.tell(&error);
                    None
                }
                Err(_) => {
                    count("timed_out");
                    tracing::debug!("a TLS handshake took longer than {LONGEST:?}");
                    None
                }
            }
        };
        // What is logged inside names the client.
        handshake.instrument(tracing::info_span!("handshake", %peer)).await
    }

    fn tell(&self, error: &io::Error) {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
        match cause {
            // `tls` has named the certificate in the log.
            Some(Error::InvalidCertificate(_)) => count("certificate"),
            Some(cause) => {
                count("failed");
                if self.log.check().is_ok() {
                    tracing::info!(%cause, "a TLS handshake failed");
                }
            }
            // Often a balancer that only looks whether the port is open.
            None => {
                count("failed");
                tracing::debug!(%error, "a connection ended in its TLS handshake");
            }
        }
    }
}

/// Starts the counters, so that the first event is a rise.
pub(super) fn count_from_zero() {
    for outcome in OUTCOMES {
        metrics::counter!("postern_tls_handshakes_total", "outcome" => outcome).increment(0);
    }
}

fn count(outcome: &'static str) {
    metrics::counter!("postern_tls_handshakes_total", "outcome" => outcome).increment(1);
}
