//! A small service that accepts Postern's access tokens.
//!
//! `GET /hello` verifies the token by itself, with Postern's public keys. That costs no call, and it notices a logout
//! only when the token expires. `GET /account` asks Postern with the generated client. That costs a call, and it
//! notices a logout at once. Use the first for most requests, and the second before something that cannot be undone.
//!
//! Start `postern serve`, then `cargo run --example verify_tokens`, then:
//! `curl -H "Authorization: Bearer $ACCESS_TOKEN" http://127.0.0.1:8090/hello`

use std::{error::Error, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, jwk::JwkSet};
use postern::proto::{GetMeRequest, User, auth_service_client::AuthServiceClient};
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::{Channel, Endpoint};

/// The claims that this service reads. RFC 9068 names them; `username` is Postern's own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Claims {
    pub sub: String,
    pub username: String,
    pub roles: Vec<String>,
}

/// Verifies access tokens with Postern's public keys.
#[derive(Debug)]
pub struct Verifier {
    keys: JwkSet,
    issuer: String,
    audience: String,
}

impl Verifier {
    /// Fetches the public keys. A real service also fetches them again every few minutes, and when it meets a `kid`
    /// that it does not know.
    pub async fn fetch(postern: SocketAddr, issuer: &str, audience: &str) -> Result<Self, Box<dyn Error>> {
        let stream = TokioIo::new(TcpStream::connect(postern).await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
        tokio::spawn(connection);
        let request = http::Request::get("/.well-known/jwks.json").header(header::HOST, postern.to_string());
        let response = sender.send_request(request.body(Empty::<axum::body::Bytes>::new())?).await?;
        let keys = serde_json::from_slice(&response.collect().await?.to_bytes())?;
        Ok(Self { keys, issuer: issuer.to_owned(), audience: audience.to_owned() })
    }

    /// The claims of a token that Postern issued for this audience and that has not expired.
    pub fn verify(&self, token: &str) -> Option<Claims> {
        let header = jsonwebtoken::decode_header(token).ok()?;
        // An access token, and no other kind of token by the same issuer (RFC 9068 §4).
        if header.typ.as_deref() != Some("at+jwt") {
            return None;
        }
        let key = DecodingKey::from_jwk(self.keys.find(&header.kid?)?).ok()?;
        // The algorithm is this service's choice. One that is taken from the token could be `none`.
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        jsonwebtoken::decode(token, &key, &validation).ok().map(|data| data.claims)
    }
}

/// Asks Postern for the account of a token. Fails from the moment when its session has ended.
pub async fn account(channel: Channel, token: &str) -> Result<User, tonic::Status> {
    let mut request = tonic::Request::new(GetMeRequest {});
    let value = format!("Bearer {token}").parse().map_err(|_| tonic::Status::unauthenticated("not a token"))?;
    request.metadata_mut().insert("authorization", value);
    let reply = AuthServiceClient::new(channel).get_me(request).await?.into_inner();
    reply.user.ok_or_else(|| tonic::Status::internal("the reply has no user"))
}

/// The token of `Authorization: Bearer <token>` (RFC 6750 §2.1).
fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}

fn unauthorized() -> Response {
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")]).into_response()
}

/// The routes of the service.
pub fn router(verifier: Verifier, postern: Channel) -> Router {
    let hello = async |State(verifier): State<Arc<Verifier>>, headers: HeaderMap| {
        let claims = bearer_token(&headers).and_then(|token| verifier.verify(token));
        claims.map_or_else(unauthorized, |claims| format!("Hello, {}!\n", claims.username).into_response())
    };
    let account = async |State(postern): State<Channel>, headers: HeaderMap| {
        let Some(token) = bearer_token(&headers) else {
            return unauthorized();
        };
        match account(postern, token).await {
            Ok(user) => format!("{}\n", user.email).into_response(),
            Err(status) if status.code() == tonic::Code::Unauthenticated => unauthorized(),
            Err(_) => StatusCode::BAD_GATEWAY.into_response(),
        }
    };
    let hello = Router::new().route("/hello", get(hello)).with_state(Arc::new(verifier));
    hello.merge(Router::new().route("/account", get(account)).with_state(postern))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let verifier = Verifier::fetch(([127, 0, 0, 1], 8080).into(), "http://localhost:8080", "postern").await?;
    let postern = Endpoint::from_static("http://127.0.0.1:50051").connect_lazy();
    let listener = TcpListener::bind(("127.0.0.1", 8090)).await?;
    println!("listening on {}", listener.local_addr()?);
    let router = router(verifier, postern);
    loop {
        let (stream, _) = listener.accept().await?;
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}
