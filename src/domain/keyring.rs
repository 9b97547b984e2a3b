//! The signing keys of access tokens. They are stored encrypted with a key derived from the master key, so a dump of
//! the database is useless without it.

use std::{collections::HashMap, fmt};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header,
    jwk::{Jwk, JwkSet, PublicKeyUse, ThumbprintHash},
};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::error::Error;

use super::{
    env::Env,
    master_key::MasterKey,
    ports::{SealedSigningKey, Store},
};

/// The length of an AES-GCM nonce, in bytes.
const NONCE_BYTES: usize = 12;

/// A key that signs access tokens. It does not implement `Debug`, so it cannot be printed.
#[expect(missing_debug_implementations, reason = "it is a private key")]
pub struct SigningKey {
    pub kid: String,
    pub algorithm: Algorithm,
    /// Parsed once, when the keys are read.
    pair: EcdsaKeyPair,
}

impl SigningKey {
    /// A compact JWS (RFC 7515 §7.1) of these claims, with a header that names the type, the algorithm and the key.
    pub fn sign(&self, typ: &str, claims: &impl Serialize) -> Result<String, Error> {
        let header = Header { typ: Some(typ.to_owned()), kid: Some(self.kid.clone()), ..Header::new(self.algorithm) };
        let segment = |json: Vec<u8>| BASE64_URL_SAFE_NO_PAD.encode(json);
        let mut token = segment(serde_json::to_vec(&header).map_err(Error::internal)?);
        token.push('.');
        token.push_str(&segment(serde_json::to_vec(claims).map_err(Error::internal)?));
        let signature = self.signature(token.as_bytes())?;
        token.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token)
    }

    /// The signature of a message in the form that JWS has for the algorithm (RFC 7518 §3.4).
    pub fn signature(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signature = self.pair.sign(&SystemRandom::new(), message);
        let signature = signature.map_err(|_| Error::internal("an access token could not be signed"))?;
        Ok(signature.as_ref().to_vec())
    }
}

/// A key that verifies access tokens, bound to its one algorithm.
#[derive(Debug)]
pub struct VerificationKey {
    pub algorithm: Algorithm,
    pub key: DecodingKey,
    jwk: Jwk,
}

/// The decrypted signing keys. The newest one signs; all of them verify.
pub struct Keyring {
    signing: SigningKey,
    verification: HashMap<String, VerificationKey>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("signing", &self.signing.kid).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Reads and decrypts the keys of a store. Creates the first key if there is none; of replicas that start at the
    /// same time, the first one decides, because the store keeps its key.
    pub async fn open(store: &dyn Store, master: &MasterKey, env: &Env) -> Result<Self, Error> {
        if store.signing_keys().await?.is_empty() {
            store.add_first_signing_key(generate(master, env)?).await?;
        }
        Self::read(store, master).await
    }

    /// Reads and decrypts the keys of a store that has at least one.
    pub async fn read(store: &dyn Store, master: &MasterKey) -> Result<Self, Error> {
        let mut sealed = store.signing_keys().await?;
        sealed.sort_by_key(|key| key.create_time);
        let mut signing = None;
        let mut verification = HashMap::new();
        for key in &sealed {
            let (signer, verifier) = open_sealed(key, master)?;
            signing = Some(signer);
            verification.insert(key.kid.clone(), verifier);
        }
        let signing = signing
            .ok_or_else(|| Error::internal("the database holds no signing key: `postern serve` makes the first"))?;
        Ok(Self { signing, verification })
    }

    /// The key that signs.
    pub fn signing(&self) -> &SigningKey {
        &self.signing
    }

    /// The key with this `kid`. An unknown one costs no I/O.
    pub fn verification(&self, kid: &str) -> Option<&VerificationKey> {
        self.verification.get(kid)
    }

    /// The public keys as a JWK Set (RFC 7517 §5), ordered by `kid`.
    pub fn jwks(&self) -> JwkSet {
        let mut keys: Vec<Jwk> = self.verification.values().map(|key| key.jwk.clone()).collect();
        keys.sort_by(|a, b| a.common.key_id.cmp(&b.common.key_id));
        JwkSet { keys }
    }
}

