//! The steps of signing keys.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::audit::{Action, AuditContext},
    error::StoreError,
};

/// The signing keys.
#[async_trait]
pub trait KeyStore {
    /// Every signing key, in no particular order.
    async fn signing_keys(&self) -> Result<Vec<SealedSigningKey>, StoreError>;

    /// Changes the signing keys, if they are still exactly as `expected`. Of several callers at the same time, one wins:
    /// `false` means that nothing was changed, and the keys are to be read again.
    async fn change_signing_keys(&self, change: KeyChange) -> Result<bool, StoreError>;
}

/// A signing key as the store keeps it: the private part is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedSigningKey {
    /// The RFC 7638 SHA-256 thumbprint of the public key.
    pub kid: String,
    /// The JWS algorithm that the key is bound to, such as `ES256`.
    pub algorithm: String,
    /// The PKCS#8 private key: nonce, then AES-256-GCM ciphertext and tag.
    pub sealed_private_key: Vec<u8>,
    pub create_time: OffsetDateTime,
    /// From when it signs. `None`: that is not decided yet, unless `publish_ahead` is `None` too. Then a release without
    /// rotation made the key, and it has signed since `create_time`.
    pub sign_time: Option<OffsetDateTime>,
    /// How long a key is published before it signs, by the settings of the replica that made this one. Whole seconds.
    pub publish_ahead: Option<Duration>,
}

/// A change of the signing keys, with the keys that it was decided from.
#[derive(Debug, Clone)]
pub struct KeyChange {
    pub expected: Vec<SealedSigningKey>,
    pub edits: Vec<KeyEdit>,
    /// What the audit log says of it, if anything.
    pub event: Option<(Action, String)>,
    pub context: AuditContext,
}

/// A part of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyEdit {
    Add(SealedSigningKey),
    /// Decides from when a key signs.
    Schedule {
        kid: String,
        sign_time: OffsetDateTime,
    },
    /// Replaces the encrypted private key: the master key is another one.
    Reseal {
        kid: String,
        sealed_private_key: Vec<u8>,
    },
    /// Deletes a key that is no longer needed.
    Forget {
        kid: String,
    },
    /// Deletes a key and tells every replica through the log of revocations.
    Revoke {
        kid: String,
    },
}
