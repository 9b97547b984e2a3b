//! TLS of the addresses: the certificate of the server, the authorities of its clients, and the files of both, which
//! are read again when they change. It knows nothing of connections and calls.

mod clients;
mod files;
mod own;
mod provider;

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    InconsistentKeys, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, UnixTime},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::MissedTickBehavior;
use webpki::{EndEntityCert, KeyUsage};

use crate::domain::service_identity::ServiceIdentity;

pub use self::{
    clients::ServiceCertificate,
    files::{TlsError, TlsFiles},
    own::any_certificate,
};
use self::{
    clients::{Clients, Named},
    files::{CERT, CLIENT_CA, Contents},
    provider::{HTTP1, HTTP2, provider},
};

/// How often the files are read. A change is used when it was read twice, because it may have been half written the
/// first time: so after two seconds, and five are promised.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The TLS of this process. A clone is a handle to the same.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    files: TlsFiles,
    clients: Option<Clients>,
    current: RwLock<Current>,
}

/// What new connections use.
#[derive(Clone)]
struct Current {
    /// Of the files that it was made from.
    digest: [u8; 32],
    for_http2: Arc<ServerConfig>,
    for_both: Arc<ServerConfig>,
    chain: Vec<CertificateDer<'static>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.0.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files. The certificates of `services` count as their credentials.
    pub fn load(files: TlsFiles, services: Vec<ServiceIdentity>) -> Result<Self, TlsError> {
        let contents = files.read()?;
        let verifier = verifier(&files, &contents)?;
        let clients = verifier.as_ref().map(|verifier| Clients::new(services, Arc::clone(verifier)));
        let current = configure(&files, &contents, clients.as_ref().zip(verifier))?;
        Ok(Self(Arc::new(Inner { files, clients, current: RwLock::new(current) })))
    }

    /// The configuration for a new connection.
    pub fn config(&self, is_http2_only: bool) -> Arc<ServerConfig> {
        let Current { for_http2, for_both, .. } = self.current();
        if is_http2_only { for_http2 } else { for_both }
    }

    /// The service that a verified client certificate stands for, if it stands for one.
    pub fn service(&self, chain: Option<&[CertificateDer<'_>]>) -> Option<ServiceCertificate> {
        self.0.clients.as_ref().zip(chain).and_then(|(clients, chain)| clients.service(chain))
    }

    fn current(&self) -> Current {
        self.0.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the log and the metrics which certificate is served.
    pub fn announce(&self) {
        let chain = self.current().chain;
        let Some(end) = chain.first().and_then(end_of) else { return };
        metrics::gauge!("postern_tls_certificate_expire_time_seconds").set(seconds(end));
        let time = i64::try_from(end.as_secs()).ok().and_then(|end| OffsetDateTime::from_unix_timestamp(end).ok());
        let expire_time = time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default();
        let certificate = Named(&chain);
        if UnixTime::now() > end {
            tracing::warn!(%certificate, expire_time, "the certificate of this server has expired: clients refuse it");
        } else {
            tracing::info!(%certificate, expire_time, "TLS with this certificate");
        }
    }

    /// Uses the files again whenever they have changed. Files that cannot be used change nothing, and are told once.
    pub async fn run_reload(self) {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen = None;
        let mut told = None;
        loop {
            ticks.tick().await;
            let tls = self.clone();
            // Files can be on a network.
            let looked = tokio::task::spawn_blocking(move || tls.look(seen)).await;
            let fault = match looked {
                Ok(Ok(now_seen)) => {
                    seen = now_seen;
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            if fault.is_some() && fault != told {
                reloads("failed").increment(1);
                tracing::error!(
                    cause = fault,
                    "the TLS files have changed and cannot be used: the certificate from before is still served"
                );
            }
            told = fault;
        }
    }

    /// Reads the files, and uses them if they are not what is used, but what was seen the last time. Returns what it
    /// saw.
    fn look(&self, seen: Option<[u8; 32]>) -> Result<Option<[u8; 32]>, TlsError> {
        let Inner { files, clients, current } = &*self.0;
        // A pipe was read at the start, and has nothing more to say.
        if !files.are_regular() {
            return Ok(None);
        }
        let contents = files.read()?;
        let digest = Some(contents.digest());
        if digest == Some(self.current().digest) || digest != seen {
            return Ok(digest);
        }
        let verifier = verifier(files, &contents)?;
        let changed = configure(files, &contents, clients.as_ref().zip(verifier.clone()))?;
        *current.write().unwrap_or_else(PoisonError::into_inner) = changed;
        if let Some((clients, verifier)) = clients.as_ref().zip(verifier) {
            clients.replace(verifier);
        }
        reloads("done").increment(1);
        self.announce();
        Ok(digest)
    }
}

/// Starts the metrics, so that the first event is a rise.
pub fn count_from_zero() {
    metrics::gauge!("postern_tls_certificate_expire_time_seconds").set(0.0);
    for outcome in ["done", "failed"] {
        reloads(outcome).increment(0);
    }
}

fn reloads(outcome: &'static str) -> metrics::Counter {
    metrics::counter!("postern_tls_reloads_total", "outcome" => outcome)
}

/// The verifier of client certificates, if they are asked for. A client may come without one.
fn verifier(files: &TlsFiles, contents: &Contents) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
    let Some(authorities) = files.authorities(contents)? else {
        return Ok(None);
    };
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority).map_err(|error| files.unusable(CLIENT_CA, &error))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
    let verifier = verifier.allow_unauthenticated().build().map_err(|error| files.unusable(CLIENT_CA, &error))?;
    Ok(Some(verifier))
}

fn configure(
    files: &TlsFiles,
    contents: &Contents,
    clients: Option<(&Clients, Arc<dyn ClientCertVerifier>)>,
) -> Result<Current, TlsError> {
    let provider = provider();
    let (chain, key) = (files.chain(contents)?, files.private_key(contents)?);
    let key = provider.key_provider.load_private_key(key).map_err(|_| files.no_key())?;
    let certified = CertifiedKey::new(chain.clone(), key);
    match certified.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
        Err(rustls::Error::InconsistentKeys(_)) => return Err(TlsError::KeyMismatch(files.clone())),
        Err(error) => return Err(files.unusable(CERT, &error)),
    }
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let builder = match clients {
        Some((clients, verifier)) => builder.with_client_cert_verifier(clients.for_handshakes(verifier)),
        None => builder.with_no_client_auth(),
    };
    let mut for_http2 = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    let mut for_both = for_http2.clone();
    for_http2.alpn_protocols = vec![HTTP2.to_vec()];
    for_both.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    Ok(Current { digest: contents.digest(), for_http2: Arc::new(for_http2), for_both: Arc::new(for_both), chain })
}

/// When a certificate expires. The library tells this only of one that has expired, so it is asked about the end of
/// time.
fn end_of(certificate: &CertificateDer<'_>) -> Option<UnixTime> {
    let end_of_time = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
    let leaf = EndEntityCert::try_from(certificate).ok()?;
    match leaf.verify_for_usage(&[], &[], &[], end_of_time, KeyUsage::server_auth(), None, None) {
        Err(webpki::Error::CertExpired { not_after, .. }) => Some(not_after),
        Ok(_) | Err(_) => None,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a time in seconds is far smaller than 2^52")]
fn seconds(time: UnixTime) -> f64 {
    time.as_secs() as f64
}
