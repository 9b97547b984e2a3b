//! The signing keys of access tokens that this process knows: which one signs, and which ones verify. They are read again
//! every few seconds, never while a call waits. `key_schedule.rs` decides when a key is made, signs and is forgotten.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use jsonwebtoken::jwk::{Jwk, JwkSet};
use time::OffsetDateTime;
use tokio::sync::Notify;
use zeroize::Zeroizing;

use crate::error::{Error, StoreError};

use super::{
    env::Env,
    ids::SessionId,
    key_schedule::{self, KeySchedule, KeyState},
    master_key::MasterKeys,
    ports::{SealedSigningKey, Store},
    signing_key::{self, SigningAlgorithm, SigningKey, VerificationKey, revocation_id},
};

/// How new keys are made, and when.
#[derive(Debug, Clone, Copy)]
pub struct KeyPolicy {
    /// The algorithm of the next key. Keys keep the one they were made for.
    pub algorithm: SigningAlgorithm,
    pub schedule: KeySchedule,
}

/// The decrypted signing keys.
pub struct Keyring {
    masters: Arc<MasterKeys>,
    pub policy: KeyPolicy,
    known: RwLock<Arc<Known>>,
    /// Woken when a token names a key that is not known.
    unknown: Notify,
    /// Woken when a key was revoked.
    revoked: Notify,
}

/// What was read last.
#[derive(Default)]
struct Known {
    keys: HashMap<String, Arc<Key>>,
    /// The same keys as they are stored.
    stored: Vec<SealedSigningKey>,
    /// When they were read. `None`: not yet.
    read_at: Option<Instant>,
}

/// A decrypted key.
struct Key {
    signing: Arc<SigningKey>,
    verification: Arc<VerificationKey>,
    /// What the log of revocations has when it is revoked.
    revocation: SessionId,
}

/// Which master key a signing key is encrypted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SealedWith {
    Current,
    Previous,
}

/// A key and its state, as the command line lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedKey {
    pub kid: String,
    pub algorithm: String,
    pub state: KeyState,
    /// From when it signs, if that was decided.
    pub sign_time: Option<OffsetDateTime>,
}

