//! Spans of OpenTelemetry, in the traces of whoever calls: one for each call, with a child for each password hash, each
//! step of the store and each mail. [`record_with`] starts them; without it nothing is made, and nothing is spent.
//!
//! What a span carries stands in the code: names, codes and numbers. What somebody sent is not among it, and neither is
//! what the log says, so no secret can leave with a trace.

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::OnceLock,
    task::{self, Poll},
};

use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue, Value,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{FutureExt as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, TraceId, Tracer as _},
};
use opentelemetry_sdk::{propagation::TraceContextPropagator, trace::SdkTracer};
use pin_project_lite::pin_project;
use tokio::task::JoinHandle;

/// The target of the lines of the access log. POSTERN_ACCESS_LOG turns it off.
pub const ACCESS: &str = "postern::access";

/// The header of W3C Trace Context. `tracestate` is not read: nobody is called from here, so nobody would get it.
const TRACEPARENT: &str = "traceparent";
/// The longest `traceparent` that is read, in bytes. That of version 00 has 55, and later versions may append to it.
const LONGEST: usize = 256;

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Starts spans, for as long as this process runs.
pub fn record_with(tracer: SdkTracer) {
    // A process has one set of them, even if it starts several services.
    let _ = TRACER.set(tracer);
}

/// Whether spans are recorded in this process.
pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// Where a trace goes on: the position of a span, as a `traceparent`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceParent(pub String);

impl TraceParent {
    /// The position of the span under way, for work that goes on later. `None` if there is none, or if it is not
    /// recorded.
    pub fn current() -> Option<Self> {
        if !is_on() {
            return None;
        }
        let context = Context::current();
        if !context.span().span_context().is_sampled() {
            return None;
        }
        let mut carrier = HashMap::new();
        TraceContextPropagator::new().inject_context(&context, &mut carrier);
        carrier.remove(TRACEPARENT).map(Self)
    }
}

/// The id of the trace that the `traceparent` of a request names, if it is a valid one.
pub fn trace_id(headers: &HeaderMap) -> Option<String> {
    id_in(&continued(sent(headers)?))
}

/// A span under way, or nothing where none is recorded. It ends when its last copy is dropped.
#[derive(Debug, Clone)]
pub struct Span(Option<Context>);

impl Span {
    /// No span.
    pub const NONE: Self = Self(None);

    /// The span of a request. It continues the trace of the span under way, or else that of whoever sent the request.
    pub fn of_request(name: &str, headers: &HeaderMap) -> Self {
        let Some(tracer) = TRACER.get() else {
            return Self::NONE;
        };
        let current = Context::current();
        let (kind, parent) = if current.has_active_span() {
            (SpanKind::Internal, current)
        } else {
            (SpanKind::Server, sent(headers).map_or_else(Context::new, continued))
        };
        Self::start(tracer, SpanBuilder::from_name(name.to_owned()).with_kind(kind), &parent)
    }

    /// The span of work that was asked for earlier, in the trace of the request that did so. Where that was not
    /// recorded, it begins a trace of its own.
    pub fn of_later_work(name: &'static str, parent: Option<&TraceParent>) -> Self {
        let Some(tracer) = TRACER.get() else {
            return Self::NONE;
        };
        let parent = parent.map_or_else(Context::new, |parent| continued(&parent.0));
        Self::start(tracer, SpanBuilder::from_name(name).with_kind(SpanKind::Consumer), &parent)
    }

    /// A part of the span under way. Without one, nothing: what this process does by itself is in no trace.
    pub fn part(name: &'static str) -> Self {
        Self::part_of(name, SpanKind::Internal)
    }

    /// A part that waits for another program.
    pub fn outside(name: &'static str) -> Self {
        Self::part_of(name, SpanKind::Client)
    }

    fn part_of(name: &'static str, kind: SpanKind) -> Self {
        let Some(tracer) = TRACER.get() else {
            return Self::NONE;
        };
        let current = Context::current();
        if !current.span().span_context().is_sampled() {
            return Self::NONE;
        }
        Self::start(tracer, SpanBuilder::from_name(name).with_kind(kind), &current)
    }

    fn start(tracer: &SdkTracer, builder: SpanBuilder, parent: &Context) -> Self {
        let span = tracer.build_with_context(builder, parent);
        Self(Some(parent.with_span(span)))
    }

    /// The id of its trace.
    pub fn trace_id(&self) -> Option<String> {
        id_in(self.0.as_ref()?)
    }

    /// Sets an attribute.
    pub fn set(&self, key: &'static str, value: impl Into<Value>) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(KeyValue::new(key, value.into()));
        }
    }

    /// Marks what it stands for as failed. The cause is in the log.
    pub fn failed(&self) {
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(""));
        }
    }

    /// Runs work in this span: what the work starts are parts of it.
    pub fn run<F: Future>(&self, work: F) -> InSpan<F> {
        InSpan { context: self.0.clone(), work }
    }
}

pin_project! {
    /// Work in a span. An async function around it would hold it twice, and all layers of a call are one future.
    #[must_use]
    pub struct InSpan<F> {
        context: Option<Context>,
        #[pin]
        work: F,
    }
}

impl<F> fmt::Debug for InSpan<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InSpan")
    }
}

impl<F: Future> Future for InSpan<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, task: &mut task::Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let _entered = this.context.clone().map(Context::attach);
        this.work.poll(task)
    }
}

/// Spawns a task that goes on in the span under way.
pub fn spawn<F>(work: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    if is_on() { tokio::spawn(work.with_current_context()) } else { tokio::spawn(work) }
}

/// The `traceparent` of a request.
fn sent(headers: &HeaderMap) -> Option<&str> {
    headers.get(TRACEPARENT)?.to_str().ok().filter(|sent| sent.len() <= LONGEST)
}

/// The context that a `traceparent` stands for, without a span if it is not valid.
fn continued(traceparent: &str) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Carrier(traceparent))
}

fn id_in(context: &Context) -> Option<String> {
    let id = context.span().span_context().trace_id();
    (id != TraceId::INVALID).then(|| id.to_string())
}

struct Carrier<'a>(&'a str);

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == TRACEPARENT).then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const ID: &str = "0af7651916cd43dd8448eb211c80319c";

    fn id_of(traceparent: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, HeaderValue::from_str(traceparent).expect("a header value"));
        trace_id(&headers)
    }

    #[test]
    fn only_a_valid_traceparent_names_a_trace() {
        for valid in ["00-{}-b7ad6b7169203331-01", "00-{}-b7ad6b7169203331-00", "cc-{}-b7ad6b7169203331-01-more"] {
            assert_eq!(id_of(&valid.replace("{}", ID)).as_deref(), Some(ID), "{valid}");
        }
        let long = format!("cc-{ID}-b7ad6b7169203331-01-{}", "x".repeat(LONGEST));
        for invalid in [
            "",
            "nonsense",
            ID,
            "00-0af7651916cd43dd8448eb211c80319c",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            long.as_str(),
        ] {
            assert_eq!(id_of(invalid), None, "{invalid:?}");
        }
        assert_eq!(trace_id(&HeaderMap::new()), None);
    }

    #[tokio::test]
    async fn nothing_is_recorded_without_a_tracer() {
        let span = Span::of_request("a call", &HeaderMap::new());
        span.run(async { assert_eq!(TraceParent::current(), None) }).await;
        assert_eq!(span.trace_id(), None);
        assert!(!is_on() && Span::part("a part").0.is_none());
    }
}
