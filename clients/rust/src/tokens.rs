//! Access tokens for outgoing calls: from a login or from a service account, renewed before they expire.
//!
//! One renewal is under way at a time, in a task of its own, so that a caller that gives up does not cancel it for the others.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderValue, Request, header::AUTHORIZATION};
use serde::Deserialize;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tonic::{Code, Status, transport::Channel};
use tower::{Layer, Service};

use crate::{
    error::{CallError, Reason},
    proto::{
        IssueServiceTokenRequest, LoginRequest, RefreshRequest, TokenPair, auth_service_client::AuthServiceClient,
        token_service_client::TokenServiceClient,
    },
    retry,
};

const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// How long callers that have no token wait for Postern to come back.
const RENEWAL_DEADLINE: Duration = Duration::from_secs(30);
/// A token is renewed when a fifth of its time is left, but never earlier than this.
const RENEW_AHEAD: Duration = Duration::from_mins(1);
/// After a renewal that failed, the next one that was not waited for.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);

/// Where refresh tokens are kept. Each can be used once, so the newest has to survive a restart, or the login is lost.
#[async_trait]
pub trait RefreshTokenStore: Send + Sync {
    /// The refresh token that was saved last. `None`: there is none.
    async fn load(&self) -> Result<Option<String>, Box<dyn std::error::Error + Send + Sync>>;
    /// Keeps a refresh token in the place of the one before. It is called before the access token beside it is used.
    async fn save(&self, refresh_token: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Keeps the refresh token in memory.
#[derive(Default)]
pub struct InMemory(std::sync::Mutex<Option<String>>);

impl InMemory {
    /// Begins with a refresh token from an earlier login.
    pub fn with(refresh_token: impl Into<String>) -> Self {
        Self(std::sync::Mutex::new(Some(refresh_token.into())))
    }
}

impl fmt::Debug for InMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InMemory")
    }
}

#[async_trait]
impl RefreshTokenStore for InMemory {
    async fn load(&self) -> Result<Option<String>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    async fn save(&self, refresh_token: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(refresh_token.to_owned());
        Ok(())
    }
}

/// What tokens are got with.
pub enum Credentials {
    /// A service account, by its client id and the secret of one of its keys.
    Service {
        /// The id of the account.
        client_id: String,
        /// `postern_…`, as it was shown when the key was created.
        client_secret: String,
    },
    /// A login that is kept by refresh tokens. It logs in when there is no refresh token, or none that Postern accepts.
    Login {
        /// The address of the account.
        email: String,
        /// Its password.
        password: String,
        /// Keeps the login.
        store: Box<dyn RefreshTokenStore>,
    },
    /// A login that was made elsewhere: the store has its refresh token. When it has ended, it has ended.
    Refresh {
        /// Has the refresh token, and gets the next ones.
        store: Box<dyn RefreshTokenStore>,
    },
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service { .. } => "Service",
            Self::Login { .. } => "Login",
            Self::Refresh { .. } => "Refresh",
        })
    }
}

/// Why there is no access token.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TokenError {
    /// Postern refused, or could not be reached. [`Reason::RefreshTokenInvalid`]: the login has ended.
    #[error("no access token: {0}")]
    Call(#[from] CallError),
    /// The store of refresh tokens failed, or has none.
    #[error("no access token: the store of refresh tokens: {0}")]
    Store(String),
    /// Postern's answer has no token that this release understands.
    #[error("no access token: the answer has none")]
    Answer,
}

/// A source of access tokens. Cloning it is cheap, and all clones share one token.
#[derive(Clone)]
pub struct TokenSource(Arc<Source>);

struct Source {
    channel: Channel,
    credentials: Credentials,
    current: RwLock<Option<AccessToken>>,
    renewal: Arc<Mutex<LastRenewal>>,
}

#[derive(Clone)]
struct AccessToken {
    text: Arc<str>,
    renew_at: Instant,
    expires_at: Instant,
}

