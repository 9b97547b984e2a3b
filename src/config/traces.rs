//! Settings of traces. Their names are those of OpenTelemetry's specification, which operators know from other
//! services; a variable that is empty counts as one that is not set, as it says.

use std::path::PathBuf;

use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};

use super::{error::ConfigError, value::read_secret, web_url};

/// Traces, which a collector gets by OTLP over gRPC.
///
/// A trace begins where its caller says (W3C Trace Context), and nothing that a caller sent is in it. For a private
/// certificate authority of an https:// collector set SSL_CERT_FILE.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Traces")]
pub struct TraceSettings {
    /// Collector that gets the traces, such as http://localhost:4317 [default: none, and nothing is traced]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_parser = endpoint, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Protocol to the collector; there is one
    #[arg(long, env = "OTEL_EXPORTER_OTLP_PROTOCOL", default_value = "grpc", value_parser = protocol,
        value_name = "NAME")]
    pub otlp_protocol: String,
    /// Headers for the collector, such as `api-key=abc`, separated by commas
    #[arg(long, env = "OTEL_EXPORTER_OTLP_HEADERS", hide_env_values = true, value_name = "HEADERS")]
    pub otlp_headers: Option<SecretString>,
    /// File that contains the headers
    #[arg(long, env = "OTEL_EXPORTER_OTLP_HEADERS_FILE", value_name = "FILE", conflicts_with = "otlp_headers")]
    pub otlp_headers_file: Option<PathBuf>,
    /// Name of this service in traces [default: postern, or what OTEL_RESOURCE_ATTRIBUTES says]
    #[arg(long, env = "OTEL_SERVICE_NAME", value_name = "NAME")]
    pub otel_service_name: Option<String>,
    /// Which calls are traced: `always_on`, `always_off` or `traceidratio`; after `parentbased_`, only calls of which
    /// the caller has not decided it
    #[arg(long, env = "OTEL_TRACES_SAMPLER", default_value = "parentbased_always_on", value_parser = sampler,
        value_name = "NAME")]
    pub otel_traces_sampler: String,
    /// Which part of the calls a sampler with `traceidratio` takes, from 0 to 1
    #[arg(long, env = "OTEL_TRACES_SAMPLER_ARG", default_value = "1", value_parser = ratio, value_name = "NUMBER")]
    pub otel_traces_sampler_arg: String,
}

const SAMPLERS: [&str; 6] = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
];

/// Which calls are traced. A parent-based one leaves that to the caller who sends a trace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TraceSampler {
    AlwaysOn,
    AlwaysOff,
    Ratio(f64),
    ParentBasedAlwaysOn,
    ParentBasedAlwaysOff,
    ParentBasedRatio(f64),
}

/// Where traces are sent, and which.
#[derive(Debug, Clone)]
pub struct Collector {
    pub endpoint: String,
    /// Marked as sensitive.
    pub headers: HeaderMap,
    pub service_name: Option<String>,
    pub sampler: TraceSampler,
}

fn endpoint(text: &str) -> Result<String, String> {
    // A user or a password in a URL would be ignored, and shown.
    if text.is_empty() || web_url::check(text).is_ok() {
        Ok(text.to_owned())
    } else {
        Err("a collector is written like http://localhost:4317".to_owned())
    }
}

fn protocol(text: &str) -> Result<String, String> {
    match text {
        "" | "grpc" => Ok("grpc".to_owned()),
        _ => Err("must be grpc: collectors take it on port 4317".to_owned()),
    }
}

fn sampler(text: &str) -> Result<String, String> {
    match text {
        "" => Ok("parentbased_always_on".to_owned()),
        known if SAMPLERS.contains(&known) => Ok(known.to_owned()),
        _ => Err(format!("must be {}", SAMPLERS.join(" or "))),
    }
}

fn ratio(text: &str) -> Result<String, String> {
    let is_ratio = text.is_empty() || text.parse::<f64>().is_ok_and(|ratio| (0.0..=1.0).contains(&ratio));
    if is_ratio { Ok(text.to_owned()) } else { Err("must be a number from 0 to 1".to_owned()) }
}

