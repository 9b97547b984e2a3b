//! The content of mails: subject, text and HTML of each kind, from `templates/mail`, with their links. This file does
//! not know how a mail is sent or how a token is made. Whether a mail is still wanted was decided before.
//!
//! A stranger can sign up with the address of somebody else, and chooses the username and the address to change to. A
//! mail program makes links of such text, so nothing of it may stand in a mail as it was typed. See decision 0041.

use std::{fmt, time::Duration};

use askama::Template;
use time::{OffsetDateTime, UtcOffset};

use crate::domain::{account::Email, mail::MailKind, one_time::Purpose, ports::ClaimedMail};

/// The placeholder for the token in a link.
const PLACEHOLDER: &str = "{token}";

/// The content of a mail, ready to be sent.
#[derive(Clone, PartialEq, Eq)]
pub struct MailContent {
    pub kind: MailKind,
    pub subject: String,
    pub text: String,
    pub html: String,
    /// The link in the mail, with its token, if it has one.
    pub link: Option<String>,
}

/// The content may include a token, so `Debug` prints only its kind.
impl fmt::Debug for MailContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MailContent").field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// Why the content could not be rendered. Each case is a bug.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    #[error("a {} mail needs a token", .0.as_str())]
    NoToken(MailKind),
    #[error("a {} mail needs the new address", .0.as_str())]
    NoNewAddress(MailKind),
    #[error("the mail could not be rendered: {0}")]
    Template(#[from] askama::Error),
}

/// Why a text is not a link to a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be an http:// or https:// URL in ASCII, with {PLACEHOLDER} at most once")]
pub struct LinkError;

/// The URL of a page that takes a token. The token replaces `{token}`, or is added as the query parameter `token`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link(String);

impl Link {
    pub fn parse(text: &str) -> Result<Self, LinkError> {
        let sample = text.replacen(PLACEHOLDER, "token", 1);
        let has_scheme = sample.starts_with("https://") || sample.starts_with("http://");
        // `Uri` ignores the fragment, so it does not check its characters. None may end a line or an attribute.
        let is_plain = sample.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"'<>\\^`{|}".contains(&byte));
        let is_address = sample.parse::<http::Uri>().is_ok_and(|uri| has_plain_authority(&uri));
        if has_scheme && is_plain && is_address { Ok(Self(text.to_owned())) } else { Err(LinkError) }
    }

    /// The URL with a token in it.
    pub fn with_token(&self, token: &str) -> String {
        let token: String = form_urlencoded::byte_serialize(token.as_bytes()).collect();
        if self.0.contains(PLACEHOLDER) {
            return self.0.replace(PLACEHOLDER, &token);
        }
        let (page, fragment) = match self.0.find('#') {
            Some(position) => self.0.split_at(position),
            None => (self.0.as_str(), ""),
        };
        let separator = match page.split_once('?') {
            None => "?",
            Some((_, query)) if query.is_empty() || query.ends_with('&') => "",
            Some(_) => "&",
        };
        format!("{page}{separator}token={token}{fragment}")
    }
}

/// Whether the authority is a host and maybe a port. A user is refused, because readers could take it for the host.
/// `Uri` accepts a malformed port; this does not.
fn has_plain_authority(uri: &http::Uri) -> bool {
    let (Some(authority), Some(host)) = (uri.authority(), uri.host()) else {
        return false;
    };
    let expected = uri.port_u16().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    !host.is_empty() && authority.as_str() == expected
}

/// The targets of the links in mails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Links {
    pub verify_email: Link,
    pub reset_password: Link,
    pub confirm_email_change: Link,
}

impl Links {
    /// The target of the link in this kind of mail, if it has a link.
    fn of(&self, kind: MailKind) -> Option<&Link> {
        match kind {
            MailKind::VerifyEmail => Some(&self.verify_email),
            MailKind::ResetPassword => Some(&self.reset_password),
            MailKind::ConfirmEmailChange => Some(&self.confirm_email_change),
            MailKind::EmailChangeRequested
            | MailKind::EmailChanged
            | MailKind::PasswordChanged
            | MailKind::AccountExists => None,
        }
    }
}

/// The content that all mails of a deployment share.
#[derive(Debug, Clone)]
pub struct MailTemplates {
    /// The name of the service. One line.
    pub service_name: String,
    pub links: Links,
}

/// The values for the templates.
struct TemplateData<'a> {
    service: &'a str,
    /// Spelled out. Empty if the mail is not about a change of address.
    new_address: String,
    /// Empty if the mail has no link.
    link: &'a str,
    /// How long the link lives, and until when. Empty if the mail has no link.
    lifetime: String,
    end: String,
    /// When the event of the mail happened.
    time: String,
}

