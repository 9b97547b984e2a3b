//! What both sides of a connection use of the library.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};

/// The protocols of an address (RFC 7301).
pub(super) const HTTP2: &[u8] = b"h2";
pub(super) const HTTP1: &[u8] = b"http/1.1";

/// The cryptography, with the suites and groups that the library has by default.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}
