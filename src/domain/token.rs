//! Tokens: their claims, how they are signed, and what a presented one must satisfy.
//!
//! An access token (RFC 9068, `typ: at+jwt`) can be verified by anyone who has the public keys. A refresh token
//! (`rt+jwt`, HS256 with a key derived from the master key, its own audience) is verified by Postern alone. Neither can
//! be used in place of the other. Lifetimes and checks are here and nowhere else. Whether a session is still open is
//! decided elsewhere: `revocation.rs` for access tokens, `refresh.rs` for refresh tokens.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, jwk::JwkSet};
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use time::OffsetDateTime;

use crate::error::Error;

use super::{
    account::User,
    digest::sha256,
    env::Env,
    ids::SessionId,
    keyring::Keyring,
    master_key::{Derived, MasterKeys},
    role::{Caller, Person, Role, ServiceCaller},
    service_account::{ServiceAccount, ServiceKey},
    session::{RefreshGrant, RefreshHash},
};

/// `typ` of an access token (RFC 9068 §2.1).
const ACCESS_TYPE: &str = "at+jwt";
/// `typ` of a refresh token. Not a registered type: only Postern reads these tokens.
const REFRESH_TYPE: &str = "rt+jwt";
/// `aud` of a refresh token. No resource server has this name.
const REFRESH_AUDIENCE: &str = "postern:refresh";
/// `client_id` of a person's tokens, which RFC 9068 §2.2 requires. People have one client: the platform itself.
pub const CLIENT_ID: &str = "postern";
/// How far the clock of the machine that minted a token may be ahead, when `iat` is checked, or behind, for `exp`.
const LEEWAY: Duration = Duration::from_secs(5);
/// How far the clocks of replicas may differ before a revocation could be dropped too early.
const CLOCK_SKEW: Duration = Duration::from_mins(1);
/// No token that Postern mints is longer. A longer one is refused before it is decoded.
const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// The last second that a token may name: the end of the year 9998.
const LATEST_TIME: i64 = 253_370_764_799;

/// How many verified access tokens are remembered. Each takes about 500 bytes.
const REMEMBERED_TOKENS: usize = 10_000;

/// The settings of tokens.
#[derive(Debug, Clone)]
pub struct TokenConfig {
    /// `iss` of every token.
    pub issuer: String,
    /// `aud` of access tokens.
    pub audience: String,
    pub access_ttl: Duration,
    /// How long the access token of a service lives.
    pub service_ttl: Duration,
}

impl TokenConfig {
    /// The longest time between minting an access token and the last moment that any replica accepts it.
    pub fn max_access_token_lifetime(&self) -> Duration {
        self.access_ttl.max(self.service_ttl) + LEEWAY + CLOCK_SKEW
    }
}

/// Mints and verifies tokens.
pub struct Tokens {
    config: TokenConfig,
    keyring: Arc<Keyring>,
    refresh: Derived<RefreshKey>,
    /// Access tokens that verified, by their SHA-256. The ones that were not used for the longest time go first.
    verified: Cache<[u8; 32], Arc<VerifiedToken>>,
}

/// The two halves of a key of refresh tokens.
struct RefreshKey {
    signing: EncodingKey,
    verification: DecodingKey,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What an access token says whose signature was verified.
#[derive(Debug)]
pub struct VerifiedToken {
    pub caller: Caller,
    /// What the token says of the caller's account, as it was when the token was minted.
    pub account: AccountClaims,
    /// `gen`: how many times the session had been rotated when the token was minted.
    pub generation: i64,
    pub issue_time: OffsetDateTime,
    pub expire_time: OffsetDateTime,
    kid: String,
    /// Whether it was noted that this token came back.
    is_noted: AtomicBool,
}

/// The claims of an access token about the account that it was minted for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountClaims {
    pub client_id: String,
    /// The name of the person or of the service.
    pub username: String,
    /// `None` for a service.
    pub email: Option<EmailClaim>,
}

/// A person's address in an access token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmailClaim {
    pub address: String,
    pub is_verified: bool,
}

impl VerifiedToken {
    /// When it is no longer accepted.
    pub fn accepted_until(&self) -> OffsetDateTime {
        self.expire_time + LEEWAY
    }

    /// Notes that this token came back, unless that has been done. `note` tells whether it could.
    pub fn note_once(&self, note: impl FnOnce() -> bool) {
        if !self.is_noted.load(Ordering::Relaxed) && note() {
            self.is_noted.store(true, Ordering::Relaxed);
        }
    }
}

