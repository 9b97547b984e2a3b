//! The name that a service has in its client certificate: a SPIFFE id or a DNS name.

use std::{fmt, sync::Arc};

/// The longest SPIFFE id and the longest trust domain (SPIFFE-ID §2), in bytes.
const LONGEST_SPIFFE_ID: usize = 2048;
const LONGEST_TRUST_DOMAIN: usize = 255;
/// The longest DNS name and the longest label (RFC 1035 §2.3.4), in bytes.
const LONGEST_NAME: usize = 253;
const LONGEST_LABEL: usize = 63;

const SPIFFE: &str = "spiffe://";

/// The name of a service in its client certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ServiceIdentity {
    /// A SPIFFE id with a path, such as `spiffe://example.org/ns/shop/sa/billing`.
    SpiffeId(Arc<str>),
    /// A DNS name in lower case.
    DnsName(Arc<str>),
}

impl ServiceIdentity {
    /// Parses a name as an operator writes it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.starts_with(SPIFFE) {
            return is_spiffe_id(text).then(|| Self::SpiffeId(text.into())).ok_or(
                "a SPIFFE id is written like spiffe://example.org/ns/shop/sa/billing, with a path and nothing after it",
            );
        }
        if text.contains("://") {
            return Err("the only URI that names a service is a SPIFFE id, such as spiffe://example.org/billing");
        }
        let name = text.to_ascii_lowercase();
        is_dns_name(&name).then(|| Self::DnsName(name.into())).ok_or(
            "a service is named by a SPIFFE id or by a DNS name, such as billing.example.org, without a wildcard",
        )
    }

    pub fn as_str(&self) -> &str {
        match self {
            Self::SpiffeId(name) | Self::DnsName(name) => name,
        }
    }
}

impl fmt::Display for ServiceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether it is the id of a workload (SPIFFE-ID §2): an id without a path names a trust domain.
fn is_spiffe_id(text: &str) -> bool {
    let Some((domain, path)) = text.strip_prefix(SPIFFE).and_then(|rest| rest.split_once('/')) else {
        return false;
    };
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let is_segment = |segment: &str| !matches!(segment, "" | "." | "..") && segment.bytes().all(is_word);
    text.len() <= LONGEST_SPIFFE_ID
        && (1..=LONGEST_TRUST_DOMAIN).contains(&domain.len())
        && domain.bytes().all(|byte| is_word(byte) && !byte.is_ascii_uppercase())
        && path.split('/').all(is_segment)
}

fn is_dns_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=LONGEST_LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // The last label of an IPv4 address is a number.
    let is_number = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    name.len() <= LONGEST_NAME && name.split('.').all(is_label) && !is_number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_by_a_spiffe_id_or_a_dns_name() {
        for (text, name) in [
            ("spiffe://example.org/ns/shop/sa/billing", "spiffe://example.org/ns/shop/sa/billing"),
            ("spiffe://a_b-c.1/X", "spiffe://a_b-c.1/X"),
            ("Billing.Example.org", "billing.example.org"),
            ("billing", "billing"),
        ] {
            assert_eq!(ServiceIdentity::parse(text).expect(text).as_str(), name);
        }
        for text in [
            "",
            "*",
            "*.example.org",
            "-a.example.org",
            "a..b",
            "a.",
            "a b",
            "192.0.2.1",
            "2001:db8::1",
            "https://example.org/billing",
            "spiffe://",
            "spiffe://example.org",
            "spiffe://example.org/",
            "spiffe:///a",
            "spiffe://Example.org/a",
            "spiffe://example.org/a/",
            "spiffe://example.org/a//b",
            "spiffe://example.org/../b",
            "spiffe://example.org/a?b",
            "spiffe://example.org/*",
            "spiffe://u@example.org/a",
            "spiffe://example.org:443/a",
            &format!("spiffe://example.org/{}", "a".repeat(2048)),
            &"a".repeat(64),
        ] {
            assert!(ServiceIdentity::parse(text).is_err(), "{text}");
        }
    }
}
