//! The access log: one line for each call, with its code, its duration and the address of its client. The method, the
//! request id and the trace id are fields of the span around it. It never has what the caller sent, such as a token or
//! a path.
//!
//! A request over HTTP for which RPCs were called has their lines, and otherwise one of its own.

use std::{cell::Cell, net::IpAddr, time::Instant};

use http::Extensions;
use tracing::Span;

use crate::{listen::ClientAddr, trace::ACCESS};

/// A call that has not been answered yet. If its client goes away before, or its connection ends, the line says
/// CANCELLED.
#[derive(Debug)]
pub struct Unanswered(Option<Line>);

#[derive(Debug)]
struct Line {
    started: Instant,
    client: Option<IpAddr>,
    /// The span that the line belongs to.
    span: Span,
    /// Whether the line of an RPC takes its place.
    is_http: bool,
}

impl Unanswered {
    /// A call of an RPC.
    pub fn rpc(started: Instant, call: &Extensions, span: &Span) -> Self {
        Self::new(started, call, span, false)
    }

    /// A request over HTTP.
    pub fn http(started: Instant, request: &Extensions, span: &Span) -> Self {
        Self::new(started, request, span, true)
    }

    fn new(started: Instant, call: &Extensions, span: &Span, is_http: bool) -> Self {
        let is_logged = tracing::enabled!(target: ACCESS, tracing::Level::INFO);
        Self(is_logged.then(|| {
            let client = call.get::<ClientAddr>().map(|peer| peer.0.ip());
            Line { started, client, span: span.clone(), is_http }
        }))
    }

    /// Writes no line for this call.
    pub fn forget(&mut self) {
        self.0 = None;
    }

    /// Writes the line.
    pub fn answered(mut self, code: &str) {
        self.log(code);
    }

    fn log(&mut self, code: &str) {
        let Some(Line { started, client, span, is_http }) = self.0.take() else {
            return;
        };
        if !(is_http && was_called()) {
            let duration_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            let peer = client.map(tracing::field::display);
            tracing::info!(target: ACCESS, parent: &span, code, duration_us, peer, "a call was answered");
        }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.log("CANCELLED");
    }
}

tokio::task_local! {
    /// Whether an RPC was called for the HTTP request that this task serves.
    static CALLED: Cell<bool>;
}

/// Serves an HTTP request, whose line is written only if no RPC is called for it.
pub async fn watch_calls<F: Future>(serving: F) -> F::Output {
    CALLED.scope(Cell::new(false), serving).await
}

/// Notes that an RPC is called.
pub(super) fn note_call() {
    // There is no HTTP request around a call of a gRPC client.
    let _ = CALLED.try_with(|called| called.set(true));
}

/// Whether an RPC was called for the HTTP request that is served.
fn was_called() -> bool {
    CALLED.try_with(Cell::get).unwrap_or(false)
}
