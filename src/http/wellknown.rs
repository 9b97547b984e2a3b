//! The documents that verifiers of tokens and clients of OAuth fetch: the public keys, discovery, and metadata.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use serde_json::json;

use crate::{domain::service::Service, error::Error};

use super::{oauth, refusal::ErrorResponse};

const JWKS_PATH: &str = "/.well-known/jwks.json";
/// The documents.
pub fn router(service: Arc<Service>, public_url: &str) -> Router {
    let documents = Arc::new(Documents {
        metadata: oauth::metadata(service.issuer(), public_url, &jwks_uri(public_url)).to_string(),
        path_of_issuer: oauth::path_for(service.issuer()),
        public_url: public_url.to_owned(),
        service,
    });
    Router::new()
        .route(JWKS_PATH, get(jwks))
        .route("/.well-known/openid-configuration", get(discovery))
        .route(oauth::METADATA_PATH, get(metadata))
        // Compared as text, because a path of the configuration is no pattern.
        .route(&format!("{}/{{*path}}", oauth::METADATA_PATH), get(metadata))
        .with_state(documents)
}

struct Documents {
    service: Arc<Service>,
    public_url: String,
    metadata: String,
    /// Where the metadata is too, if the issuer has a path.
    path_of_issuer: String,
}

/// The discovery document (OpenID Connect Discovery 1.0 §3), with the parts that apply to Postern. Istio, Envoy and JWT
/// libraries read the issuer and the URL of the keys from it. A member that would be empty is left out (§4.2), such as
/// `response_types_supported`: there is no authorization endpoint.
async fn discovery(State(documents): State<Arc<Documents>>, headers: HeaderMap) -> Response {
    let Documents { service, public_url, .. } = documents.as_ref();
    let mut document = json!({
        "issuer": service.issuer(),
        "jwks_uri": jwks_uri(public_url),
        "id_token_signing_alg_values_supported": service.signing_algorithms(),
        "subject_types_supported": ["public"],
        "claims_supported": [
            "iss", "aud", "sub", "client_id", "iat", "exp", "jti", "sid", "username", "email", "email_verified", "roles",
            "gen",
        ],
    });
    if let Some(members) = document.as_object_mut() {
        members.extend(oauth::members(public_url));
    }
    cacheable(&headers, document.to_string(), service.keys_max_age())
}

async fn metadata(State(documents): State<Arc<Documents>>, uri: Uri, headers: HeaderMap) -> Response {
    if ![oauth::METADATA_PATH, &documents.path_of_issuer].contains(&uri.path()) {
        return ErrorResponse::not_found().into_response();
    }
    cacheable(&headers, documents.metadata.clone(), documents.service.keys_max_age())
}

/// The URL of the public keys.
fn jwks_uri(public_url: &str) -> String {
    format!("{}{JWKS_PATH}", public_url.trim_end_matches('/'))
}

async fn jwks(State(documents): State<Arc<Documents>>, headers: HeaderMap) -> Response {
    let service = &documents.service;
    match serde_json::to_string(&service.jwks()) {
        Ok(document) => cacheable(&headers, document, service.keys_max_age()),
        Err(error) => ErrorResponse::from(Error::internal(error)).into_response(),
    }
}

/// A public document with a strong ETag (RFC 9110 §8.8.3), or 304 if the client has it already. A verifier may keep it for
/// `max_age`: then it knows a key before that signs.
fn cacheable(request: &HeaderMap, document: String, max_age: Duration) -> Response {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, document.as_bytes());
    let tag = format!("\"{}\"", BASE64_URL_SAFE_NO_PAD.encode(digest.as_ref()));
    let known = request
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .any(|candidate| candidate == "*" || candidate.trim_start_matches("W/") == tag);
    let mut response = Response::new(if known { Body::empty() } else { Body::from(document) });
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Ok(cache) = HeaderValue::try_from(format!("public, max-age={}", max_age.as_secs())) {
        headers.insert(header::CACHE_CONTROL, cache);
    }
    if let Ok(tag) = HeaderValue::try_from(tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}
