//! The mail URL: the transport that it names, and how to reach the mail server. It may contain a password, so an error
//! never quotes it.
//!
//! It is parsed here and not with `url`, which follows the WHATWG standard: that drops line breaks, accepts almost any
//! host of an unknown scheme, and ignores an empty port, an empty user and a wrong %. A wrong setting must be refused
//! and not repaired.

use std::{num::NonZeroU16, path::PathBuf};

use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    mail::{SmtpCredentials, SmtpSecurity, SmtpSettings, TransportSettings},
    this_machine::is_loopback,
};

/// Parses a mail URL. `password` comes from a file. An error says what is wrong with the URL, without quoting it.
pub(super) fn transport(url: &str, password: Option<SecretString>) -> Result<TransportSettings, &'static str> {
    const FORMS: &str = "must begin with log:, file:, smtp:// or smtps://";
    let (scheme, rest) = url.split_once(':').ok_or(FORMS)?;
    let no_user = || match password {
        Some(_) => Err("has no user, but POSTERN_MAIL_PASSWORD_FILE is set"),
        None => Ok(()),
    };
    match (scheme, rest.strip_prefix("//")) {
        ("log", None) => {
            no_user()?;
            if rest.is_empty() { Ok(TransportSettings::Log) } else { Err("must have nothing after log:") }
        }
        ("file", None) => {
            no_user()?;
            if rest.is_empty() || rest.contains('\0') {
                return Err("must name a directory after file:");
            }
            Ok(TransportSettings::File(PathBuf::from(rest)))
        }
        ("file", Some(path)) => {
            no_user()?;
            // A file URL (RFC 8089) without a host.
            if !path.starts_with('/') || path.contains('\0') {
                return Err("must name a directory after file:, such as file:mails or file:///var/mails");
            }
            Ok(TransportSettings::File(PathBuf::from(path)))
        }
        ("smtp", Some(rest)) => smtp(rest, password, false).map(TransportSettings::Smtp),
        ("smtps", Some(rest)) => smtp(rest, password, true).map(TransportSettings::Smtp),
        _ => Err(FORMS),
    }
}

/// Parses the part after `smtp://` or `smtps://`.
fn smtp(rest: &str, password_from_file: Option<SecretString>, tls: bool) -> Result<SmtpSettings, &'static str> {
    let (authority, query) = rest.split_once('?').map_or((rest, None), |(before, query)| (before, Some(query)));
    // A path or a fragment after the query is refused as part of the query.
    if authority.contains(['/', '#', '\\']) {
        return Err("must have no path or fragment; in a user or password write / as %2F, ? as %3F and # as %23");
    }
    let (user_info, server) = authority.rsplit_once('@').map_or((None, authority), |(info, host)| (Some(info), host));
    let (host, port) = host_and_port(server)?;
    let security = match (tls, query) {
        (true, None) => SmtpSecurity::Tls,
        (true, Some(_)) => return Err("must have no parameters after smtps://"),
        (false, Some("tls=required")) => SmtpSecurity::StartTls,
        (false, Some("tls=none")) => SmtpSecurity::Plaintext,
        (false, Some(_)) => {
            return Err("has only ?tls=required or ?tls=none as a parameter; in a password write ? as %3F");
        }
        (false, None) if is_loopback(host) => SmtpSecurity::Plaintext,
        (false, None) => SmtpSecurity::StartTls,
    };
    let default_port = match security {
        SmtpSecurity::Plaintext => 25,
        SmtpSecurity::StartTls => 587,
        SmtpSecurity::Tls => 465,
    };
    let credentials = match user_info {
        Some(user_info) => Some(credentials(user_info, password_from_file)?),
        None if password_from_file.is_some() => {
            return Err("has no user, but POSTERN_MAIL_PASSWORD_FILE is set");
        }
        None => None,
    };
    Ok(SmtpSettings { host: host.to_owned(), port: port.unwrap_or(default_port), security, credentials })
}

