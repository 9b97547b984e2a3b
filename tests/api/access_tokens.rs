//! What an access token must satisfy. The tests have the real signing key, so every forged token here has a valid
//! signature unless the test says otherwise. Only a token exactly as Postern mints it passes.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use postern::domain::{
    account::{Email, User, Username},
    env::{Env, ManualClock},
    ids::{SessionId, UserId},
    key_schedule::KeySchedule,
    keyring::{KeyPolicy, Keyring},
    master_key::{MasterKey, MasterKeys},
    role::Role,
    signing_key::{SigningAlgorithm, SigningKey},
    token::{AccessTokenError, TokenConfig, Tokens},
};
use serde_json::{Value, json};
use time::{OffsetDateTime, ext::NumericalDuration as _};

use crate::{
    app::{MASTER_KEY, START},
    support::{Database, Engine, with_database},
};

/// The token service with its signing key, with which a test can sign any header and claims.
pub struct Mint {
    pub tokens: Tokens,
    pub master: MasterKey,
    pub env: Env,
    keyring: Arc<Keyring>,
}

/// A header or a payload as text, so that it can contain what no library would write.
fn encoded(text: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(text)
}

impl Mint {
    pub async fn new(database: &Database) -> Self {
        let env = Env::with_clock(Arc::new(ManualClock::new(START)));
        let master = MasterKey::parse(MASTER_KEY).expect("a master key");
        let store = database.store().await;
        let config = TokenConfig {
            issuer: "https://auth.example.com".to_owned(),
            audience: "platform".to_owned(),
            access_ttl: std::time::Duration::from_mins(15),
            service_ttl: std::time::Duration::from_mins(15),
        };
        let schedule = KeySchedule {
            rotation: std::time::Duration::from_hours(90 * 24),
            publish_ahead: std::time::Duration::from_hours(24),
            token_lifetime: config.max_access_token_lifetime(),
        };
        let policy = KeyPolicy { algorithm: SigningAlgorithm::Es256, schedule };
        let masters = Arc::new(MasterKeys::from(MasterKey::parse(MASTER_KEY).expect("a master key")));
        let opened = Keyring::open(store.as_ref(), Arc::clone(&masters), policy, &env).await;
        let keyring = Arc::new(opened.expect("a key"));
        let tokens = Tokens::new(config, Arc::clone(&keyring), &masters).expect("tokens");
        Self { tokens, master, env, keyring }
    }

    fn signing(&self) -> Arc<SigningKey> {
        self.keyring.signing(self.env.now()).expect("a key")
    }

    fn kid(&self) -> String {
        self.signing().kid.clone()
    }

    /// A token that Postern minted.
    fn minted(&self) -> String {
        let user = User {
            id: UserId(self.env.uuid().expect("randomness")),
            username: Username::parse("ada").expect("a username"),
            email: Email::parse("ada@example.com").expect("an address"),
            email_verified: false,
            roles: vec![Role::parse("user").expect("a role")],
            disabled: false,
            create_time: START,
            update_time: START,
        };
        let session = SessionId(self.env.uuid().expect("randomness"));
        self.tokens.mint_access(&user, session, 0, &self.env).expect("a token").token
    }

    pub fn header(&self) -> Value {
        json!({"typ": "at+jwt", "alg": "ES256", "kid": self.kid()})
    }

    pub fn claims(&self) -> Value {
        let payload = self.minted().split('.').nth(1).map(|payload| BASE64_URL_SAFE_NO_PAD.decode(payload));
        serde_json::from_slice(&payload.expect("a payload").expect("base64url")).expect("JSON")
    }

    /// A token with this header and payload, signed with the real key.
    pub fn signed(&self, header: &str, claims: &str) -> String {
        let message = format!("{}.{}", encoded(header), encoded(claims));
        let signature = self.signing().signature(message.as_bytes()).expect("a signature");
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }

    fn verify(&self, token: &str) -> Result<(), AccessTokenError> {
        self.verify_at(token, START)
    }

