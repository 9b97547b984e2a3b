//! The operations address: liveness, readiness and metrics, for probes and Prometheus. It is not part of the contract
//! and must not be reachable from the internet.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    middleware::from_fn,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

use crate::telemetry::Metrics;

use super::call::refuse_oversized_head;

/// The conditions under which this replica can answer calls, as `/readyz` reports them.
#[derive(Debug, Default)]
pub struct Readiness {
    database: AtomicBool,
    stopping: AtomicBool,
}

impl Readiness {
    /// Each condition, and whether it holds.
    pub fn parts(&self) -> [(&'static str, bool); 2] {
        [
            ("database", self.database.load(Ordering::Relaxed)),
            ("accepting_calls", !self.stopping.load(Ordering::Relaxed)),
        ]
    }

    /// Sets whether the database can be reached.
    pub fn set_database(&self, reachable: bool) {
        self.database.store(reachable, Ordering::Relaxed);
    }

    /// Marks the server as shutting down.
    pub fn set_stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }
}

/// The probes and the metrics.
pub fn router(readiness: Arc<Readiness>, metrics: Metrics) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz).with_state(readiness))
        .route("/metrics", get(render).with_state(metrics))
        .layer(from_fn(refuse_oversized_head))
}

/// Answers 200 if every condition holds, otherwise 503 with the ones that do not.
async fn readyz(State(readiness): State<Arc<Readiness>>) -> Response {
    let parts = readiness.parts();
    let ready = parts.iter().all(|(_, ready)| *ready);
    let parts: serde_json::Map<_, _> = parts
        .into_iter()
        .map(|(name, ready)| (name.to_owned(), json!(if ready { "ready" } else { "not ready" })))
        .collect();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({"ready": ready, "parts": parts}).to_string();
    (status, [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
}

async fn render(State(metrics): State<Metrics>) -> Response {
    let mut response = Response::new(Body::from(metrics.render()));
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, format);
    response
}