/// A minted token and when it expires; whole seconds.
#[derive(Clone)]
pub struct Minted {
    pub token: String,
    pub expire_time: OffsetDateTime,
}

impl std::fmt::Debug for Minted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Minted").field("expire_time", &self.expire_time).finish_non_exhaustive()
    }
}

/// The pair of tokens that a client holds for its session.
#[derive(Debug)]
pub struct TokenPair {
    pub access: Minted,
    pub refresh: Minted,
}

/// Why an access token does not verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessTokenError {
    /// It is not a token that Postern minted for this audience.
    Invalid,
    /// It was valid and has expired.
    Expired,
    /// Its session has ended, or its user was disabled or deleted.
    Revoked,
    /// It may have been revoked: the log of revocations could not be read for too long.
    RevocationUnknown,
}

/// The JOSE header of our tokens: exactly these members. Any other member is refused, in particular `crit`, `b64`,
/// `zip`, `enc` and keys that a token carries itself (`jwk`, `jku`, `x5u`, `x5c`); so is a member that appears twice.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JoseHeader {
    typ: String,
    alg: Algorithm,
    #[serde(default)]
    kid: Option<String>,
}

/// `subject_type` of an access token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SubjectType {
    #[default]
    User,
    Service,
}

#[derive(Default, Serialize, Deserialize)]
struct AccessClaims {
    iss: String,
    aud: String,
    sub: String,
    client_id: String,
    exp: i64,
    iat: i64,
    jti: String,
    sid: String,
    username: String,
    /// What kind of caller the token is for. Nobody but Postern writes this claim. A token without it is a person's: there
    /// were no others before there was this claim.
    #[serde(default)]
    subject_type: SubjectType,
    /// A person's tokens have this and the next claim, a service's neither.
    #[serde(skip_serializing_if = "Option::is_none")]
    email: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    email_verified: Option<bool>,
    roles: Vec<String>,
    /// Generation, as in the refresh token that was minted with this one. A token from before there was this claim counts
    /// as one of a session that was never refreshed.
    #[serde(rename = "gen", default)]
    generation: i64,
}

#[derive(Serialize, Deserialize)]
struct RefreshClaims {
    iss: String,
    aud: String,
    sub: String,
    exp: i64,
    iat: i64,
    jti: String,
    sid: String,
    /// Generation.
    #[serde(rename = "gen")]
    generation: i64,
    /// When the session ends, as a NumericDate.
    end: i64,
}

impl Tokens {
    pub fn new(config: TokenConfig, keyring: Arc<Keyring>, masters: &MasterKeys) -> Result<Self, Error> {
        let key = |secret: &[u8]| {
            Ok(RefreshKey { signing: EncodingKey::from_secret(secret), verification: DecodingKey::from_secret(secret) })
        };
        let refresh = masters.derive("refresh-token-signing", key)?;
        Ok(Self { config, keyring, refresh, verified: Cache::new(REMEMBERED_TOKENS) })
    }

    /// The longest time between minting an access token and the last moment that any replica accepts it.
    pub fn max_access_token_lifetime(&self) -> Duration {
        self.config.max_access_token_lifetime()
    }

    /// Mints an access token with the user's current data, to go with the refresh token of `generation`.
    pub fn mint_access(&self, user: &User, session_id: SessionId, generation: i64, env: &Env) -> Result<Minted, Error> {
        let claims = AccessClaims {
            sub: user.id.to_string(),
            client_id: CLIENT_ID.to_owned(),
            sid: session_id.to_string(),
            username: user.username.as_str().to_owned(),
            subject_type: SubjectType::User,
            email: Some(user.email.as_str().to_owned()),
            email_verified: Some(user.email_verified),
            roles: names(&user.roles),
            generation,
            ..self.common_claims(self.config.access_ttl, env)?
        };
        self.mint(&claims, env)
    }

    /// Mints an access token for a service that has presented one of its keys. It does not outlive the key.
    pub fn mint_service_access(&self, account: &ServiceAccount, key: &ServiceKey, env: &Env) -> Result<Minted, Error> {
        let common = self.common_claims(self.config.service_ttl, env)?;
        let key_end = key.expire_time.map_or(i64::MAX, OffsetDateTime::unix_timestamp);
        let claims = AccessClaims {
            exp: common.exp.min(key_end),
            sub: account.id.to_string(),
            client_id: account.id.to_string(),
            sid: key.id.to_string(),
            username: account.name.as_str().to_owned(),
            subject_type: SubjectType::Service,
            roles: names(&account.roles),
            ..common
        };
        self.mint(&claims, env)
    }

