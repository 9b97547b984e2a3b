//! The layers around every call in their order, with the reason for each position.
//!
//! They are functions that call each other in one future. A stack of boxed services, which every call clones, cost as much
//! CPU as a tenth of a call.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{Router, extract::Request, response::Response, routing::Route};
use tower::{Service as TowerService, ServiceExt as _, layer::layer_fn};

use crate::domain::{env::Env, service::Service};

use super::{
    access::{self, AccessRules},
    authenticate,
    context::{self, MeasuredRpcs},
    ext_authz,
    limits::{self, Places},
};

/// What the layers need.
struct Stack {
    env: Env,
    measured: MeasuredRpcs,
    places: Places,
    service: Arc<Service>,
    rules: AccessRules,
}

impl Stack {
    /// Passes a call through all layers to a service.
    async fn call(&self, service: Route, request: Request) -> Response {
        let Self { env, measured, places, service: domain, rules } = self;
        // The innermost first.
        let call = |request| async { service.oneshot(request).await.unwrap_or_else(|never| match never {}) };
        // Authorizes the call. Innermost, so that no service can be reached without it.
        let call = |request| access::authorize(rules, request, call);
        // Authenticates the caller.
        let call = |request| authenticate::authenticate(domain, request, call);
        // Before any work is done for the call.
        let call = |request| limits::bound_calls(places, request, call);
        // Around the rest, so that the time spent receiving and waiting counts too.
        let call = |request| limits::bound_time(request, call);
        // Around the services, because it rewrites their decoding errors.
        let call = |request| context::normalize_errors(request, call);
        // Around all our code that could panic.
        let call = |request| context::catch_panics(request, call);
        // Before anything reads the request as gRPC.
        let call = |request| context::require_grpc_content_type(request, call);
        // Before anything reads the headers, which have been dropped.
        let call = |request| context::refuse_oversized_head(request, call);
        // Around everything that could refuse a call.
        let call = |request| context::request_context(measured, request, call);
        let call = |request| ext_authz::deny_failed_checks(request, call);
        // Outermost, so that every log line of the call contains the request id.
        context::assign_request_id(env, request, call).await
    }
}

/// A service with the layers around it.
#[derive(Clone)]
struct Layered {
    stack: Arc<Stack>,
    service: Route,
}

impl TowerService<Request> for Layered {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let Self { stack, service } = self.clone();
        Box::pin(async move { Ok(stack.call(service, request).await) })
    }
}

/// Puts the layers around all services of a router.
pub(super) fn around(services: Router, service: Arc<Service>, env: Env, rules: AccessRules) -> Router {
    let (measured, places) = (MeasuredRpcs::new(&rules), Places::default());
    let stack = Arc::new(Stack { env, measured, places, service, rules });
    services.layer(layer_fn(move |service| Layered { stack: Arc::clone(&stack), service }))
}
