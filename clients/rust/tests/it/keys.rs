//! How often the keys are fetched, and what happens when they rotate.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use postern_client::{Clock, KeySource, Verifier, VerifyError};
use serde_json::{Value, json};

use crate::stage::{new_person, postern, serve_keys, service, stage, variable, verifier};

async fn published() -> Value {
    let url = format!("{}/.well-known/jwks.json", variable("POSTERN_ISSUER"));
    let text = reqwest::get(url).await.expect("an answer").text().await.expect("a body");
    serde_json::from_str(&text).expect("JSON")
}

fn with_kid(token: &str, kid: &str) -> String {
    let (_, rest) = token.split_once('.').expect("a token");
    let header = json!({"typ": "at+jwt", "alg": "ES256", "kid": kid}).to_string();
    format!("{}.{rest}", BASE64_URL_SAFE_NO_PAD.encode(header))
}

fn token_of(person: &Value) -> String {
    person["accessToken"].as_str().expect("a token").to_owned()
}

#[tokio::test]
async fn a_thousand_first_checks_fetch_the_keys_once() {
    let (url, fetches) = serve_keys(published().await).await;
    let verifier = verifier().keys(KeySource::at(url)).build().expect("a verifier");
    let token = token_of(&new_person().await);
    let checks = (0..1000).map(|_| {
        let (verifier, token) = (verifier.clone(), token.clone());
        tokio::spawn(async move { verifier.verify(&token).await })
    });
    for check in checks.collect::<Vec<_>>() {
        assert!(check.await.expect("no panic").is_ok());
    }
    assert_eq!(fetches.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_caller_that_gives_up_does_not_cancel_the_fetch_of_the_others() {
    let (url, fetches) = serve_keys(published().await).await;
    let verifier = verifier().keys(KeySource::at(url)).build().expect("a verifier");
    let token = token_of(&new_person().await);
    let impatient = tokio::time::timeout(Duration::from_millis(10), verifier.verify(&token)).await;
    assert!(impatient.is_err(), "the server of the keys takes longer");
    assert!(verifier.verify(&token).await.is_ok());
    assert_eq!(fetches.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn unknown_keys_cause_one_fetch_in_each_cooldown() {
    let (url, fetches) = serve_keys(published().await).await;
    let token = token_of(&new_person().await);
    #[expect(clippy::disallowed_methods, reason = "the token is of now")]
    let now = std::time::SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").as_secs();
    let seconds = Arc::new(AtomicU64::new(now));
    let read = Arc::clone(&seconds);
    let clock = Clock::new(move || UNIX_EPOCH + Duration::from_secs(read.load(Ordering::SeqCst)));
    let verifier = verifier().keys(KeySource::at(url)).clock(clock).build().expect("a verifier");
    assert!(verifier.verify(&token).await.is_ok());
    for round in 1..=3 {
        for number in 0..200 {
            let forged = with_kid(&token, &format!("unknown-{round}-{number}"));
            assert_eq!(verifier.verify(&forged).await.expect_err("refused"), VerifyError::TokenInvalid);
        }
        assert_eq!(fetches.load(Ordering::SeqCst), round);
        seconds.fetch_add(11, Ordering::SeqCst);
    }
    assert!(verifier.verify(&token).await.is_ok());
}

#[tokio::test]
async fn without_keys_a_token_is_not_called_invalid() {
    let source = KeySource::at("http://127.0.0.1:9/jwks.json");
    let verifier = verifier().keys(source).build().expect("a verifier");
    let token = token_of(&new_person().await);
    assert_eq!(verifier.verify(&token).await.expect_err("refused"), VerifyError::KeysUnavailable);
}

#[tokio::test]
async fn a_token_of_a_key_that_is_not_published_any_more_is_refused_after_the_next_fetch() {
    let (url, _) = serve_keys(published().await).await;
    let token = token_of(&new_person().await);
    let mut source = KeySource::at(url.clone());
    source.max_age = Duration::ZERO;
    source.cooldown = Duration::ZERO;
    let of_others = Verifier::builder(variable("POSTERN_ISSUER"), variable("POSTERN_AUDIENCE"));
    let (empty, _) = serve_keys(json!({"keys": []})).await;
    assert!(verifier().keys(source.clone()).build().expect("a verifier").verify(&token).await.is_ok());
    source.url = empty;
    let without = of_others.keys(source).build().expect("a verifier");
    assert_eq!(without.verify(&token).await.expect_err("refused"), VerifyError::TokenInvalid);
}

#[tokio::test]
async fn a_rotation_of_the_keys_is_not_noticed() {
    let mut source = KeySource::of_issuer(&variable("POSTERN_ISSUER"));
    source.cooldown = Duration::ZERO;
    let verifier = verifier().keys(source).build().expect("a verifier");
    let before = service(postern()).token().await.expect("a token");
    assert!(verifier.verify(&before).await.is_ok());
    stage("/keys/rotate", Value::Null).await;
    let after = service(postern()).token().await.expect("a token");
    assert_ne!(before.split('.').next(), after.split('.').next(), "another key");
    assert!(verifier.verify(&after).await.is_ok());
    assert!(verifier.verify(&before).await.is_ok());
}