#[derive(Default)]
struct LastRenewal {
    failure: Option<(Instant, TokenError)>,
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TokenSource").field(&self.0.credentials).finish()
    }
}

impl TokenSource {
    /// Nothing is called until a token is asked for.
    pub fn new(channel: Channel, credentials: Credentials) -> Self {
        Self(Arc::new(Source { channel, credentials, current: RwLock::default(), renewal: Arc::default() }))
    }

    /// An access token that is valid now. It waits only when there is none.
    pub async fn token(&self) -> Result<Arc<str>, TokenError> {
        let asked_at = Instant::now();
        if let Some(token) = self.0.current() {
            if token.renew_at <= asked_at {
                self.renew_beside();
            }
            return Ok(token.text);
        }
        let last = Arc::clone(&self.0.renewal).lock_owned().await;
        // Whoever waited may find that the one before has renewed it, or has just failed to.
        if let Some(token) = self.0.current() {
            return Ok(token.text);
        }
        if let Some((_, error)) = last.failure.as_ref().filter(|(at, _)| *at >= asked_at) {
            return Err(error.clone());
        }
        self.spawn_renewal(last).await.map_err(|_| TokenError::Answer)?
    }

    /// Forgets the access token: the next caller gets another one. For a token that Postern refuses although it has not
    /// expired, because it was revoked.
    pub fn invalidate(&self) {
        *self.0.current.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Starts a renewal if none is under way and the last one did not fail just now.
    fn renew_beside(&self) {
        if let Ok(last) = Arc::clone(&self.0.renewal).try_lock_owned()
            && last.failure.as_ref().is_none_or(|(at, _)| at.elapsed() > PAUSE_AFTER_FAILURE)
        {
            drop(self.spawn_renewal(last));
        }
    }

    fn spawn_renewal(
        &self,
        mut last: OwnedMutexGuard<LastRenewal>,
    ) -> tokio::task::JoinHandle<Result<Arc<str>, TokenError>> {
        let source = Arc::clone(&self.0);
        tokio::spawn(async move {
            let renewed = source.renew().await;
            last.failure = renewed.as_ref().err().map(|error| (Instant::now(), error.clone()));
            renewed
        })
    }
}

impl Source {
    /// The token, unless it has expired.
    fn current(&self) -> Option<AccessToken> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.clone().filter(|token| token.expires_at > Instant::now())
    }

    /// Gets a token. While it is not known whether Postern carried a call out, the same call is made again: with the same
    /// refresh token Postern then answers the same, so that a lost answer is no logout.
    async fn renew(&self) -> Result<Arc<str>, TokenError> {
        let started = Instant::now();
        for failures in 0.. {
            match self.get().await {
                Err(TokenError::Call(error)) if error.is_temporary() => {
                    let pause = retry::pause(failures, &error);
                    if started.elapsed() + pause > RENEWAL_DEADLINE {
                        return Err(error.into());
                    }
                    tokio::time::sleep(pause).await;
                }
                Err(error) => return Err(error),
                Ok(text) => {
                    let token = AccessToken::new(text, Instant::now()).ok_or(TokenError::Answer)?;
                    let text = Arc::clone(&token.text);
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(token);
                    return Ok(text);
                }
            }
        }
        Err(TokenError::Answer)
    }

    async fn get(&self) -> Result<String, TokenError> {
        match &self.credentials {
            Credentials::Service { client_id, client_secret } => {
                let request =
                    IssueServiceTokenRequest { client_id: client_id.clone(), client_secret: client_secret.clone() };
                let mut client = TokenServiceClient::new(self.channel.clone());
                let answer = client.issue_service_token(with_deadline(request)).await;
                Ok(answer.map_err(CallError::from)?.into_inner().access_token)
            }
            Credentials::Refresh { store } => self.refresh(store.as_ref()).await,
            Credentials::Login { email, password, store } => match self.refresh(store.as_ref()).await {
                Err(TokenError::Call(error)) if error.is(&Reason::RefreshTokenInvalid) => {
                    self.login(email, password, store.as_ref()).await
                }
                Err(TokenError::Store(_)) if load(store.as_ref()).await?.is_none() => {
                    self.login(email, password, store.as_ref()).await
                }
                other => other,
            },
        }
    }

