//! Layers that let only those through who satisfy the demands. The handlers find an `Arc<Caller>` in the extensions of the
//! request.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{
    HeaderMap, Request, Response, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::json;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::{
    demand::{Demand, Demands},
    error::{DOMAIN, VerifyError},
    verifier::{Caller, Verifier},
};

/// Makes layers around a verifier.
#[derive(Debug, Clone)]
pub struct Guard(Verifier);

impl Guard {
    /// The layers verify with this.
    pub fn new(verifier: Verifier) -> Self {
        Self(verifier)
    }

    /// For HTTP routes that all have this demand, such as axum's `route_layer`. Refusals are JSON, as Postern's are.
    pub fn http(&self, demand: Demand) -> GuardHttp {
        GuardHttp { guard: self.clone(), demand: Arc::new(demand) }
    }

    /// For gRPC services, with a demand for each method: `Server::builder().layer(guard.grpc(demands))`.
    pub fn grpc(&self, demands: Demands) -> GuardGrpc {
        GuardGrpc { guard: self.clone(), demands: Arc::new(demands) }
    }

    /// The caller of a request, if it satisfies a demand. `None` where the demand is public.
    pub async fn admit(&self, headers: &HeaderMap, demand: &Demand) -> Result<Option<Arc<Caller>>, VerifyError> {
        if demand.is_public() {
            return Ok(None);
        }
        let caller = self.0.verify(bearer(headers)?).await?;
        demand.check(&caller)?;
        Ok(Some(caller))
    }
}

/// The token of the only `authorization` header.
fn bearer(headers: &HeaderMap) -> Result<&str, VerifyError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or(VerifyError::TokenMissing)?;
    if values.next().is_some() {
        return Err(VerifyError::TokenInvalid);
    }
    let value = value.to_str().map_err(|_| VerifyError::TokenInvalid)?;
    let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
    // Another scheme counts as no token.
    if scheme.eq_ignore_ascii_case("bearer") {
        Ok(token.trim_start_matches(' '))
    } else {
        Err(VerifyError::TokenMissing)
    }
}

type BoxFuture<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// See [`Guard::http`].
#[derive(Debug, Clone)]
pub struct GuardHttp {
    guard: Guard,
    demand: Arc<Demand>,
}

/// See [`Guard::grpc`].
#[derive(Debug, Clone)]
pub struct GuardGrpc {
    guard: Guard,
    demands: Arc<Demands>,
}

/// A service behind a guard.
#[derive(Debug, Clone)]
pub struct Guarded<G, S> {
    guard: G,
    inner: S,
}

impl<S> Layer<S> for GuardHttp {
    type Service = Guarded<Self, S>;

    fn layer(&self, inner: S) -> Self::Service {
        Guarded { guard: self.clone(), inner }
    }
}

impl<S> Layer<S> for GuardGrpc {
    type Service = Guarded<Self, S>;

    fn layer(&self, inner: S) -> Self::Service {
        Guarded { guard: self.clone(), inner }
    }
}

/// Whom a guard lets through, and how it answers to the others.
pub trait Gate<R>: Clone + Send + 'static {
    /// The caller of a request, if it has to be known.
    fn admit(
        &self,
        path: &str,
        headers: &HeaderMap,
    ) -> impl Future<Output = Result<Option<Arc<Caller>>, VerifyError>> + Send;

    /// The answer to a request that was refused.
    fn refuse(error: VerifyError) -> Response<R>;
}

impl<R: From<String>> Gate<R> for GuardHttp {
    async fn admit(&self, _path: &str, headers: &HeaderMap) -> Result<Option<Arc<Caller>>, VerifyError> {
        self.guard.admit(headers, &self.demand).await
    }

    fn refuse(error: VerifyError) -> Response<R> {
        json_refusal(error)
    }
}

impl<R: Default> Gate<R> for GuardGrpc {
    async fn admit(&self, path: &str, headers: &HeaderMap) -> Result<Option<Arc<Caller>>, VerifyError> {
        match self.demands.of(path) {
            Some(demand) => self.guard.admit(headers, demand).await,
            None => Err(VerifyError::MethodNotDeclared),
        }
    }

    fn refuse(error: VerifyError) -> Response<R> {
        Status::from(error).into_http()
    }
}

impl<G, S, B, R> Service<Request<B>> for Guarded<G, S>
where
    G: Gate<R>,
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = BoxFuture<Response<R>, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // The service that is ready is the one to call; the clone takes its place.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let guard = self.guard.clone();
        Box::pin(async move {
            match guard.admit(request.uri().path(), request.headers()).await {
                Ok(caller) => {
                    if let Some(caller) = caller {
                        request.extensions_mut().insert(caller);
                    }
                    inner.call(request).await
                }
                Err(error) => Ok(G::refuse(error)),
            }
        })
    }
}

/// An answer in the form of AIP-193, with the challenge of RFC 6750.
fn json_refusal<R: From<String>>(error: VerifyError) -> Response<R> {
    let status = StatusCode::from_u16(error.http_status()).unwrap_or(StatusCode::FORBIDDEN);
    let body = json!({"error": {
        "code": status.as_u16(),
        "status": name(error.code()),
        "message": error.to_string(),
        "details": [{
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": error.reason().as_str(),
            "domain": DOMAIN,
            "metadata": {},
        }],
    }});
    let mut response = Response::new(R::from(body.to_string()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, http::HeaderValue::from_static("1"));
    }
    let challenge = match (error, status) {
        (VerifyError::TokenMissing, _) => Some("Bearer"),
        (_, StatusCode::UNAUTHORIZED) => Some("Bearer error=\"invalid_token\""),
        (_, StatusCode::FORBIDDEN) => Some("Bearer error=\"insufficient_scope\""),
        _ => None,
    };
    if let Some(challenge) = challenge {
        headers.insert(WWW_AUTHENTICATE, http::HeaderValue::from_static(challenge));
    }
    response
}

fn name(code: Code) -> &'static str {
    match code {
        Code::Unauthenticated => "UNAUTHENTICATED",
        Code::Unavailable => "UNAVAILABLE",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        _ => "PERMISSION_DENIED",
    }
}