impl TraceSettings {
    /// The collector, if there is one.
    pub fn collector(&self) -> Result<Option<Collector>, ConfigError> {
        let headers = self.headers()?;
        let Some(endpoint) = self.otlp_endpoint.clone().filter(|endpoint| !endpoint.is_empty()) else {
            return Ok(None);
        };
        let service_name = self.otel_service_name.clone().filter(|name| !name.is_empty());
        Ok(Some(Collector { endpoint, headers, service_name, sampler: self.sampler() }))
    }

    fn sampler(&self) -> TraceSampler {
        let ratio = self.otel_traces_sampler_arg.parse().unwrap_or(1.0);
        match self.otel_traces_sampler.as_str() {
            "always_on" => TraceSampler::AlwaysOn,
            "always_off" => TraceSampler::AlwaysOff,
            "traceidratio" => TraceSampler::Ratio(ratio),
            "parentbased_always_off" => TraceSampler::ParentBasedAlwaysOff,
            "parentbased_traceidratio" => TraceSampler::ParentBasedRatio(ratio),
            _ => TraceSampler::ParentBasedAlwaysOn,
        }
    }

    fn headers(&self) -> Result<HeaderMap, ConfigError> {
        let (variable, text) = match (&self.otlp_headers, &self.otlp_headers_file) {
            (Some(headers), _) => ("OTEL_EXPORTER_OTLP_HEADERS", headers.expose_secret().to_owned()),
            (None, Some(path)) => {
                let variable = "OTEL_EXPORTER_OTLP_HEADERS_FILE";
                (variable, read_secret(variable, path)?.trim().to_owned())
            }
            (None, None) => return Ok(HeaderMap::new()),
        };
        let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
        pairs.map(header).collect::<Option<HeaderMap>>().ok_or_else(|| {
            ConfigError::Unusable(variable, "must be headers such as api-key=abc, separated by commas".to_owned())
        })
    }
}

/// A header, whose value is percent-encoded (W3C Baggage, which the specification refers to).
fn header(pair: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = pair.split_once('=')?;
    let name: HeaderName = name.trim().to_ascii_lowercase().parse().ok()?;
    let mut value = HeaderValue::from_str(&percent_decode_str(value.trim()).decode_utf8().ok()?).ok()?;
    value.set_sensitive(true);
    Some((name, value))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        traces: TraceSettings,
    }

    fn collector(arguments: &[&str]) -> Result<Option<Collector>, ConfigError> {
        let arguments = [&["postern"], arguments].concat();
        Arguments::try_parse_from(arguments).expect("arguments").traces.collector()
    }

    #[test]
    fn an_empty_variable_counts_as_one_that_is_not_set() {
        assert!(collector(&[]).expect("valid").is_none());
        assert!(collector(&["--otlp-endpoint="]).expect("valid").is_none());
        let empty =
            ["--otlp-protocol=", "--otel-service-name=", "--otel-traces-sampler=", "--otel-traces-sampler-arg="];
        let given = [&["--otlp-endpoint=http://localhost:4317"][..], &empty].concat();
        let collector = collector(&given).expect("valid").expect("a collector");
        assert_eq!((collector.service_name, collector.sampler), (None, TraceSampler::ParentBasedAlwaysOn));
    }

    #[test]
    fn headers_are_decoded_and_never_printed() {
        let given = ["--otlp-endpoint=https://collector.example", "--otlp-headers=Api-Key=hunter%202, x=y=z,"];
        let collector = collector(&given).expect("valid").expect("a collector");
        assert_eq!(collector.headers["api-key"], "hunter 2");
        assert_eq!(collector.headers["x"], "y=z");
        assert!(!format!("{collector:?}").contains("hunter"));
    }

    #[test]
    fn headers_that_are_none_are_refused_without_their_value() {
        for wrong in ["hunter2", "hunter 2=x", "hunter=%ff", "hunter=a%0Ab"] {
            let refusal = collector(&[&format!("--otlp-headers={wrong}")]).expect_err(wrong).to_string();
            assert!(refusal.contains("OTEL_EXPORTER_OTLP_HEADERS") && !refusal.contains("hunter"), "{refusal}");
        }
    }

    #[test]
    fn a_collector_is_a_url_of_a_host_without_a_user() {
        for good in ["http://localhost:4317", "https://collector.example", "http://[::1]:4317/"] {
            assert!(endpoint(good).is_ok(), "{good}");
        }
        for bad in
            ["localhost:4317", "http://", "unix:///x", "http://a b", "http://u:p@collector.example", "http://a:99999"]
        {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }
}
