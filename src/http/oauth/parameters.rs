//! The parameters of a request: a form (RFC 6749 appendix B), read strictly and wiped afterwards. It knows no endpoint.

use std::collections::{HashMap, hash_map::Entry};

use axum::body::Body;
use http::{HeaderMap, Uri, header};
use zeroize::Zeroizing;

use crate::{body::ReadError, grpc::MAX_MESSAGE, http::call};

use super::error::OAuthError;

const CONTENT_TYPE: &str = "application/x-www-form-urlencoded";

/// The parameters of a request. One without a value counts as one that was not sent (RFC 6749 section 3.2), and one that no
/// endpoint knows is ignored. They may be secret, so nothing prints them.
pub struct Parameters(HashMap<String, Zeroizing<String>>);

impl Parameters {
    pub async fn read(headers: &HeaderMap, uri: &Uri, body: Body) -> Result<Self, OAuthError> {
        // Secrets do not belong into a URI, which proxies log (RFC 6749 section 2.3.1).
        if uri.query().is_some_and(|query| !query.is_empty()) {
            return Err(OAuthError::invalid_request("parameters belong in the body"));
        }
        let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case(CONTENT_TYPE) {
            return Err(OAuthError::invalid_request(format!("the content type must be {CONTENT_TYPE}")));
        }
        let body = call::read_body(body).await.map_err(|fault| match fault {
            ReadError::TooLarge => OAuthError::too_large(MAX_MESSAGE),
            ReadError::Disconnected => OAuthError::invalid_request("the body is incomplete"),
            ReadError::TooSlow => OAuthError::request_timeout(),
        })?;
        Self::parse(&Zeroizing::new(Vec::from(body)))
    }

    fn parse(body: &[u8]) -> Result<Self, OAuthError> {
        let mut parameters = HashMap::new();
        for (name, value) in form_urlencoded::parse(body) {
            let value = Zeroizing::new(value.into_owned());
            // Invalid UTF-8 arrives as U+FFFD, and would become a secret that nobody has sent.
            if name.contains(char::REPLACEMENT_CHARACTER) || value.contains(char::REPLACEMENT_CHARACTER) {
                return Err(OAuthError::invalid_request("the body is not UTF-8"));
            }
            match parameters.entry(name.into_owned()) {
                Entry::Vacant(entry) => drop(entry.insert(value)),
                // Section 3.2: a proxy may read the first of two, and a server the last.
                Entry::Occupied(_) => return Err(OAuthError::invalid_request("a parameter is given twice")),
            }
        }
        Ok(Self(parameters))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.as_str()).filter(|value| !value.is_empty())
    }

    pub fn required(&self, name: &str) -> Result<&str, OAuthError> {
        self.get(name).ok_or_else(|| OAuthError::invalid_request(format!("{name} is required")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_read_strictly() {
        let form = Parameters::parse(b"a=x+y%26%C3%A9&b=&unknown=1").expect("a form");
        assert_eq!((form.get("a"), form.get("b"), form.get("c")), (Some("x y&\u{e9}"), None, None));
        assert!(form.required("b").is_err());
        for bad in [&b"a=1&a=1"[..], b"a=&a=", b"x=1&y=2&x=3", b"a=%FF", b"%ff=a"] {
            assert!(Parameters::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
