//! SMTP: which server, how its connection is protected, and how long each step may take.
//!
//! lettre implements the protocol; the connections are managed here. lettre's own transport limits only the time to
//! connect (lettre#1027), and it reuses a connection whose mail was cancelled half-way, so that the next mail would
//! read the answers to the last one. Here every step has a time limit, and a connection is reused only after a mail
//! that was sent.

use std::{
    fmt,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use lettre::{
    address::Envelope,
    transport::smtp::{
        Error as LettreError,
        authentication::{Credentials, DEFAULT_MECHANISMS},
        client::{AsyncSmtpConnection, TlsParameters},
        extension::ClientId,
    },
};
use secrecy::{ExposeSecret, SecretString};

/// How long one step may take: connecting, STARTTLS, authentication, or testing an idle connection.
const STEP: Duration = Duration::from_secs(10);
/// How long a mail may take from `MAIL FROM` to the last reply. This is longer than a step, because some servers scan
/// for spam before they answer, and a mail that is given up at that point is delivered twice.
const TRANSACTION: Duration = Duration::from_secs(30);
const _: () = assert!(TRANSACTION.as_secs() > STEP.as_secs(), "a mail takes longer than a step");
/// How many idle connections are idle.
const KEPT: usize = 2;
/// How long a connection stays idle. Servers close idle connections after some minutes. An older one is closed when the
/// next mail is sent.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The mail server and how to use it.
#[derive(Debug, Clone)]
pub struct SmtpSettings {
    /// A name, or an IP address without brackets.
    pub host: String,
    pub port: u16,
    pub security: SmtpSecurity,
    pub credentials: Option<SmtpCredentials>,
}

/// How the connection to the mail server is protected. There is no opportunistic TLS: an attacker on the network could
/// strip STARTTLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmtpSecurity {
    /// Not at all.
    Plaintext,
    /// STARTTLS is required (RFC 3207).
    StartTls,
    /// TLS from the first byte (RFC 8314 §3.3).
    Tls,
}

/// The credentials for the mail server.
#[derive(Debug, Clone)]
pub struct SmtpCredentials {
    pub user: String,
    pub password: SecretString,
}

impl SmtpSettings {
    /// Whether the password crosses the network in plain text.
    pub fn exposes_password(&self) -> bool {
        self.credentials.is_some() && self.security == SmtpSecurity::Plaintext && !is_loopback(&self.host)
    }
}

/// Whether the host is this machine, so that nothing crosses the network.
pub fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// Why a mail was not accepted. May contain anything that the server said.
#[derive(Debug)]
pub(super) enum SmtpError {
    /// The server refused, or the connection failed.
    Failed(LettreError),
    /// The step that took too long.
    TimedOut(&'static str),
}

/// A mail server and the connections to it.
pub(super) struct Smtp {
    settings: SmtpSettings,
    /// `None` without TLS.
    tls: Option<TlsParameters>,
    hello: ClientId,
    idle: Mutex<Vec<(AsyncSmtpConnection, Instant)>>,
}

impl fmt::Debug for Smtp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Smtp").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Smtp {
    /// Reads the trusted certificates of the system if the connection is encrypted. Does not connect.
    pub(super) fn new(settings: SmtpSettings) -> Result<Self, LettreError> {
        let tls = match settings.security {
            SmtpSecurity::Plaintext => None,
            SmtpSecurity::StartTls | SmtpSecurity::Tls => Some(TlsParameters::new(settings.host.clone())?),
        };
        Ok(Self { settings, tls, hello: ClientId::default(), idle: Mutex::default() })
    }

    /// Sends a mail. If the caller drops the future, the connection is closed.
    pub(super) async fn send(&self, envelope: &Envelope, message: &[u8]) -> Result<(), SmtpError> {
        let mut connection = match self.kept_connection().await {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        within(TRANSACTION, "handing the mail over", connection.send(envelope, message)).await?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push((connection, Instant::now()));
        }
        Ok(())
    }

    /// An idle connection that is still open.
    async fn kept_connection(&self) -> Option<AsyncSmtpConnection> {
        loop {
            let (mut connection, _) = {
                let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
                idle.retain(|(_, since)| since.elapsed() < IDLE_TIMEOUT);
                idle.pop()?
            };
            if tokio::time::timeout(STEP, connection.test_connected()).await == Ok(true) {
                return Some(connection);
            }
        }
    }

