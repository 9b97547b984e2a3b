//! The running service: built by the production `build()`, on its own ports, with a clock that only the test moves.
//! Responses are decoded into a reply or a [`Failure`].

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use postern::{
    app::{self, Addresses},
    config::Config,
    database_url::DatabaseUrl,
    domain::{
        env::{Clock, Env, ManualClock},
        mail::MailKind,
    },
    grpc::ERROR_DOMAIN,
    mail::{Mailer, MemoryOutbox, Sender, Sent},
    proto::{
        ChangePasswordRequest, GetMeRequest, LoginRequest, LoginResponse, LogoutRequest, RefreshRequest,
        RequestEmailChangeRequest, RequestPasswordResetRequest, ResendVerificationEmailRequest, ResetPasswordRequest,
        SignUpRequest, TokenPair, User, account_service_client::AccountServiceClient,
        auth_service_client::AuthServiceClient,
    },
};
use secrecy::ExposeSecret as _;
use time::{OffsetDateTime, macros::datetime};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

use crate::support::{Database, Engine, wait_until};

/// The time at which every test starts. It is not a whole second, as in reality.
pub const START: OffsetDateTime = datetime!(2030-01-02 03:04:05.678_901 UTC);
/// The password of every account.
pub const PASSWORD: &str = "correct horse battery staple";
/// A password to change to.
pub const NEW_PASSWORD: &str = "quite another staple for that battery";
/// The master key, which PostgreSQL requires and SQLite generates.
pub const MASTER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

/// The command line of `postern serve`, so that a test has the production defaults. If a flag is repeated, the last one
/// counts.
#[derive(Debug, clap::Parser)]
#[command(args_override_self = true)]
struct CommandLine {
    #[command(flatten)]
    config: Config,
}

/// Parses arguments into a configuration.
pub fn parse(arguments: &[&str]) -> Result<Config, clap::Error> {
    let command_line = std::iter::once("postern").chain(arguments.iter().copied());
    <CommandLine as clap::Parser>::try_parse_from(command_line).map(|parsed| parsed.config)
}

/// The configuration of a test on this database. Hashing is cheap unless the arguments say otherwise.
pub fn configuration(database: &Database, arguments: &[&str]) -> Config {
    let url = match database.database() {
        DatabaseUrl::Sqlite(file) => format!("sqlite:{}", file.display()),
        DatabaseUrl::Postgres { url, .. } => url.expose_secret().to_owned(),
    };
    let url = format!("--database-url={url}");
    let master_key = format!("--master-key={MASTER_KEY}");
    let mut all = vec![
        "--grpc-addr=127.0.0.1:0",
        "--http-addr=127.0.0.1:0",
        "--ops-addr=127.0.0.1:0",
        "--lame-duck=0s",
        "--argon2-memory-kib=64",
        "--argon2-iterations=1",
        &url,
    ];
    if matches!(database.database(), DatabaseUrl::Postgres { .. }) {
        all.extend([master_key.as_str(), "--database-max-connections=8"]);
    }
    all.extend(arguments);
    parse(&all).expect("a configuration")
}

/// The service on the database of a test. A test stops it, and the final state is checked then.
#[must_use]
pub struct TestApp<'a> {
    pub addresses: Addresses,
    pub clock: Arc<ManualClock>,
    /// The mails of the service.
    pub mails: MemoryOutbox,
    /// The mails that the test has not taken yet, oldest first.
    mailbox: Mutex<Vec<Sent>>,
    database: &'a Database,
    channel: Channel,
    stop: CancellationToken,
    running: Option<JoinHandle<()>>,
}

impl<'a> TestApp<'a> {
    pub async fn start(database: &'a Database, arguments: &[&str]) -> Self {
        Self::start_at(database, Arc::new(ManualClock::new(START)), arguments).await
    }

    async fn start_at(database: &'a Database, clock: Arc<ManualClock>, arguments: &[&str]) -> Self {
        let config = configuration(database, arguments);
        if database.engine == Engine::Postgres {
            app::migrate(&config.store).await.expect("a schema");
        }
        let (mailer, mails) = Mailer::memory(Sender::parse("Postern <no-reply@localhost>").expect("a sender"));
        let app = app::build_with(&config, Env::with_clock(Arc::clone(&clock) as _), mailer).await.expect("a service");
        let addresses = app.addresses();
        let stop = CancellationToken::new();
        let running = tokio::spawn(app.run(stop.clone()));
        let endpoint = Endpoint::from_shared(format!("http://{}", addresses.grpc)).expect("an address");
        let channel = endpoint.connect_lazy();
        Self { addresses, clock, mails, mailbox: Mutex::default(), database, channel, stop, running: Some(running) }
    }

