//! The certificates of clients: which authorities they may be from, whose they are, and for how long they hold. A
//! certificate that is refused is named in the log.

use std::{
    fmt,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use governor::{DefaultDirectRateLimiter, Quota};
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::EndEntityCert;

use crate::domain::{digest::sha256, service_identity::ServiceIdentity};

/// How long a certificate is taken to hold after it was verified, so that not every call costs a verification.
const VERIFIED_FOR: Duration = Duration::from_secs(5);
/// How many certificates are named in the log per minute.
const LINES_A_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(59);
/// How many names of a certificate are logged, and how much of each, in characters: they may be a stranger's.
const MOST_NAMES: usize = 3;
const LONGEST_NAME: usize = 128;

/// Who may come with a certificate. A clone is a handle to the same.
#[derive(Clone)]
pub(super) struct Clients(Arc<Inner>);

struct Inner {
    services: Vec<ServiceIdentity>,
    /// Verifies by the authorities of now.
    verifier: RwLock<Arc<dyn ClientCertVerifier>>,
    log: Arc<DefaultDirectRateLimiter>,
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clients").field("services", &self.0.services).finish_non_exhaustive()
    }
}

impl Clients {
    pub(super) fn new(services: Vec<ServiceIdentity>, verifier: Arc<dyn ClientCertVerifier>) -> Self {
        let log = Arc::new(DefaultDirectRateLimiter::direct(Quota::per_minute(LINES_A_MINUTE)));
        Self(Arc::new(Inner { services, verifier: RwLock::new(verifier), log }))
    }

    /// Replaces the authorities.
    pub(super) fn replace(&self, verifier: Arc<dyn ClientCertVerifier>) {
        *self.0.verifier.write().unwrap_or_else(PoisonError::into_inner) = verifier;
    }

    /// The verifier for handshakes, which names in the log what it refuses.
    pub(super) fn for_handshakes(&self, verifier: Arc<dyn ClientCertVerifier>) -> Arc<dyn ClientCertVerifier> {
        Arc::new(NamingRefusals { verifier, log: Arc::clone(&self.0.log) })
    }

    /// The service that a verified certificate stands for. One of nobody gives nothing.
    pub(super) fn service(&self, chain: &[CertificateDer<'_>]) -> Option<ServiceCertificate> {
        let leaf = EndEntityCert::try_from(chain.first()?).ok()?;
        let Some(identity) = self.identity(&leaf) else {
            if self.0.log.check().is_ok() {
                tracing::info!(
                    certificate = %Named(chain),
                    "a client certificate gives nothing: POSTERN_SERVICE_IDENTITIES has no name of it"
                );
            }
            return None;
        };
        let held = Held {
            identity,
            chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
            clients: self.clone(),
            verified: Mutex::default(),
        };
        Some(ServiceCertificate(Arc::new(held)))
    }

    /// A certificate with several URIs is no SPIFFE id (X509-SVID §2), and nobody knows which of them is meant.
    fn identity(&self, leaf: &EndEntityCert<'_>) -> Option<ServiceIdentity> {
        let is_service = |identity: &ServiceIdentity| self.0.services.contains(identity);
        let mut uris = leaf.valid_uri_names();
        let uri = uris.next().filter(|_| uris.next().is_none()).map(|uri| ServiceIdentity::SpiffeId(uri.into()));
        let names = leaf.valid_dns_names().map(|name| ServiceIdentity::DnsName(name.to_ascii_lowercase().into()));
        uri.into_iter().chain(names).find(is_service)
    }

    fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.0.verifier.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The client certificate of a service that is named in POSTERN_SERVICE_IDENTITIES. The private key was proven in the
/// handshake. An extension of the calls of its connection.
#[derive(Clone)]
pub struct ServiceCertificate(Arc<Held>);

struct Held {
    identity: ServiceIdentity,
    chain: Vec<CertificateDer<'static>>,
    clients: Clients,
    /// By whom and when it was verified last.
    verified: Mutex<Option<(Arc<dyn ClientCertVerifier>, Instant)>>,
}

impl fmt::Debug for ServiceCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServiceCertificate").field(&self.0.identity).finish()
    }
}

impl ServiceCertificate {
    /// The service.
    pub fn identity(&self) -> &ServiceIdentity {
        &self.0.identity
    }

    /// Whether it would still be accepted: it can expire while its connection goes on, and its authority can be taken
    /// away. A resumed TLS session was not verified at all.
    pub fn holds(&self) -> bool {
        let current = self.0.clients.verifier();
        let mut verified = self.0.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified.as_ref().is_some_and(|(by, at)| Arc::ptr_eq(by, &current) && at.elapsed() < VERIFIED_FOR) {
            return true;
        }
        let Some((leaf, others)) = self.0.chain.split_first() else { return false };
        match current.verify_client_cert(leaf, others, UnixTime::now()) {
            Ok(_) => {
                *verified = Some((current, Instant::now()));
                true
            }
            Err(error) => {
                if self.0.clients.0.log.check().is_ok() {
                    tracing::warn!(
                        certificate = %Named(&self.0.chain), %error,
                        "a client certificate is no longer accepted"
                    );
                }
                false
            }
        }
    }
}

/// Logs the certificates that another verifier refuses. The span of the handshake has the address of the client.
struct NamingRefusals {
    verifier: Arc<dyn ClientCertVerifier>,
    log: Arc<DefaultDirectRateLimiter>,
}

impl NamingRefusals {
    fn named<T>(&self, chain: &[CertificateDer<'_>], outcome: Result<T, Error>) -> Result<T, Error> {
        outcome.inspect_err(|error| {
            if self.log.check().is_ok() {
                tracing::warn!(certificate = %Named(chain), %error, "a client certificate was refused");
            }
        })
    }
}

impl fmt::Debug for NamingRefusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.verifier.fmt(f)
    }
}

impl ClientCertVerifier for NamingRefusals {
    fn offer_client_auth(&self) -> bool {
        self.verifier.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.verifier.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.named(std::slice::from_ref(leaf), self.verifier.verify_client_cert(leaf, others, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.named(std::slice::from_ref(leaf), self.verifier.verify_tls12_signature(message, leaf, signed))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.named(std::slice::from_ref(leaf), self.verifier.verify_tls13_signature(message, leaf, signed))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// The first names of a certificate, and the SHA-256 of all of it.
pub(super) struct Named<'a>(pub(super) &'a [CertificateDer<'a>]);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(der) = self.0.first() else { return f.write_str("none") };
        if let Ok(leaf) = EndEntityCert::try_from(der) {
            for name in leaf.valid_uri_names().chain(leaf.valid_dns_names()).take(MOST_NAMES) {
                write!(f, "{} ", name.chars().take(LONGEST_NAME).collect::<String>().escape_debug())?;
            }
        }
        f.write_str("SHA256:")?;
        sha256(der).iter().try_for_each(|byte| write!(f, "{byte:02X}"))
    }
}