    async fn connect(&self) -> Result<AsyncSmtpConnection, SmtpError> {
        let SmtpSettings { host, port, security, credentials } = &self.settings;
        let tls_at_once = self.tls.clone().filter(|_| *security == SmtpSecurity::Tls);
        let connecting =
            AsyncSmtpConnection::connect_tokio1((host.as_str(), *port), Some(STEP), &self.hello, tls_at_once, None);
        let mut connection = within(STEP, "connecting", connecting).await?;
        if let Some(tls) = self.tls.clone().filter(|_| *security == SmtpSecurity::StartTls) {
            within(STEP, "STARTTLS", connection.starttls(tls, &self.hello)).await?;
        }
        if let Some(SmtpCredentials { user, password }) = credentials {
            let credentials = Credentials::new(user.clone(), password.expose_secret().to_owned());
            within(STEP, "signing in", connection.auth(DEFAULT_MECHANISMS, &credentials)).await?;
        }
        Ok(connection)
    }

    /// The texts that must not be logged if the server quotes them: the password in every form in which it is sent.
    pub(super) fn secrets(&self) -> Vec<SecretString> {
        let Some(SmtpCredentials { user, password }) = &self.settings.credentials else {
            return Vec::new();
        };
        let login = BASE64_STANDARD.encode(password.expose_secret());
        let plain = BASE64_STANDARD.encode(format!("\0{user}\0{}", password.expose_secret()));
        vec![plain.into(), login.into(), password.clone()]
    }
}

