//! The mailer: builds the message of a mail and sends it to a mail server, or for development to the log or to files.
//! `messages.rs` renders the content. The mailer does not know why a mail is sent or when it is retried: see
//! `outbox.rs`.

mod error;
mod memory;
pub mod messages;
pub mod outbox;
mod sender;
mod smtp;

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use lettre::{
    Address, Message,
    message::{Mailbox, MultiPart, SinglePart, header},
};
use secrecy::{ExposeSecret, SecretString};
use time::OffsetDateTime;

use crate::{
    domain::{account::Email, ids::MailId},
    private_file,
};

use self::{
    messages::MailContent,
    smtp::{Smtp, SmtpError},
};

pub use self::error::{SendError, SendErrorKind};
pub use self::memory::{MemoryOutbox, Sent};
pub use self::sender::{Sender, SenderError};
pub use self::smtp::{SmtpCredentials, SmtpSecurity, SmtpSettings};

/// How much of a server's answer is logged, in characters.
const MAX_ANSWER_LENGTH: usize = 300;
/// Base64 text of at least this length may be one of our tokens or a password. The ids in the answers of servers are
/// shorter; the shortest token has 64 characters.
const SUSPICIOUS_LENGTH: usize = 32;

/// The transport of mails.
#[derive(Debug, Clone)]
pub enum TransportSettings {
    /// Mails are written to the log, including their links. This is for development.
    Log,
    /// Mails are written to files in this directory, one for each mail.
    File(PathBuf),
    /// Mails are sent to a mail server.
    Smtp(SmtpSettings),
}

/// Why the transport cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("POSTERN_MAIL_URL: the directory {path} cannot be used for mails: {source}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("TLS to the mail server cannot be set up: {0}")]
    Tls(#[source] lettre::transport::smtp::Error),
}

/// Sends mails.
#[derive(Debug)]
pub struct Mailer {
    from: Sender,
    transport: Transport,
}

#[derive(Debug)]
enum Transport {
    Smtp(Box<Smtp>),
    Log,
    File(PathBuf),
    Memory(MemoryOutbox),
}

impl Mailer {
    /// Prepares the transport, and logs a transport that is not meant for production. Creates the directory of `file:`,
    /// readable by its owner only. Does not connect to the mail server, so that the service starts while it is down.
    pub fn new(settings: TransportSettings, from: Sender) -> Result<Self, SetupError> {
        let transport = match settings {
            TransportSettings::Log => {
                tracing::info!(
                    "mails are written to this log and not sent, which is only for development; POSTERN_MAIL_URL changes this"
                );
                Transport::Log
            }
            TransportSettings::File(path) => match private_file::create_directory(&path) {
                Ok(()) => Transport::File(path),
                Err(source) => return Err(SetupError::Directory { path, source }),
            },
            TransportSettings::Smtp(settings) => {
                if settings.exposes_password() {
                    tracing::warn!(
                        "the password for the mail server crosses the network in plain text, because of ?tls=none"
                    );
                }
                Transport::Smtp(Box::new(Smtp::new(settings).map_err(SetupError::Tls)?))
            }
        };
        Ok(Self { from, transport })
    }

    /// A mailer for tests, which collects mails. No setting selects it.
    pub fn memory(from: Sender) -> (Self, MemoryOutbox) {
        let outbox = MemoryOutbox::default();
        (Self { from, transport: Transport::Memory(outbox.clone()) }, outbox)
    }

    /// Whether mails are only written to the log.
    pub fn is_log_only(&self) -> bool {
        match self.transport {
            Transport::Log => true,
            Transport::Smtp(_) | Transport::File(_) | Transport::Memory(_) => false,
        }
    }