    /// What all access tokens have in common.
    fn common_claims(&self, ttl: Duration, env: &Env) -> Result<AccessClaims, Error> {
        let now = env.now();
        Ok(AccessClaims {
            iss: self.config.issuer.clone(),
            aud: self.config.audience.clone(),
            exp: (now + ttl).unix_timestamp(),
            iat: now.unix_timestamp(),
            jti: env.uuid()?.to_string(),
            ..AccessClaims::default()
        })
    }

    fn mint(&self, claims: &AccessClaims, env: &Env) -> Result<Minted, Error> {
        let token = self.keyring.signing(env.now())?.sign(ACCESS_TYPE, claims)?;
        let expire_time = OffsetDateTime::from_unix_timestamp(claims.exp).map_err(Error::internal)?;
        Ok(Minted { token, expire_time })
    }

    /// What an access token says, if Postern minted it and it has not expired. Costs no I/O.
    ///
    /// The same token comes again with every call of its holder, so those that verified are remembered. What is
    /// remembered is what the token says: its expiry is compared with the clock each time, and whether it was revoked
    /// is decided elsewhere each time.
    pub fn verify_access(&self, token: &str, now: OffsetDateTime) -> Result<Arc<VerifiedToken>, AccessTokenError> {
        let digest = sha256(token.as_bytes());
        let verified = match self.verified.get(&digest) {
            Some(verified) if self.keyring.knows(&verified.kid) => verified,
            Some(_) | None => {
                let verified = Arc::new(self.verify(token)?);
                self.verified.insert(digest, Arc::clone(&verified));
                verified
            }
        };
        let now = whole_seconds(now);
        if now >= verified.accepted_until() {
            return Err(AccessTokenError::Expired);
        }
        // A clock was wrong, and this token would outlive what revokes it.
        if verified.issue_time > now + LEEWAY {
            return Err(AccessTokenError::Invalid);
        }
        Ok(verified)
    }

    /// Reads an access token that Postern minted. Its times are not checked here.
    fn verify(&self, token: &str) -> Result<VerifiedToken, AccessTokenError> {
        let invalid = AccessTokenError::Invalid;
        let header = read_header(token).ok_or(invalid)?;
        let key = header.kid.as_deref().and_then(|kid| self.keyring.verification(kid)).ok_or(invalid)?;
        if header.typ != ACCESS_TYPE || header.alg != key.algorithm {
            return Err(invalid);
        }
        let claims: AccessClaims = signed_claims(token, &key.key, key.algorithm).ok_or(invalid)?;
        if claims.iss != self.config.issuer || claims.aud != self.config.audience {
            return Err(invalid);
        }
        let (caller, email) = caller_of(&claims).ok_or(invalid)?;
        // Far enough from the ends of time that a leeway can be added.
        let time =
            |date: i64| OffsetDateTime::UNIX_EPOCH + Duration::from_secs(date.clamp(0, LATEST_TIME).unsigned_abs());
        Ok(VerifiedToken {
            caller,
            account: AccountClaims { client_id: claims.client_id, username: claims.username, email },
            generation: claims.generation,
            issue_time: time(claims.iat),
            expire_time: time(claims.exp),
            kid: header.kid.unwrap_or_default(),
            is_noted: AtomicBool::new(false),
        })
    }

    /// Mints the refresh token for a grant. Equal grants give equal bytes, as long as the master key is the same.
    pub fn mint_refresh(&self, grant: &RefreshGrant) -> Result<Minted, Error> {
        self.mint_refresh_with(self.refresh.active(), grant)
    }

    /// Mints a refresh token again that has this hash. `None` if it was minted with another issuer or master key.
    pub fn mint_refresh_again(&self, grant: &RefreshGrant, hash: RefreshHash) -> Result<Option<Minted>, Error> {
        for key in self.refresh.each() {
            let minted = self.mint_refresh_with(key, grant)?;
            if RefreshHash::of(&minted.token) == hash {
                return Ok(Some(minted));
            }
        }
        Ok(None)
    }

