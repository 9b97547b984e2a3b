//! Authentication: turns the `authorization` metadata into an [`Identity`]. It never rejects a call for its token;
//! `access.rs` decides. Checking a token needs only CPU and memory.
//!
//! A call of the OAuth endpoints may have the [`ClientCredentials`] of a service in the place of a token. Those are verified
//! here too, so that they pass the same limits. A call with wrong ones is rejected (RFC 6749 section 5.2).
//!
//! A client certificate is the credential of its connection, and that of a call is the better one: it counts only for a
//! call without a token.

use axum::{extract::Request, response::Response};
use http::{HeaderMap, header::AUTHORIZATION};

use crate::{
    domain::{
        role::Caller, service::Service, service_account::ClientSecret, service_identity::ServiceIdentity,
        session::Client, token::AccessTokenError,
    },
    error::Error,
    listen::ClientAddr,
    tls::ServiceCertificate,
};

use super::{next::Next, response::respond};

/// The credentials of a service account. Only code of this process can add them to the extensions of a call.
#[derive(Debug, Clone)]
pub struct ClientCredentials {
    pub id: String,
    pub secret: ClientSecret,
}

/// The caller, as a call identifies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// No bearer token.
    Anonymous,
    /// A bearer token that does not verify.
    Invalid(AccessTokenError),
    /// A bearer token that verifies.
    Known(Caller),
    /// No bearer token, and the client certificate of a service.
    Certified(ServiceIdentity),
}

impl From<AccessTokenError> for Error {
    fn from(fault: AccessTokenError) -> Self {
        match fault {
            AccessTokenError::Invalid => Self::TokenInvalid,
            AccessTokenError::Expired => Self::TokenExpired,
            AccessTokenError::Revoked => Self::SessionRevoked,
            AccessTokenError::RevocationUnknown => Self::RevocationsUnknown,
        }
    }
}

/// Adds the identity of the caller to the extensions of the call.
pub async fn authenticate(service: &Service, mut request: Request, next: impl Next) -> Response {
    let identity = match request.extensions_mut().remove::<ClientCredentials>() {
        None => match identify(request.headers(), service) {
            Identity::Anonymous => certified(&request),
            known => known,
        },
        Some(ClientCredentials { id, secret }) => {
            let ip = request.extensions().get::<ClientAddr>().map(|peer| peer.0.ip());
            let client = Client { ip, user_agent: None };
            match service.authenticate_service(id.parse().ok(), &secret, &client).await {
                Ok(caller) => Identity::Known(caller),
                Err(error) => return respond(error.into()),
            }
        }
    };
    request.extensions_mut().insert(identity);
    next.run(request).await
}

fn identify(headers: &HeaderMap, service: &Service) -> Identity {
    match bearer_token(headers) {
        Ok(None) => Identity::Anonymous,
        Ok(Some(token)) => service.identify(token).map_or_else(Identity::Invalid, Identity::Known),
        Err(fault) => Identity::Invalid(fault),
    }
}

/// The service that the client certificate of the connection stands for, if it is still accepted.
fn certified(request: &Request) -> Identity {
    let certificate = request.extensions().get::<ServiceCertificate>().filter(|certificate| certificate.holds());
    certificate.map_or(Identity::Anonymous, |certificate| Identity::Certified(certificate.identity().clone()))
}

/// The token of `authorization: Bearer <token>` (RFC 6750 §2.1). The scheme is not case-sensitive (RFC 9110 §11.1).
/// Another scheme counts as no token. Two `authorization` values are invalid, because it is unclear which one is meant.
pub(super) fn bearer_token(headers: &HeaderMap) -> Result<Option<&str>, AccessTokenError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(AccessTokenError::Invalid);
    }
    Ok(token_in(value.to_str().map_err(|_| AccessTokenError::Invalid)?))
}

/// The token of an `authorization` value, if its scheme is Bearer.
pub fn token_in(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ').unwrap_or((authorization, ""));
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_start_matches(' '))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn token_of(values: &[&str]) -> Result<Option<String>, AccessTokenError> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_bytes(value.as_bytes()).expect("a header value"));
        }
        bearer_token(&headers).map(|token| token.map(str::to_owned))
    }

    #[test]
    fn the_scheme_is_read_in_any_case() {
        for value in ["Bearer a.b.c", "bearer a.b.c", "BEARER a.b.c", "Bearer   a.b.c"] {
            assert_eq!(token_of(&[value]), Ok(Some("a.b.c".to_owned())), "{value}");
        }
    }

    #[test]
    fn another_scheme_is_no_token_and_two_values_are_invalid() {
        assert_eq!(token_of(&[]), Ok(None));
        assert_eq!(token_of(&["Basic YTpi"]), Ok(None));
        assert_eq!(token_of(&["Bearer"]), Ok(Some(String::new())));
        assert_eq!(token_of(&["Bearer a.b.c", "Bearer a.b.c"]), Err(AccessTokenError::Invalid));
        assert_eq!(token_of(&["Bearer \u{e9}"]), Err(AccessTokenError::Invalid));
    }
}
