//! Service accounts: how another service proves who it is. An account has a name and roles, and keys; the secret of a key is
//! shown once. There can be several keys, so that a secret is replaced without a gap.

use std::{
    fmt,
    time::{Duration, Instant},
};

use aws_lc_rs::constant_time;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use quick_cache::sync::Cache;
use secrecy::{ExposeSecret as _, SecretString};
use time::OffsetDateTime;

use crate::error::{Error, FieldReason, FieldViolation};

use super::{
    digest::sha256,
    env::Env,
    ids::{ServiceAccountId, ServiceKeyId},
    role::{Role, ServiceCaller},
};

/// The start of every secret, so that scanners of source code can find one.
const SECRET_PREFIX: &str = "postern_";
/// The random part of a secret, in bytes.
const SECRET_BYTES: usize = 32;
/// The longest secret that is looked at, in bytes.
const MAX_SECRET_BYTES: usize = 128;
/// The longest description of a key, in characters.
const MAX_DESCRIPTION_CHARS: usize = 200;
/// The most keys of one account.
pub const MOST_KEYS: u32 = 20;
/// The most accounts.
pub const MOST_ACCOUNTS: u32 = 10_000;
/// How many tokens of one account may be revoked in a minute. Each is in the memory of every replica until it has expired.
pub const MOST_REVOKED_TOKENS: u32 = 600;

/// The name of a service account: `[a-z][a-z0-9_-]{0,63}`. No two accounts have the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceName(String);