fn host_and_port(server: &str) -> Result<(&str, Option<u16>), &'static str> {
    let (host, port) = if let Some(bracketed) = server.strip_prefix('[') {
        let (host, port) = bracketed.split_once(']').ok_or("has a [ without ] in its host")?;
        host.parse::<std::net::Ipv6Addr>().map_err(|_| "has no IPv6 address in the brackets of its host")?;
        (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or("has a wrong port")?) })
    } else {
        let (host, port) = server.split_once(':').map_or((server, None), |(host, port)| (host, Some(port)));
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if host.is_empty() || !host.bytes().all(is_name) {
            return Err("needs a host: a name in ASCII, an IPv4 address, or an IPv6 address in brackets");
        }
        (host, port)
    };
    let Some(port) = port else {
        return Ok((host, None));
    };
    // `parse` accepts a sign, which a port must not have.
    match port.parse::<NonZeroU16>() {
        Ok(number) if port.bytes().all(|byte| byte.is_ascii_digit()) => Ok((host, Some(number.get()))),
        Ok(_) | Err(_) => Err("has a wrong port; in a password write : as %3A and @ as %40"),
    }
}

fn credentials(user_info: &str, from_file: Option<SecretString>) -> Result<SmtpCredentials, &'static str> {
    let (user, password) = user_info.split_once(':').map_or((user_info, None), |(user, rest)| (user, Some(rest)));
    let user = percent_decoded(user)?;
    let password = match (password, from_file) {
        (Some(_), Some(_)) => return Err("has a password, but POSTERN_MAIL_PASSWORD_FILE is set too"),
        (Some(encoded), None) => SecretString::from(percent_decoded(encoded)?.as_str()),
        (None, Some(password)) => password,
        (None, None) => {
            return Err("has a user without a password: add the password, or set POSTERN_MAIL_PASSWORD_FILE");
        }
    };
    // NUL separates the two in the protocol (RFC 4616).
    if user.is_empty()
        || password.expose_secret().is_empty()
        || [&user, password.expose_secret()].iter().any(|text| text.contains('\0'))
    {
        return Err("needs a user and a password that are not empty and contain no NUL");
    }
    Ok(SmtpCredentials { user: user.as_str().to_owned(), password })
}

