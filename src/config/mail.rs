//! Settings of mail: the transport, the name of the service, the targets of links, and the limits.

use std::{num::NonZeroU32, path::PathBuf, time::Duration};

use clap::{ArgAction, Args};
use http::Uri;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    domain::{one_time::Purpose, throttle::AddressLimit},
    mail::{
        Sender, TransportSettings,
        messages::{Link, Links, MailTemplates},
    },
};

use super::{
    error::{ConfigError, Faults},
    mail_url,
    value::read_secret,
};

/// Mail, and the name of the service in it.
///
/// TLS to the mail server uses the certificate authorities of the system. Add a private authority there, or name it in
/// SSL_CERT_FILE or SSL_CERT_DIR, which replace those of the system (rustls-native-certs). They are read when the
/// service starts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Mail")]
pub struct MailSettings {
    /// `log:` (mails are only logged), `file:DIR`, `smtps://[USER[:PASSWORD]@]HOST[:PORT]`, or `smtp://…`, which uses
    /// STARTTLS except on loopback or with `?tls=none`
    #[arg(long, env = "POSTERN_MAIL_URL", hide_env_values = true, default_value = "log:", value_name = "URL")]
    pub mail_url: SecretString,
    /// File that contains the URL
    #[arg(long, env = "POSTERN_MAIL_URL_FILE", value_name = "FILE", conflicts_with = "mail_url")]
    pub mail_url_file: Option<PathBuf>,
    /// File that contains the password of the user in the URL
    #[arg(long, env = "POSTERN_MAIL_PASSWORD_FILE", value_name = "FILE")]
    pub mail_password_file: Option<PathBuf>,
    /// Sender of mails, such as `Example <no-reply@example.com>` [default: the service's name, no-reply at the public
    /// URL's host]
    #[arg(long, env = "POSTERN_MAIL_FROM", value_name = "ADDRESS")]
    pub mail_from: Option<String>,
    /// Name of the service in mails and pages
    #[arg(long, env = "POSTERN_SERVICE_NAME", default_value = "Postern", value_parser = service_name, value_name = "NAME")]
    pub service_name: String,
    /// Page that verification mails link to; the token replaces `{token}` in it, or is added as `token=…` [default: the
    /// public URL and /verify-email]
    #[arg(long, env = "POSTERN_VERIFY_EMAIL_URL", value_name = "URL")]
    pub verify_email_url: Option<String>,
    /// Page that password reset mails link to; the token is added as in POSTERN_VERIFY_EMAIL_URL [default: the public URL and /reset-password]
    #[arg(long, env = "POSTERN_RESET_PASSWORD_URL", value_name = "URL")]
    pub reset_password_url: Option<String>,
    /// Page that mails to a new address link to; the token is added as in POSTERN_VERIFY_EMAIL_URL [default: the public URL and /confirm-email-change]
    #[arg(long, env = "POSTERN_CONFIRM_EMAIL_CHANGE_URL", value_name = "URL")]
    pub confirm_email_change_url: Option<String>,
    /// How many mails per hour can be requested for one address
    #[arg(long, env = "POSTERN_MAIL_LIMIT_PER_ADDRESS", default_value_t = 10, value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub mail_limit_per_address: u32,
    /// How many mails per minute one client address can cause, by sign-ups and in other ways each, at each replica; 0 for
    /// no limit
    #[arg(long, env = "POSTERN_MAIL_LIMIT_PER_CLIENT", default_value_t = 60, value_name = "COUNT")]
    pub mail_limit_per_client: u32,
    /// Do not reveal at sign-up or change of address that an address has an account; mail its owner instead
    #[arg(long, env = "POSTERN_CONCEAL_EXISTING_ACCOUNTS", default_value_t = false, action = ArgAction::Set,
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub conceal_existing_accounts: bool,
}

/// Parses the name of the service, which stands in the subject of mails and therefore must fit on one line.
fn service_name(text: &str) -> Result<String, String> {
    let breaks_line = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    if !(1..=64).contains(&text.chars().count()) || text.trim() != text || text.contains(breaks_line) {
        return Err("a name has 1 to 64 characters, no control characters, and no space at its ends".to_owned());
    }
    Ok(text.to_owned())
}