    /// Stops the service and starts it again on the same database, with the clock unchanged.
    pub async fn restart(self, arguments: &[&str]) -> Self {
        let (database, clock) = (self.database, Arc::clone(&self.clock));
        self.stop().await;
        Self::start_at(database, clock, arguments).await
    }

    /// Stops the service as SIGTERM does, and checks that no transaction is left open.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(running) = self.running.take() {
            running.await.expect("the service stops without a panic");
        }
        self.database.assert_at_rest().await;
    }

    /// Leaves the service running until the runtime of the test ends, if stopping is not part of the test.
    pub fn abandon(mut self) {
        self.running = None;
    }

    /// Moves the service's clock.
    pub fn pass(&self, time: time::Duration) {
        self.clock.advance(time);
    }

    /// The time of the service's clock.
    pub fn now(&self) -> OffsetDateTime {
        Clock::now(&*self.clock)
    }

    pub fn auth(&self) -> AuthServiceClient<Channel> {
        AuthServiceClient::new(self.channel.clone())
    }

    pub fn account(&self) -> AccountServiceClient<Channel> {
        AccountServiceClient::new(self.channel.clone())
    }

    pub fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone())
    }

    /// Signs up `name` at `name@example.com`.
    pub async fn sign_up(&self, name: &str) -> User {
        let request = SignUpRequest {
            username: name.to_owned(),
            email: format!("{name}@example.com"),
            password: PASSWORD.to_owned(),
        };
        let reply = self.try_sign_up(request).await.expect("an account");
        reply.user.expect("its user")
    }

    pub async fn try_sign_up(&self, request: SignUpRequest) -> Result<postern::proto::SignUpResponse, Failure> {
        Ok(self.auth().sign_up(request).await?.into_inner())
    }

    /// Logs in an account of [`sign_up`](Self::sign_up).
    pub async fn log_in(&self, name: &str) -> TokenPair {
        let reply = self.try_log_in(&format!("{name}@example.com"), PASSWORD).await.expect("a session");
        reply.tokens.expect("its tokens")
    }

    pub async fn try_log_in(&self, email: &str, password: &str) -> Result<LoginResponse, Failure> {
        let request = LoginRequest { email: email.to_owned(), password: password.to_owned() };
        Ok(self.auth().login(request).await?.into_inner())
    }

    pub async fn me(&self, access_token: &str) -> Result<User, Failure> {
        let reply = self.auth().get_me(authorized(access_token, GetMeRequest {})).await?.into_inner();
        Ok(reply.user.expect("a user"))
    }

    pub async fn refresh(&self, refresh_token: &str) -> Result<TokenPair, Failure> {
        let request = RefreshRequest { refresh_token: refresh_token.to_owned() };
        let reply = self.auth().refresh(request).await?.into_inner();
        Ok(reply.tokens.expect("tokens"))
    }

    /// Asserts that neither token of a session is accepted.
    pub async fn assert_session_over(&self, tokens: &TokenPair) {
        assert_fails(self.me(&tokens.access_token).await, Code::Unauthenticated, "SESSION_REVOKED");
        assert_fails(self.refresh(&tokens.refresh_token).await, Code::Unauthenticated, "REFRESH_TOKEN_INVALID");
    }

    pub async fn log_out(&self, refresh_token: &str) -> Result<(), Failure> {
        self.end(refresh_token, false).await
    }

    pub async fn log_out_everywhere(&self, refresh_token: &str) -> Result<(), Failure> {
        self.end(refresh_token, true).await
    }

    async fn end(&self, refresh_token: &str, everywhere: bool) -> Result<(), Failure> {
        let request = LogoutRequest { refresh_token: refresh_token.to_owned(), everywhere };
        self.auth().logout(request).await?;
        Ok(())
    }

    pub async fn resend_verification(&self, email: &str) -> Result<(), Failure> {
        let request = ResendVerificationEmailRequest { email: email.to_owned() };
        self.account().resend_verification_email(request).await?;
        Ok(())
    }

    pub async fn request_reset(&self, email: &str) -> Result<(), Failure> {
        let request = RequestPasswordResetRequest { email: email.to_owned() };
        self.account().request_password_reset(request).await?;
        Ok(())
    }

    pub async fn reset_password(&self, token: &str, new_password: &str) -> Result<(), Failure> {
        let request = ResetPasswordRequest { token: token.to_owned(), new_password: new_password.to_owned() };
        self.account().reset_password(request).await?;
        Ok(())
    }

    pub async fn change_password(&self, access_token: &str, current: &str, new: &str) -> Result<TokenPair, Failure> {
        let request = ChangePasswordRequest { current_password: current.to_owned(), new_password: new.to_owned() };
        let reply = self.account().change_password(authorized(access_token, request)).await?.into_inner();
        Ok(reply.tokens.expect("tokens"))
    }

    pub async fn request_email_change(&self, access_token: &str, new_email: &str) -> Result<(), Failure> {
        let request = RequestEmailChangeRequest { new_email: new_email.to_owned(), password: PASSWORD.to_owned() };
        self.account().request_email_change(authorized(access_token, request)).await?;
        Ok(())
    }

    /// Waits for the next mail of this kind to this address, and takes it.
    pub async fn mail_to(&self, address: &str, kind: MailKind) -> Sent {
        wait_until(&format!("a {} mail comes to {address}", kind.as_str()), async || {
            let mut mailbox = self.mailbox.lock().expect("a mailbox");
            mailbox.extend(self.mails.take());
            let matches = |mail: &Sent| mail.to.as_str() == address && mail.content.kind == kind;
            let position = mailbox.iter().position(matches)?;
            Some(mailbox.remove(position))
        })
        .await
    }

    /// Waits for the next mail of this kind to this address, takes it, and returns the token in it.
    pub async fn token_to(&self, address: &str, kind: MailKind) -> String {
        let mail = self.mail_to(address, kind).await;
        let link = mail.content.link.expect("a link");
        let (_, token) = link.split_once("token=").expect("a token in the link");
        token.to_owned()
    }

    /// Waits until the outbox is empty, and asserts that the test has taken every mail.
    pub async fn assert_no_more_mail(&self) {
        wait_until("the outbox is empty", async || {
            (self.database.sql.number("SELECT count(*) FROM mail_outbox WHERE dead_time IS NULL").await == 0)
                .then_some(())
        })
        .await;
        let mut mailbox = self.mailbox.lock().expect("a mailbox");
        mailbox.extend(self.mails.take());
        assert!(mailbox.is_empty(), "{mailbox:?}");
    }
}

