//! The errors of the OAuth endpoints (RFC 6749 section 5.2, RFC 6750 section 3.1, RFC 7009 section 2.2.1), and what each error
//! of an RPC becomes. It decides nothing; it loses the details that these RFCs have no place for.

use axum::{
    extract::Request,
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    http::refusal::{self, Refused},
    proto::ErrorReason,
};

use super::{answer::answer, metadata};

/// When to try again if nothing else says so, in seconds.
const RETRY: u64 = 1;
const BASIC: HeaderValue = HeaderValue::from_static("Basic realm=\"postern\", charset=\"UTF-8\"");
const BEARER: HeaderValue = HeaderValue::from_static("Bearer");

/// A refused request.
#[derive(Debug)]
pub struct OAuthError {
    status: StatusCode,
    code: &'static str,
    description: String,
    /// `WWW-Authenticate`, a header for each.
    challenges: Vec<HeaderValue>,
    retry_after: Option<u64>,
}

impl OAuthError {
    fn new(status: StatusCode, code: &'static str, description: impl Into<String>) -> Self {
        Self { status, code, description: description.into(), challenges: Vec::new(), retry_after: None }
    }

    /// The request is malformed.
    pub fn invalid_request(description: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", description)
    }

    /// The body is larger than a request may be.
    pub fn too_large(limit: usize) -> Self {
        let description = format!("the body is larger than {limit} bytes");
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, ..Self::invalid_request(description) }
    }

    /// The body did not arrive in time.
    pub fn request_timeout() -> Self {
        let description = "the body did not arrive in time";
        Self { status: StatusCode::REQUEST_TIMEOUT, ..Self::invalid_request(description) }
    }

    /// The client is unknown, or its credentials are wrong or missing. The answer does not show which.
    pub fn invalid_client() -> Self {
        let error =
            Self::new(StatusCode::UNAUTHORIZED, "invalid_client", "the client credentials are missing or wrong");
        Self { challenges: vec![BASIC], ..error }
    }

    /// Neither client credentials nor a token came with a request that needs either.
    pub fn unauthenticated() -> Self {
        Self { challenges: vec![BASIC, BEARER], ..Self::invalid_client() }
    }

    pub fn unsupported_grant_type() -> Self {
        let description = "grant_type must be client_credentials or refresh_token";
        Self::new(StatusCode::BAD_REQUEST, "unsupported_grant_type", description)
    }

    /// No scope can be granted, so none can be asked for.
    pub fn invalid_scope() -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_scope", "there are no scopes: leave scope out")
    }

    fn bearer(status: StatusCode, code: &'static str, challenge: &'static str, description: &str) -> Self {
        let error = Self::new(status, code, description);
        Self { challenges: vec![HeaderValue::from_static(challenge)], ..error }
    }
}

impl From<Status> for OAuthError {
    fn from(status: Status) -> Self {
        match (reason(&status), status.code()) {
            (Some(ErrorReason::InvalidClient), _) => Self::invalid_client(),
            (Some(ErrorReason::RefreshTokenInvalid), _) => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_grant", status.message())
            }
            (Some(ErrorReason::TokenMissing), _) => Self::unauthenticated(),
            (Some(ErrorReason::TokenInvalid | ErrorReason::TokenExpired | ErrorReason::SessionRevoked), _) => {
                let challenge = "Bearer error=\"invalid_token\"";
                Self::bearer(StatusCode::UNAUTHORIZED, "invalid_token", challenge, status.message())
            }
            (Some(ErrorReason::ServiceRequired), _) => {
                let challenge = "Bearer error=\"insufficient_scope\"";
                Self::bearer(StatusCode::FORBIDDEN, "insufficient_scope", challenge, status.message())
            }
            (_, Code::InvalidArgument) => Self::invalid_request(status.message()),
            (_, code) => Self::of_http(refusal::http_status(code), &status),
        }
    }
}

impl From<crate::error::Error> for OAuthError {
    fn from(error: crate::error::Error) -> Self {
        Status::from(error).into()
    }
}

impl OAuthError {
    /// The error for an HTTP status that these RFCs do not give a meaning.
    fn of_http(http: StatusCode, status: &Status) -> Self {
        match http {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                let retry_after = refusal::retry_after(status).unwrap_or(RETRY);
                let error = Self::new(http, "temporarily_unavailable", status.message());
                Self { retry_after: Some(retry_after), ..error }
            }
            http if http.is_client_error() => Self::new(http, "invalid_request", status.message()),
            http => Self::new(http, "server_error", status.message()),
        }
    }
}

/// The reason of a status that Postern made.
fn reason(status: &Status) -> Option<ErrorReason> {
    let info = status.get_details_error_info()?;
    ErrorReason::from_str_name(&format!("ERROR_REASON_{}", info.reason))
}

impl IntoResponse for OAuthError {
    fn into_response(self) -> Response {
        // Section 5.2 allows these characters.
        let allowed = |c: &char| matches!(c, ' '..='~') && !matches!(c, '"' | '\\');
        let description: String = self.description.chars().filter(allowed).collect();
        let mut response = answer(&json!({"error": self.code, "error_description": description}));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        for challenge in self.challenges {
            headers.append(header::WWW_AUTHENTICATE, challenge);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Gives what the layers of the HTTP address refuse, such as another method, the form that OAuth clients read.
pub async fn normalize(request: Request, next: Next) -> Response {
    let is_endpoint = metadata::ENDPOINTS.contains(&request.uri().path());
    let mut response = next.run(request).await;
    let refused = response.extensions_mut().remove::<Refused>();
    let Some(Refused(status)) = refused.filter(|_| is_endpoint) else {
        return response;
    };
    let mut answer = OAuthError::of_http(response.status(), &status).into_response();
    if let Some(methods) = response.headers_mut().remove(header::ALLOW) {
        answer.headers_mut().insert(header::ALLOW, methods);
    }
    answer
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::{Error, FieldViolation, StoreError};

    #[test]
    fn each_error_of_an_rpc_has_a_standard_code() {
        let unavailable = || Error::StoreUnavailable(StoreError::Unavailable("gone".into()));
        let overloaded = Error::Overloaded { retry_after: Duration::from_millis(1_001) };
        for (error, status, code, retry_after) in [
            (Error::InvalidClient, 401, "invalid_client", None),
            (Error::RefreshTokenInvalid, 400, "invalid_grant", None),
            (FieldViolation::required("token").into(), 400, "invalid_request", None),
            (Error::TokenMissing, 401, "invalid_client", None),
            (Error::TokenExpired, 401, "invalid_token", None),
            (Error::SessionRevoked, 401, "invalid_token", None),
            (Error::ServiceRequired, 403, "insufficient_scope", None),
            (overloaded, 429, "temporarily_unavailable", Some("2")),
            (unavailable(), 503, "temporarily_unavailable", Some("1")),
            (Error::RevocationsUnknown, 503, "temporarily_unavailable", Some("1")),
            (Error::DeadlineExceeded, 504, "temporarily_unavailable", Some("1")),
            (Error::internal("tulip"), 500, "server_error", None),
        ] {
            let named = format!("{error:?}");
            let answer = OAuthError::from(error);
            assert_eq!((answer.status.as_u16(), answer.code), (status, code), "{named}");
            assert!(!answer.description.contains("tulip"));
            let response = answer.into_response();
            let header = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
            assert_eq!(header(header::RETRY_AFTER), retry_after, "{named}");
            assert_eq!(header(header::CACHE_CONTROL), Some("no-store"));
            assert_eq!(header(header::WWW_AUTHENTICATE).is_some(), matches!(status, 401 | 403), "{named}");
        }
    }
}
