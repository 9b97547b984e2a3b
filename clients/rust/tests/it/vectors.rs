//! The vectors that the real server made and judged.

use std::{sync::Arc, time::Duration};

use postern_client::{
    Caller, Clock, Demand, KeySource, Revocations, SubjectType, Verifier, VerifyError, WhenUnknown,
    proto::{Heartbeat, RolesChanged, SessionEnded, WatchRevocationsResponse, watch_revocations_response::Event},
};
use prost_types::Timestamp;
use serde_json::{Value, json};

use crate::stage::{serve_keys, variable};

#[tokio::test]
async fn every_verdict_is_that_of_the_server() {
    let file = std::fs::read_to_string(variable("POSTERN_VECTORS")).expect("the vectors");
    let vectors: Value = serde_json::from_str(&file).expect("JSON");
    let text = |name: &str| vectors[name].as_str().expect(name).to_owned();
    let (url, _) = serve_keys(vectors["jwks"].clone()).await;
    let builder = Verifier::builder(text("issuer"), text("audience")).keys(KeySource::at(url));
    let verifier = builder.build().expect("a verifier");
    let cases = vectors["cases"].as_array().expect("cases");
    assert!(cases.len() > 200, "{} cases", cases.len());
    for case in cases {
        let verdict = verdict_of(&verifier, case).await;
        match verdict {
            Ok(caller) => {
                assert_eq!(case["verdict"], "ACCEPTED", "{}", case["name"]);
                assert_eq!(as_json(&caller), case["caller"], "{}", case["name"]);
            }
            Err(error) => assert_eq!(error.reason().as_str(), case["verdict"], "{}", case["name"]),
        }
    }
}

#[tokio::test]
async fn tokens_of_every_algorithm_are_accepted() {
    let file = std::fs::read_to_string(variable("POSTERN_VECTORS")).expect("the vectors");
    let vectors: Value = serde_json::from_str(&file).expect("JSON");
    let algorithms = vectors["algorithms"].as_array().expect("algorithms");
    assert_eq!(algorithms.len(), 2);
    for one in algorithms {
        let text = |name: &str| one[name].as_str().expect(name).to_owned();
        let (url, _) = serve_keys(one["jwks"].clone()).await;
        let builder = Verifier::builder(text("issuer"), text("audience")).keys(KeySource::at(url));
        let checked = builder.build().expect("a verifier").verify(&text("token")).await;
        assert_eq!(checked.map(|caller| caller.subject.clone()), Ok(text("subject")), "{}", text("algorithm"));
    }
}

async fn verdict_of(verifier: &Verifier, case: &Value) -> Result<Arc<Caller>, VerifyError> {
    let revocations = Revocations::new(WhenUnknown::Refuse, Duration::from_secs(30), Clock::system());
    for message in case["revocations"].as_array().expect("messages") {
        revocations.apply(message_of(message));
    }
    revocations.apply(heartbeat_of_now());
    let caller = verifier.verify(case["token"].as_str().expect("a token")).await?;
    let caller = revocations.check(&caller)?;
    let demand = match case["demand"]["subject_type"].as_str() {
        Some("user") => Demand::person(),
        Some("service") => Demand::service(),
        Some(other) => panic!("{other}"),
        None => Demand::authenticated(),
    };
    let role = case["demand"]["role"].as_str();
    role.map_or(demand.clone(), |role| demand.role(role)).check(&caller)?;
    Ok(caller)
}

pub fn heartbeat_of_now() -> WatchRevocationsResponse {
    #[expect(clippy::disallowed_methods, reason = "the tokens were made just now")]
    let now = std::time::SystemTime::now();
    let heartbeat = Heartbeat { complete_time: Some(Timestamp::from(now)) };
    WatchRevocationsResponse { event: Some(Event::Heartbeat(heartbeat)), ..WatchRevocationsResponse::default() }
}

/// A message from its proto3 JSON. The times do not matter: they lie ahead.
fn message_of(json: &Value) -> WatchRevocationsResponse {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let event = if let Some(ended) = json.get("sessionEnded") {
        Event::SessionEnded(SessionEnded { session_id: text(&ended["sessionId"]) })
    } else {
        let changed = &json["rolesChanged"];
        let roles = changed["roles"].as_array().map(|roles| roles.iter().map(text).collect()).unwrap_or_default();
        let disabled = changed["disabled"].as_bool().unwrap_or_default();
        Event::RolesChanged(RolesChanged { user_id: text(&changed["userId"]), roles, disabled })
    };
    WatchRevocationsResponse {
        event: Some(event),
        cursor: text(&json["cursor"]),
        ..WatchRevocationsResponse::default()
    }
}

fn as_json(caller: &Caller) -> Value {
    let mut json = json!({
        "subject": caller.subject,
        "subjectType": if caller.subject_type == SubjectType::User { "user" } else { "service" },
        "clientId": caller.client_id,
        "sessionId": caller.session_id,
        "tokenId": caller.token_id,
        "username": caller.username,
        "roles": caller.roles,
    });
    if let (Some(email), Some(is_verified)) = (&caller.email, caller.email_verified) {
        json["email"] = json!(email);
        json["emailVerified"] = json!(is_verified);
    }
    json
}
