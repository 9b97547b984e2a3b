//! What `tests/libraries/stage` offers.

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use postern_client::{Credentials, InMemory, TokenSource, Verifier, VerifierBuilder, endpoint};
use serde_json::Value;
use tonic::transport::Channel;

#[expect(clippy::disallowed_methods, reason = "the stage passes its addresses in the environment")]
pub fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is missing: run tests/libraries/stage clients/rust/test"))
}

pub fn postern() -> Channel {
    endpoint(format!("http://{}", variable("POSTERN_GRPC_ADDR"))).expect("an address").connect_lazy()
}

/// The same server through a proxy that can be cut.
pub fn postern_through_proxy() -> Channel {
    endpoint(format!("http://{}", variable("POSTERN_FEED_ADDR"))).expect("an address").connect_lazy()
}

pub fn verifier() -> VerifierBuilder {
    Verifier::builder(variable("POSTERN_ISSUER"), variable("POSTERN_AUDIENCE"))
}

pub fn service(channel: Channel) -> TokenSource {
    let credentials = Credentials::Service {
        client_id: variable("POSTERN_CLIENT_ID"),
        client_secret: variable("POSTERN_CLIENT_SECRET"),
    };
    TokenSource::new(channel, credentials)
}

pub fn login(channel: Channel, person: &Value) -> TokenSource {
    let text = |name: &str| person[name].as_str().expect(name).to_owned();
    let store = Box::new(InMemory::with(text("refreshToken")));
    TokenSource::new(channel, Credentials::Login { email: text("email"), password: text("password"), store })
}

/// Asks the stage for something.
pub async fn stage(path: &str, body: Value) -> Value {
    let url = format!("{}{path}", variable("POSTERN_STAGE"));
    let answer = reqwest::Client::new().post(url).body(body.to_string()).send().await.expect("an answer of the stage");
    let status = answer.status();
    let text = answer.text().await.expect("a body");
    assert!(status.is_success(), "{path}: {text}");
    serde_json::from_str(&text).expect("JSON")
}

pub async fn new_person() -> Value {
    stage("/accounts", Value::Null).await
}

pub async fn until<F: Future<Output = bool>>(what: &str, seconds: u64, mut probe: impl FnMut() -> F) -> Duration {
    let started = Instant::now();
    while !probe().await {
        assert!(started.elapsed() < Duration::from_secs(seconds), "{what}: not within {seconds} s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    started.elapsed()
}

/// An HTTP server with a JWK Set that counts how often it is fetched. Each answer takes a moment.
pub async fn serve_keys(jwks: Value) -> (String, Arc<AtomicUsize>) {
    let fetches = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&fetches);
    let answer = move || {
        counted.fetch_add(1, Ordering::SeqCst);
        let text = jwks.to_string();
        async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            text
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/jwks.json", listener.local_addr().expect("an address"));
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/jwks.json", get(answer))).await });
    (url, fetches)
}
