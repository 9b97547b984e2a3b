//! SMTP: which server, how its connection is protected, and how long each step may take.
//!
//! lettre implements the protocol; the connections are managed here. lettre's own transport limits only the time to
//! connect (lettre#1027), and it reuses a connection whose mail was cancelled half-way, so that the next mail would
//! read the answers to the last one. Here every step has a time limit, and a connection is reused only after a mail
//! that was sent.

use std::{
    fmt,
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

use crate::this_machine::is_loopback;

/// How long one step may take: connecting, STARTTLS, authentication, or testing an idle connection.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a mail may take from `MAIL FROM` to the last reply. This is longer than a step, because some servers scan
/// for spam before they answer, and a mail that is given up at that point is delivered twice.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(30);
const _: () = assert!(TRANSACTION_TIMEOUT.as_secs() > STEP_TIMEOUT.as_secs(), "a mail takes longer than a step");
/// The most idle connections that are kept open for the next mails.
const MAX_IDLE: usize = 2;
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
    /// No protection.
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

/// Why a mail was not accepted. It may contain any text of the server.
#[derive(Debug)]
pub(super) enum SmtpError {
    /// The server refused the mail, or the connection failed.
    Failed(LettreError),
    /// This step took too long.
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
        let mut connection = match self.idle_connection().await {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        with_timeout(TRANSACTION_TIMEOUT, "sending the mail", connection.send(envelope, message)).await?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push((connection, Instant::now()));
        }
        Ok(())
    }

    /// Takes an idle connection that is still open, if there is one.
    async fn idle_connection(&self) -> Option<AsyncSmtpConnection> {
        loop {
            let (mut connection, _) = {
                let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
                idle.retain(|(_, since)| since.elapsed() < IDLE_TIMEOUT);
                idle.pop()?
            };
            if tokio::time::timeout(STEP_TIMEOUT, connection.test_connected()).await == Ok(true) {
                return Some(connection);
            }
        }
    }

    async fn connect(&self) -> Result<AsyncSmtpConnection, SmtpError> {
        let SmtpSettings { host, port, security, credentials } = &self.settings;
        let tls_at_once = self.tls.clone().filter(|_| *security == SmtpSecurity::Tls);
        let connecting = AsyncSmtpConnection::connect_tokio1(
            (host.as_str(), *port),
            Some(STEP_TIMEOUT),
            &self.hello,
            tls_at_once,
            None,
        );
        let mut connection = with_timeout(STEP_TIMEOUT, "connecting", connecting).await?;
        if let Some(tls) = self.tls.clone().filter(|_| *security == SmtpSecurity::StartTls) {
            with_timeout(STEP_TIMEOUT, "STARTTLS", connection.starttls(tls, &self.hello)).await?;
        }
        if let Some(SmtpCredentials { user, password }) = credentials {
            let credentials = Credentials::new(user.clone(), password.expose_secret().to_owned());
            with_timeout(STEP_TIMEOUT, "authentication", connection.auth(DEFAULT_MECHANISMS, &credentials)).await?;
        }
        Ok(connection)
    }

    /// The password in every form in which it is sent. It must not be logged if the server quotes it.
    pub(super) fn secrets(&self) -> Vec<SecretString> {
        let Some(SmtpCredentials { user, password }) = &self.settings.credentials else {
            return Vec::new();
        };
        let login = BASE64_STANDARD.encode(password.expose_secret());
        let plain = BASE64_STANDARD.encode(format!("\0{user}\0{}", password.expose_secret()));
        vec![plain.into(), login.into(), password.clone()]
    }
}