    fn verify_at(&self, token: &str, now: OffsetDateTime) -> Result<(), AccessTokenError> {
        self.tokens.verify_access(token, now).map(drop)
    }

    #[track_caller]
    pub fn assert_invalid(&self, token: &str, what: &str) {
        assert_eq!(self.verify(token), Err(AccessTokenError::Invalid), "{what}");
    }
}

/// The object with one member replaced or removed.
pub fn with(mut object: Value, member: &str, value: Option<Value>) -> String {
    let members = object.as_object_mut().expect("an object");
    match value {
        Some(value) => members.insert(member.to_owned(), value),
        None => members.remove(member),
    };
    object.to_string()
}

/// The object as text, with an additional member at its end.
pub fn with_another(object: &Value, member: &str) -> String {
    let text = object.to_string();
    format!("{},{member}}}", text.strip_suffix('}').expect("an object"))
}

pub async fn with_mint(test: impl AsyncFnOnce(&Mint)) {
    with_database(Engine::Sqlite, async |database| test(&Mint::new(database).await).await).await;
}

#[tokio::test]
async fn a_token_built_like_a_minted_one_passes() {
    with_mint(async |mint| {
        assert_eq!(mint.verify(&mint.minted()), Ok(()));
        // Every test below changes this token in one respect, so this one must be valid.
        let token = mint.signed(&mint.header().to_string(), &mint.claims().to_string());
        assert_eq!(mint.verify(&token), Ok(()));
        let verified = mint.tokens.verify_access(&token, START).expect("a caller");
        assert!(verified.caller.has_role("user") && !verified.caller.has_role("admin"));
    })
    .await;
}

#[tokio::test]
async fn a_header_with_an_additional_member_is_refused() {
    with_mint(async |mint| {
        let claims = mint.claims().to_string();
        let jwk = serde_json::to_value(mint.tokens.jwks()).expect("JSON")["keys"][0].clone();
        for (member, value) in [
            ("crit", json!(["exp"])),
            ("crit", json!([])),
            ("crit", json!(["b64"])),
            ("b64", json!(false)),
            ("b64", json!(true)),
            ("zip", json!("DEF")),
            ("enc", json!("A256GCM")),
            ("jku", json!("https://attacker.example/jwks.json")),
            ("jwk", jwk),
            ("x5u", json!("https://attacker.example/cert.pem")),
            ("x5c", json!(["AAAA"])),
            ("x5t", json!("AAAA")),
            ("x5t#S256", json!("AAAA")),
            ("cty", json!("JWT")),
            ("nonce", json!("AAAA")),
            ("exp", json!(1)),
            ("", json!(1)),
        ] {
            let header = with(mint.header(), member, Some(value.clone()));
            mint.assert_invalid(&mint.signed(&header, &claims), &format!("{member}: {value}"));
        }
    })
    .await;
}

#[tokio::test]
async fn a_header_of_another_type_of_token_is_refused() {
    with_mint(async |mint| {
        let claims = mint.claims().to_string();
        for (member, value) in [
            ("typ", None),
            ("typ", Some(json!("JWT"))),
            ("typ", Some(json!("rt+jwt"))),
            ("typ", Some(json!("at+JWT"))),
            ("typ", Some(json!("application/at+jwt"))),
            ("typ", Some(json!("at+jwt "))),
            ("typ", Some(json!(["at+jwt"]))),
            ("typ", Some(Value::Null)),
            ("alg", None),
            ("alg", Some(json!("none"))),
            ("alg", Some(json!("None"))),
            ("alg", Some(json!("es256"))),
            ("alg", Some(json!("HS256"))),
            ("alg", Some(json!("ES384"))),
            ("alg", Some(json!("EdDSA"))),
            ("alg", Some(json!("RS256"))),
            ("alg", Some(Value::Null)),
            ("kid", None),
            ("kid", Some(Value::Null)),
            ("kid", Some(json!(""))),
            ("kid", Some(json!("another"))),
            ("kid", Some(json!("../../etc/passwd"))),
            ("kid", Some(json!("' OR 1=1 --"))),
            ("kid", Some(json!([mint.kid()]))),
        ] {
            let what = format!("{member}: {value:?}");
            let header = with(mint.header(), member, value);
            mint.assert_invalid(&mint.signed(&header, &claims), &what);
        }
    })
    .await;
}

