//! The master key, and the keys that are derived from it.

use std::fmt;

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
}