/// The next key, and from when it signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRotation {
    pub kid: String,
    pub sign_time: OffsetDateTime,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Reads and decrypts the keys of a store. Creates the first key if there is none; of replicas that start at the
    /// same time, the first one decides, because the store keeps its key.
    pub async fn open(
        store: &dyn Store,
        masters: Arc<MasterKeys>,
        policy: KeyPolicy,
        env: &Env,
    ) -> Result<Self, Error> {
        let keyring = Self::new(masters, policy);
        if store.signing_keys().await?.is_empty() {
            // Nobody has verified anything yet, so it signs at once.
            let first = keyring.generate(env, Some(env.now()))?;
            store.add_first_signing_key(first).await?;
        }
        keyring.read_first(store).await
    }

    /// Reads and decrypts the keys of a store that has at least one.
    pub async fn read(store: &dyn Store, masters: Arc<MasterKeys>, policy: KeyPolicy) -> Result<Self, Error> {
        Self::new(masters, policy).read_first(store).await
    }

    fn new(masters: Arc<MasterKeys>, policy: KeyPolicy) -> Self {
        let (unknown, revoked) = (Notify::new(), Notify::new());
        Self { masters, policy, known: RwLock::default(), unknown, revoked }
    }

    async fn read_first(self, store: &dyn Store) -> Result<Self, Error> {
        let asked_at = Instant::now();
        let stored = store.signing_keys().await?;
        if stored.is_empty() {
            return Err(Error::internal("the database holds no signing key: `postern serve` makes the first"));
        }
        self.install(stored, asked_at)?;
        Ok(self)
    }

    /// Takes over the keys as they were read by a query that began at `asked_at`. A key that cannot be decrypted is an error;
    /// the other ones are taken over then, and this process counts as one that could not read the keys.
    pub fn install(&self, stored: Vec<SealedSigningKey>, asked_at: Instant) -> Result<(), Error> {
        let before = self.known();
        let (mut keys, mut failure, mut previous_is_active) = (HashMap::new(), None, false);
        for sealed in &stored {
            // A `kid` is a hash of the public key, so a key that is known is the same key.
            let known = before.keys.get(&sealed.kid).cloned();
            let (key, error) = match (self.unseal(sealed), known) {
                (Ok((pkcs8, with)), known) => {
                    previous_is_active |= with == SealedWith::Previous;
                    let key = known.map_or_else(|| read_key(sealed, &pkcs8).map(Arc::new), Ok);
                    key.map_or_else(|error| (None, Some(error)), |key| (Some(key), None))
                }
                (Err(error), Some(key)) => {
                    tracing::error!(
                        cause = error.for_operators(),
                        "a signing key that is in use could not be read again"
                    );
                    (Some(key), None)
                }
                (Err(error), None) => (None, Some(error)),
            };
            if let Some(key) = key {
                keys.insert(sealed.kid.clone(), key);
            }
            failure = failure.or(error);
        }
        self.masters.set_previous_active(previous_is_active);
        let stored = stored.into_iter().filter(|sealed| keys.contains_key(&sealed.kid)).collect();
        let read_at = if failure.is_none() { Some(asked_at) } else { before.read_at };
        self.replace(Known { keys, stored, read_at });
        failure.map_or(Ok(()), Err)
    }

    /// A new key, encrypted with the active master key. Without a time to sign, that is decided once the key is visible.
    pub fn generate(&self, env: &Env, sign_time: Option<OffsetDateTime>) -> Result<SealedSigningKey, Error> {
        let algorithm = self.policy.algorithm;
        let key = signing_key::generate(algorithm, self.masters.active(), env)?;
        Ok(SealedSigningKey {
            kid: key.kid,
            algorithm: algorithm.as_str().to_owned(),
            sealed_private_key: key.sealed_private_key,
            create_time: env.now(),
            sign_time,
            publish_ahead: Some(self.policy.schedule.publish_ahead),
        })
    }

    /// Encrypts a key with the current master key. `None` if it is.
    pub fn reseal(&self, sealed: &SealedSigningKey, env: &Env) -> Result<Option<Vec<u8>>, Error> {
        match self.unseal(sealed)? {
            (_, SealedWith::Current) => Ok(None),
            (pkcs8, SealedWith::Previous) => {
                let master = self.masters.current();
                signing_key::seal(&pkcs8, &sealed.kid, &sealed.algorithm, master, env).map(Some)
            }
        }
    }

    fn unseal(&self, sealed: &SealedSigningKey) -> Result<(Zeroizing<Vec<u8>>, SealedWith), Error> {
        algorithm_of(sealed)?;
        let current = (self.masters.current(), SealedWith::Current);
        let previous = self.masters.previous().map(|previous| (previous, SealedWith::Previous));
        for (master, with) in std::iter::once(current).chain(previous) {
            let opened = signing_key::unseal(&sealed.sealed_private_key, &sealed.kid, &sealed.algorithm, master)?;
            if let Some(pkcs8) = opened {
                return Ok((pkcs8, with));
            }
        }
        Err(wrong_key(sealed))
    }

    /// The key that signs at this time. An error if the keys were not read for so long that it may be another one.
    pub fn signing(&self, now: OffsetDateTime) -> Result<Arc<SigningKey>, Error> {
        let known = self.known();
        let longest = self.policy.schedule.longest_staleness(&known.stored);
        if known.read_at.is_none_or(|read_at| read_at.elapsed() > longest) {
            let cause = format!("the signing keys were not read for more than {longest:?}");
            return Err(StoreError::Unavailable(cause.into()).into());
        }
        let signing = key_schedule::signing(&known.stored, now).and_then(|key| known.keys.get(&key.kid));
        let signing = signing.ok_or_else(|| StoreError::Unavailable("the key that signs was revoked".into()))?;
        Ok(Arc::clone(&signing.signing))
    }

    /// The key with this `kid`. An unknown one costs no I/O here; the keys are read again soon.
    pub fn verification(&self, kid: &str) -> Option<Arc<VerificationKey>> {
        let found = self.lock_known().keys.get(kid).map(|key| Arc::clone(&key.verification));
        if found.is_none() {
            self.unknown.notify_one();
        }
        found
    }

    /// Whether there is a key with this `kid`.
    pub fn knows(&self, kid: &str) -> bool {
        self.lock_known().keys.contains_key(kid)
    }

    /// The public keys as a JWK Set (RFC 7517 §5), ordered by `kid`.
    pub fn jwks(&self) -> JwkSet {
        let mut keys: Vec<Jwk> = self.known().keys.values().map(|key| key.verification.jwk.clone()).collect();
        keys.sort_by(|a, b| a.common.key_id.cmp(&b.common.key_id));
        JwkSet { keys }
    }

    /// The algorithms of the published keys.
    pub fn algorithms(&self) -> Vec<String> {
        let mut names: Vec<_> = self.stored().into_iter().map(|key| key.algorithm).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// How long a verifier may keep the JWK Set.
    pub fn max_age(&self) -> Duration {
        let known = self.known();
        let read_ago = known.read_at.map_or(Duration::MAX, |read_at| read_at.elapsed());
        self.policy.schedule.max_age(&known.stored, read_ago)
    }

    /// The keys with their states, in the order in which they sign.
    pub fn list(&self, now: OffsetDateTime) -> Vec<ListedKey> {
        let mut stored = self.stored();
        let time =
            |key: &SealedSigningKey| key_schedule::signs_since(key).map_or((true, key.create_time), |at| (false, at));
        stored.sort_by_key(time);
        let listed = |key: &SealedSigningKey| ListedKey {
            kid: key.kid.clone(),
            algorithm: key.algorithm.clone(),
            state: key_schedule::state(&stored, key, now),
            sign_time: key_schedule::signs_since(key),
        };
        stored.iter().map(listed).collect()
    }

    /// The keys as they are stored.
    pub fn stored(&self) -> Vec<SealedSigningKey> {
        self.known().stored.clone()
    }

    /// Drops the keys that were revoked, by the ids that the log of revocations has for them.
    pub fn drop_revoked(&self, is_revoked: impl Fn(SessionId) -> bool) {
        let known = self.known();
        if !known.keys.values().any(|key| is_revoked(key.revocation)) {
            return;
        }
        let kept = |kid: &String| known.keys.get(kid).is_some_and(|key| !is_revoked(key.revocation));
        let keys =
            known.keys.iter().filter(|(kid, _)| kept(kid)).map(|(kid, key)| (kid.clone(), Arc::clone(key))).collect();
        let stored = known.stored.iter().filter(|key| kept(&key.kid)).cloned().collect();
        self.replace(Known { keys, stored, read_at: known.read_at });
        self.revoked.notify_one();
    }

    /// Returns when a token has named a key that is not known.
    pub async fn unknown_named(&self) {
        self.unknown.notified().await;
    }

    /// Returns when a key was revoked: another one may sign now.
    pub async fn key_revoked(&self) {
        self.revoked.notified().await;
    }

    fn known(&self) -> Arc<Known> {
        Arc::clone(&self.lock_known())
    }

    fn lock_known(&self) -> std::sync::RwLockReadGuard<'_, Arc<Known>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, known: Known) {
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(known);
    }
}