/// Renders the text and the HTML of one kind.
macro_rules! render_pair {
    ($data:ident, $text:tt, $html:tt) => {{
        #[derive(Template)]
        #[template(path = $text)]
        struct Text<'a> {
            mail: &'a TemplateData<'a>,
        }
        #[derive(Template)]
        #[template(path = $html)]
        struct Html<'a> {
            mail: &'a TemplateData<'a>,
        }
        (Text { mail: &$data }.render()?, Html { mail: &$data }.render()?)
    }};
}

impl MailTemplates {
    /// Renders the content of a mail. A token is only put into a kind of mail that carries one.
    pub fn render(&self, mail: &ClaimedMail, token: Option<&str>) -> Result<MailContent, RenderError> {
        let kind = mail.kind;
        let link = match self.links.of(kind) {
            None => None,
            Some(link) => Some(link.with_token(token.ok_or(RenderError::NoToken(kind))?)),
        };
        let lifetime = kind.purpose().map(Purpose::lifetime);
        let data = TemplateData {
            service: &self.service_name,
            new_address: mail.new_email.as_ref().map(spelled_out).unwrap_or_default(),
            link: link.as_deref().unwrap_or_default(),
            lifetime: lifetime.map(in_words).unwrap_or_default(),
            end: lifetime.map(|lifetime| in_utc(later(mail.create_time, lifetime))).unwrap_or_default(),
            time: in_utc(mail.create_time),
        };
        let needs_new_address = match kind {
            MailKind::EmailChangeRequested | MailKind::EmailChanged => true,
            MailKind::VerifyEmail
            | MailKind::ResetPassword
            | MailKind::ConfirmEmailChange
            | MailKind::PasswordChanged
            | MailKind::AccountExists => false,
        };
        if needs_new_address && data.new_address.is_empty() {
            return Err(RenderError::NoNewAddress(kind));
        }
        let (text, html) = match kind {
            MailKind::VerifyEmail => render_pair!(data, "mail/verify_email.txt", "mail/verify_email.html"),
            MailKind::ResetPassword => render_pair!(data, "mail/reset_password.txt", "mail/reset_password.html"),
            MailKind::ConfirmEmailChange => {
                render_pair!(data, "mail/confirm_email_change.txt", "mail/confirm_email_change.html")
            }
            MailKind::EmailChangeRequested => {
                render_pair!(data, "mail/email_change_requested.txt", "mail/email_change_requested.html")
            }
            MailKind::EmailChanged => render_pair!(data, "mail/email_changed.txt", "mail/email_changed.html"),
            MailKind::PasswordChanged => render_pair!(data, "mail/password_changed.txt", "mail/password_changed.html"),
            MailKind::AccountExists => render_pair!(data, "mail/account_exists.txt", "mail/account_exists.html"),
        };
        Ok(MailContent { kind, subject: subject(kind, &self.service_name), text, html, link })
    }
}

fn subject(kind: MailKind, service: &str) -> String {
    match kind {
        MailKind::VerifyEmail => format!("Confirm your email address for {service}"),
        MailKind::ResetPassword => format!("Choose a new password for {service}"),
        MailKind::ConfirmEmailChange => format!("Confirm your new email address for {service}"),
        MailKind::EmailChangeRequested => format!("A new email address was requested for your {service} account"),
        MailKind::EmailChanged => format!("The email address of your {service} account was changed"),
        MailKind::PasswordChanged => format!("The password of your {service} account was changed"),
        MailKind::AccountExists => format!("You already have a {service} account"),
    }
}

/// An address that is not a link in any mail program, also in plain text: `ada (at) example (dot) com`. Invisible
/// characters would not do: browsers drop them from the host of a link.
fn spelled_out(email: &Email) -> String {
    email.as_str().replace('.', " (dot) ").replace('@', " (at) ")
}

fn later(time: OffsetDateTime, by: Duration) -> OffsetDateTime {
    time.saturating_add(time::Duration::try_from(by).unwrap_or(time::Duration::MAX))
}

