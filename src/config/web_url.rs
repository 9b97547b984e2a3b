//! The form of the URLs that name this service.

use http::Uri;

/// Checks a URL as RFC 8414 section 2 has an issuer: a scheme, a host, maybe a port and a path, no query and no fragment.
/// Unlike there, `http` is allowed, for development. Nor may there be a user, which readers could take for the host.
pub(super) fn check(text: &str) -> Result<(), &'static str> {
    const FORM: &str = "must be an http:// or https:// URL of a host, such as https://auth.example.com";
    if text.contains(['?', '#']) {
        return Err("must be a URL without query (?) and fragment (#), as RFC 8414 section 2 requires of an issuer");
    }
    let has_scheme = text.starts_with("https://") || text.starts_with("http://");
    let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"'<>\\^`{|}".contains(&byte));
    if !has_scheme || !is_plain {
        return Err(FORM);
    }
    let uri: Uri = text.parse().map_err(|_| FORM)?;
    let host = uri.host().filter(|host| !host.is_empty()).ok_or(FORM)?;
    let expected = uri.port_u16().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    if uri.authority().is_some_and(|authority| authority.as_str() == expected) { Ok(()) } else { Err(FORM) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_issuer_is_a_url_of_a_host_without_query_and_fragment() {
        for good in [
            "http://localhost:8080",
            "https://auth.example.com",
            "https://auth.example.com/",
            "https://auth.example.com:8443/tenant/1",
            "http://[::1]:8080",
            "http://10.0.0.1",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "not a url",
            "auth.example.com",
            "urn:x",
            "ftp://auth.example.com",
            "https://",
            "https:///path",
            "https://:8080",
            "https://auth.example.com:port",
            "https://auth.example.com:99999",
            "https://user@auth.example.com",
            "https://auth.example.com/a b",
            "https://auth.example.com/{token}",
            "https://b\u{fc}cher.example",
            " https://auth.example.com",
            "https://auth.example.com?",
            "https://auth.example.com/?tenant=1",
            "https://auth.example.com#",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
