//! The files of TLS: what is in them, and what is wrong with them. A message never contains a part of a file.

use std::{
    fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use zeroize::Zeroizing;

use crate::{domain::digest::sha256, private_file};

/// The settings that name the files.
pub(super) const CERT: &str = "POSTERN_TLS_CERT";
pub(super) const KEY: &str = "POSTERN_TLS_KEY";
pub(super) const CLIENT_CA: &str = "POSTERN_TLS_CLIENT_CA";

/// The longest file that is read, in bytes. All authorities of the public web take a fifth of this.
const LONGEST_FILE: u64 = 1024 * 1024;

/// Where the files are.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate of the server, and after it those between it and its authority.
    pub cert: PathBuf,
    /// The private key of that certificate.
    pub key: PathBuf,
    /// The authorities of the certificates of clients.
    pub client_ca: Option<PathBuf>,
}

/// Why TLS cannot be set up. Each message names the setting.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{variable}: {path} cannot be read: {source}", path = .path.display())]
    Unreadable { variable: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{variable}: {path} has no certificate in PEM, which begins with -----BEGIN CERTIFICATE-----",
        path = .path.display()
    )]
    NoCertificate { variable: &'static str, path: PathBuf },
    #[error("{variable}: {path} has a certificate that cannot be used: {problem}", path = .path.display())]
    Certificate { variable: &'static str, path: PathBuf, problem: String },
    #[error(
        "POSTERN_TLS_KEY: {path} has no private key that can be used: write it in PEM, as PKCS #8, PKCS #1 or SEC 1, \
         without a passphrase",
        path = .path.display()
    )]
    NoKey { path: PathBuf },
    #[error(
        "POSTERN_TLS_KEY: {key} is not the key of the first certificate in {cert}: the certificate of the server comes \
         first in POSTERN_TLS_CERT, and those of its authorities after it",
        key = .0.key.display(), cert = .0.cert.display()
    )]
    KeyMismatch(TlsFiles),
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
}

/// What is in the files.
pub(super) struct Contents {
    cert: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Vec<u8>>,
}

impl TlsFiles {
    /// Reads the files.
    pub(super) fn read(&self) -> Result<Contents, TlsError> {
        let client_ca = self.client_ca.as_deref().map(|path| read(CLIENT_CA, path)).transpose()?;
        Ok(Contents { cert: read(CERT, &self.cert)?, key: Zeroizing::new(read(KEY, &self.key)?), client_ca })
    }

    /// Whether all of them can be read more than once.
    pub(super) fn are_regular(&self) -> bool {
        let files = [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()];
        // What is missing can come back.
        files.into_iter().flatten().all(|path| fs::metadata(path).map_or(true, |file| file.is_file()))
    }

    /// The certificates of the server.
    pub(super) fn chain(&self, contents: &Contents) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(CERT, &self.cert, &contents.cert)
    }

    /// The private key of the server. What is wrong with it is not told, because that would quote it.
    pub(super) fn private_key(&self, contents: &Contents) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&contents.key).map_err(|_| self.no_key())
    }

    pub(super) fn no_key(&self) -> TlsError {
        TlsError::NoKey { path: self.key.clone() }
    }

    /// The certificates of the authorities of clients, if they are asked for.
    pub(super) fn authorities(&self, contents: &Contents) -> Result<Option<Vec<CertificateDer<'static>>>, TlsError> {
        let files = self.client_ca.as_ref().zip(contents.client_ca.as_ref());
        files.map(|(path, pem)| certificates(CLIENT_CA, path, pem)).transpose()
    }

    /// A certificate that cannot be used.
    pub(super) fn unusable(&self, variable: &'static str, problem: &dyn fmt::Display) -> TlsError {
        let path = self.client_ca.as_ref().filter(|_| variable == CLIENT_CA).unwrap_or(&self.cert);
        TlsError::Certificate { variable, path: path.clone(), problem: problem.to_string() }
    }
}

impl Contents {
    /// Differs if a file differs.
    pub(super) fn digest(&self) -> [u8; 32] {
        let files = [&self.cert, &*self.key].into_iter().chain(&self.client_ca);
        sha256(&files.map(|file| sha256(file)).collect::<Vec<_>>().concat())
    }
}

fn read(variable: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let mut contents = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(LONGEST_FILE + 1).read_to_end(&mut contents));
    let fits = read.and_then(|length| {
        let is_too_long = length as u64 > LONGEST_FILE;
        if is_too_long { Err(io::Error::other("it is larger than 1 MiB")) } else { Ok(contents) }
    });
    fits.map_err(|source| TlsError::Unreadable {
        variable,
        path: path.to_owned(),
        source: private_file::explain(path, source),
    })
}

fn certificates(variable: &'static str, path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found =
        read.map_err(|error| TlsError::Certificate { variable, path: path.to_owned(), problem: error.to_string() })?;
    if found.is_empty() { Err(TlsError::NoCertificate { variable, path: path.to_owned() }) } else { Ok(found) }
}