fn read_key(sealed: &SealedSigningKey, pkcs8: &[u8]) -> Result<Key, Error> {
    let (signing, verification) = signing_key::read(pkcs8, algorithm_of(sealed)?)?;
    let revocation = revocation_id(&sealed.kid);
    Ok(Key { signing: Arc::new(signing), verification: Arc::new(verification), revocation })
}

fn algorithm_of(sealed: &SealedSigningKey) -> Result<SigningAlgorithm, Error> {
    SigningAlgorithm::parse(&sealed.algorithm).ok_or_else(|| {
        Error::internal(format!("signing key {} has the unknown algorithm {}", sealed.kid, sealed.algorithm))
    })
}

fn wrong_key(sealed: &SealedSigningKey) -> Error {
    Error::internal(format!(
        "signing key {} cannot be decrypted: POSTERN_MASTER_KEY is not the one that this database was made with",
        sealed.kid
    ))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::domain::master_key::MasterKey;

    fn keyring(current: u8, previous: Option<u8>) -> Keyring {
        let master = |byte| MasterKey::from_bytes([byte; 32]);
        let schedule = KeySchedule {
            rotation: Duration::from_hours(90 * 24),
            publish_ahead: Duration::from_hours(24),
            token_lifetime: Duration::from_mins(16),
        };
        let policy = KeyPolicy { algorithm: SigningAlgorithm::EdDsa, schedule };
        Keyring::new(Arc::new(MasterKeys::new(master(current), previous.map(master))), policy)
    }

    fn key_of(keyring: &Keyring) -> SealedSigningKey {
        let env = Env::system();
        keyring.generate(&env, Some(env.now())).expect("a key")
    }

    fn signing(keyring: &Keyring) -> Result<String, Error> {
        keyring.signing(Env::system().now()).map(|key| key.kid.clone())
    }

    #[test]
    fn a_process_that_could_not_read_the_keys_for_long_signs_no_more() {
        let keyring = keyring(1, None);
        let key = key_of(&keyring);
        let longest = keyring.policy.schedule.longest_staleness(std::slice::from_ref(&key));
        for (ago, signs) in [(Duration::ZERO, true), (longest / 2, true), (longest + Duration::from_secs(1), false)] {
            let asked_at = Instant::now().checked_sub(ago).expect("the machine is up for longer");
            keyring.install(vec![key.clone()], asked_at).expect("the key");
            assert_eq!(signing(&keyring).is_ok(), signs, "{ago:?}");
            assert!(keyring.knows(&key.kid), "it still verifies");
        }
        assert!(matches!(signing(&keyring), Err(Error::StoreUnavailable(_))));
    }

    #[test]
    fn a_key_that_cannot_be_decrypted_leaves_the_others_and_counts_as_not_read() {
        let keyring = keyring(1, None);
        let (mine, theirs) = (key_of(&keyring), key_of(&self::keyring(2, None)));
        let first = Instant::now();
        keyring.install(vec![mine.clone()], first).expect("the key");
        let refused = keyring.install(vec![mine.clone(), theirs.clone()], Instant::now());
        assert!(refused.expect_err("no master key").for_operators().contains(&theirs.kid));
        assert_eq!(signing(&keyring).ok(), Some(mine.kid));
        assert_eq!(keyring.known().read_at, Some(first));
    }

    #[test]
    fn a_key_that_is_known_stays_when_it_is_encrypted_with_a_master_key_that_is_not() {
        let (before, between, after) = (keyring(1, None), keyring(2, Some(1)), keyring(2, None));
        let key = key_of(&before);
        before.install(vec![key.clone()], Instant::now()).expect("the key");
        between.install(vec![key.clone()], Instant::now()).expect("the previous master key opens it");
        assert!(after.install(vec![key.clone()], Instant::now()).is_err());
        // What a replica with both makes now, one with the previous master key alone can read.
        let next = key_of(&between);
        before.install(vec![key.clone(), next], Instant::now()).expect("both keys");

        let sealed_private_key = between.reseal(&key, &Env::system()).expect("the key").expect("it is the old one");
        let resealed = SealedSigningKey { sealed_private_key, ..key };
        for keyring in [&before, &between, &after] {
            keyring.install(vec![resealed.clone()], Instant::now()).expect("the key");
            assert_eq!(signing(keyring).ok().as_ref(), Some(&resealed.kid));
        }
        assert_eq!(between.reseal(&resealed, &Env::system()).expect("the key"), None, "it is done");
        assert!(after.install(vec![key_of(&between)], Instant::now()).is_ok(), "the new master key is in use");
    }

    #[test]
    fn a_revoked_key_is_dropped_and_an_unknown_one_is_noted() {
        let keyring = keyring(1, None);
        let (first, second) = (key_of(&keyring), key_of(&keyring));
        keyring.install(vec![first.clone(), second.clone()], Instant::now()).expect("the keys");
        keyring.drop_revoked(|_| false);
        assert!(keyring.key_revoked().now_or_never().is_none());

        let revoked = revocation_id(&second.kid);
        keyring.drop_revoked(|id| id == revoked);
        assert!(keyring.key_revoked().now_or_never().is_some());
        assert_eq!((keyring.knows(&second.kid), signing(&keyring).ok()), (false, Some(first.kid.clone())));
        assert_eq!(keyring.jwks().keys.len(), 1);

        assert!(keyring.verification(&first.kid).is_some());
        assert!(keyring.unknown_named().now_or_never().is_none());
        assert!(keyring.verification(&second.kid).is_none());
        assert!(keyring.unknown_named().now_or_never().is_some());
    }
}
