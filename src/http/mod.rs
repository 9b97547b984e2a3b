//! The HTTP address: REST, gRPC-Web and the endpoints of OAuth through the gRPC layers, the pages that mails link to, the
//! public keys, decisions about requests that a proxy asks about, and the OpenAPI description with a page that shows it.
//! `ops.rs` is the operations address, which has its own listener.

mod call;
mod docs;
mod forward_auth;
mod gateway;
mod grpc_web;
mod json;
mod oauth;
mod observed;
pub mod openapi;
pub mod ops;
pub mod pages;
mod refusal;
mod routes;
mod wellknown;

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    middleware::{Next, from_fn, from_fn_with_state},
    response::Response,
    routing::get,
};
use http::{HeaderValue, Method, header};
use prost_reflect::DescriptorPool;
use tower_http::{
    cors::{AllowOrigin, CorsLayer},
    set_header::SetResponseHeaderLayer,
};

use crate::{
    domain::{env::Env, service::Service},
    error::Error,
    grpc, proto,
    shares::Shares,
};

use self::{pages::PageOptions, refusal::ErrorResponse};

/// The options of the HTTP address.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// The public URL of this address.
    pub public_url: String,
    /// The origins whose pages may call REST and gRPC-Web.
    pub cors_origins: Vec<HeaderValue>,
    pub pages: PageOptions,
    pub env: Env,
}

/// All routes of the HTTP address.
pub fn router(grpc_router: &Router, service: Arc<Service>, options: &HttpOptions) -> Result<Router, Error> {
    let contract = DescriptorPool::decode(proto::CONTRACT).map_err(Error::internal)?;
    let routes = routes::routes(&contract)?;
    // One copy for everybody: answers that nobody reads hold no copies of their own.
    let description = Bytes::from(openapi::document(&routes).to_string());
    let description = move || {
        let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let response = ([json], description.clone());
        async move { response }
    };
    let mut surface = gateway::router(routes, grpc_router)?
        .merge(grpc_web::router(&contract, grpc_router))
        .merge(oauth::router(grpc_router, &service, options.env.clone()))
        .merge(wellknown::router(Arc::clone(&service), &options.public_url))
        .route("/openapi.json", get(description))
        .fallback(|| async { ErrorResponse::not_found() })
        .method_not_allowed_fallback(|| async { ErrorResponse::method_not_allowed() });
    if !options.cors_origins.is_empty() {
        surface = surface.layer(cors(&options.cors_origins));
    }
    // Added after CORS, because no script of another origin needs these.
    let surface = surface
        .merge(pages::router(grpc_router, &options.pages)?)
        .merge(docs::router())
        .merge(forward_auth::router(service));
    let surface = surface
        .layer(from_fn_with_state(Shares::new(grpc::RECEIVED_AT_ONCE), call::bound_receiving))
        .layer(from_fn(call::refuse_oversized_head))
        // Around all layers that refuse requests.
        .layer(from_fn(oauth::normalize))
        .layer(from_fn(observed::observe));
    Ok(with_security_headers(surface).layer(from_fn_with_state(options.env.clone(), assign_request_id)))
}

async fn assign_request_id(State(env): State<Env>, request: Request, next: Next) -> Response {
    grpc::assign_request_id(&env, request, |request| next.run(request)).await
}

/// Lets pages of these origins call the API and read its answers. Scripts send bearer tokens, so cookies are not
/// allowed.
fn cors(origins: &[HeaderValue]) -> CorsLayer {
    let rest_headers = [header::AUTHORIZATION, header::CONTENT_TYPE, grpc::REQUEST_ID];
    let rest_answers = [header::RETRY_AFTER, header::WWW_AUTHENTICATE, grpc::REQUEST_ID];
    CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins.iter().cloned()))
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH])
        .allow_headers(rest_headers.into_iter().chain(grpc_web::REQUEST_HEADERS).collect::<Vec<_>>())
        .expose_headers(rest_answers.into_iter().chain(grpc_web::RESPONSE_HEADERS).collect::<Vec<_>>())
        .max_age(std::time::Duration::from_mins(10))
}

/// Adds the headers of every response (OWASP REST Security): no content sniffing, no referrer, no framing, and no
/// caching unless the response says so itself. A page brings its own content security policy.
fn with_security_headers(router: Router) -> Router {
    let value = HeaderValue::from_static;
    router
        .layer(SetResponseHeaderLayer::overriding(header::X_CONTENT_TYPE_OPTIONS, value("nosniff")))
        .layer(SetResponseHeaderLayer::overriding(header::REFERRER_POLICY, value("no-referrer")))
        .layer(SetResponseHeaderLayer::if_not_present(
            header::CONTENT_SECURITY_POLICY,
            value("default-src 'none'; frame-ancestors 'none'"),
        ))
        .layer(SetResponseHeaderLayer::if_not_present(header::CACHE_CONTROL, value("no-store")))
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, extract::Request};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_response_keeps_its_own_content_security_policy() {
        let own = [(header::CONTENT_SECURITY_POLICY, "style-src 'sha256-x'"), (header::REFERRER_POLICY, "unsafe-url")];
        let router = Router::new().route("/own", get(|| async { own })).route("/", get(|| async {}));
        let router = with_security_headers(router);
        for (path, policy) in [("/own", "style-src 'sha256-x'"), ("/", "default-src 'none'; frame-ancestors 'none'")] {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            let response = router.clone().oneshot(request).await.expect("infallible");
            assert_eq!(response.headers()[header::CONTENT_SECURITY_POLICY], policy);
            assert_eq!(response.headers()[header::REFERRER_POLICY], "no-referrer");
            assert_eq!(response.headers().get_all(header::CONTENT_SECURITY_POLICY).iter().count(), 1);
        }
    }
}
