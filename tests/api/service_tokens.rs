//! The tokens of services beside those of people. Every token here has a valid signature of the real key: neither kind passes
//! for the other, and claims of both kinds are those of nobody.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use postern::domain::{
    ids::{ServiceAccountId, ServiceKeyId},
    role::{Caller, Role},
    service_account::{ServiceAccount, ServiceKey, ServiceName},
    token::whole_seconds,
};
use serde_json::{Value, json};
use time::{OffsetDateTime, ext::NumericalDuration as _};

use crate::{
    access_tokens::{Mint, with, with_another, with_mint},
    app::START,
};

fn account(mint: &Mint) -> ServiceAccount {
    ServiceAccount {
        id: ServiceAccountId(mint.env.uuid().expect("randomness")),
        name: ServiceName::parse("billing-worker").expect("a name"),
        roles: vec![Role::parse("reader").expect("a role")],
        disabled: false,
        create_time: START,
        update_time: START,
    }
}

fn key(mint: &Mint, account: &ServiceAccount, expire_time: Option<OffsetDateTime>) -> ServiceKey {
    ServiceKey {
        id: ServiceKeyId(mint.env.uuid().expect("randomness")),
        account: account.id,
        description: String::new(),
        create_time: START,
        expire_time,
        last_use_time: None,
    }
}

fn service_claims(mint: &Mint) -> Value {
    let account = account(mint);
    let minted = mint.tokens.mint_service_access(&account, &key(mint, &account, None), &mint.env).expect("a token");
    let payload = minted.token.split('.').nth(1).map(|payload| BASE64_URL_SAFE_NO_PAD.decode(payload));
    serde_json::from_slice(&payload.expect("a payload").expect("base64url")).expect("JSON")
}

fn caller(mint: &Mint, claims: &str) -> Caller {
    let token = mint.signed(&mint.header().to_string(), claims);
    mint.tokens.verify_access(&token, START).expect("a caller").caller.clone()
}

fn assert_nobody(mint: &Mint, claims: &str) {
    mint.assert_invalid(&mint.signed(&mint.header().to_string(), claims), claims);
}

#[tokio::test]
async fn a_token_is_a_persons_or_a_services_by_all_of_its_claims() {
    with_mint(async |mint| {
        let (person, service) = (mint.claims(), service_claims(mint));
        assert!(matches!(caller(mint, &person.to_string()), Caller::Person(_)));
        assert!(matches!(caller(mint, &service.to_string()), Caller::Service(_)));
        // Tokens of people had no such claim once.
        assert!(matches!(caller(mint, &with(person.clone(), "subject_type", None)), Caller::Person(_)));

        for kind in [json!("Service"), json!("USER"), json!("admin"), json!(""), Value::Null, json!(1), json!(["user"])]
        {
            for claims in [&person, &service] {
                assert_nobody(mint, &with(claims.clone(), "subject_type", Some(kind.clone())));
            }
        }
        assert_nobody(mint, &with(person.clone(), "subject_type", Some(json!("service"))));
        assert_nobody(mint, &with(service.clone(), "subject_type", Some(json!("user"))));
        assert_nobody(mint, &with(service.clone(), "subject_type", None));
        for (claims, other) in [(&person, "service"), (&service, "user")] {
            assert_nobody(mint, &with_another(claims, &format!("\"subject_type\":\"{other}\"")));
        }
        for member in ["email", "email_verified"] {
            assert_nobody(mint, &with(person.clone(), member, None));
            assert_nobody(mint, &with(person.clone(), member, Some(Value::Null)));
        }
        assert_nobody(mint, &with(service.clone(), "email", Some(json!("ada@example.com"))));
        assert_nobody(mint, &with(service.clone(), "email_verified", Some(json!(false))));
        assert_nobody(mint, &with(service.clone(), "client_id", Some(json!("postern"))));
        assert_nobody(mint, &with(service.clone(), "client_id", Some(person["sub"].clone())));
        for member in ["sub", "sid", "client_id", "username", "roles", "exp", "iat", "jti", "aud", "iss"] {
            assert_nobody(mint, &with(service.clone(), member, None));
        }
    })
    .await;
}

#[tokio::test]
async fn the_token_of_a_service_does_not_outlive_its_key() {
    with_mint(async |mint| {
        let account = account(mint);
        for (end, expected) in
            [(None, 15.minutes()), (Some(START + 1.hours()), 15.minutes()), (Some(START + 7.seconds()), 7.seconds())]
        {
            let minted =
                mint.tokens.mint_service_access(&account, &key(mint, &account, end), &mint.env).expect("a token");
            let verified = mint.tokens.verify_access(&minted.token, START).expect("a caller");
            assert_eq!(verified.expire_time, minted.expire_time);
            assert_eq!(minted.expire_time - whole_seconds(START), expected, "{end:?}");
        }
    })
    .await;
}