impl MailSettings {
    /// The transport of mails.
    pub fn transport(&self) -> Result<TransportSettings, ConfigError> {
        let (url, variable) = match &self.mail_url_file {
            Some(path) => (read_secret("POSTERN_MAIL_URL_FILE", path)?, "POSTERN_MAIL_URL_FILE"),
            None => (Zeroizing::new(self.mail_url.expose_secret().to_owned()), "POSTERN_MAIL_URL"),
        };
        let password = match &self.mail_password_file {
            Some(path) => Some(read_secret("POSTERN_MAIL_PASSWORD_FILE", path)?),
            None => None,
        };
        // Editors add a line end, which is not part of the password. A space may be part of it.
        let password = password.map(|text| SecretString::from(text.trim_end_matches(['\r', '\n'])));
        mail_url::transport(url.trim(), password).map_err(|problem| ConfigError::Unusable(variable, problem.to_owned()))
    }

    /// The sender of mails. `public_url` is `Config::public_url`.
    pub fn from(&self, public_url: &str) -> Result<Sender, ConfigError> {
        let unusable = |problem: String| ConfigError::Unusable("POSTERN_MAIL_FROM", problem);
        if let Some(text) = &self.mail_from {
            return Sender::parse(text).map_err(|error| unusable(error.to_string()));
        }
        let uri = public_url.parse::<Uri>().ok();
        let is_web = |uri: &&Uri| matches!(uri.scheme_str(), Some("http" | "https"));
        let host = uri.as_ref().filter(is_web).and_then(Uri::host).filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| unusable("must be set if the public URL has no host".to_owned()))?;
        // An IP address cannot be the domain of an email address.
        let is_name = !host.starts_with('[') && host.parse::<std::net::Ipv4Addr>().is_err();
        let domain = if is_name { host } else { "localhost" };
        let named = Sender::named(&self.service_name, &format!("no-reply@{domain}"));
        named.map_err(|error| unusable(format!("{error}, because no address can be derived from the public URL")))
    }

    /// The parts of mails that the deployment chooses: the name of the service and the targets of links.
    pub fn templates(&self, public_url: &str) -> Result<MailTemplates, ConfigError> {
        let mut faults = Faults::default();
        let given = [&self.verify_email_url, &self.reset_password_url, &self.confirm_email_change_url];
        if given.iter().any(|url| url.is_none()) {
            // Once, and not for each of them.
            faults.take(default_link(public_url, ""));
        }
        let mut link = |variable, given: &Option<String>, purpose: Purpose| match given {
            None => default_link(public_url, purpose.page_path()).ok(),
            Some(given) => {
                faults.take(Link::parse(given).map_err(|error| ConfigError::Unusable(variable, error.to_string())))
            }
        };
        let links = (
            link("POSTERN_VERIFY_EMAIL_URL", &self.verify_email_url, Purpose::VerifyEmail),
            link("POSTERN_RESET_PASSWORD_URL", &self.reset_password_url, Purpose::ResetPassword),
            link("POSTERN_CONFIRM_EMAIL_CHANGE_URL", &self.confirm_email_change_url, Purpose::ChangeEmail),
        );
        let (Some(verify_email), Some(reset_password), Some(confirm_email_change)) = links else {
            return Err(faults.into_error());
        };
        let links = Links { verify_email, reset_password, confirm_email_change };
        Ok(MailTemplates { service_name: self.service_name.clone(), links })
    }

    /// The limit for one address: the mails of an hour may be sent at once, and are then refilled evenly over an hour.
    pub fn address_limit(&self) -> AddressLimit {
        let burst = self.mail_limit_per_address.max(1);
        AddressLimit { burst, interval: Duration::from_hours(1) / burst }
    }

    /// How many mails per minute one client address can cause. `None` means no limit.
    pub fn client_limit(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.mail_limit_per_client)
    }
}

