//! The HTTP address: REST over the gRPC stack, the pages that mails link to, the keys, and the description of it all. The
//! operations address is `ops.rs`, on a listener of its own.

mod call;
mod gateway;
mod json;
pub mod openapi;
pub mod ops;
pub mod pages;
mod refusal;
mod routes;
mod wellknown;

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    middleware::{Next, from_fn, from_fn_with_state},
    response::Response,
    routing::get,
};
use http::{HeaderValue, Method, header};
use prost_reflect::DescriptorPool;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::{
    domain::{env::Env, service::Service},
    error::Error,
    grpc, proto,
};

use self::{pages::PageOptions, refusal::ErrorResponse};

/// What the HTTP address is told.
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Where people and programs reach this address from outside.
    pub public_url: String,
    /// Origins whose pages may call; none by default.
    pub cors_origins: Vec<HeaderValue>,
    pub pages: PageOptions,
    pub env: Env,
}

/// Everything that the HTTP address serves.
pub fn router(grpc_router: &Router, service: Arc<Service>, options: &HttpOptions) -> Result<Router, Error> {
    let contract = DescriptorPool::decode(proto::CONTRACT).map_err(Error::internal)?;
    let routes = routes::routes(&contract)?;
    let description = openapi::document(&routes).to_string();
    let description = move || {
        let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let response = ([json], description.clone());
        async move { response }
    };
    let mut surface = gateway::router(routes, grpc_router)?
        .merge(wellknown::router(service, &options.public_url))
        .route("/openapi.json", get(description))
        .fallback(|| async { ErrorResponse::not_found() })
        .method_not_allowed_fallback(|| async { ErrorResponse::method_not_allowed() });
    if !options.cors_origins.is_empty() {
        surface = surface.layer(cors(&options.cors_origins));
    }
    // Outside of CORS: no script has business with them, whatever its origin.
    let surface = surface.merge(pages::router(grpc_router, &options.pages)?);
    Ok(surface.layer(from_fn(secure)).layer(from_fn_with_state(options.env.clone(), identify)))
}

/// Pages of the named origins may call and read the answers. Bearer tokens are sent by scripts, so cookies need not be.
fn cors(origins: &[HeaderValue]) -> CorsLayer {
    CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins.iter().cloned()))
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE, grpc::REQUEST_ID])
        .expose_headers([header::RETRY_AFTER, header::WWW_AUTHENTICATE, grpc::REQUEST_ID])
        .max_age(std::time::Duration::from_mins(10))
}

/// Gives the request its id, which the gRPC stack then finds, and sends it back, also where no RPC was reached.
async fn identify(State(env): State<Env>, mut request: Request, next: Next) -> Response {
    let id = grpc::request_id(request.headers(), &env);
    if let Some(id) = &id {
        request.headers_mut().insert(grpc::REQUEST_ID, id.clone());
    }
    let mut response = next.run(request).await;
    if let Some(id) = id {
        response.headers_mut().insert(grpc::REQUEST_ID, id);
    }
    response
}

/// Headers of every response (OWASP REST Security): nothing is sniffed, framed, referred to, or, unless it says so
/// itself, kept. A page brings its own policy, which lets its style apply and nothing else.
async fn secure(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in [(header::X_CONTENT_TYPE_OPTIONS, "nosniff"), (header::REFERRER_POLICY, "no-referrer")] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let policy = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(policy);
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn an_answer_keeps_its_own_policy_and_others_get_the_strictest() {
        let own = [(header::CONTENT_SECURITY_POLICY, "style-src 'sha256-x'"), (header::REFERRER_POLICY, "unsafe-url")];
        let router =
            Router::new().route("/own", get(|| async { own })).route("/", get(|| async {})).layer(from_fn(secure));
        for (path, policy) in [("/own", "style-src 'sha256-x'"), ("/", "default-src 'none'; frame-ancestors 'none'")] {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            let response = router.clone().oneshot(request).await.expect("infallible");
            assert_eq!(response.headers()[header::CONTENT_SECURITY_POLICY], policy);
            assert_eq!(response.headers()[header::REFERRER_POLICY], "no-referrer");
            assert_eq!(response.headers().get_all(header::CONTENT_SECURITY_POLICY).iter().count(), 1);
        }
    }
}
