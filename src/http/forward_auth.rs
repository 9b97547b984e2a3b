//! `/v1/forward-auth`: a proxy asks about a request by passing on its headers (nginx's `auth_request`, Traefik's
//! ForwardAuth). The decision is that of `grpc/ext_authz.rs`, and the query has the demands of the route.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{RawQuery, State},
    response::Response,
    routing::any,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use crate::{
    domain::{demands::Demands, service::Service},
    grpc::{Decision, decide},
};

/// The route. It has no effect, so the method does not matter: some proxies pass on that of the request.
pub fn router(service: Arc<Service>) -> Router {
    Router::new().route("/v1/forward-auth", any(forward_auth)).with_state(service)
}

async fn forward_auth(State(service): State<Arc<Service>>, RawQuery(query): RawQuery, headers: HeaderMap) -> Response {
    let query = query.unwrap_or_default();
    let pairs: Vec<_> = form_urlencoded::parse(query.as_bytes()).collect();
    let demands = Demands::parse(pairs.iter().map(|(name, value)| (name.as_ref(), value.as_ref())));
    let authorization = headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes);
    match decide(&service, authorization, demands) {
        Decision::Allowed(allowed) => {
            let mut response = Response::new(Body::empty());
            for (name, value) in allowed.identity {
                set(&mut response, HeaderName::from_static(name), &value);
            }
            response
        }
        Decision::Denied(denied) => {
            let mut response = Response::new(Body::from(denied.message));
            *response.status_mut() = StatusCode::from_u16(denied.http).unwrap_or(StatusCode::FORBIDDEN);
            set(&mut response, header::CONTENT_TYPE, "text/plain; charset=utf-8");
            if let Some(challenge) = denied.challenge {
                set(&mut response, header::WWW_AUTHENTICATE, &challenge);
            }
            if let Some(seconds) = denied.retry_after {
                set(&mut response, header::RETRY_AFTER, seconds);
            }
            response
        }
    }
}

/// Sets a header. The decision has checked the values.
fn set(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}