impl Drop for TestApp<'_> {
    fn drop(&mut self) {
        // A failing test needs no further check; a passing one must have stopped the service.
        assert!(self.running.is_none() || std::thread::panicking(), "a test did not stop its service");
    }
}

/// A request with this access token.
pub fn authorized<T>(access_token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let bearer = MetadataValue::try_from(format!("Bearer {access_token}")).expect("metadata");
    request.metadata_mut().insert("authorization", bearer);
    request
}

/// A claim of an access token, without verifying it.
pub fn claim(tokens: &TokenPair, name: &str) -> serde_json::Value {
    use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
    let payload = tokens.access_token.split('.').nth(1).expect("a payload");
    let claims: serde_json::Value =
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(payload).expect("base64url")).expect("JSON");
    claims[name].clone()
}

/// What a client learns about a failed call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub message: String,
    /// From `ErrorInfo`. Empty if there is none.
    pub reason: String,
    /// The fields in `BadRequest`.
    pub fields: Vec<String>,
    /// From `RetryInfo`.
    pub retry_delay: Option<Duration>,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let details = status.check_error_details().expect("details that can be read");
        let info = details.error_info();
        if let Some(info) = info {
            assert_eq!(info.domain, ERROR_DOMAIN);
        }
        let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
        Self {
            code: status.code(),
            message: status.message().to_owned(),
            reason: info.map(|info| info.reason.clone()).unwrap_or_default(),
            fields: violations.iter().map(|violation| violation.field.clone()).collect(),
            retry_delay: details.retry_info().and_then(|info| info.retry_delay),
        }
    }
}

/// Asserts that a call fails with this code and reason, and returns the failure.
#[track_caller]
pub fn assert_fails<T: std::fmt::Debug>(outcome: Result<T, Failure>, code: Code, reason: &str) -> Failure {
    let failure = outcome.expect_err("the call should have failed");
    assert_eq!((failure.code, failure.reason.as_str()), (code, reason), "{failure:?}");
    failure
}
