//! Logging, metrics and the export of traces. The log goes to standard error, as text or as JSON. The types of secrets
//! cannot be printed, and email addresses are printed without their local part. `http/ops.rs` serves the metrics;
//! `docs/operations.md` lists them.

mod log_queue;
mod traces;

use std::{io::IsTerminal, sync::OnceLock, time::Duration};

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{EnvFilter, fmt::writer::BoxMakeWriter};

use crate::{
    config::{Collector, LogFormat, LogSettings},
    trace::ACCESS,
};

use self::log_queue::LogQueue;
pub use self::{
    log_queue::{LogGuard, flush as flush_log},
    traces::Traces,
};

/// Why logging cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("POSTERN_LOG: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error("logging was already started: {0}")]
    Twice(#[from] Box<dyn std::error::Error + Send + Sync>),
    #[error("the log cannot start its thread: {0}")]
    Thread(#[from] std::io::Error),
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT: {0}")]
    Collector(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Starts logging. With `queued`, lines wait in a queue for whoever reads them, and the guard writes the last ones.
pub fn start(config: &LogSettings, queued: bool) -> Result<Option<LogGuard>, TelemetryError> {
    let terminal = std::io::stderr().is_terminal();
    let format = config.log_format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let mut filter = EnvFilter::try_new(&config.log)?;
    if !config.access_log {
        filter = filter.add_directive(format!("{ACCESS}=off").parse()?);
    }
    let (writer, guard) = if queued {
        let (queue, guard) = LogQueue::start()?;
        (BoxMakeWriter::new(move || queue.clone()), Some(guard))
    } else {
        (BoxMakeWriter::new(std::io::stderr), None)
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        // Otherwise a line that cannot be written, because nobody reads standard error any more, would be told to standard
        // error, and that panics in the middle of a call.
        .log_internal_errors(false)
        .with_target(false);
    match format {
        LogFormat::Text => builder.with_ansi(terminal).try_init()?,
        LogFormat::Json => builder.json().flatten_event(true).with_span_list(false).try_init()?,
    }
    Ok(guard)
}

/// Starts to trace calls.
pub fn start_traces(collector: Collector) -> Result<Traces, TelemetryError> {
    Ok(Traces::start(collector)?)
}

/// Upper bounds of the buckets of every duration, in seconds: from a token check to the longest call.
const DURATION_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// How often samples are moved into the buckets of their histograms.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// The metrics of the process. There is one set, even if a process starts several services.
#[derive(Clone)]
pub struct Metrics(PrometheusHandle);

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// The metrics of the process. The first call of this function starts them.
    pub fn of_process() -> Self {
        static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
        let handle = HANDLE.get_or_init(|| {
            let builder = PrometheusBuilder::new();
            let builder = builder
                .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &DURATION_BUCKETS)
                .unwrap_or_else(|_no_buckets| PrometheusBuilder::new());
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!(
                    "another metrics recorder is installed in this process, so the metrics of Postern stay empty"
                );
            }
            describe();
            handle
        });
        Self(handle.clone())
    }

    /// Moves samples into the buckets of their histograms, for ever. Until then each takes memory, and there may be nobody
    /// who reads the metrics.
    pub async fn run_upkeep(self) {
        let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
        loop {
            ticks.tick().await;
            self.0.run_upkeep();
        }
    }

    /// All metrics in the text format of Prometheus.
    pub fn render(&self) -> String {
        self.0.run_upkeep();
        self.0.render()
    }
}

/// Names and units, by Prometheus's conventions. Labels are bounded: RPCs of the contract, codes, outcomes.
fn describe() {
    describe_counter!("postern_rpcs_total", "RPCs answered, by method and gRPC code");
    describe_histogram!(
        "postern_rpc_duration_seconds",
        Unit::Seconds,
        "How long RPCs took to answer, by method and gRPC code"
    );
    describe_gauge!("postern_hash_queue_depth", "Password hashes that wait for a thread");
    describe_histogram!("postern_hash_wait_seconds", Unit::Seconds, "How long password hashes waited for a thread");
    describe_histogram!("postern_hash_duration_seconds", Unit::Seconds, "How long password hashes took");
    describe_gauge!("postern_database_connections", "Connections to the database, by state");
    describe_gauge!("postern_database_up", "Whether the database answered the last ping");
    describe_counter!("postern_sessions_opened_total", "Sessions opened by login or by a change of password");
    describe_counter!("postern_refreshes_total", "Refresh tokens presented, by outcome");
    describe_counter!(
        "postern_seen_generations_total",
        "Access tokens of a new generation that came back, by what became of the note"
    );
    describe_counter!("postern_service_tokens_total", "Access tokens that services asked for, by outcome");
    describe_counter!("postern_checks_total", "Requests that proxies asked about, by outcome");
    describe_gauge!("postern_signing_key_age_seconds", Unit::Seconds, "For how long the signing key has signed");
    describe_counter!("postern_signing_key_reads_total", "Readings of the signing keys, by outcome");
    describe_gauge!("postern_revocation_streams", "Open streams of revocations");
    describe_counter!("postern_revocation_streams_ended_total", "Streams of revocations that have ended, by reason");
    describe_counter!("postern_logins_throttled_total", "Password attempts that were refused, by limit");
    describe_counter!("postern_mails_total", "Attempts to send mail, by kind and outcome");
    describe_counter!("postern_mails_withheld_total", "Mails that were not queued, by the limit that was reached");
    describe_gauge!("postern_mail_queue", "Mails in the outbox, by state");
    describe_counter!(
        "postern_connections_refused_total",
        "Connections closed at once, because their client has its share or all are taken"
    );
    describe_counter!("postern_tls_handshakes_total", "TLS handshakes, by outcome");
    describe_counter!("postern_tls_reloads_total", "Changes of the TLS files, by outcome");
    describe_gauge!(
        "postern_tls_certificate_expire_time_seconds",
        Unit::Seconds,
        "When the certificate of this server expires, in Unix time"
    );
    describe_counter!("postern_task_failures_total", "Background tasks that failed and were started again, by task");
    describe_counter!("postern_housekeeping_total", "Deletions of expired rows, by outcome");
    describe_counter!(
        "postern_log_lines_dropped_total",
        "Log lines that were dropped because nobody read the ones before"
    );
    describe_counter!("postern_trace_spans_total", "Spans of traces, by what became of them");
}
