//! The master key, and the keys that are derived from it.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aws_lc_rs::hkdf;
use base64::{Engine, prelude::BASE64_STANDARD};
use zeroize::Zeroizing;

use crate::error::Error;

use super::env::Env;

/// The length of the master key and of each derived key, in bytes.
const KEY_BYTES: usize = 32;

/// The one secret that an operator keeps: 32 bytes, written in base64. Every other key is derived from it
/// (HKDF-SHA-256, RFC 5869) or encrypted with a key that is.
pub struct MasterKey(Zeroizing<[u8; KEY_BYTES]>);

/// Why a text is not a master key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MasterKeyError {
    #[error("is not 32 bytes in base64; make one with: openssl rand -base64 32")]
    Malformed,
    #[error("is a placeholder: its bytes are all alike; make one with: openssl rand -base64 32")]
    Placeholder,
}

impl MasterKey {
    /// Reads the base64 form. White space around it is ignored, because files end in a newline.
    pub fn parse(text: &str) -> Result<Self, MasterKeyError> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(text.trim()).map_err(|_| MasterKeyError::Malformed)?);
        let key: [u8; KEY_BYTES] = bytes.as_slice().try_into().map_err(|_| MasterKeyError::Malformed)?;
        if key.iter().all(|byte| byte == &key[0]) {
            return Err(MasterKeyError::Placeholder);
        }
        Ok(Self(Zeroizing::new(key)))
    }

    /// A key for tests.
    #[cfg(test)]
    pub(crate) fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Generates a new key, in its base64 form.
    pub fn generate(env: &Env) -> Result<Zeroizing<String>, Error> {
        let bytes = Zeroizing::new(env.random::<KEY_BYTES>()?);
        Ok(Zeroizing::new(BASE64_STANDARD.encode(bytes.as_slice())))
    }

    /// Derives a key for one purpose. A different label gives a different key, so changing a label invalidates
    /// everything that was made with the old one.
    pub fn derive(&self, label: &'static str) -> Result<Zeroizing<[u8; KEY_BYTES]>, Error> {
        let mut derived = Zeroizing::new([0; KEY_BYTES]);
        hkdf::Salt::new(hkdf::HKDF_SHA256, b"postern/v1")
            .extract(self.0.as_slice())
            .expand(&[label.as_bytes()], hkdf::HKDF_SHA256)
            .and_then(|output| output.fill(derived.as_mut_slice()))
            .map_err(|_| Error::internal("a key could not be derived"))?;
        Ok(derived)
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey([redacted])")
    }
}

/// The master key, and the one before it while a deployment changes from that to this.
///
/// Both are accepted. The one that the signing keys in the database are encrypted with is active: what is made is made with
/// that. So replicas with both keys agree with replicas that have the previous one alone, until `postern keys rewrap`
/// encrypts the signing keys with the current one.
#[derive(Debug)]
pub struct MasterKeys {
    current: MasterKey,
    previous: Option<MasterKey>,
    previous_is_active: Arc<AtomicBool>,
}

impl From<MasterKey> for MasterKeys {
    fn from(current: MasterKey) -> Self {
        Self::new(current, None)
    }
}

impl MasterKeys {
    pub fn new(current: MasterKey, previous: Option<MasterKey>) -> Self {
        Self { current, previous, previous_is_active: Arc::default() }
    }

    pub fn current(&self) -> &MasterKey {
        &self.current
    }

    pub fn previous(&self) -> Option<&MasterKey> {
        self.previous.as_ref()
    }

    /// The key that things are made with.
    pub fn active(&self) -> &MasterKey {
        match &self.previous {
            Some(previous) if self.previous_is_active.load(Ordering::Relaxed) => previous,
            Some(_) | None => &self.current,
        }
    }

    /// Notes whether a signing key is still encrypted with the previous one.
    pub(super) fn set_previous_active(&self, is_active: bool) {
        self.previous_is_active.store(is_active, Ordering::Relaxed);
    }

    /// Derives a key for one purpose from each.
    pub fn derive<T>(
        &self,
        label: &'static str,
        make: impl Fn(&[u8]) -> Result<T, Error>,
    ) -> Result<Derived<T>, Error> {
        let derived = |master: &MasterKey| make(master.derive(label)?.as_slice());
        Ok(Derived {
            current: derived(&self.current)?,
            previous: self.previous.as_ref().map(derived).transpose()?,
            previous_is_active: Arc::clone(&self.previous_is_active),
        })
    }
}

/// What was derived from the master keys for one purpose.
pub struct Derived<T> {
    current: T,
    previous: Option<T>,
    previous_is_active: Arc<AtomicBool>,
}

impl<T> fmt::Debug for Derived<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Derived([redacted])")
    }
}

impl<T> Derived<T> {
    /// The one to make things with.
    pub fn active(&self) -> &T {
        match &self.previous {
            Some(previous) if self.previous_is_active.load(Ordering::Relaxed) => previous,
            Some(_) | None => &self.current,
        }
    }

    /// All of them, to check things with.
    pub fn each(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.current).chain(&self.previous)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn master(byte: u8) -> MasterKey {
        MasterKey::from_bytes([byte; KEY_BYTES])
    }

    #[test]
    fn only_32_bytes_of_base64_that_differ_are_a_master_key() {
        let parse = |text: &str| MasterKey::parse(text).err();
        assert_eq!(parse(""), Some(MasterKeyError::Malformed));
        assert_eq!(parse("changeme"), Some(MasterKeyError::Malformed));
        assert_eq!(parse(&BASE64_STANDARD.encode([7; 31])), Some(MasterKeyError::Malformed));
        assert_eq!(parse(&BASE64_STANDARD.encode([0; 32])), Some(MasterKeyError::Placeholder));
        let generated = MasterKey::generate(&Env::system()).expect("randomness");
        assert_eq!(parse(&format!("{}\n", generated.as_str())), None);
    }

    #[test]
    fn derived_keys_differ_by_purpose_and_by_master_key() {
        let derive = |byte, label| master(byte).derive(label).expect("a key").to_vec();
        assert_eq!(derive(1, "a"), derive(1, "a"));
        assert_ne!(derive(1, "a"), derive(1, "b"));
        assert_ne!(derive(1, "a"), derive(2, "a"));
    }

    #[test]
    fn the_previous_key_is_accepted_and_makes_things_while_it_is_active() {
        let keys = MasterKeys::new(master(1), Some(master(2)));
        let derived = keys.derive("a", |key| Ok(key.to_vec())).expect("keys");
        let one = |byte| master(byte).derive("a").expect("a key").to_vec();
        assert_eq!(derived.each().cloned().collect::<Vec<_>>(), [one(1), one(2)]);
        assert_eq!(*derived.active(), one(1));
        keys.set_previous_active(true);
        assert_eq!(*derived.active(), one(2));
        let alone = MasterKeys::from(master(1));
        alone.set_previous_active(true);
        assert_eq!(*alone.derive("a", |key| Ok(key.to_vec())).expect("a key").active(), one(1));
    }
}
