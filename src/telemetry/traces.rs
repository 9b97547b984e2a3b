//! Sends the spans of `trace` to a collector, by OTLP over gRPC. A collector that is slow or away costs no call
//! anything: spans wait in a bounded queue, and those that find it full are dropped and counted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use opentelemetry::{Context, KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::{
    ExporterBuildError, WithExportConfig as _, WithTonicConfig as _,
    tonic_types::{metadata::MetadataMap, transport::ClientTlsConfig},
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor,
    },
};

use crate::{
    config::{Collector, TraceSampler},
    trace,
};

/// How many spans wait for the collector. One takes about a kilobyte.
const MOST_WAITING: usize = 2_048;
/// How long one batch of spans may take, and how long the last ones may take when the process ends.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// The export of spans.
#[derive(Debug)]
pub struct Traces(SdkTracerProvider);

impl Traces {
    /// Starts to record spans and to send them. Connects in the background, so the collector may be away.
    pub fn start(collector: Collector) -> Result<Self, ExporterBuildError> {
        let is_https = collector.endpoint.starts_with("https://");
        let mut exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(collector.endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .with_metadata(MetadataMap::from_headers(collector.headers));
        if is_https {
            exporter = exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
        }
        let waiting = Arc::new(AtomicUsize::new(0));
        let exporter = Reporting {
            exporter: exporter.build()?,
            waiting: Arc::clone(&waiting),
            is_failing: AtomicBool::new(false),
        };
        let batches = BatchConfigBuilder::default().with_max_queue_size(MOST_WAITING).build();
        let batches = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Bounded { batches, waiting })
            .with_sampler(sampler(collector.sampler))
            .with_resource(resource(collector.service_name))
            .build();
        trace::record_with(provider.tracer("postern"));
        Ok(Self(provider))
    }

    /// Sends the spans that still wait, and stops. A collector that is away does not keep the process for long.
    pub async fn stop(self) {
        let stopping = tokio::task::spawn_blocking(move || self.0.shutdown_with_timeout(FLUSH_TIMEOUT));
        if let Ok(Err(error)) = stopping.await {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

/// What the spans are from: what OTEL_RESOURCE_ATTRIBUTES says, and the name of the service.
fn resource(service_name: Option<String>) -> Resource {
    let resource = Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.name", "postern"),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        ])
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_detector(Box::new(EnvResourceDetector::new()));
    match service_name {
        Some(name) => resource.with_service_name(name).build(),
        None => resource.build(),
    }
}

fn sampler(chosen: TraceSampler) -> Sampler {
    let parent_based = |root| Sampler::ParentBased(Box::new(root));
    match chosen {
        TraceSampler::AlwaysOn => Sampler::AlwaysOn,
        TraceSampler::AlwaysOff => Sampler::AlwaysOff,
        TraceSampler::Ratio(ratio) => Sampler::TraceIdRatioBased(ratio),
        TraceSampler::ParentBasedAlwaysOn => parent_based(Sampler::AlwaysOn),
        TraceSampler::ParentBasedAlwaysOff => parent_based(Sampler::AlwaysOff),
        TraceSampler::ParentBasedRatio(ratio) => parent_based(Sampler::TraceIdRatioBased(ratio)),
    }
}

fn count(outcome: &'static str, spans: usize) {
    metrics::counter!("postern_trace_spans_total", "outcome" => outcome).increment(spans as u64);
}

/// Drops and counts spans that find the queue full. The queue behind it has as many places and would drop them in
/// silence.
#[derive(Debug)]
struct Bounded {
    batches: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            count("dropped", 1);
        } else {
            self.batches.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}

/// Counts what is sent, and logs when sending begins to fail and when it works again.
#[derive(Debug)]
struct Reporting {
    exporter: opentelemetry_otlp::SpanExporter,
    waiting: Arc<AtomicUsize>,
    is_failing: AtomicBool,
}

impl SpanExporter for Reporting {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        let outcome = self.exporter.export(batch).await;
        match &outcome {
            Ok(()) => {
                count("sent", spans);
                if self.is_failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("the collector takes traces again");
                }
            }
            Err(error) => {
                count("failed", spans);
                if !self.is_failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "traces cannot be sent to OTEL_EXPORTER_OTLP_ENDPOINT and are lost");
                }
            }
        }
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