    async fn refresh(&self, store: &dyn RefreshTokenStore) -> Result<String, TokenError> {
        let refresh_token = load(store).await?.ok_or_else(|| TokenError::Store("it has none".to_owned()))?;
        let request = with_deadline(RefreshRequest { refresh_token });
        let answer = AuthServiceClient::new(self.channel.clone()).refresh(request).await;
        keep(answer.map_err(CallError::from)?.into_inner().tokens, store).await
    }

    async fn login(&self, email: &str, password: &str, store: &dyn RefreshTokenStore) -> Result<String, TokenError> {
        let request = LoginRequest { email: email.to_owned(), password: password.to_owned() };
        let answer = AuthServiceClient::new(self.channel.clone()).login(with_deadline(request)).await;
        keep(answer.map_err(CallError::from)?.into_inner().tokens, store).await
    }
}

async fn load(store: &dyn RefreshTokenStore) -> Result<Option<String>, TokenError> {
    store.load().await.map_err(|error| TokenError::Store(error.to_string()))
}

/// Saves the refresh token, and only then returns the access token.
async fn keep(tokens: Option<TokenPair>, store: &dyn RefreshTokenStore) -> Result<String, TokenError> {
    let tokens = tokens.ok_or(TokenError::Answer)?;
    store.save(&tokens.refresh_token).await.map_err(|error| TokenError::Store(error.to_string()))?;
    Ok(tokens.access_token)
}

fn with_deadline<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}

impl AccessToken {
    /// Its lifetime counts from now, so that a wrong clock of this machine does not matter. `None`: it is no JWT.
    fn new(text: String, now: Instant) -> Option<Self> {
        #[derive(Deserialize)]
        struct Dates {
            iat: u64,
            exp: u64,
        }
        let payload = BASE64_URL_SAFE_NO_PAD.decode(text.split('.').nth(1)?).ok()?;
        let dates: Dates = serde_json::from_slice(&payload).ok()?;
        let lifetime = Duration::from_secs(dates.exp.saturating_sub(dates.iat));
        let ahead = (lifetime / 5).min(RENEW_AHEAD);
        Some(Self { text: text.into(), renew_at: now + lifetime.saturating_sub(ahead), expires_at: now + lifetime })
    }
}

/// Puts the token of a source into every call: `AuthServiceClient::new(AuthorizeLayer::new(tokens).layer(channel))`.
#[derive(Debug, Clone)]
pub struct AuthorizeLayer(TokenSource);

impl AuthorizeLayer {
    /// Calls get the token of this source.
    pub fn new(tokens: TokenSource) -> Self {
        Self(tokens)
    }
}

impl<S> Layer<S> for AuthorizeLayer {
    type Service = Authorized<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Authorized { inner, tokens: self.0.clone() }
    }
}

/// A channel whose calls have an access token.
#[derive(Debug, Clone)]
pub struct Authorized<S> {
    inner: S,
    tokens: TokenSource,
}

impl<S, B> Service<Request<B>> for Authorized<S>
where
    S: Service<Request<B>> + Clone + Send + 'static,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // The service that is ready is the one to call; the clone takes its place.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let tokens = self.tokens.clone();
        Box::pin(async move {
            let token = tokens.token().await.map_err(refusal)?;
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
            inner.call(request).await.map_err(Into::into)
        })
    }
}

/// A call that could not get a token fails as the call for the token did.
fn refusal(error: TokenError) -> Status {
    let message = error.to_string();
    match error {
        TokenError::Call(cause) => Status::new(cause.code, message),
        TokenError::Store(_) | TokenError::Answer => Status::new(Code::Unauthenticated, message),
    }
}
