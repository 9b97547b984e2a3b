//! Decides whether an access token is good, without asking Postern: RFC 9068, as strictly as Postern itself does.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, crypto};
use quick_cache::sync::Cache;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    clock::Clock,
    error::VerifyError,
    feed::RevocationFeed,
    keys::{KeySource, Keys},
};

const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// How far the clocks of Postern and of this machine may be apart, in seconds. Postern allows as much between replicas.
const LEEWAY: i64 = 5;
const REMEMBERED_TOKENS: usize = 10_000;

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The id of the person or of the service account: `sub`.
    pub subject: String,
    /// Which of the two it is.
    pub subject_type: SubjectType,
    /// Whom the token was issued to: `postern` for a person, else the id of the service account.
    pub client_id: String,
    /// The id of the session, or of the key of a service: `sid`.
    pub session_id: String,
    /// The id of this token: `jti`.
    pub token_id: String,
    /// The name of the account when the token was issued.
    pub username: String,
    /// A person's address when the token was issued.
    pub email: Option<String>,
    /// Whether that address was verified. `None` for a service.
    pub email_verified: Option<bool>,
    /// The roles: those of the token, or newer ones if a feed of revocations knows them.
    pub roles: Vec<String>,
    /// When the token expires: seconds since 1970.
    pub expire_time: i64,
}

impl Caller {
    /// Whether the caller has a role.
    pub fn has_role(&self, role: &str) -> bool {
        self.roles.iter().any(|one| one == role)
    }
}

/// What a token stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SubjectType {
    /// A person.
    #[default]
    User,
    /// A service account.
    Service,
}

/// A token whose signature was checked.
#[derive(Debug)]
pub(crate) struct Verified {
    caller: Arc<Caller>,
    kid: String,
    issue_time: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    typ: String,
    alg: Algorithm,
    kid: String,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: String,
    client_id: String,
    exp: i64,
    iat: i64,
    jti: String,
    sid: String,
    username: String,
    #[serde(default)]
    subject_type: SubjectType,
    email: Option<String>,
    email_verified: Option<bool>,
    roles: Vec<String>,
}

/// Verifies access tokens of one issuer for one audience. Cloning it is cheap.
#[derive(Debug, Clone)]
pub struct Verifier(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    issuer: String,
    audience: String,
    clock: Clock,
    keys: Arc<Keys>,
    /// Tokens that were verified before. The least used ones are forgotten.
    verified: Cache<Box<str>, Arc<Verified>>,
    feed: Option<RevocationFeed>,
}

/// What a [`Verifier`] needs to know.
#[derive(Debug)]
pub struct VerifierBuilder {
    issuer: String,
    audience: String,
    keys: KeySource,
    clock: Clock,
    feed: Option<RevocationFeed>,
}

impl VerifierBuilder {
    /// Keys from somewhere else than the issuer's `/.well-known/jwks.json`, or fetched at other times.
    #[must_use]
    pub fn keys(mut self, keys: KeySource) -> Self {
        self.keys = keys;
        self
    }

    /// Refuses what was revoked, as the feed knows it.
    #[must_use]
    pub fn revocations(mut self, feed: RevocationFeed) -> Self {
        self.feed = Some(feed);
        self
    }

    /// Another clock, for tests.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// An error: TLS could not be set up on this machine.
    pub fn build(self) -> Result<Verifier, reqwest::Error> {
        let keys = Arc::new(Keys::new(self.keys, self.clock.clone())?);
        Ok(Verifier(Arc::new(Inner {
            issuer: self.issuer,
            audience: self.audience,
            clock: self.clock,
            keys,
            verified: Cache::new(REMEMBERED_TOKENS),
            feed: self.feed,
        })))
    }
}

impl Verifier {
    /// `issuer` and `audience` are `POSTERN_ISSUER` and `POSTERN_AUDIENCE`, byte for byte.
    pub fn builder(issuer: impl Into<String>, audience: impl Into<String>) -> VerifierBuilder {
        let issuer = issuer.into();
        let keys = KeySource::of_issuer(&issuer);
        VerifierBuilder { issuer, audience: audience.into(), keys, clock: Clock::system(), feed: None }
    }

    /// Whose token it is, if it is good now. It waits only when the key of the token has to be fetched.
    pub async fn verify(&self, token: &str) -> Result<Arc<Caller>, VerifyError> {
        let inner = &self.0;
        let verified = match inner.verified.get(token) {
            Some(verified) if inner.keys.knows(&verified.kid) => verified,
            Some(_) | None => {
                let verified = Arc::new(inner.verify(token).await?);
                inner.verified.insert(token.into(), Arc::clone(&verified));
                verified
            }
        };
        let now = inner.clock.seconds();
        if now >= verified.caller.expire_time.saturating_add(LEEWAY) {
            return Err(VerifyError::TokenExpired);
        }
        if verified.issue_time > now.saturating_add(LEEWAY) {
            return Err(VerifyError::TokenInvalid);
        }
        match &inner.feed {
            None => Ok(Arc::clone(&verified.caller)),
            Some(feed) => feed.check(&verified.caller),
        }
    }
}

impl Inner {
    async fn verify(&self, token: &str) -> Result<Verified, VerifyError> {
        let invalid = VerifyError::TokenInvalid;
        if token.len() > MAX_TOKEN_BYTES {
            return Err(invalid);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(invalid)?;
        let (header, payload) = message.split_once('.').ok_or(invalid)?;
        let header: Header = decoded(header).ok_or(invalid)?;
        if header.typ != "at+jwt" {
            return Err(invalid);
        }
        let key = self.keys.get(&header.kid).await?;
        if header.alg != key.algorithm {
            return Err(invalid);
        }
        let is_signed = BASE64_URL_SAFE_NO_PAD.decode(signature).is_ok()
            && crypto::verify(signature, message.as_bytes(), &key.key, key.algorithm).unwrap_or(false);
        let claims = is_signed.then(|| decoded::<Claims>(payload)).flatten().ok_or(invalid)?;
        if claims.iss != self.issuer || claims.aud != self.audience {
            return Err(invalid);
        }
        let issue_time = claims.iat;
        let caller = Arc::new(caller_of(claims).ok_or(invalid)?);
        Ok(Verified { caller, kid: header.kid, issue_time })
    }
}

/// A segment: strict base64url without padding, and JSON of this shape.
fn decoded<T: DeserializeOwned>(segment: &str) -> Option<T> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(segment).ok()?).ok()
}

/// A person has an address, and a service none. A service is its own client.
fn caller_of(claims: Claims) -> Option<Caller> {
    let is_whole = match claims.subject_type {
        SubjectType::User => claims.email.is_some() && claims.email_verified.is_some(),
        SubjectType::Service => {
            claims.email.is_none() && claims.email_verified.is_none() && claims.client_id == claims.sub
        }
    };
    (is_whole && !claims.sub.is_empty() && !claims.sid.is_empty()).then_some(Caller {
        subject: claims.sub,
        subject_type: claims.subject_type,
        client_id: claims.client_id,
        session_id: claims.sid,
        token_id: claims.jti,
        username: claims.username,
        email: claims.email,
        email_verified: claims.email_verified,
        roles: claims.roles,
        expire_time: claims.exp,
    })
}