    fn mint_refresh_with(&self, key: &RefreshKey, grant: &RefreshGrant) -> Result<Minted, Error> {
        let claims = RefreshClaims {
            iss: self.config.issuer.clone(),
            aud: REFRESH_AUDIENCE.to_owned(),
            sub: grant.user_id.to_string(),
            exp: grant.expire_time.unix_timestamp(),
            iat: grant.issue_time.unix_timestamp(),
            jti: format!("{}.{}", grant.session_id, grant.generation),
            sid: grant.session_id.to_string(),
            generation: grant.generation,
            end: grant.session_end_time.unix_timestamp(),
        };
        let header = Header { typ: Some(REFRESH_TYPE.to_owned()), ..Header::new(Algorithm::HS256) };
        let token = jsonwebtoken::encode(&header, &claims, &key.signing).map_err(Error::internal)?;
        Ok(Minted { token, expire_time: grant.expire_time })
    }

    /// The grant of a refresh token, if Postern minted it. Expiry is not checked here, because an expired token can
    /// still log out.
    pub fn verify_refresh(&self, token: &str) -> Option<RefreshGrant> {
        let header = read_header(token)?;
        if header.typ != REFRESH_TYPE || header.alg != Algorithm::HS256 || header.kid.is_some() {
            return None;
        }
        let signed = |key: &RefreshKey| signed_claims(token, &key.verification, Algorithm::HS256);
        let claims: RefreshClaims = self.refresh.each().find_map(signed)?;
        if claims.iss != self.config.issuer || claims.aud != REFRESH_AUDIENCE {
            return None;
        }
        Some(RefreshGrant {
            session_id: claims.sid.parse().ok()?,
            user_id: claims.sub.parse().ok()?,
            generation: claims.generation,
            issue_time: OffsetDateTime::from_unix_timestamp(claims.iat).ok()?,
            expire_time: OffsetDateTime::from_unix_timestamp(claims.exp).ok()?,
            session_end_time: OffsetDateTime::from_unix_timestamp(claims.end).ok()?,
        })
    }

    /// `iss` of every token.
    pub fn issuer(&self) -> &str {
        &self.config.issuer
    }

    /// `aud` of access tokens.
    pub fn audience(&self) -> &str {
        &self.config.audience
    }

    /// The public keys as a JWK Set.
    pub fn jwks(&self) -> JwkSet {
        self.keyring.jwks()
    }
}

/// The caller of these claims, and the address that only a person's token has. `None` if they are not the claims of one kind
/// of caller.
fn caller_of(claims: &AccessClaims) -> Option<(Caller, Option<EmailClaim>)> {
    let roles = claims.roles.iter().map(|name| Role::parse(name)).collect::<Option<_>>()?;
    match (claims.subject_type, &claims.email, claims.email_verified) {
        (SubjectType::User, Some(email), Some(is_verified)) => {
            let (user_id, session_id) = (claims.sub.parse().ok()?, claims.sid.parse().ok()?);
            let email = EmailClaim { address: email.clone(), is_verified };
            Some((Caller::Person(Person { user_id, session_id, roles }), Some(email)))
        }
        (SubjectType::Service, None, None) if claims.client_id == claims.sub => {
            let (account_id, key_id) = (claims.sub.parse().ok()?, claims.sid.parse().ok()?);
            let token_id = Some(claims.jti.parse().ok()?);
            Some((Caller::Service(ServiceCaller { account_id, key_id, token_id, roles }), None))
        }
        _ => None,
    }
}

fn names(roles: &[Role]) -> Vec<String> {
    roles.iter().map(|role| role.as_str().to_owned()).collect()
}

/// Drops the fraction of a second: NumericDates in our tokens are whole seconds (RFC 7519 §2).
pub fn whole_seconds(time: OffsetDateTime) -> OffsetDateTime {
    time.replace_nanosecond(0).unwrap_or(time)
}

/// The header of a compact JWS of three strict base64url segments; `None` for anything else.
fn read_header(token: &str) -> Option<JoseHeader> {
    if token.len() > MAX_TOKEN_BYTES {
        return None;
    }
    let mut segments = token.split('.');
    let header = segments.next()?;
    if segments.count() != 2 {
        return None;
    }
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(header).ok()?).ok()
}

/// The claims of a token whose signature verifies with this key and algorithm. The library's own claim checks are off:
/// they accept a missing `aud`, a list of audiences and 60 s of leeway, and they read the machine's clock. Our callers
/// check the claims instead.
fn signed_claims<C: DeserializeOwned>(token: &str, key: &DecodingKey, algorithm: Algorithm) -> Option<C> {
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    jsonwebtoken::decode(token, key, &validation).ok().map(|data| data.claims)
}
