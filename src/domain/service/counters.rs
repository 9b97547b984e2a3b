//! The counters of the service start at 0. Prometheus sees a rise only from one value to the next, so the first event of a
//! counter that begins at 1 would raise no alert.

/// Each counter with the values of its label. `tests/clients/test_operations.py` compares them with the documented ones.
const COUNTERS: [(&str, &str, &[&str]); 10] = [
    ("postern_refreshes_total", "outcome", &["rotated", "retried", "reused", "dead"]),
    ("postern_seen_generations_total", "outcome", &["written", "no_room"]),
    ("postern_service_tokens_total", "outcome", &["issued", "refused"]),
    ("postern_logins_throttled_total", "limit", &["account", "client"]),
    ("postern_mails_withheld_total", "limit", &["address", "client"]),
    (
        "postern_checks_total",
        "outcome",
        &["allowed", "anonymous", "unauthenticated", "forbidden", "misconfigured", "unavailable"],
    ),
    (
        "postern_revocation_streams_ended_total",
        "reason",
        &["client", "connection", "slow", "token", "restored", "database", "fault"],
    ),
    ("postern_signing_key_reads_total", "outcome", &["read", "failed"]),
    ("postern_housekeeping_total", "outcome", &["done", "failed"]),
    ("postern_trace_spans_total", "outcome", &["sent", "failed", "dropped"]),
];

/// Starts every counter.
pub fn count_from_zero() {
    metrics::counter!("postern_sessions_opened_total").increment(0);
    metrics::counter!("postern_log_lines_dropped_total").increment(0);
    metrics::gauge!("postern_revocation_streams").increment(0.0);
    for (counter, label, values) in COUNTERS {
        for value in values {
            metrics::counter!(counter, label => *value).increment(0);
        }
    }
}