#[tokio::test]
async fn a_member_given_twice_is_refused() {
    with_mint(async |mint| {
        let (header, claims) = (mint.header(), mint.claims());
        for member in ["typ", "alg", "kid"] {
            // With the same value, so that nothing else is wrong with it.
            let twice = with_another(&header, &format!("\"{member}\":{}", header[member]));
            mint.assert_invalid(&mint.signed(&twice, &claims.to_string()), member);
        }
        for (member, value) in claims.as_object().expect("an object") {
            let twice = with_another(&claims, &format!("\"{member}\":{value}"));
            mint.assert_invalid(&mint.signed(&header.to_string(), &twice), member);
        }
    })
    .await;
}

#[tokio::test]
async fn a_claim_of_another_value_or_type_is_refused() {
    with_mint(async |mint| {
        let id = "01920000-0000-7000-8000-000000000000";
        let header = mint.header().to_string();
        for (claim, value) in [
            ("aud", json!("another")),
            ("aud", json!("")),
            ("aud", json!(["platform"])),
            ("aud", json!(["platform", "another"])),
            ("aud", json!("Platform")),
            ("aud", json!("postern:refresh")),
            ("aud", json!(1)),
            ("iss", json!("https://attacker.example")),
            ("iss", json!("https://auth.example.com/")),
            ("iss", json!("HTTPS://auth.example.com")),
            ("iss", json!(["https://auth.example.com"])),
            ("exp", json!("1893467945")),
            ("exp", json!(4_102_444_800.5)),
            ("exp", json!(4_102_444_800.0)),
            ("exp", json!(1e300)),
            ("exp", json!(u64::MAX)),
            ("exp", json!(true)),
            ("iat", json!("1893467045")),
            ("iat", json!(1_893_467_045.5)),
            ("sub", json!("ada@example.com")),
            ("sub", json!("")),
            ("sub", json!(7)),
            ("sub", json!([id])),
            ("sid", json!("another")),
            ("sid", json!("")),
            ("sid", json!(7)),
            ("jti", json!(7)),
            ("roles", json!("user")),
            ("roles", json!("user admin")),
            ("roles", json!([1])),
            ("roles", json!(["Admin"])),
            ("roles", json!([""])),
            ("roles", json!({"user": true})),
            ("email_verified", json!("true")),
            ("username", json!(7)),
            ("email", json!([])),
        ] {
            let what = format!("{claim}: {value}");
            let claims = with(mint.claims(), claim, Some(value));
            mint.assert_invalid(&mint.signed(&header, &claims), &what);
        }
    })
    .await;
}

