//! Tokens for outgoing calls. A relay before the real server loses answers; a small server issues tokens that live for seconds.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use postern_client::{
    AuthorizeLayer, Credentials, InMemory, Reason, TokenError, TokenSource,
    proto::{
        GetMeRequest, GetMeResponse, IntrospectTokenRequest, IntrospectTokenResponse, IssueServiceTokenRequest,
        IssueServiceTokenResponse, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, RefreshRequest,
        RefreshResponse, RevokeTokenRequest, RevokeTokenResponse, SignUpRequest, SignUpResponse,
        WatchRevocationsRequest, WatchRevocationsResponse,
        auth_service_client::AuthServiceClient,
        auth_service_server::{AuthService, AuthServiceServer},
        token_service_server::{TokenService, TokenServiceServer},
    },
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_stream::{Empty, wrappers::TcpListenerStream};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Server},
};
use tower::Layer as _;

use crate::stage::{login, new_person, postern, service, stage};

type Answer<T> = Result<Response<T>, Status>;

/// Passes logins and refreshes on, and loses the answers of the first refreshes.
#[derive(Clone)]
struct Relay {
    upstream: AuthServiceClient<Channel>,
    to_lose: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<String>>>,
    logins: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl AuthService for Relay {
    async fn sign_up(&self, _: Request<SignUpRequest>) -> Answer<SignUpResponse> {
        Err(Status::unimplemented(""))
    }
    async fn login(&self, request: Request<LoginRequest>) -> Answer<LoginResponse> {
        self.logins.fetch_add(1, Ordering::SeqCst);
        self.upstream.clone().login(request.into_inner()).await
    }
    async fn refresh(&self, request: Request<RefreshRequest>) -> Answer<RefreshResponse> {
        let message = request.into_inner();
        self.seen.lock().expect("a lock").push(message.refresh_token.clone());
        let answer = self.upstream.clone().refresh(message).await;
        let lose = |left: usize| left.checked_sub(1);
        if self.to_lose.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lose).is_ok() {
            return Err(Status::unavailable("the answer was lost"));
        }
        answer
    }
    async fn logout(&self, _: Request<LogoutRequest>) -> Answer<LogoutResponse> {
        Err(Status::unimplemented(""))
    }
    async fn get_me(&self, _: Request<GetMeRequest>) -> Answer<GetMeResponse> {
        Err(Status::unimplemented(""))
    }
}

async fn serve(routes: tonic::service::Routes) -> Channel {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let uri = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(Server::builder().add_routes(routes).serve_with_incoming(TcpListenerStream::new(listener)));
    postern_client::endpoint(uri).expect("an address").connect_lazy()
}

async fn relay(to_lose: usize) -> (Relay, Channel) {
    let relay = Relay {
        upstream: AuthServiceClient::new(postern()),
        to_lose: Arc::new(AtomicUsize::new(to_lose)),
        seen: Arc::default(),
        logins: Arc::default(),
    };
    let channel = serve(tonic::service::Routes::new(AuthServiceServer::new(relay.clone()))).await;
    (relay, channel)
}

async fn me(tokens: TokenSource) -> Result<Response<GetMeResponse>, Status> {
    AuthServiceClient::new(AuthorizeLayer::new(tokens).layer(postern())).get_me(GetMeRequest {}).await
}

#[tokio::test]
async fn answers_that_are_lost_log_nobody_out() {
    let person = new_person().await;
    let (relay, channel) = relay(2).await;
    let tokens = login(channel, &person);
    let user = me(tokens.clone()).await.expect("logged in").into_inner().user.expect("a user");
    assert_eq!(user.id, person["id"].as_str().expect("an id"));
    let seen = relay.seen.lock().expect("a lock").clone();
    assert_eq!(seen, vec![person["refreshToken"].as_str().expect("a token").to_owned(); 3]);
    assert_eq!(relay.logins.load(Ordering::SeqCst), 0);
    // The next renewal uses the token that was kept.
    tokens.invalidate();
    assert!(me(tokens).await.is_ok());
    assert_ne!(relay.seen.lock().expect("a lock").last(), seen.last());
}

