//! The public keys of the issuer, fetched when they are needed and again from time to time.
//!
//! One fetch is under way at a time, in a task of its own, so that a caller that gives up does not cancel it for the others.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse},
};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::{clock::Clock, error::VerifyError};

const FETCH_DEADLINE: Duration = Duration::from_secs(5);
/// More than any set of keys has.
const MAX_BYTES: usize = 1024 * 1024;

/// Where keys come from, and how often they may be fetched.
#[derive(Debug, Clone)]
pub struct KeySource {
    /// The JWK Set (RFC 7517), such as `https://auth.example.com/.well-known/jwks.json`.
    pub url: String,
    /// The least time between two fetches that unknown keys cause. Default: 10 s.
    pub cooldown: Duration,
    /// After this time known keys are fetched again, so that a key that is not published any more stops being accepted.
    /// Default: 5 minutes, as long as Postern lets them be kept.
    pub max_age: Duration,
}

impl KeySource {
    /// Postern's path below the issuer.
    pub fn of_issuer(issuer: &str) -> Self {
        Self::at(format!("{}/.well-known/jwks.json", issuer.trim_end_matches('/')))
    }

    /// The keys at a URL of their own, for an issuer that is reached by another name from here.
    pub fn at(url: impl Into<String>) -> Self {
        Self { url: url.into(), cooldown: Duration::from_secs(10), max_age: Duration::from_mins(5) }
    }
}

/// A key, and the only algorithm that it is for. A token does not choose it.
#[derive(Debug)]
pub(crate) struct PublicKey {
    pub(crate) algorithm: Algorithm,
    pub(crate) key: DecodingKey,
}

type Known = HashMap<String, Arc<PublicKey>>;

#[derive(Debug)]
pub(crate) struct Keys {
    source: KeySource,
    clock: Clock,
    http: reqwest::Client,
    known: RwLock<Option<Arc<Known>>>,
    fetch: Arc<Mutex<LastFetch>>,
}

#[derive(Debug, Default)]
struct LastFetch {
    /// When it began, since 1970.
    at: Option<Duration>,
    failed: bool,
}

impl Keys {
    pub(crate) fn new(source: KeySource, clock: Clock) -> Result<Self, reqwest::Error> {
        let http =
            reqwest::Client::builder().timeout(FETCH_DEADLINE).redirect(reqwest::redirect::Policy::none()).build()?;
        Ok(Self { source, clock, http, known: RwLock::default(), fetch: Arc::default() })
    }

    /// The key of this id. [`VerifyError::TokenInvalid`]: the issuer has no such key.
    pub(crate) async fn get(self: &Arc<Self>, kid: &str) -> Result<Arc<PublicKey>, VerifyError> {
        if let Some(key) = self.known(kid) {
            self.refresh_if_old();
            return Ok(key);
        }
        let last = Arc::clone(&self.fetch).lock_owned().await;
        // Whoever waited may find that the one before has fetched it.
        if let Some(key) = self.known(kid) {
            return Ok(key);
        }
        let last = if self.is_within(&last, self.source.cooldown) { last } else { self.fetch(last).await? };
        match self.known(kid) {
            Some(key) => Ok(key),
            // The key may be a new one that could not be fetched.
            None if last.failed => Err(VerifyError::KeysUnavailable),
            None => Err(VerifyError::TokenInvalid),
        }
    }

    /// Whether the key is still published, as far as is known.
    pub(crate) fn knows(self: &Arc<Self>, kid: &str) -> bool {
        self.refresh_if_old();
        self.known(kid).is_some()
    }

    fn known(&self, kid: &str) -> Option<Arc<PublicKey>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().and_then(|known| known.get(kid)).map(Arc::clone)
    }

    /// Starts a fetch beside the check if the keys are old, and if nobody else does so already.
    fn refresh_if_old(self: &Arc<Self>) {
        let Ok(last) = Arc::clone(&self.fetch).try_lock_owned() else {
            return;
        };
        let age = if last.failed { self.source.cooldown } else { self.source.max_age };
        if !self.is_within(&last, age) {
            drop(self.spawn_fetch(last));
        }
    }

    /// Whether the last fetch began less than this time ago. A clock that was put back does not delay the next one.
    fn is_within(&self, last: &LastFetch, time: Duration) -> bool {
        let now = self.clock.since_epoch();
        last.at.and_then(|at| now.checked_sub(at)).is_some_and(|age| age < time)
    }

    async fn fetch(
        self: &Arc<Self>,
        last: OwnedMutexGuard<LastFetch>,
    ) -> Result<OwnedMutexGuard<LastFetch>, VerifyError> {
        self.spawn_fetch(last).await.map_err(|_| VerifyError::KeysUnavailable)
    }

    fn spawn_fetch(
        self: &Arc<Self>,
        mut last: OwnedMutexGuard<LastFetch>,
    ) -> tokio::task::JoinHandle<OwnedMutexGuard<LastFetch>> {
        let keys = Arc::clone(self);
        tokio::spawn(async move {
            *last = LastFetch { at: Some(keys.clock.since_epoch()), failed: true };
            if let Some(found) = keys.download().await {
                *keys.known.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(found));
                last.failed = false;
            }
            last
        })
    }

    async fn download(&self) -> Option<Known> {
        let mut response = self.http.get(&self.source.url).send().await.ok()?.error_for_status().ok()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.ok()? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_BYTES {
                return None;
            }
        }
        let set: JwkSet = serde_json::from_slice(&body).ok()?;
        Some(set.keys.iter().filter_map(usable).collect())
    }
}

/// A key with an id that is for signatures of an algorithm that Postern has.
fn usable(jwk: &Jwk) -> Option<(String, Arc<PublicKey>)> {
    let kid = jwk.common.key_id.clone()?;
    let is_for_signatures = jwk.common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature);
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        _ => return None,
    };
    let key = is_for_signatures.then(|| DecodingKey::from_jwk(jwk).ok())??;
    Some((kid, Arc::new(PublicKey { algorithm, key })))
}