#[tokio::test]
async fn a_claim_that_is_missing_or_null_is_refused() {
    with_mint(async |mint| {
        let header = mint.header().to_string();
        let claims = mint.claims();
        let names: Vec<_> = claims.as_object().expect("an object").keys().cloned().collect();
        for name in &names {
            // Tokens from before there were these claims do not have them.
            let may_be_missing = ["gen", "subject_type"].contains(&name.as_str());
            let without = mint.signed(&header, &with(claims.clone(), name, None));
            assert_eq!(mint.verify(&without).is_ok(), may_be_missing, "{name}");
            mint.assert_invalid(&mint.signed(&header, &with(claims.clone(), name, Some(Value::Null))), name);
        }
        for name in [
            "iss",
            "aud",
            "sub",
            "exp",
            "iat",
            "jti",
            "sid",
            "username",
            "subject_type",
            "email",
            "email_verified",
            "roles",
            "gen",
        ] {
            assert!(names.iter().any(|minted| minted == name), "a minted token has no {name}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_header_or_payload_that_is_not_a_json_object_is_refused() {
    with_mint(async |mint| {
        let (header, claims) = (mint.header(), mint.claims());
        for text in ["", "null", "[]", "{}", "\"text\"", "{", "{}{}", "\u{feff}{}"] {
            mint.assert_invalid(&mint.signed(text, &claims.to_string()), text);
            mint.assert_invalid(&mint.signed(&header.to_string(), text), text);
        }
        // Values in the right order, without their names.
        let header_values = json!(["at+jwt", "ES256", mint.kid()]).to_string();
        mint.assert_invalid(&mint.signed(&header_values, &claims.to_string()), "a header as an array");
        let order = [
            "iss",
            "aud",
            "sub",
            "client_id",
            "exp",
            "iat",
            "jti",
            "sid",
            "username",
            "email",
            "email_verified",
            "roles",
        ];
        let claim_values: Vec<_> = order.iter().map(|name| claims[name].clone()).collect();
        mint.assert_invalid(&mint.signed(&header.to_string(), &json!(claim_values).to_string()), "claims as an array");
    })
    .await;
}

#[tokio::test]
async fn an_access_token_is_refused_five_seconds_after_its_expiry() {
    with_mint(async |mint| {
        let token = mint.minted();
        let expiry = OffsetDateTime::from_unix_timestamp(mint.claims()["exp"].as_i64().expect("a number"));
        let expiry = expiry.expect("a time");
        assert_eq!(expiry, START.replace_nanosecond(0).expect("a whole second") + 15.minutes());
        assert_eq!(mint.verify_at(&token, expiry - 1.microseconds()), Ok(()));
        assert_eq!(mint.verify_at(&token, expiry + 5.seconds()), Err(AccessTokenError::Expired));
        assert_eq!(mint.verify_at(&token, expiry + 90.days()), Err(AccessTokenError::Expired));
        for exp in [i64::MIN, -1, 0] {
            let claims = with(mint.claims(), "exp", Some(json!(exp)));
            let token = mint.signed(&mint.header().to_string(), &claims);
            assert_eq!(mint.verify(&token), Err(AccessTokenError::Expired), "{exp}");
        }
        // Expired and also not ours: the answer does not mention the expiry.
        let forged = with(mint.claims(), "aud", Some(json!("another")));
        let forged = mint.signed(&mint.header().to_string(), &forged);
        assert_eq!(mint.verify_at(&forged, expiry + 1.hours()), Err(AccessTokenError::Invalid));
    })
    .await;
}

#[tokio::test]
async fn a_token_of_more_than_eight_kibibytes_is_refused() {
    with_mint(async |mint| {
        let sized = |size: usize| {
            // Base64 cannot have every length, so the header makes up the difference.
            (0..4).find_map(|spaces| {
                let header = format!("{}{}", mint.header(), " ".repeat(spaces));
                let without = mint.signed(&header, &mint.claims().to_string()).len();
                (0..8).find_map(|more| {
                    let filling = "x".repeat((size - without) * 3 / 4 - 12 + more);
                    let claims = with_another(&mint.claims(), &format!("\"x\":\"{filling}\""));
                    Some(mint.signed(&header, &claims)).filter(|token| token.len() == size)
                })
            })
        };
        assert_eq!(mint.verify(&sized(8 * 1024).expect("a token of that size")), Ok(()));
        mint.assert_invalid(&sized(8 * 1024 + 1).expect("a token of that size"), "a byte too many");
        mint.assert_invalid(&"a".repeat(1024 * 1024), "a mebibyte");
        mint.assert_invalid(&format!("{}{}", mint.minted(), "A".repeat(1024 * 1024)), "a mebibyte of signature");
    })
    .await;
}

#[tokio::test]
async fn only_three_strict_base64url_segments_are_a_token() {
    with_mint(async |mint| {
        let token = mint.minted();
        let [header, payload, signature] = token.split('.').collect::<Vec<_>>()[..] else {
            panic!("three segments");
        };
        for forged in [
            String::new(),
            ".".to_owned(),
            "..".to_owned(),
            "....".to_owned(),
            format!("{header}.{payload}"),
            format!("{header}.{payload}."),
            format!(".{payload}.{signature}"),
            format!("{header}..{signature}"),
            format!("{token}."),
            format!("{token}.{signature}"),
            format!("{header}.{payload}.{signature}.{signature}.{signature}"),
            format!("{header}=.{payload}.{signature}"),
            format!("{header}.{payload}.{signature}=="),
            format!("{header}.{payload}.{signature}\n"),
            format!(" {token}"),
            format!("{header}.{payload}.{signature} "),
            format!("{header}.{payload}.{}", &signature[..signature.len() - 1]),
            format!("{header}.{payload}.{}", &signature[..signature.len() - 4]),
            format!("{header}.{payload}.{signature}AAAA"),
            format!("{header}.{payload}.+{}", &signature[1..]),
            format!("{header}.{payload}./{}", &signature[1..]),
            format!("{header}.{payload}.{}", "A".repeat(signature.len())),
        ] {
            mint.assert_invalid(&forged, &forged);
        }
        // The last character has four unused bits, so another text can stand for the same bytes.
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let last = alphabet.iter().position(|byte| Some(byte) == token.as_bytes().last()).expect("base64url");
        let other = char::from(alphabet[last ^ 1]);
        mint.assert_invalid(&format!("{}{other}", &token[..token.len() - 1]), "stray bits");
    })
    .await;
}

#[tokio::test]
async fn only_a_signature_of_the_signing_key_over_exactly_this_text_verifies() {
    with_mint(async |mint| {
        let token = mint.minted();
        let (message, signature) = token.rsplit_once('.').expect("a signature");
        let [header, payload] = message.split('.').collect::<Vec<_>>()[..] else {
            panic!("two segments");
        };
        for position in [0, signature.len() / 2, signature.len() - 2] {
            let mut tampered = signature.as_bytes().to_vec();
            tampered[position] = if tampered[position] == b'A' { b'B' } else { b'A' };
            let tampered = String::from_utf8(tampered).expect("ASCII");
            mint.assert_invalid(&format!("{message}.{tampered}"), "a tampered signature");
        }
        let admin = encoded(&with(mint.claims(), "roles", Some(json!(["admin"]))));
        mint.assert_invalid(&format!("{header}.{admin}.{signature}"), "a tampered payload");
        let spaced = encoded(&format!(" {}", mint.header()));
        mint.assert_invalid(&format!("{spaced}.{payload}.{signature}"), "the same header, written otherwise");

        // Another Postern's key, under our key's name.
        with_mint(async |other| {
            let forged = other.signed(&mint.header().to_string(), &mint.claims().to_string());
            mint.assert_invalid(&forged, "another key");
            mint.assert_invalid(&other.minted(), "another key under its own name");
        })
        .await;

        // HMAC with the public key as the secret, in each form of the key.
        let jwk = &serde_json::to_value(mint.tokens.jwks()).expect("JSON")["keys"][0];
        let coordinate = |name: &str| BASE64_URL_SAFE_NO_PAD.decode(jwk[name].as_str().expect("text")).expect("base64");
        let point = [vec![4], coordinate("x"), coordinate("y")].concat();
        for secret in [point.clone(), point[1..].to_vec(), jwk.to_string().into_bytes(), Vec::new()] {
            let header = with(mint.header(), "alg", Some(json!("HS256")));
            let message = format!("{}.{payload}", encoded(&header));
            let key = EncodingKey::from_secret(&secret);
            let signature = crypto::sign(message.as_bytes(), &key, Algorithm::HS256).expect("a signature");
            mint.assert_invalid(&format!("{message}.{signature}"), "HS256 under the public key");
            mint.assert_invalid(&format!("{header}.{payload}.{signature}"), "HS256 under the public key");
        }
        let unsigned = encoded(&with(mint.header(), "alg", Some(json!("none"))));
        mint.assert_invalid(&format!("{unsigned}.{payload}."), "no signature");
    })
    .await;
}
