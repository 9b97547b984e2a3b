//! Revocations from the real server, with and without a connection.

use std::time::Duration;

use postern_client::{FeedOptions, RevocationFeed, Verifier, VerifyError, WhenUnknown};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::stage::{new_person, postern, postern_through_proxy, service, stage, until, verifier};

/// The proxy is one, so one test at a time cuts it.
static PROXY: Mutex<()> = Mutex::const_new(());

async fn following(when_unknown: WhenUnknown, staleness: u64) -> (Verifier, RevocationFeed) {
    let options = FeedOptions::new(when_unknown).max_staleness(Duration::from_secs(staleness));
    let feed = RevocationFeed::start(postern_through_proxy(), service(postern()), options);
    feed.ready().await;
    (verifier().revocations(feed.clone()).build().expect("a verifier"), feed)
}

async fn log_out(person: &Value) {
    stage("/logout", json!({"refreshToken": person["refreshToken"]})).await;
}

fn token_of(person: &Value) -> &str {
    person["accessToken"].as_str().expect("a token")
}

#[tokio::test]
async fn a_logout_is_known_within_a_second() {
    let _proxy = PROXY.lock().await;
    let (verifier, _feed) = following(WhenUnknown::Refuse, 30).await;
    let person = new_person().await;
    let caller = verifier.verify(token_of(&person)).await.expect("logged in");
    assert_eq!((caller.subject.as_str(), caller.has_role("user")), (person["id"].as_str().expect("an id"), true));
    log_out(&person).await;
    let revoked = async || verifier.verify(token_of(&person)).await == Err(VerifyError::SessionRevoked);
    assert!(until("the logout is known", 5, revoked).await < Duration::from_secs(1));
}

#[tokio::test]
async fn without_a_connection_the_choice_counts_and_afterwards_everything_is_known() {
    let _proxy = PROXY.lock().await;
    let (refusing, feed) = following(WhenUnknown::Refuse, 6).await;
    let (accepting, _feed) = following(WhenUnknown::Accept, 6).await;
    let (person, leaver) = (new_person().await, new_person().await);
    stage("/feed/cut", Value::Null).await;
    log_out(&leaver).await;
    let unknown = async || refusing.verify(token_of(&person)).await == Err(VerifyError::RevocationsUnknown);
    until("revocations are unknown", 20, unknown).await;
    assert!(!feed.is_complete());
    assert!(accepting.verify(token_of(&leaver)).await.is_ok(), "nobody knows");
    stage("/feed/restore", Value::Null).await;
    until("it heals", 20, async || refusing.verify(token_of(&person)).await.is_ok()).await;
    for verifier in [&refusing, &accepting] {
        let revoked = async || verifier.verify(token_of(&leaver)).await == Err(VerifyError::SessionRevoked);
        until("what happened meanwhile is known", 20, revoked).await;
    }
}

#[tokio::test]
async fn before_the_first_answer_revocations_are_unknown() {
    let nowhere = postern_client::endpoint("http://127.0.0.1:9").expect("an address").connect_lazy();
    let feed = RevocationFeed::start(nowhere, service(postern()), FeedOptions::new(WhenUnknown::Refuse));
    let verifier = verifier().revocations(feed).build().expect("a verifier");
    let person = new_person().await;
    assert_eq!(verifier.verify(token_of(&person)).await, Err(VerifyError::RevocationsUnknown));
    assert_eq!(verifier.verify("nonsense").await, Err(VerifyError::TokenInvalid));
}
