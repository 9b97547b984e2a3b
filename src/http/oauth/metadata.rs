//! Authorization server metadata (RFC 8414): where the endpoints are and what they take. Every URL is that of the
//! configuration; nothing of a request changes one. `wellknown.rs` serves the document.

use http::Uri;
use serde_json::{Map, Value, json};

pub const TOKEN: &str = "/oauth2/token";
pub const INTROSPECT: &str = "/oauth2/introspect";
pub const REVOKE: &str = "/oauth2/revoke";
pub const ENDPOINTS: [&str; 3] = [TOKEN, INTROSPECT, REVOKE];

/// Where the document of an issuer without a path is.
pub const METADATA_PATH: &str = "/.well-known/oauth-authorization-server";

/// The members about the endpoints. The discovery document has them too.
pub fn members(public_url: &str) -> Map<String, Value> {
    let url = |path: &str| format!("{}{path}", public_url.trim_end_matches('/'));
    let clients = ["client_secret_basic", "client_secret_post", "none"];
    // Section 2 allows a type of access token among the methods of this endpoint.
    let services = ["client_secret_basic", "client_secret_post", "Bearer"];
    Map::from_iter([
        ("token_endpoint".to_owned(), url(TOKEN).into()),
        ("token_endpoint_auth_methods_supported".to_owned(), json!(clients)),
        ("grant_types_supported".to_owned(), json!(["client_credentials", "refresh_token"])),
        ("introspection_endpoint".to_owned(), url(INTROSPECT).into()),
        ("introspection_endpoint_auth_methods_supported".to_owned(), json!(services)),
        ("revocation_endpoint".to_owned(), url(REVOKE).into()),
        ("revocation_endpoint_auth_methods_supported".to_owned(), json!(clients)),
    ])
}

/// The document.
pub fn metadata(issuer: &str, public_url: &str, jwks_uri: &str) -> Value {
    let mut document = members(public_url);
    document.insert("issuer".to_owned(), issuer.into());
    document.insert("jwks_uri".to_owned(), jwks_uri.into());
    // Required, and empty because there is no authorization endpoint.
    document.insert("response_types_supported".to_owned(), json!([]));
    Value::Object(document)
}

/// Where the document of this issuer is: its path comes after the well-known one, without a slash at its end (section 3.1).
pub fn path_for(issuer: &str) -> String {
    let uri: Option<Uri> = issuer.parse().ok();
    let path = uri.map(|uri| uri.path().trim_end_matches('/').to_owned());
    format!("{METADATA_PATH}{}", path.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_an_issuer_is_inserted_after_the_well_known_one() {
        for (issuer, path) in [
            ("https://id.example.com", "/.well-known/oauth-authorization-server"),
            ("https://id.example.com/", "/.well-known/oauth-authorization-server"),
            ("https://id.example.com/a", "/.well-known/oauth-authorization-server/a"),
            ("https://id.example.com:8443/a/b/", "/.well-known/oauth-authorization-server/a/b"),
        ] {
            assert_eq!(path_for(issuer), path);
        }
    }
}