/// Decodes percent-encoding (RFC 3986 §2.1). A + is not a space. A % without two hexadecimal digits after it is refused;
/// `percent-encoding` would keep it.
fn percent_decoded(text: &str) -> Result<Zeroizing<String>, &'static str> {
    let is_encoded =
        |rest: &str| rest.as_bytes().first_chunk::<2>().is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit));
    if !text.split('%').skip(1).all(is_encoded) {
        return Err("has a % in its user or password without two hexadecimal digits after it: write it as %25");
    }
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| "has a user or password that is not UTF-8")?;
    Ok(Zeroizing::new(decoded.into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(url: &str) -> Result<TransportSettings, &'static str> {
        transport(url, None)
    }

    fn server(text: &str) -> SmtpSettings {
        match url(text) {
            Ok(TransportSettings::Smtp(settings)) => settings,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn host_port_and_security_are_read_from_the_url() {
        use SmtpSecurity::{Plaintext, StartTls, Tls};
        for (text, host, port, security) in [
            ("smtp://mail.example.com", "mail.example.com", 587, StartTls),
            ("smtp://mail.example.com:25", "mail.example.com", 25, StartTls),
            ("smtp://mail.example.com?tls=required", "mail.example.com", 587, StartTls),
            ("smtp://mailpit:1025?tls=none", "mailpit", 1025, Plaintext),
            ("smtp://192.0.2.1?tls=none", "192.0.2.1", 25, Plaintext),
            ("smtp://localhost", "localhost", 25, Plaintext),
            ("smtp://127.8.9.10:1025", "127.8.9.10", 1025, Plaintext),
            ("smtp://[::1]", "::1", 25, Plaintext),
            ("smtp://[::1]:26?tls=required", "::1", 26, StartTls),
            ("smtp://localhost?tls=required", "localhost", 587, StartTls),
            ("smtp://[2001:db8::1]", "2001:db8::1", 587, StartTls),
            ("smtps://mail.example.com", "mail.example.com", 465, Tls),
            ("smtps://localhost:4650", "localhost", 4650, Tls),
        ] {
            let found = server(text);
            assert_eq!((found.host.as_str(), found.port, found.security), (host, port, security), "{text}");
            assert!(found.credentials.is_none() && !found.exposes_password(), "{text}");
        }
    }

    #[test]
    fn users_and_passwords_are_percent_decoded() {
        for (user_info, user, password) in [
            ("postern:hunter2", "postern", "hunter2"),
            ("no-reply%40example.com:a%3ab%2Fc%25+d%20", "no-reply@example.com", "a:b/c%+d "),
            ("a:b:c", "a", "b:c"),
            ("a@b:c@d", "a@b", "c@d"),
            ("zo%C3%AB:\u{eb}", "zoë", "ë"),
        ] {
            let credentials = server(&format!("smtps://{user_info}@mail.example.com")).credentials.expect(user_info);
            assert_eq!((credentials.user.as_str(), credentials.password.expose_secret()), (user, password));
        }
        for (text, exposes) in [
            ("smtp://a:b@mail.example.com?tls=none", true),
            ("smtp://a:b@mail.example.com", false),
            ("smtp://a:b@localhost", false),
            ("smtps://a:b@mail.example.com", false),
        ] {
            assert_eq!(server(text).exposes_password(), exposes, "{text}");
        }
    }

    #[test]
    fn an_unusable_url_is_refused_and_the_error_does_not_quote_it() {
        for text in [
            "",
            "log",
            "log:hunter2",
            "log://",
            "file:",
            "file://hunter2/mails",
            "SMTP://hunter2",
            "smtp:hunter2",
            "smtp://",
            "smtp://hunter2/",
            "smtp://hunter2#a",
            "smtp://hunter2?",
            "smtp://hunter2?tls=maybe",
            "smtp://hunter2?tls=none&tls=required",
            "smtp://hunter2?tls=none#a",
            "smtp://hunter2?timeout=1",
            "smtps://hunter2?tls=none",
            "smtps://hunter2?tls=required",
            "smtp://hunter2:",
            "smtp://hunter2:?tls=none",
            "smtp://:@mail.example.com",
            "smtp://hunter2\t",
            "smtp://hunter2:0",
            "smtp://hunter2:65536",
            "smtp://hunter2:+25",
            "smtp://hunter2:25:25",
            "smtp://hunter 2",
            "smtp://hünter2",
            "smtp://hunter2\r\nRCPT",
            "smtp://[::1",
            "smtp://[hunter2]",
            "smtp://[::1]25",
            "smtp://::1",
            "smtp://hunter2@mail.example.com",
            "smtp://:hunter2@mail.example.com",
            "smtp://postern:@mail.example.com",
            "smtp://@mail.example.com",
            "smtp://postern:hunter2%@mail.example.com",
            "smtp://postern:hunter2%4@mail.example.com",
            "smtp://postern:hunter2%+1@mail.example.com",
            "smtp://postern:hunter2%ff@mail.example.com",
            "smtp://postern:hunter2%00@mail.example.com",
            "smtp://postern:hunter2/@mail.example.com",
            "smtp://postern:hunter2#@mail.example.com",
            "smtp://postern:hunter2?@mail.example.com",
            "smtp://postern:hunter2@",
            "https://hunter2",
        ] {
            let refusal = url(text).expect_err(text);
            assert!(!refusal.contains("hunter2"), "{text}: {refusal}");
        }
    }

    #[test]
    fn log_and_file_urls_need_no_mail_server() {
        assert!(matches!(url("log:"), Ok(TransportSettings::Log)));
        for (text, directory) in
            [("file:mails", "mails"), ("file:/var/mails", "/var/mails"), ("file:///var/m", "/var/m")]
        {
            let found = url(text);
            assert!(matches!(&found, Ok(TransportSettings::File(path)) if path.to_str() == Some(directory)), "{text}");
        }
    }
}