    /// Sends a mail with this date. The same id gives the same message with the same `Message-ID`, so that a receiver
    /// can detect a mail that was sent twice. If the future is dropped before it ends, it is unknown whether the mail
    /// was sent.
    pub async fn send(
        &self,
        id: MailId,
        to: &Email,
        content: &MailContent,
        date: OffsetDateTime,
    ) -> Result<(), SendError> {
        let message = self.message(id, to, content, date)?;
        match &self.transport {
            Transport::Smtp(smtp) => smtp
                .send(message.envelope(), &message.formatted())
                .await
                .map_err(|error| describe(&error, to, &smtp.secrets())),
            Transport::Log => {
                let link = content.link.as_deref();
                tracing::info!(to = to.as_str(), subject = content.subject, link, "mail logged and not sent");
                Ok(())
            }
            Transport::File(directory) => {
                let (directory, message) = (directory.clone(), message.formatted());
                let writing = tokio::task::spawn_blocking(move || write_mail(&directory, id, &message));
                writing.await.map_err(SendError::local)?.map_err(SendError::local)
            }
            Transport::Memory(outbox) => {
                let message = String::from_utf8_lossy(&message.formatted()).into_owned();
                outbox.put(Sent { id, to: to.clone(), content: content.clone(), message })
            }
        }
    }

    fn message(
        &self,
        id: MailId,
        to: &Email,
        content: &MailContent,
        date: OffsetDateTime,
    ) -> Result<Message, SendError> {
        // The error of the parser is dropped, because it may quote the address.
        let recipient: Address =
            to.as_str().parse().map_err(|_| SendError::local("the address of the recipient is not valid in a mail"))?;
        let from = self.from.mailbox();
        // The boundary is derived from the id, so it is the same when a mail is sent again. It cannot occur in the
        // content: a token contains the id only in base64.
        let parts = MultiPart::alternative()
            .boundary(format!("postern-{}", id.0.simple()))
            .singlepart(SinglePart::plain(content.text.clone()))
            .singlepart(SinglePart::html(content.html.clone()));
        Message::builder()
            .from(from.clone())
            .to(Mailbox::new(None, recipient))
            .date(in_range(date))
            .message_id(Some(format!("<{id}@{}>", from.email.domain())))
            .subject(content.subject.as_str())
            .header(AutoSubmitted)
            .multipart(parts)
            .map_err(SendError::local)
    }
}

/// The date for lettre, which panics outside the years 1970 to 9999.
fn in_range(date: OffsetDateTime) -> SystemTime {
    const END: u64 = 253_402_300_799;
    let seconds = u64::try_from(date.unix_timestamp()).unwrap_or(0).min(END);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// `Auto-Submitted: auto-generated` (RFC 3834 §5), so that automatic replies are not sent.
#[derive(Debug, Clone, Copy)]
struct AutoSubmitted;

impl header::Header for AutoSubmitted {
    fn name() -> header::HeaderName {
        header::HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Self)
    }

    fn display(&self) -> header::HeaderValue {
        header::HeaderValue::new(Self::name(), "auto-generated".to_owned())
    }
}

/// Writes `<id>.eml` atomically, readable by its owner only.
fn write_mail(directory: &Path, id: MailId, message: &[u8]) -> std::io::Result<()> {
    let unfinished = directory.join(format!(".{id}.unfinished"));
    let mut file = private_file::options().create(true).truncate(true).open(&unfinished)?;
    file.write_all(message)?;
    file.sync_all()?;
    fs::rename(&unfinished, directory.join(format!("{id}.eml")))
}

/// Describes a failure without the recipient and the content.
fn describe(error: &SmtpError, to: &Email, secrets: &[SecretString]) -> SendError {
    match error {
        SmtpError::TimedOut(step) => {
            SendError { kind: SendErrorKind::Connection, detail: format!("{step} took too long") }
        }
        SmtpError::Failed(error) => {
            let kind = if error.is_permanent() {
                SendErrorKind::Permanent
            } else if error.is_transient() {
                SendErrorKind::Transient
            } else {
                SendErrorKind::Connection
            };
            SendError { kind, detail: scrub(&error.to_string(), to, secrets) }
        }
    }
}

