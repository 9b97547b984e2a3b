//! What a refresh token must satisfy. The tests have the real key. Access and refresh tokens are not interchangeable.
//! Whether its session is open is tested in `tests/store`.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use postern::domain::{
    ids::{SessionId, UserId},
    session::RefreshGrant,
};
use serde_json::{Value, json};
use time::ext::NumericalDuration as _;
use tonic::Code::{InvalidArgument, Unauthenticated};

use crate::{
    access_tokens::Mint,
    app::{START, TestApp, assert_fails},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![access_and_refresh_tokens_are_not_interchangeable, a_refresh_token_of_a_deleted_database_is_refused];

fn grant(mint: &Mint) -> RefreshGrant {
    let issue_time = START.replace_nanosecond(0).expect("a whole second");
    RefreshGrant {
        session_id: SessionId(mint.env.uuid().expect("randomness")),
        user_id: UserId(mint.env.uuid().expect("randomness")),
        generation: 3,
        issue_time,
        expire_time: issue_time + 7.days(),
        session_end_time: issue_time + 90.days(),
    }
}

/// The header and the claims of a token.
fn taken_apart(token: &str) -> [Value; 2] {
    let mut segments = token.split('.').map(|segment| {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(segment).expect("base64url");
        serde_json::from_slice(&bytes).expect("JSON")
    });
    [segments.next().expect("a header"), segments.next().expect("claims")]
}

fn signed_with(secret: &[u8], header: &Value, claims: &Value) -> String {
    let encoded = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", encoded(header), encoded(claims));
    let signature = crypto::sign(message.as_bytes(), &EncodingKey::from_secret(secret), Algorithm::HS256);
    format!("{message}.{}", signature.expect("a signature"))
}

#[tokio::test]
async fn equal_grants_give_equal_tokens_and_a_token_yields_its_grant() {
    with_database(Engine::Sqlite, async |database| {
        let mint = Mint::new(database).await;
        let grant = grant(&mint);
        let token = mint.tokens.mint_refresh(&grant).expect("a token").token;
        assert_eq!(mint.tokens.mint_refresh(&grant).expect("a token").token, token);
        assert_eq!(mint.tokens.verify_refresh(&token).as_ref(), Some(&grant));
        for other in [
            RefreshGrant { generation: 4, ..grant.clone() },
            RefreshGrant { issue_time: grant.issue_time + 1.seconds(), ..grant.clone() },
            RefreshGrant { session_id: SessionId(mint.env.uuid().expect("randomness")), ..grant },
        ] {
            assert_ne!(mint.tokens.mint_refresh(&other).expect("a token").token, token);
        }
    })
    .await;
}

#[tokio::test]
async fn a_refresh_token_with_any_difference_is_refused() {
    with_database(Engine::Sqlite, async |database| {
        let mint = Mint::new(database).await;
        let secret = mint.master.derive("refresh-token-signing").expect("a key");
        let minted = mint.tokens.mint_refresh(&grant(&mint)).expect("a token").token;
        let [header, claims] = taken_apart(&minted);
        let passes = |header: &Value, claims: &Value| {
            mint.tokens.verify_refresh(&signed_with(secret.as_slice(), header, claims)).is_some()
        };
        assert!(
            passes(&header, &claims),
            "every case below changes this token in one respect, so this one must be valid"
        );

        for (member, value) in [
            ("typ", json!("at+jwt")),
            ("typ", json!("JWT")),
            ("typ", Value::Null),
            ("alg", json!("none")),
            ("alg", json!("HS512")),
            ("alg", json!("ES256")),
            ("kid", json!("any")),
            ("crit", json!(["exp"])),
            ("b64", json!(false)),
            ("zip", json!("DEF")),
            ("jwk", json!({"kty": "oct", "k": "AAAA"})),
        ] {
            let mut header = header.clone();
            header[member] = value.clone();
            assert!(!passes(&header, &claims), "{member}: {value}");
        }
        for (claim, value) in [
            ("aud", json!("platform")),
            ("aud", json!(["postern:refresh"])),
            ("iss", json!("https://attacker.example")),
            ("sub", json!("ada@example.com")),
            ("sid", json!("another")),
            ("gen", json!("3")),
            ("gen", json!(3.5)),
            ("exp", json!("1893467945")),
            ("exp", json!(i64::MAX)),
            ("iat", json!(1.5)),
            ("end", json!(i64::MIN)),
            ("jti", json!(7)),
        ] {
            let mut claims = claims.clone();
            claims[claim] = value.clone();
            assert!(!passes(&header, &claims), "{claim}: {value}");
        }
        for claim in claims.as_object().expect("an object").keys() {
            let mut without = claims.clone();
            without.as_object_mut().expect("an object").remove(claim);
            assert!(!passes(&header, &without), "no {claim}");
        }
        for label in ["signing-key-encryption", ""] {
            let other = mint.master.derive(label).expect("a key");
            let forged = signed_with(other.as_slice(), &header, &claims);
            assert_eq!(mint.tokens.verify_refresh(&forged), None, "the key for {label:?}");
        }
        for forged in
            ["", "..", &minted[1..], &minted[..minted.len() - 1], &format!("{minted}A"), &format!("{minted}.")]
        {
            assert_eq!(mint.tokens.verify_refresh(forged), None, "{forged}");
        }
    })
    .await;
}

async fn access_and_refresh_tokens_are_not_interchangeable(database: &Database) {
    // Also where an operator gives access tokens the audience of refresh tokens.
    for arguments in [&[][..], &["--audience=postern:refresh"]] {
        let app = TestApp::start(database, arguments).await;
        if arguments.is_empty() {
            app.sign_up("ada").await;
        }
        let tokens = app.log_in("ada").await;
        assert_fails(app.me(&tokens.refresh_token).await, Unauthenticated, "TOKEN_INVALID");
        assert_fails(app.refresh(&tokens.access_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
        assert_fails(app.log_out(&tokens.access_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
        assert_fails(app.me("").await, Unauthenticated, "TOKEN_INVALID");
        for missing in [app.refresh("").await.map(drop), app.log_out("").await, app.log_out_everywhere("").await] {
            assert_eq!(assert_fails(missing, InvalidArgument, "INVALID_FIELD").fields, ["refresh_token"]);
        }
        let status = app.auth().get_me(postern::proto::GetMeRequest {}).await;
        assert_fails(status.map(drop).map_err(Into::into), Unauthenticated, "TOKEN_MISSING");
        app.me(&tokens.access_token).await.expect("the session is none the worse for it");
        app.stop().await;
    }
}

async fn a_refresh_token_of_a_deleted_database_is_refused(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let tokens = app.log_in("ada").await;
    // The rows are gone, as after a restore from an empty backup, and the master key is the same.
    database.sql.execute("DELETE FROM sessions").await;
    database.sql.execute("DELETE FROM users").await;
    app.sign_up("ada").await;
    assert_fails(app.refresh(&tokens.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    assert_fails(app.log_out(&tokens.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    assert_fails(app.log_out_everywhere(&tokens.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    assert_fails(app.me(&tokens.access_token).await, Unauthenticated, "SESSION_REVOKED");
    assert_eq!(database.sql.number("SELECT count(*) FROM sessions").await, 0);
    app.stop().await;
}