/// Runs one step of the protocol with a time limit.
async fn with_timeout<T>(
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

    /// A mail server with scripted answers, which records what it receives.
    struct Server {
        port: u16,
        /// The lines of each connection.
        received: Arc<Mutex<Vec<Vec<String>>>>,
    }

    impl Server {
        /// `answer` returns the answer to a line. An empty answer is not sent.
        fn start(answer: fn(&str) -> &'static str) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = listener.local_addr().expect("an address").port();
            let received = Arc::<Mutex<Vec<Vec<String>>>>::default();
            let record = Arc::clone(&received);
            std::thread::spawn(move || {
                for (number, stream) in listener.incoming().enumerate() {
                    record.lock().expect("a lock").push(Vec::new());
                    let (record, mut stream) = (Arc::clone(&record), stream.expect("a connection"));
                    std::thread::spawn(move || {
                        stream.write_all(b"220 mail.example\r\n").expect("a greeting");
                        for line in BufReader::new(stream.try_clone().expect("a stream")).lines().map_while(Result::ok)
                        {
                            let reply = answer(&line);
                            record.lock().expect("a lock")[number].push(line);
                            // Fails if the client has closed the connection.
                            stream.write_all(reply.as_bytes()).ok();
                        }
                    });
                }
            });
            Self { port, received }
        }

        /// Waits until the last line of the connection with this number, counted from 1, is DATA.
        async fn wait_for_data(&self, connection: usize) {
            let has_data = || self.received().get(connection - 1)?.last().filter(|line| *line == "DATA").map(drop);
            while has_data().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }

        fn received(&self) -> Vec<Vec<String>> {
            self.received.lock().expect("a lock").clone()
        }
    }

    /// The answers of a server that accepts every mail.
    fn accept_all(line: &str) -> &'static str {
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
    async fn consecutive_mails_use_one_connection() {
        let server = Server::start(accept_all);
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Plaintext)).expect("a transport");
        send(&smtp).await.expect("sent");
        send(&smtp).await.expect("sent");
        let received = server.received();
        assert_eq!(received.len(), 1, "{received:?}");
        let verbs: Vec<_> = received[0].iter().map(|line| line.split([' ', ':']).next().expect("a word")).collect();
        let mail = ["MAIL", "RCPT", "DATA", "Subject", "", "..", "hello", "", "."];
        assert_eq!(verbs, [["EHLO", "AUTH"].as_slice(), &mail, &["NOOP"], &mail].concat());
        assert_eq!(received[0][1], format!("AUTH PLAIN {}", BASE64_STANDARD.encode("\0postern\0hunter2")));
        let secrets: Vec<_> = smtp.secrets().iter().map(|secret| secret.expose_secret().to_owned()).collect();
        assert!(received[0][1].ends_with(&secrets[0]), "the encoded password is in secrets()");
        assert!(!format!("{smtp:?}").contains("hunter2"));
    }

    #[tokio::test]
    async fn the_connection_of_a_cancelled_mail_is_closed() {
        // DATA is never answered. A second mail on the same connection would read the answer to the first one.
        let server = Server::start(|line| if line == "DATA" { "" } else { accept_all(line) });
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Plaintext)).expect("a transport");
        for connections in 1..=2 {
            tokio::select! {
                outcome = send(&smtp) => panic!("DATA is not answered: {outcome:?}"),
                () = server.wait_for_data(connections) => {}
            }
            assert_eq!(server.received().len(), connections);
        }
    }

    #[tokio::test]
    async fn the_connection_of_a_refused_mail_is_closed() {
        let server = Server::start(|line| if line.starts_with("RCPT") { "450 later\r\n" } else { accept_all(line) });
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Plaintext)).expect("a transport");
        for connections in 1..=2 {
            let refusal = send(&smtp).await.expect_err("refused");
            assert!(matches!(&refusal, SmtpError::Failed(error) if error.is_transient()), "{refusal:?}");
            assert_eq!(server.received().len(), connections);
        }
    }

    #[tokio::test]
    async fn an_error_contains_the_answer_of_the_server_without_secrets() {
        let server = Server::start(|line| {
            if line.starts_with("RCPT") { "550 5.1.1 <B@example.com> unknown, hunter2\r\n" } else { accept_all(line) }
        });
        let from = Sender::parse("a@example.com").expect("a sender");
        let settings = TransportSettings::Smtp(settings(server.port, SmtpSecurity::Plaintext));
        let mailer = Mailer::new(settings, from).expect("a mailer");
        let to = Email::parse("b@example.com").expect("an address");
        let text = "a text".to_owned();
        let content =
            MailContent { kind: MailKind::AccountExists, subject: text.clone(), html: text.clone(), text, link: None };
        let error =
            mailer.send(MailId(Uuid::nil()), &to, &content, OffsetDateTime::UNIX_EPOCH).await.expect_err("refused");
        assert_eq!(error.kind, SendErrorKind::Permanent);
        let expected =
            "the mail server rejected the mail permanently: permanent error (550): 5.1.1 <…@example.com> unknown, […]";
        assert_eq!(error.to_string(), expected);
    }

    #[tokio::test]
    async fn without_starttls_only_ehlo_is_sent() {
        let server = Server::start(accept_all);
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::StartTls)).expect("a transport");
        let refusal = send(&smtp).await.expect_err("no STARTTLS");
        assert!(matches!(&refusal, SmtpError::Failed(error) if error.is_client()), "{refusal:?}");
        let received = server.received();
        assert!(received[0].iter().all(|line| line.starts_with("EHLO")), "{received:?}");
    }

    #[tokio::test]
    async fn tls_needs_no_process_wide_provider_and_a_closed_port_is_an_error() {
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        for security in [SmtpSecurity::Tls, SmtpSecurity::StartTls] {
            let smtp = Smtp::new(settings(port, security)).expect("a transport");
            let refusal = send(&smtp).await.expect_err("a closed port");
            assert!(matches!(&refusal, SmtpError::Failed(error) if error.status().is_none()), "{refusal:?}");
        }
    }

    #[tokio::test]
    async fn tls_to_a_server_without_tls_is_an_error() {
        let server = Server::start(accept_all);
        let smtp = Smtp::new(settings(server.port, SmtpSecurity::Tls)).expect("a transport");
        let refusal = send(&smtp).await.expect_err("no TLS");
        assert!(matches!(&refusal, SmtpError::Failed(error) if error.status().is_none()), "{refusal:?}");
        assert!(!format!("{:?}", server.received()).contains("AUTH"));
    }
}