#[tokio::test]
async fn a_login_that_has_ended_is_made_again_with_the_password_and_without_one_it_is_told() {
    let person = new_person().await;
    stage("/logout", json!({"refreshToken": person["refreshToken"]})).await;
    let (relay, channel) = relay(0).await;
    assert!(me(login(channel.clone(), &person)).await.is_ok());
    assert_eq!(relay.logins.load(Ordering::SeqCst), 1);
    let store = Box::new(InMemory::with(person["refreshToken"].as_str().expect("a token")));
    match TokenSource::new(channel, Credentials::Refresh { store }).token().await {
        Err(TokenError::Call(error)) => assert_eq!(error.reason, Some(Reason::RefreshTokenInvalid)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_hundred_callers_cause_one_renewal_and_one_that_gives_up_cancels_nothing() {
    let person = new_person().await;
    let (relay, channel) = relay(1).await;
    let tokens = login(channel, &person);
    let impatient = tokio::time::timeout(Duration::from_millis(20), tokens.token()).await;
    let callers: Vec<_> = (0..100)
        .map(|_| {
            tokio::spawn({
                let tokens = tokens.clone();
                async move { tokens.token().await }
            })
        })
        .collect();
    let mut got = Vec::new();
    for caller in callers {
        got.push(caller.await.expect("no panic").expect("a token"));
    }
    assert!(got.windows(2).all(|pair| pair[0] == pair[1]));
    assert!(impatient.is_err() || impatient.is_ok_and(|token| token.is_ok()));
    assert_eq!(relay.seen.lock().expect("a lock").len(), 2, "the one that was lost, and its repetition");
}

#[tokio::test]
async fn a_service_gets_a_token_that_postern_takes() {
    assert!(service(postern()).token().await.is_ok());
    let credentials =
        Credentials::Service { client_id: "nobody".to_owned(), client_secret: "postern_wrong".to_owned() };
    match TokenSource::new(postern(), credentials).token().await {
        Err(TokenError::Call(error)) => assert_eq!(error.reason, Some(Reason::InvalidClient)),
        other => panic!("{other:?}"),
    }
}

/// Issues tokens that live for two seconds, for as long as it is asked to.
#[derive(Clone, Default)]
struct ShortLived {
    issued: Arc<AtomicUsize>,
    is_down: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl TokenService for ShortLived {
    type WatchRevocationsStream = Empty<Result<WatchRevocationsResponse, Status>>;

    async fn issue_service_token(&self, _: Request<IssueServiceTokenRequest>) -> Answer<IssueServiceTokenResponse> {
        if self.is_down.load(Ordering::SeqCst) > 0 {
            return Err(Status::unavailable("down"));
        }
        let number = self.issued.fetch_add(1, Ordering::SeqCst);
        let claims = json!({"iat": 1000, "exp": 1002, "jti": number}).to_string();
        let access_token = format!("e30.{}.e30", BASE64_URL_SAFE_NO_PAD.encode(claims));
        Ok(Response::new(IssueServiceTokenResponse { access_token, ..IssueServiceTokenResponse::default() }))
    }
    async fn introspect_token(&self, _: Request<IntrospectTokenRequest>) -> Answer<IntrospectTokenResponse> {
        Err(Status::unimplemented(""))
    }
    async fn revoke_token(&self, _: Request<RevokeTokenRequest>) -> Answer<RevokeTokenResponse> {
        Err(Status::unimplemented(""))
    }
    async fn watch_revocations(&self, _: Request<WatchRevocationsRequest>) -> Answer<Self::WatchRevocationsStream> {
        Err(Status::unimplemented(""))
    }
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires_and_used_while_that_fails() {
    let server = ShortLived::default();
    let channel = serve(tonic::service::Routes::new(TokenServiceServer::new(server.clone()))).await;
    let credentials = Credentials::Service { client_id: "a".to_owned(), client_secret: "b".to_owned() };
    let tokens = TokenSource::new(channel, credentials);
    let first = tokens.token().await.expect("a token");
    assert_eq!(tokens.token().await.expect("a token"), first);
    // Four fifths of two seconds have passed: the old one is still handed out, and a new one is fetched beside it.
    tokio::time::sleep(Duration::from_millis(1650)).await;
    server.is_down.store(1, Ordering::SeqCst);
    assert_eq!(tokens.token().await.expect("a token"), first);
    server.is_down.store(0, Ordering::SeqCst);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while tokens.token().await.expect("a token") == first {
        assert!(tokio::time::Instant::now() < deadline, "never renewed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(server.issued.load(Ordering::SeqCst) >= 2);
}

#[test]
fn nothing_of_credentials_is_printed() {
    let secrets = ["ada@example.com", "the password", "the secret", "the refresh token"].map(str::to_owned);
    let [email, password, client_secret, refresh_token] = secrets.clone();
    let store = Box::new(InMemory::with(refresh_token));
    let shown = format!(
        "{:?} {:?}",
        Credentials::Login { email, password, store },
        Credentials::Service { client_id: "id".to_owned(), client_secret }
    );
    assert!(secrets.iter().all(|secret| !shown.contains(secret)), "{shown}");
    assert_eq!(Value::from(shown), json!("Login Service"));
}