/// Formats a duration, such as `24 hours` or `30 minutes`.
fn in_words(duration: Duration) -> String {
    const HOUR: u64 = 60 * 60;
    let seconds = duration.as_secs();
    let (count, unit) = if seconds.is_multiple_of(HOUR) { (seconds / HOUR, "hour") } else { (seconds / 60, "minute") };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// Formats a time, such as `2 January 2030, 03:04 UTC`.
fn in_utc(time: OffsetDateTime) -> String {
    let time = time.to_offset(UtcOffset::UTC);
    format!("{} {} {}, {:02}:{:02} UTC", time.day(), time.month(), time.year(), time.hour(), time.minute())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use time::macros::datetime;
    use uuid::Uuid;

    use crate::domain::ids::MailId;

    use super::*;

    const TOKEN: &str = "AZQk3_RvcACAAAAAAAAAAY-rGk0qz2Zc1tYtq9y7m1m0m3mJb8u0d5v7x9z1B3D5";

    fn link(text: &str) -> Link {
        Link::parse(text).expect(text)
    }

    fn templates(service_name: &str) -> MailTemplates {
        MailTemplates {
            service_name: service_name.to_owned(),
            links: Links {
                verify_email: link("https://auth.example.com/verify-email"),
                reset_password: link("https://app.example.com/reset/{token}?from=mail&lang=en"),
                confirm_email_change: link("https://app.example.com/#/confirm?t={token}"),
            },
        }
    }

    fn mail(kind: MailKind) -> ClaimedMail {
        let email = |text| Email::parse(text).expect("an address");
        ClaimedMail {
            id: MailId(Uuid::from_u128(7)),
            kind,
            recipient: email("ada@example.com"),
            new_email: Some(email("lovelace@example.org")),
            grant: None,
            attempt: 1,
            create_time: datetime!(2030-01-02 05:04:05.678_901 +02:00),
            trace: None,
        }
    }

    fn content(kind: MailKind) -> MailContent {
        templates("Postern").render(&mail(kind), Some(TOKEN)).expect("content")
    }

    #[test]
    fn the_content_of_each_kind_matches_its_snapshot() {
        for kind in MailKind::ALL {
            let MailContent { subject, text, html, .. } = content(kind);
            insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
                insta::assert_snapshot!(format!("{}.txt", kind.as_str()), format!("Subject: {subject}\n\n{text}"));
                insta::assert_snapshot!(format!("{}.html", kind.as_str()), html);
            });
        }
    }

    #[test]
    fn subjects_differ_and_lines_are_at_most_90_characters_long() {
        let subjects: BTreeSet<_> = MailKind::ALL.into_iter().map(|kind| content(kind).subject).collect();
        assert_eq!(subjects.len(), MailKind::ALL.len());
        for kind in MailKind::ALL {
            let text = content(kind).text;
            for line in text.lines().filter(|line| !line.contains("://")) {
                assert!(line.chars().count() <= 90, "{kind:?}: {line}");
            }
            assert!(!text.contains("\n\n\n") && text.ends_with("Sent automatically by Postern"), "{text}");
        }
    }

    #[test]
    fn a_mail_contains_a_token_if_and_only_if_its_kind_has_a_purpose() {
        for kind in MailKind::ALL {
            let content = content(kind);
            let has_purpose = kind.purpose().is_some();
            assert_eq!(templates("Postern").links.of(kind).is_some(), has_purpose, "{kind:?}");
            for part in [&content.text, &content.html] {
                assert_eq!(part.contains(TOKEN), has_purpose, "{kind:?}");
            }
            assert!(!content.subject.contains(TOKEN));
            assert!(!format!("{content:?}").contains(TOKEN), "Debug does not print the token");
            let Some(link) = content.link else {
                assert!(!has_purpose && !content.html.contains("href"), "{kind:?}");
                continue;
            };
            assert!(
                has_purpose && content.text.lines().any(|line| line == link),
                "{kind:?}: the link is on a line of its own"
            );
            let without = templates("Postern").render(&mail(kind), None).expect_err("no token");
            assert!(matches!(without, RenderError::NoToken(named) if named == kind), "{without}");
        }
    }

    #[test]
    fn a_notice_of_a_change_names_the_new_address() {
        for kind in [MailKind::EmailChangeRequested, MailKind::EmailChanged] {
            assert!(content(kind).text.contains("\nto: lovelace (at) example (dot) org\n"), "{kind:?}");
            let without = ClaimedMail { new_email: None, ..mail(kind) };
            let refusal = templates("Postern").render(&without, None).expect_err("no new address");
            assert!(matches!(refusal, RenderError::NoNewAddress(named) if named == kind), "{refusal}");
        }
    }

    #[test]
    fn no_address_in_a_mail_reads_as_a_link() {
        for address in ["www.evil.com/login?a=b@evil.example.com", "ada+http-evil.com@x.co", "ada@www.evil.example.com"]
        {
            for kind in MailKind::ALL {
                let email = || Email::parse(address).expect(address);
                let mail = ClaimedMail { recipient: email(), new_email: Some(email()), ..mail(kind) };
                let content = templates("Postern").render(&mail, Some(TOKEN)).expect("content");
                let link = content.link.unwrap_or_else(|| "no link".to_owned());
                let html_link = link.replace('&', "&#38;");
                for text in [content.subject, content.text.replace(&link, ""), content.html.replace(&html_link, "")] {
                    // Styles have dots too, before digits.
                    let body = text.split_once("<body").map_or(text.as_str(), |(_, body)| body);
                    let mut pairs = body.chars().zip(body.chars().skip(1));
                    assert!(
                        !body.contains('@') && !pairs.any(|(c, d)| c == '.' && d.is_alphabetic()),
                        "{kind:?}: {body}"
                    );
                }
            }
        }
    }

    #[test]
    fn values_are_escaped_in_html() {
        let templates = templates("<script>&\"'");
        for kind in MailKind::ALL {
            let new_email = Email::parse("d&e'f@example.com").ok();
            let mail = ClaimedMail { new_email, ..mail(kind) };
            let content = templates.render(&mail, Some("\"><script>")).expect("content");
            assert!(!content.html.contains("<script"), "{}", content.html);
            assert!(
                !content.html.contains("d&e") && content.html.contains("&#60;script&#62;&#38;&#34;&#39;"),
                "{kind:?}"
            );
            assert!(content.text.contains("<script>&\"'"), "values are not escaped in text");
        }
    }

    #[test]
    fn a_token_replaces_the_placeholder_or_becomes_a_query_parameter() {
        for (page, expected) in [
            ("https://a.example/verify", "https://a.example/verify?token=T"),
            ("https://a.example", "https://a.example?token=T"),
            ("http://localhost:8080/", "http://localhost:8080/?token=T"),
            ("https://a.example/v?lang=en", "https://a.example/v?lang=en&token=T"),
            ("https://a.example/v?", "https://a.example/v?token=T"),
            ("https://a.example/v?lang=en&", "https://a.example/v?lang=en&token=T"),
            ("https://a.example/v#top", "https://a.example/v?token=T#top"),
            ("https://a.example/v?a=b#top?x", "https://a.example/v?a=b&token=T#top?x"),
            ("https://a.example/v#top?x", "https://a.example/v?token=T#top?x"),
            ("https://a.example/{token}/v?a=b", "https://a.example/T/v?a=b"),
            ("https://a.example/v?t={token}&a=b", "https://a.example/v?t=T&a=b"),
            ("https://a.example/#/v/{token}", "https://a.example/#/v/T"),
            ("https://[2001:db8::1]:8443/v", "https://[2001:db8::1]:8443/v?token=T"),
        ] {
            assert_eq!(link(page).with_token("T"), expected);
        }
        assert_eq!(link("https://a.example/v").with_token(TOKEN), format!("https://a.example/v?token={TOKEN}"));
        assert_eq!(link("https://a.example/v").with_token("&#/"), "https://a.example/v?token=%26%23%2F");
    }

    #[test]
    fn an_unusable_url_is_not_a_link() {
        for bad in [
            "",
            "a.example/v",
            "ftp://a.example/v",
            "javascript:alert(1)//http://a.example",
            "https://",
            "https:///v",
            "https://?token={token}",
            "https://a.example/v v",
            "https://a.example/v\n",
            " https://a.example/v",
            "https://a.example/\"><script>",
            "https://a.example/'",
            "https://bücher.example/v",
            "https://a.example:99999/v",
            "https://a.example:x/v",
            "https://bank.example@a.example/v",
            "https://a.example/{id}",
            "https://a.example/{token}/{token}",
            "https://a.example/#<b>",
        ] {
            assert_eq!(Link::parse(bad), Err(LinkError), "{bad}");
        }
    }

    #[test]
    fn durations_and_times_are_formatted_for_people() {
        let formatted = [3_600, 86_400, 60, 1_800, 5_400].map(|seconds| in_words(Duration::from_secs(seconds)));
        assert_eq!(formatted, ["1 hour", "24 hours", "1 minute", "30 minutes", "90 minutes"]);
        assert_eq!(in_utc(datetime!(2030-12-31 23:59:59 -01:00)), "1 January 2031, 00:59 UTC");
        assert_eq!(later(OffsetDateTime::UNIX_EPOCH, Duration::MAX).year(), 9_999);
    }
}