/// The link to a page of the service itself.
fn default_link(public_url: &str, path: &str) -> Result<Link, ConfigError> {
    let unusable = || {
        let problem = "must be an http:// or https:// URL without query and fragment, or POSTERN_VERIFY_EMAIL_URL, \
                       POSTERN_RESET_PASSWORD_URL and POSTERN_CONFIRM_EMAIL_CHANGE_URL must all be set; the \
                       default is POSTERN_ISSUER";
        ConfigError::Unusable("POSTERN_PUBLIC_URL", problem.to_owned())
    };
    if public_url.contains(['?', '#', '{']) {
        return Err(unusable());
    }
    Link::parse(&format!("{}{path}", public_url.trim_end_matches('/'))).map_err(|_| unusable())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use tempfile::TempDir;

    use crate::mail::SmtpSettings;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct CommandLine {
        #[command(flatten)]
        mail: MailSettings,
    }

    const PUBLIC_URL: &str = "https://auth.example.com/base/";

    fn parse(arguments: &[&str]) -> Result<MailSettings, clap::Error> {
        let command_line = std::iter::once("postern").chain(arguments.iter().copied());
        CommandLine::try_parse_from(command_line).map(|parsed| parsed.mail)
    }

    fn config(arguments: &[&str]) -> MailSettings {
        parse(arguments).expect("a configuration")
    }

    #[test]
    fn an_error_of_the_mail_url_names_the_setting_and_not_its_value() {
        for url in ["smtp://postern:hunter2%@mail.example.com", "hunter2://", "smtp://postern:hunter2@"] {
            let refusal = config(&[&format!("--mail-url={url}")]).transport().expect_err(url);
            assert!(refusal.to_string().starts_with("POSTERN_MAIL_URL "), "{refusal}");
            assert!(!format!("{refusal} {refusal:?}").contains("hunter2"), "{refusal}");
        }
        let config = config(&["--mail-url= smtp://postern:hunter2@mail.example.com\n"]);
        let transport = config.transport().expect("surrounding white space is ignored");
        assert!(!format!("{config:?} {transport:?}").contains("hunter2"));
    }

    #[test]
    fn url_and_password_can_be_read_from_files() {
        let directory = TempDir::new().expect("a directory");
        let file = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).expect("a file");
            directory.path().join(name).to_str().expect("a plain name").to_owned()
        };
        let url_file = format!("--mail-url-file={}", file("url", "smtps://postern@mail.example.com\n"));
        let password_file = format!("--mail-password-file={}", file("password", " hunter2 \r\n"));
        let Ok(TransportSettings::Smtp(SmtpSettings { credentials: Some(credentials), .. })) =
            config(&[&url_file, &password_file]).transport()
        else {
            panic!("no credentials");
        };
        assert_eq!((credentials.user.as_str(), credentials.password.expose_secret()), ("postern", " hunter2 "));

        let refusal = config(&[&url_file]).transport().expect_err("no password");
        assert!(refusal.to_string().starts_with("POSTERN_MAIL_URL_FILE "), "{refusal}");
        for url in ["smtps://postern:hunter2@mail.example.com", "smtps://mail.example.com", "log:", "file:mails"] {
            let refusal = config(&[&format!("--mail-url={url}"), &password_file]).transport().expect_err(url);
            assert!(refusal.to_string().contains("POSTERN_MAIL_PASSWORD_FILE"), "{refusal}");
        }
        let both = parse(&["--mail-url=log:", &url_file]).expect_err("a URL and a file");
        assert_eq!(both.kind(), clap::error::ErrorKind::ArgumentConflict);
        let missing = config(&["--mail-url-file=/nowhere/url"]).transport().expect_err("no such file");
        assert!(missing.to_string().starts_with("POSTERN_MAIL_URL_FILE: /nowhere/url"), "{missing}");
    }

    #[test]
    fn the_default_sender_is_derived_from_the_service_name_and_the_public_url() {
        let from = |arguments: &[&str], public_url| config(arguments).from(public_url);
        let sender = |text| Sender::parse(text).expect("a sender");
        assert_eq!(from(&[], PUBLIC_URL).ok(), Some(sender("Postern <no-reply@auth.example.com>")));
        assert_eq!(from(&[], "http://localhost:8080").ok(), Some(sender("Postern <no-reply@localhost>")));
        for address in ["http://127.0.0.1:8080", "https://[2001:db8::1]"] {
            assert_eq!(from(&[], address).ok(), Some(sender("Postern <no-reply@localhost>")), "{address}");
        }
        let named = from(&["--service-name=Doe, Jane & Söhne"], PUBLIC_URL).expect("a sender");
        assert_eq!(Some(named), Sender::named("Doe, Jane & Söhne", "no-reply@auth.example.com").ok());
        assert_eq!(from(&["--mail-from=a@b.example"], "urn:x").ok(), Some(sender("a@b.example")));
        for (arguments, public_url) in [
            ([].as_slice(), "urn:x"),
            (&["--mail-from="], PUBLIC_URL),
            (&["--mail-from=a@b.example\r\nBcc: c@d.example"], PUBLIC_URL),
        ] {
            let refusal = from(arguments, public_url).expect_err("no sender");
            assert!(refusal.to_string().starts_with("POSTERN_MAIL_FROM "), "{refusal}");
        }
    }

    #[test]
    fn links_lead_to_the_public_url_unless_they_are_configured() {
        let link = |text| Link::parse(text).expect("a link");
        let links = config(&["--reset-password-url=https://app.example.com/#/r/{token}"]).templates(PUBLIC_URL);
        let expected = Links {
            verify_email: link("https://auth.example.com/base/verify-email"),
            reset_password: link("https://app.example.com/#/r/{token}"),
            confirm_email_change: link("https://auth.example.com/base/confirm-email-change"),
        };
        assert_eq!(links.expect("templates").links, expected);

        let configured = [
            "--verify-email-url=https://a.example/1",
            "--reset-password-url=https://a.example/2",
            "--confirm-email-change-url=https://a.example/3",
        ];
        config(&configured).templates("urn:x").expect("nothing is derived from the public URL");
        for public_url in ["urn:x", "ftp://a.example", "https://a.example?b", "https://a.example#b", "https://{token}"]
        {
            let refusal = config(&configured[1..]).templates(public_url).expect_err(public_url);
            assert!(refusal.to_string().starts_with("POSTERN_PUBLIC_URL must be "), "{refusal}");
        }
        for (argument, variable) in [
            ("--verify-email-url=a.example", "POSTERN_VERIFY_EMAIL_URL"),
            ("--reset-password-url=javascript:alert(1)", "POSTERN_RESET_PASSWORD_URL"),
            ("--confirm-email-change-url=", "POSTERN_CONFIRM_EMAIL_CHANGE_URL"),
        ] {
            let refusal = config(&[argument]).templates(PUBLIC_URL).expect_err(argument);
            assert!(refusal.to_string().starts_with(&format!("{variable} must be ")), "{refusal}");
        }
    }

    #[test]
    fn the_name_of_the_service_fits_on_one_line() {
        let longest = "ß".repeat(64);
        for name in ["P", "<script>&\"", longest.as_str()] {
            let config = config(&[&format!("--service-name={name}")]);
            assert_eq!(config.templates(PUBLIC_URL).expect("templates").service_name, name);
        }
        let too_long = "a".repeat(65);
        for name in ["", " ", " a", "a\r\nBcc: b", "a\u{2028}b", "a\u{7f}", too_long.as_str()] {
            assert!(parse(&[&format!("--service-name={name}")]).is_err(), "{name:?}");
        }
    }

    #[test]
    fn the_mail_limit_is_spread_over_an_hour_and_zero_means_no_client_limit() {
        let config = config(&["--mail-limit-per-address=7", "--mail-limit-per-client=0"]);
        let limit = config.address_limit();
        assert_eq!(limit.burst, 7);
        assert!((limit.interval * 7).abs_diff(Duration::from_hours(1)) < Duration::from_millis(1));
        assert_eq!(config.client_limit(), None);
    }
}
