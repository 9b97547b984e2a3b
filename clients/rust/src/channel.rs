//! How to connect to Postern.

use std::time::Duration;

use tonic::transport::{ClientTlsConfig, Endpoint, Error};

/// An endpoint with limits that suit Postern: `http://host:50051` without TLS, `https://…` with it and the public
/// authorities. Change what differs, then call `connect_lazy()`: it connects with the first call, and again when it has to.
///
/// There is no deadline for whole calls, because a stream of revocations has none. Set one for each call.
pub fn endpoint(uri: impl Into<String>) -> Result<Endpoint, Error> {
    let uri = uri.into();
    let endpoint = Endpoint::from_shared(uri.clone())?
        .connect_timeout(Duration::from_secs(5))
        .tcp_keepalive(Some(Duration::from_secs(30)))
        // A connection that a firewall has dropped is found out within half a minute.
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10));
    if uri.starts_with("https://") {
        endpoint.tls_config(ClientTlsConfig::new().with_enabled_roots())
    } else {
        Ok(endpoint)
    }
}