/// Removes line breaks from a server's answer, and what it may have quoted: the recipient, passwords, links and tokens.
fn scrub(answer: &str, to: &Email, secrets: &[SecretString]) -> String {
    let mut text = answer.to_owned();
    for secret in secrets.iter().map(ExposeSecret::expose_secret).filter(|secret| !secret.is_empty()) {
        text = text.replace(secret, "[…]");
    }
    let domain = to.as_str().rsplit_once('@').map_or("", |(_, domain)| domain);
    let masked = format!("…@{domain}");
    let mut rest = text.as_str();
    let mut without_address = String::new();
    // `to_ascii_lowercase` changes no lengths, so a position in its result is valid in `rest`.
    while let Some(found) = rest.to_ascii_lowercase().find(to.as_str()) {
        let (before, after) = rest.split_at(found);
        without_address.extend([before, &masked]);
        rest = after.split_at(to.as_str().len()).1;
    }
    without_address.push_str(rest);
    let words: Vec<_> =
        without_address.split(|c: char| c.is_whitespace() || c.is_control()).map(without_secrets).collect();
    words.join(" ").chars().take(MAX_ANSWER_LENGTH).collect()
}

/// The word, unless it is a link or may contain a token.
fn without_secrets(word: &str) -> &str {
    let is_base64 = |c: char| c.is_ascii_alphanumeric() || "-_+/=".contains(c);
    if word.contains("://") || word.split(|c| !is_base64(c)).any(|run| run.len() >= SUSPICIOUS_LENGTH) {
        "[…]"
    } else {
        word
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt as _,
        sync::{Arc, Mutex},
    };

    use tempfile::TempDir;
    use time::macros::datetime;
    use uuid::Uuid;

    use crate::domain::mail::MailKind;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2030-01-02 05:04:05.678_901 +02:00);

    fn id() -> MailId {
        MailId(Uuid::from_u128(0x0199_0000_0000_7000_8000_0000_0000_0001))
    }

    fn ada() -> Email {
        Email::parse("ada@example.com").expect("an address")
    }

    fn content() -> MailContent {
        MailContent {
            kind: MailKind::VerifyEmail,
            subject: "Confirm your address for Café".to_owned(),
            text: "Zoë: https://a.example/?token=SECRET\n".to_owned(),
            html: "<p>Zoë: SECRET</p>\n".to_owned(),
            link: Some("https://a.example/?token=SECRET".to_owned()),
        }
    }

    fn sender() -> Sender {
        Sender::parse("Example <no-reply@example.com>").expect("a sender")
    }

    /// The head and the body of the message, as it would be sent.
    async fn sent(from: Sender, content: &MailContent) -> (String, String) {
        let (mailer, outbox) = Mailer::memory(from);
        mailer.send(id(), &ada(), content, NOW).await.expect("sent");
        let [mail] = <[Sent; 1]>::try_from(outbox.take()).expect("one mail");
        assert!(mail.message.is_ascii(), "a message must not need 8BITMIME");
        let (head, body) = mail.message.split_once("\r\n\r\n").expect("a head and a body");
        (head.to_owned(), body.to_owned())
    }

    fn headers(head: &str) -> Vec<&str> {
        head.split("\r\n").filter(|line| !line.starts_with([' ', '\t'])).collect()
    }

    #[tokio::test]
    async fn a_mail_has_exactly_the_expected_headers() {
        let (head, body) = sent(sender(), &content()).await;
        let headers = headers(&head);
        assert!(headers.contains(&"From: Example <no-reply@example.com>"), "{head}");
        assert!(headers.contains(&"To: ada@example.com"), "{head}");
        assert!(headers.contains(&"Date: Wed, 02 Jan 2030 03:04:05 +0000"), "{head}");
        assert!(headers.contains(&"Message-ID: <01990000-0000-7000-8000-000000000001@example.com>"), "{head}");
        assert!(headers.contains(&"Auto-Submitted: auto-generated"), "{head}");
        assert!(headers.contains(&"MIME-Version: 1.0"), "{head}");
        let names: Vec<_> = headers.iter().filter_map(|line| line.split_once(": ")).map(|(name, _)| name).collect();
        assert_eq!(names.len(), 8, "{names:?}");
        assert!(head.contains("Subject: Confirm your address for =?utf-8?b?Q2Fmw6k=?="), "{head}");
        assert!(
            head.contains("multipart/alternative;\r\n boundary=\"postern-01990000000070008000000000000001\""),
            "{head}"
        );
        let (text, html) = body.split_once("Content-Type: text/html; charset=utf-8").expect("two parts");
        assert!(text.contains("Content-Type: text/plain; charset=utf-8"), "{text}");
        assert!(text.contains("Zo=C3=AB: https://a.example/?token=3DSECRET"), "{text}");
        assert!(html.contains("<p>Zo=C3=AB: SECRET</p>"), "{html}");
    }

    #[tokio::test]
    async fn a_mail_that_is_sent_again_is_identical() {
        assert_eq!(sent(sender(), &content()).await, sent(sender(), &content()).await);
    }

    #[tokio::test]
    async fn no_header_can_be_injected() {
        for text in [
            "a\r\nBcc: eve@example.com",
            "a\nBcc: eve@example.com",
            "a\r\n\r\nBcc: eve@example.com",
            "a\rb",
            "é\r\nBcc: e",
        ] {
            let (head, _) = sent(sender(), &MailContent { subject: text.to_owned(), ..content() }).await;
            assert!(headers(&head).iter().all(|line| !line.starts_with("Bcc")), "{head}");
            assert_eq!(headers(&head).len(), 8, "{head}");
            assert_eq!(Sender::parse(&format!("{text} <no-reply@example.com>")), Err(SenderError));
            assert_eq!(Sender::parse(&format!("no-reply@example.com{text}")), Err(SenderError));
            assert_eq!(Sender::named(text, "no-reply@example.com"), Err(SenderError));
            assert_eq!(Sender::named("a", &format!("no-reply@example.com{text}")), Err(SenderError));
        }
    }

    #[tokio::test]
    async fn the_name_of_a_sender_is_encoded_so_that_it_arrives_unchanged() {
        for (name, header) in [
            ("Example", "From: Example <no-reply@example.com>"),
            ("Example Inc", "From: \"Example Inc\" <no-reply@example.com>"),
            ("Say \"hi\"", "From: \"Say \\\"hi\\\"\" <no-reply@example.com>"),
            // The base64 text stands for: a, b <c@d.example>
            ("a, b <c@d.example>", "From: =?utf-8?b?YSwgYiA8Y0BkLmV4YW1wbGU+?= <no-reply@example.com>"),
            ("Café Zoë", "From: =?utf-8?b?Q2Fmw6kgWm/Dqw==?= <no-reply@example.com>"),
        ] {
            let (head, _) = sent(Sender::named(name, "no-reply@example.com").expect(name), &content()).await;
            assert!(headers(&head).contains(&header), "{head}");
        }
    }

    #[tokio::test]
    async fn a_mail_can_be_built_for_every_address_that_an_account_can_have() {
        let (mailer, _) = Mailer::memory(sender());
        let longest = format!("{}@{}.example", "a".repeat(64), ["b".repeat(60).as_str(); 2].join("."));
        for address in ["a!#$%&'*+-/=?^_`{|}~b@example.com", "1@xn--bcher-kva.example", "a.b@c.d", longest.as_str()] {
            let email = Email::parse(address).expect(address);
            mailer.send(id(), &email, &content(), NOW).await.expect(address);
        }
    }

    #[tokio::test]
    async fn a_date_outside_the_range_of_mail_does_not_panic() {
        let (mailer, outbox) = Mailer::memory(sender());
        for date in [datetime!(1969-12-31 0:00 UTC), datetime!(9999-12-31 23:59:59 -23:00)] {
            mailer.send(id(), &ada(), &content(), date).await.expect("sent");
        }
        assert_eq!(outbox.sent().len(), 2);
    }

    #[tokio::test]
    async fn a_mail_file_is_complete_and_readable_by_its_owner_only() {
        let root = TempDir::new().expect("a directory");
        let directory = root.path().join("deep/mails");
        let mailer = Mailer::new(TransportSettings::File(directory.clone()), sender()).expect("a mailer");
        assert!(!mailer.is_log_only());
        for _ in 0..2 {
            mailer.send(id(), &ada(), &content(), NOW).await.expect("written");
        }
        let files: Vec<_> = fs::read_dir(&directory).expect("a directory").map(|file| file.expect("a file")).collect();
        assert_eq!(files.len(), 1, "the second mail replaces the first one, and no unfinished file is left");
        assert_eq!(files[0].file_name().to_str(), Some("01990000-0000-7000-8000-000000000001.eml"));
        let mail = fs::read_to_string(files[0].path()).expect("a mail");
        assert!(mail.contains("To: ada@example.com\r\n") && mail.ends_with("--\r\n"), "{mail}");
        let mode = |path: &Path| fs::metadata(path).expect("its mode").permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&files[0].path())), (0o700, 0o600));

        let occupied = Mailer::new(TransportSettings::File(files[0].path()), sender()).expect_err("no directory");
        assert!(occupied.to_string().contains("cannot be used for mails"), "{occupied}");
        fs::remove_dir_all(&directory).expect("removed");
        let error = mailer.send(id(), &ada(), &content(), NOW).await.expect_err("no directory");
        assert_eq!(error.kind, SendErrorKind::Local);
    }

    #[tokio::test]
    async fn a_test_can_make_mails_fail() {
        let (mailer, outbox) = Mailer::memory(sender());
        outbox.fail_with(Some(SendErrorKind::Transient));
        let error = mailer.send(id(), &ada(), &content(), NOW).await.expect_err("requested by the test");
        assert_eq!((error.kind, outbox.sent().len()), (SendErrorKind::Transient, 0));
        outbox.fail_with(None);
        mailer.send(id(), &ada(), &content(), NOW).await.expect("sent");
        let debug = format!("{mailer:?} {:?}", outbox.sent()[0].content);
        assert!(!debug.contains("SECRET"), "{debug}");
    }

    /// A buffer that collects log lines.
    #[derive(Clone, Default)]
    struct LogBuffer(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for LogBuffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("a lock").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_logged_mail_contains_its_recipient_subject_and_link() {
        let logged = LogBuffer::default();
        let writer = logged.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let mailer = Mailer::new(TransportSettings::Log, sender()).expect("a mailer");
        assert!(mailer.is_log_only());
        mailer.send(id(), &ada(), &content(), NOW).await.expect("logged");
        let log = String::from_utf8(logged.0.lock().expect("a lock").clone()).expect("text");
        let (start, mail) = log.trim_end().split_once('\n').expect("two lines");
        assert!(start.contains("POSTERN_MAIL_URL") && start.contains("only for development"), "{log}");
        for part in ["to=\"ada@example.com\"", "link=\"https://a.example/?token=SECRET\"", "Café"] {
            assert!(mail.contains(part), "{log}");
        }
    }

    #[test]
    fn quoted_addresses_and_secrets_are_removed_from_answers() {
        let token = "AZQk3_RvcACAAAAAAAAAAY-rGk0qz2Zc1tYtq9y7m1m0m3mJb8u0d5v7x9z1B3D5";
        let secrets = [SecretString::from("hunter 2")];
        for (answer, expected) in [
            ("550 5.1.1 <ada@example.com>: unknown", "550 5.1.1 <…@example.com>: unknown"),
            ("Ada@Example.COM,ada@example.com", "…@example.com,…@example.com"),
            ("É: no ada@example.com here", "É: no …@example.com here"),
            ("spam: https://a.example/?token=x", "spam: […]"),
            (&format!("spam: ({token})"), "spam: […]"),
            ("who is hunter 2?", "who is […]?"),
            ("two\r\nlines\u{1b}[31m", "two  lines [31m"),
            ("queued as 4XyZ12abcDEFz", "queued as 4XyZ12abcDEFz"),
            ("", ""),
        ] {
            assert_eq!(scrub(answer, &ada(), &secrets), expected);
        }
        assert_eq!(scrub(&"no ".repeat(1_000), &ada(), &secrets).len(), MAX_ANSWER_LENGTH);
    }

    #[test]
    fn a_timeout_error_names_the_step() {
        let error = describe(&SmtpError::TimedOut("connecting"), &ada(), &[]);
        assert_eq!(error.to_string(), "the mail server could not be used: connecting took too long");
        assert_eq!(error.kind.as_str(), "connection");
    }
}