fn generate(master: &MasterKey, env: &Env) -> Result<SealedSigningKey, Error> {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
        .map_err(|_| Error::internal("a signing key could not be made"))?;
    let pkcs8 = pair.to_pkcs8v1().map_err(|_| Error::internal("a signing key could not be encoded"))?;
    let (signing, _) = read(pkcs8.as_ref(), Algorithm::ES256)?;
    let algorithm = "ES256";
    let mut sealed = env.random::<NONCE_BYTES>()?.to_vec();
    let nonce = Nonce::try_assume_unique_for_key(&sealed).map_err(|_| Error::internal("a nonce has 12 bytes"))?;
    let mut ciphertext = pkcs8.as_ref().to_vec();
    sealing_key(master)?
        .seal_in_place_append_tag(nonce, additional_data(&signing.kid, algorithm), &mut ciphertext)
        .map_err(|_| Error::internal("a signing key could not be encrypted"))?;
    sealed.append(&mut ciphertext);
    Ok(SealedSigningKey {
        kid: signing.kid,
        algorithm: algorithm.to_owned(),
        sealed_private_key: sealed,
        create_time: env.now(),
    })
}

fn open_sealed(sealed: &SealedSigningKey, master: &MasterKey) -> Result<(SigningKey, VerificationKey), Error> {
    let wrong_key = || {
        Error::internal(format!(
            "signing key {} cannot be decrypted: POSTERN_MASTER_KEY is not the one that this database was made with",
            sealed.kid
        ))
    };
    let algorithm = match sealed.algorithm.as_str() {
        "ES256" => Algorithm::ES256,
        other => {
            return Err(Error::internal(format!("signing key {} has the unknown algorithm {other}", sealed.kid)));
        }
    };
    let (nonce, ciphertext) = sealed.sealed_private_key.split_at_checked(NONCE_BYTES).ok_or_else(wrong_key)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| wrong_key())?;
    let mut buffer = Zeroizing::new(ciphertext.to_vec());
    let pkcs8 = sealing_key(master)?
        .open_in_place(nonce, additional_data(&sealed.kid, &sealed.algorithm), &mut buffer)
        .map_err(|_| wrong_key())?;
    read(pkcs8, algorithm)
}

fn sealing_key(master: &MasterKey) -> Result<LessSafeKey, Error> {
    let key = master.derive("signing-key-encryption")?;
    let key = UnboundKey::new(&AES_256_GCM, key.as_slice()).map_err(|_| Error::internal("an AES key has 32 bytes"))?;
    Ok(LessSafeKey::new(key))
}

/// Binds a ciphertext to its row: it cannot be decrypted with another `kid` or algorithm.
fn additional_data(kid: &str, algorithm: &str) -> Aad<Vec<u8>> {
    Aad::from(format!("signing-key:{algorithm}:{kid}").into_bytes())
}

fn read(pkcs8: &[u8], algorithm: Algorithm) -> Result<(SigningKey, VerificationKey), Error> {
    let key = EncodingKey::from_ec_der(pkcs8);
    let mut jwk = Jwk::from_encoding_key(&key, algorithm).map_err(Error::internal)?;
    let kid = jwk.thumbprint(ThumbprintHash::SHA256).map_err(Error::internal)?;
    jwk.common.key_id = Some(kid.clone());
    jwk.common.public_key_use = Some(PublicKeyUse::Signature);
    let verification = VerificationKey { algorithm, key: DecodingKey::from_jwk(&jwk).map_err(Error::internal)?, jwk };
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8).map_err(Error::internal)?;
    Ok((SigningKey { kid, algorithm, pair }, verification))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn master(byte: u8) -> MasterKey {
        MasterKey::from_bytes([byte; 32])
    }

    #[test]
    fn a_sealed_key_opens_only_under_its_master_key_and_in_its_own_row() {
        let sealed = generate(&master(1), &Env::system()).expect("a key");
        let (signing, _) = open_sealed(&sealed, &master(1)).expect("opens");
        assert_eq!(signing.kid, sealed.kid);
        assert!(open_sealed(&sealed, &master(2)).is_err());
        let moved = SealedSigningKey { kid: "another".to_owned(), ..sealed.clone() };
        assert!(open_sealed(&moved, &master(1)).is_err());
        let cut = SealedSigningKey { sealed_private_key: sealed.sealed_private_key[..8].to_vec(), ..sealed };
        assert!(open_sealed(&cut, &master(1)).is_err());
    }

    #[test]
    fn the_jwk_set_holds_public_members_only() {
        let sealed = generate(&master(1), &Env::system()).expect("a key");
        let (signing, verification) = open_sealed(&sealed, &master(1)).expect("opens");
        let keyring = Keyring { verification: HashMap::from([(sealed.kid, verification)]), signing };
        let json = serde_json::to_value(keyring.jwks()).expect("JSON");
        let key = json["keys"][0].as_object().expect("a key");
        let mut members: Vec<_> = key.keys().map(String::as_str).collect();
        members.sort_unstable();
        assert_eq!(members, ["alg", "crv", "kid", "kty", "use", "x", "y"]);
    }
}