impl ServiceName {
    pub fn parse(name: &str) -> Result<Self, FieldViolation> {
        if name.is_empty() {
            return Err(FieldViolation::required("name"));
        }
        // The rule of a role's name.
        Role::parse(name).map(|_| Self(name.to_owned())).ok_or_else(|| {
            FieldViolation::new(
                "name",
                FieldReason::Malformed,
                "must be a name such as billing-worker: a-z, then a-z, 0-9, _ or -, at most 64",
            )
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    pub id: ServiceAccountId,
    pub name: ServiceName,
    /// Sorted. There may be none.
    pub roles: Vec<Role>,
    pub disabled: bool,
    pub create_time: OffsetDateTime,
    pub update_time: OffsetDateTime,
}

/// A key of a service account, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceKey {
    pub id: ServiceKeyId,
    pub account: ServiceAccountId,
    /// For people: where the secret is.
    pub description: String,
    pub create_time: OffsetDateTime,
    /// `None`: it does not expire.
    pub expire_time: Option<OffsetDateTime>,
    /// Exact to the hour. `None`: it was never used.
    pub last_use_time: Option<OffsetDateTime>,
}

/// The description of a key.
pub fn description(text: String) -> Result<String, FieldViolation> {
    if text.chars().count() > MAX_DESCRIPTION_CHARS || text.contains(char::is_control) {
        return Err(FieldViolation::new(
            "description",
            FieldReason::Malformed,
            "must be at most 200 characters, in one line",
        ));
    }
    Ok(text)
}

/// The secret of a key. It is shown once, and cannot be printed.
#[derive(Debug, Clone)]
pub struct ClientSecret(SecretString);

impl ClientSecret {
    /// A new secret: 256 random bits.
    pub fn generate(env: &Env) -> Result<Self, Error> {
        let random = env.random::<SECRET_BYTES>()?;
        Ok(Self(format!("{SECRET_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(random)).into()))
    }

    /// A secret that a client has presented.
    pub fn presented(text: String) -> Result<Self, FieldViolation> {
        match text.len() {
            0 => Err(FieldViolation::required("client_secret")),
            1..=MAX_SECRET_BYTES => Ok(Self(text.into())),
            _ => Err(FieldViolation::new("client_secret", FieldReason::TooLong, "must be at most 128 bytes")),
        }
    }

    /// For the answer that shows it.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    pub fn hash(&self) -> SecretHash {
        SecretHash(sha256(self.expose().as_bytes()))
    }
}

/// The SHA-256 of a secret. The store keeps nothing else of it: 256 random bits need no slow hash.
#[derive(Debug, Clone, Copy)]
pub struct SecretHash(pub [u8; 32]);

impl SecretHash {
    /// Compares in constant time.
    pub fn is_same(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

/// How long a verified secret is remembered. It is shorter than the memory of revocations, which is at least a minute longer
/// than the life of a token (`Tokens::max_access_token_lifetime`): what ends the tokens of a key is still known.
const REMEMBERED_FOR: Duration = Duration::from_mins(1);
/// How many verified secrets are remembered.
const REMEMBERED_SECRETS: usize = 1_000;

/// A secret as it was presented with the id of an account, in a form that cannot be presented again.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PresentedSecret([u8; 32]);

/// Not the hash: it would tell whether two logs are about the same secret.
impl fmt::Debug for PresentedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PresentedSecret").finish_non_exhaustive()
    }
}

impl PresentedSecret {
    pub fn of(account: ServiceAccountId, secret: &ClientSecret) -> Self {
        Self(sha256(&[account.0.as_bytes().as_slice(), &secret.hash().0].concat()))
    }
}

/// The secrets that were verified within the last minute, and whose they are. Whether the key has ended since then is decided
/// by the revocations. The ones that were not used for the longest time go first.
pub struct VerifiedSecrets(Cache<PresentedSecret, VerifiedSecret>);

impl fmt::Debug for VerifiedSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifiedSecrets").finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct VerifiedSecret {
    service: ServiceCaller,
    /// No clock can move it.
    verified_at: Instant,
    /// When the key expires.
    expire_time: Option<OffsetDateTime>,
}

impl Default for VerifiedSecrets {
    fn default() -> Self {
        Self(Cache::new(REMEMBERED_SECRETS))
    }
}

impl VerifiedSecrets {
    pub fn get(&self, presented: &PresentedSecret, now: OffsetDateTime) -> Option<ServiceCaller> {
        let found = self.0.get(presented)?;
        let is_live = found.verified_at.elapsed() < REMEMBERED_FOR && found.expire_time.is_none_or(|end| now < end);
        is_live.then_some(found.service)
    }

    pub fn insert(&self, presented: PresentedSecret, service: ServiceCaller, expire_time: Option<OffsetDateTime>) {
        self.0.insert(presented, VerifiedSecret { service, verified_at: Instant::now(), expire_time });
    }
}

#[cfg(test)]
mod tests {
    use time::ext::NumericalDuration as _;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_verified_secret_is_remembered_for_its_account_and_until_its_key_expires() {
        let [secret, other] = [(); 2].map(|()| ClientSecret::generate(&Env::system()).expect("randomness"));
        let [account, stranger] = [1, 2].map(|number| ServiceAccountId(Uuid::from_u128(number)));
        let service =
            ServiceCaller { account_id: account, key_id: ServiceKeyId(Uuid::nil()), token_id: None, roles: Vec::new() };
        let now = OffsetDateTime::UNIX_EPOCH;
        let secrets = VerifiedSecrets::default();
        secrets.insert(PresentedSecret::of(account, &secret), service.clone(), Some(now + 1.seconds()));
        assert_eq!(secrets.get(&PresentedSecret::of(account, &secret), now), Some(service));
        for (id, secret, at) in
            [(stranger, &secret, now), (account, &other, now), (account, &secret, now + 1.seconds())]
        {
            assert_eq!(secrets.get(&PresentedSecret::of(id, secret), at), None);
        }
    }

    #[test]
    fn a_secret_has_a_prefix_and_256_bits_and_is_never_printed() {
        let secrets = [(); 2].map(|()| ClientSecret::generate(&Env::system()).expect("randomness"));
        for secret in &secrets {
            let random = secret.expose().strip_prefix(SECRET_PREFIX).expect("the prefix");
            assert_eq!(BASE64_URL_SAFE_NO_PAD.decode(random).expect("base64url").len(), SECRET_BYTES);
            assert!(!format!("{secret:?}").contains(random));
        }
        assert!(!secrets[0].hash().is_same(&secrets[1].hash()));
        let presented = ClientSecret::presented(secrets[0].expose().to_owned()).expect("a secret");
        assert!(presented.hash().is_same(&secrets[0].hash()));
    }

    #[test]
    fn a_name_is_that_of_a_role() {
        assert_eq!(ServiceName::parse("billing-worker").expect("a name").as_str(), "billing-worker");
        for bad in ["", "Billing", "-a", "a b", "é", &"a".repeat(65)] {
            assert!(ServiceName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