async fn within<T>(
    limit: Duration,
    step: &'static str,
    work: impl Future<Output = Result<T, LettreError>>,
) -> Result<T, SmtpError> {
    match tokio::time::timeout(limit, work).await {
        Ok(outcome) => outcome.map_err(SmtpError::Failed),
        Err(_) => Err(SmtpError::TimedOut(step)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        net::TcpListener,
        sync::Arc,
    };

    use time::OffsetDateTime;
    use uuid::Uuid;

    use crate::{
        domain::{account::Email, ids::MailId, mail::MailKind},
        mail::{Mailer, SendErrorKind, Sender, TransportSettings, messages::MailContent},
    };

    use super::*;

    /// A mail server that says what it is told to, and remembers what it was told.
    struct Server {
        port: u16,
        /// Per connection, line by line.
        heard: Arc<Mutex<Vec<Vec<String>>>>,
    }

    impl Server {
        /// `answer` gets each line; what it returns is sent. Empty is silence.
        fn start(answer: fn(&str) -> &'static str) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = listener.local_addr().expect("an address").port();
            let heard = Arc::<Mutex<Vec<Vec<String>>>>::default();
            let remember = Arc::clone(&heard);
            std::thread::spawn(move || {
                for (number, stream) in listener.incoming().enumerate() {
                    remember.lock().expect("a lock").push(Vec::new());
                    let (remember, mut stream) = (Arc::clone(&remember), stream.expect("a connection"));
                    std::thread::spawn(move || {
                        stream.write_all(b"220 mail.example\r\n").expect("a greeting");
                        for line in BufReader::new(stream.try_clone().expect("a stream")).lines().map_while(Result::ok)
                        {
                            let reply = answer(&line);
                            remember.lock().expect("a lock")[number].push(line);
                            // Whoever does not listen any more is not written to.
                            stream.write_all(reply.as_bytes()).ok();
                        }
                    });
                }
            });
            Self { port, heard }
        }

        fn heard(&self) -> Vec<Vec<String>> {
            self.heard.lock().expect("a lock").clone()
        }
    }

    /// A server that takes every mail.
    fn polite(line: &str) -> &'static str {
        match line.split([' ', ':']).next().unwrap_or_default() {
            "EHLO" => "250-mail.example\r\n250 AUTH PLAIN LOGIN\r\n",
            "AUTH" => "235 welcome\r\n",
            "MAIL" | "RCPT" | "NOOP" | "." => "250 fine\r\n",
            "DATA" => "354 go on\r\n",
            "QUIT" => "221 bye\r\n",
            _ => "",
        }
    }

    fn settings(port: u16, security: SmtpSecurity) -> SmtpSettings {
        let credentials = Some(SmtpCredentials { user: "postern".to_owned(), password: "hunter2".into() });
        SmtpSettings { host: "127.0.0.1".to_owned(), port, security, credentials }
    }

    async fn send(smtp: &Smtp) -> Result<(), SmtpError> {
        let address = |text: &str| text.parse().expect("an address");
        let envelope = Envelope::new(Some(address("a@example.com")), vec![address("b@example.com")]).expect("both");
        smtp.send(&envelope, b"Subject: hello\r\n\r\n.\r\nhello\r\n").await
    }

    #[tokio::test]
    async fn mails_follow_one_another_over_one_connection() {
        let server = Server::start(polite);
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Plaintext)).expect("a transport");
        send(&smtp).await.expect("sent");
        send(&smtp).await.expect("sent");
        let heard = server.heard();
        assert_eq!(heard.len(), 1, "{heard:?}");
        let verbs: Vec<_> = heard[0].iter().map(|line| line.split([' ', ':']).next().expect("a word")).collect();
        let mail = ["MAIL", "RCPT", "DATA", "Subject", "", "..", "hello", "", "."];
        assert_eq!(verbs, [["EHLO", "AUTH"].as_slice(), &mail, &["NOOP"], &mail].concat());
        assert_eq!(heard[0][1], format!("AUTH PLAIN {}", BASE64_STANDARD.encode("\0postern\0hunter2")));
        let secrets: Vec<_> = smtp.secrets().iter().map(|secret| secret.expose_secret().to_owned()).collect();
        assert!(heard[0][1].ends_with(&secrets[0]), "what was sent is known as a secret");
        assert!(!format!("{smtp:?}").contains("hunter2"));
    }

    #[tokio::test]
    async fn a_mail_that_was_given_up_takes_its_connection_along() {
        // The first mail's DATA is never answered, and would be by the next mail's reading.
        let server = Server::start(|line| if line == "DATA" { "" } else { polite(line) });
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Plaintext)).expect("a transport");
        for connections in 1..=2 {
            tokio::time::timeout(Duration::from_millis(300), send(&smtp)).await.expect_err("no answer");
            let heard = server.heard();
            assert_eq!(heard.len(), connections, "{heard:?}");
            assert_eq!(heard[connections - 1].last().map(String::as_str), Some("DATA"), "{heard:?}");
        }
    }

    #[tokio::test]
    async fn a_refused_mail_takes_its_connection_along() {
        let server = Server::start(|line| if line.starts_with("RCPT") { "450 later\r\n" } else { polite(line) });
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Plaintext)).expect("a transport");
        for connections in 1..=2 {
            let refusal = send(&smtp).await.expect_err("refused");
            assert!(matches!(&refusal, SmtpError::Failed(error) if error.is_transient()), "{refusal:?}");
            assert_eq!(server.heard().len(), connections);
        }
    }

    #[tokio::test]
    async fn a_refusal_says_what_the_server_said_but_for_what_is_secret() {
        let server = Server::start(|line| {
            if line.starts_with("RCPT") { "550 5.1.1 <B@example.com> unknown, hunter2\r\n" } else { polite(line) }
        });
        let from = Sender::parse("a@example.com").expect("a sender");
        let settings = TransportSettings::Smtp(settings(server.port, SmtpSecurity::Plaintext));
        let mailer = Mailer::new(settings, from).expect("a mailer");
        let to = Email::parse("b@example.com").expect("an address");
        let text = "a text".to_owned();
        let letter =
            MailContent { kind: MailKind::AccountExists, subject: text.clone(), html: text.clone(), text, link: None };
        let error = mailer.send(MailId(Uuid::nil()), &to, &letter, OffsetDateTime::UNIX_EPOCH).await.expect_err("a no");
        assert_eq!(error.kind, SendErrorKind::Permanent);
        let expected = "the mail server refused for good: permanent error (550): 5.1.1 <…@example.com> unknown, […]";
        assert_eq!(error.to_string(), expected);
    }

    #[tokio::test]
    async fn without_starttls_nothing_is_said_that_matters() {
        let server = Server::start(polite);
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::StartTls)).expect("a transport");
        let refusal = send(&smtp).await.expect_err("no STARTTLS");
        assert!(matches!(&refusal, SmtpError::Failed(error) if error.is_client()), "{refusal:?}");
        let heard = server.heard();
        assert!(heard[0].iter().all(|line| line.starts_with("EHLO")), "{heard:?}");
    }

    #[tokio::test]
    async fn tls_is_set_up_without_a_process_wide_provider_and_a_closed_port_is_an_error() {
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        for security in [SmtpSecurity::Tls, SmtpSecurity::StartTls] {
            let smtp = Smtp::new(settings(port, security)).expect("a transport");
            let refusal = send(&smtp).await.expect_err("nobody is there");
            assert!(matches!(&refusal, SmtpError::Failed(error) if error.status().is_none()), "{refusal:?}");
        }
    }

    #[tokio::test]
    async fn tls_to_a_server_that_has_none_is_an_error() {
        let server = Server::start(polite);
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Tls)).expect("a transport");
        let refusal = send(&smtp).await.expect_err("no TLS");
        assert!(matches!(&refusal, SmtpError::Failed(error) if error.status().is_none()), "{refusal:?}");
        assert!(!format!("{:?}", server.heard()).contains("AUTH"));
    }

    #[test]
    fn loopback_is_this_machine_and_no_other() {
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "::", "0.0.0.0", "mailpit"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
