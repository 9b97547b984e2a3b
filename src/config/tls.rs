//! Settings of TLS on the addresses of the server.

use std::path::PathBuf;

use clap::Args;

use crate::{
    domain::service_identity::ServiceIdentity,
    private_file,
    tls::{Tls, TlsFiles},
};

use super::error::{ConfigError, Faults};

/// The certificate of the server, and those of its clients.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsSettings {
    /// File with the certificate of this server in PEM, and after it those between it and its authority; all three
    /// addresses then have TLS. It is read again when it changes [default: no TLS]
    #[arg(long, env = "POSTERN_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// File with the private key of that certificate in PEM, without a passphrase
    #[arg(long, env = "POSTERN_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// File with the authorities of client certificates in PEM. A client may come without a certificate, but not with
    /// one of another authority [default: clients are not asked for certificates]
    #[arg(long, env = "POSTERN_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Services whose client certificates are credentials like their tokens: SPIFFE ids or DNS names, separated by
    /// commas [default: none]
    #[arg(long, env = "POSTERN_SERVICE_IDENTITIES", value_name = "NAMES", value_delimiter = ',',
        value_parser = identity)]
    pub service_identities: Vec<ServiceIdentity>,
}

fn identity(text: &str) -> Result<ServiceIdentity, &'static str> {
    ServiceIdentity::parse(text.trim())
}

impl TlsSettings {
    /// Whether the addresses are to have TLS.
    pub fn is_asked_for(&self) -> bool {
        self.tls_cert.is_some() || self.tls_key.is_some()
    }

    /// Reads the files, if there are any.
    pub fn load(&self) -> Result<Option<Tls>, ConfigError> {
        let mut faults = Faults::default();
        let (cert, key, ca) = (&self.tls_cert, &self.tls_key, &self.tls_client_ca);
        for (is_set, setting, needed, other) in [
            (cert.is_some(), "POSTERN_TLS_CERT", key.is_some(), "POSTERN_TLS_KEY"),
            (key.is_some(), "POSTERN_TLS_KEY", cert.is_some(), "POSTERN_TLS_CERT"),
            (ca.is_some(), "POSTERN_TLS_CLIENT_CA", cert.is_some(), "POSTERN_TLS_CERT"),
            (!self.service_identities.is_empty(), "POSTERN_SERVICE_IDENTITIES", ca.is_some(), "POSTERN_TLS_CLIENT_CA"),
        ] {
            if is_set && !needed {
                let text =
                    format!("{setting} is set, and has no meaning without {other}: set both, or remove {setting}");
                faults.add(ConfigError::Contradiction(text));
            }
        }
        let loaded = cert.clone().zip(key.clone()).and_then(|(cert, key)| {
            private_file::warn_if_public(&key);
            let files = TlsFiles { cert, key, client_ca: ca.clone() };
            faults.take(Tls::load(files, self.service_identities.clone()).map_err(ConfigError::from))
        });
        faults.into_result().map(|()| loaded)
    }
}
