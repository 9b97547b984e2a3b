//! One signing key of access tokens: its algorithm, how it is made, encrypted and read. It is stored encrypted with a key
//! derived from the master key, so a dump of the database is useless without it.

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    encoding::{AsDer, Pkcs8V1Der},
    rand::SystemRandom,
    rsa::{self, KeySize},
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256,
        RsaPublicKeyComponents,
    },
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header,
    jwk::{AlgorithmParameters, CommonParameters, Jwk, PublicKeyUse, RSAKeyParameters, RSAKeyType, ThumbprintHash},
};
use serde::Serialize;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::error::Error;

use super::{digest::sha256, env::Env, ids::SessionId, master_key::MasterKey};

/// The length of an AES-GCM nonce, in bytes.
const NONCE_BYTES: usize = 12;

/// The algorithm of new signing keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigningAlgorithm {
    /// ECDSA on P-256 with SHA-256 (RFC 7518 §3.4).
    Es256,
    /// Ed25519 (RFC 8037).
    EdDsa,
    /// RSASSA-PKCS1-v1_5 with SHA-256 and a key of 3072 bits (RFC 7518 §3.3).
    Rs256,
}

impl SigningAlgorithm {
    pub const ALL: [Self; 3] = [Self::Es256, Self::EdDsa, Self::Rs256];

    /// The name of the algorithm in JOSE and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Es256 => "ES256",
            Self::EdDsa => "EdDSA",
            Self::Rs256 => "RS256",
        }
    }

    /// The algorithm with this name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == name)
    }

    fn jose(self) -> Algorithm {
        match self {
            Self::Es256 => Algorithm::ES256,
            Self::EdDsa => Algorithm::EdDSA,
            Self::Rs256 => Algorithm::RS256,
        }
    }
}

/// A key that signs access tokens. It does not implement `Debug`, so it cannot be printed.
#[expect(missing_debug_implementations, reason = "it is a private key")]
pub struct SigningKey {
    pub kid: String,
    pub algorithm: Algorithm,
    /// Parsed once, when the key is read.
    pair: Pair,
}

enum Pair {
    Es256(EcdsaKeyPair),
    EdDsa(Ed25519KeyPair),
    Rs256(rsa::KeyPair),
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

    /// The signature of a message in the form that JWS has for the algorithm (RFC 7518 §3, RFC 8037 §3.1).
    pub fn signature(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let failed = |_| Error::internal("an access token could not be signed");
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Es256(pair) => Ok(pair.sign(&random, message).map_err(failed)?.as_ref().to_vec()),
            Pair::EdDsa(pair) => Ok(pair.sign(message).as_ref().to_vec()),
            Pair::Rs256(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).map_err(failed)?;
                Ok(signature)
            }
        }
    }
}

/// A key that verifies access tokens, bound to its one algorithm.
#[derive(Debug)]
pub struct VerificationKey {
    pub algorithm: Algorithm,
    pub key: DecodingKey,
    /// The public key, named by its thumbprint.
    pub jwk: Jwk,
}

/// A new key, encrypted. Making an RSA key takes up to a second of CPU.
#[derive(Debug)]
pub struct NewKey {
    pub kid: String,
    pub sealed_private_key: Vec<u8>,
}

/// Makes a key.
pub fn generate(algorithm: SigningAlgorithm, master: &MasterKey, env: &Env) -> Result<NewKey, Error> {
    let pkcs8 = private_key(algorithm)?;
    let (signing, _) = read(&pkcs8, algorithm)?;
    let sealed_private_key = seal(&pkcs8, &signing.kid, algorithm.as_str(), master, env)?;
    Ok(NewKey { kid: signing.kid, sealed_private_key })
}

/// A new private key as PKCS#8.
fn private_key(algorithm: SigningAlgorithm) -> Result<Zeroizing<Vec<u8>>, Error> {
    let not_made = |_| Error::internal("a signing key could not be made");
    let not_encoded = |_| Error::internal("a signing key could not be encoded");
    let pkcs8 = match algorithm {
        SigningAlgorithm::Es256 => {
            let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map_err(not_made)?;
            pair.to_pkcs8v1().map_err(not_encoded)?.as_ref().to_vec()
        }
        SigningAlgorithm::EdDsa => {
            let pair = Ed25519KeyPair::generate().map_err(not_made)?;
            pair.to_pkcs8v1().map_err(not_encoded)?.as_ref().to_vec()
        }
        SigningAlgorithm::Rs256 => {
            let pair = rsa::KeyPair::generate(KeySize::Rsa3072).map_err(not_made)?;
            AsDer::<Pkcs8V1Der>::as_der(&pair).map_err(not_encoded)?.as_ref().to_vec()
        }
    };
    Ok(Zeroizing::new(pkcs8))
}

/// Encrypts a private key: a nonce, then the ciphertext and its tag.
pub fn seal(pkcs8: &[u8], kid: &str, algorithm: &str, master: &MasterKey, env: &Env) -> Result<Vec<u8>, Error> {
    let mut sealed = env.random::<NONCE_BYTES>()?.to_vec();
    let nonce = Nonce::try_assume_unique_for_key(&sealed).map_err(|_| Error::internal("a nonce has 12 bytes"))?;
    let mut ciphertext = pkcs8.to_vec();
    sealing_key(master)?
        .seal_in_place_append_tag(nonce, additional_data(kid, algorithm), &mut ciphertext)
        .map_err(|_| Error::internal("a signing key could not be encrypted"))?;
    sealed.append(&mut ciphertext);
    Ok(sealed)
}

/// Decrypts a private key. `None` if it was not encrypted with this master key, for this `kid` and algorithm.
pub fn unseal(
    sealed: &[u8],
    kid: &str,
    algorithm: &str,
    master: &MasterKey,
) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
    let Some((nonce, ciphertext)) = sealed.split_at_checked(NONCE_BYTES) else {
        return Ok(None);
    };
    let Ok(nonce) = Nonce::try_assume_unique_for_key(nonce) else {
        return Ok(None);
    };
    let mut buffer = Zeroizing::new(ciphertext.to_vec());
    let opened = sealing_key(master)?.open_in_place(nonce, additional_data(kid, algorithm), &mut buffer);
    Ok(opened.ok().map(|pkcs8| Zeroizing::new(pkcs8.to_vec())))
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

/// The two halves of a decrypted key.
pub fn read(pkcs8: &[u8], algorithm: SigningAlgorithm) -> Result<(SigningKey, VerificationKey), Error> {
    let jose = algorithm.jose();
    let (pair, mut jwk) = match algorithm {
        SigningAlgorithm::Es256 => {
            let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8).map_err(Error::internal)?;
            let jwk = Jwk::from_encoding_key(&EncodingKey::from_ec_der(pkcs8), jose).map_err(Error::internal)?;
            (Pair::Es256(pair), jwk)
        }
        SigningAlgorithm::EdDsa => {
            let pair = Ed25519KeyPair::from_pkcs8(pkcs8).map_err(Error::internal)?;
            let jwk = Jwk::from_encoding_key(&EncodingKey::from_ed_der(pkcs8), jose).map_err(Error::internal)?;
            (Pair::EdDsa(pair), jwk)
        }
        SigningAlgorithm::Rs256 => {
            let pair = rsa::KeyPair::from_pkcs8(pkcs8).map_err(Error::internal)?;
            let public = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
            let jwk = Jwk {
                common: CommonParameters { key_algorithm: Some(jose.into()), ..CommonParameters::default() },
                algorithm: AlgorithmParameters::RSA(RSAKeyParameters {
                    key_type: RSAKeyType::RSA,
                    n: BASE64_URL_SAFE_NO_PAD.encode(&public.n),
                    e: BASE64_URL_SAFE_NO_PAD.encode(&public.e),
                }),
            };
            (Pair::Rs256(pair), jwk)
        }
    };
    let kid = jwk.thumbprint(ThumbprintHash::SHA256).map_err(Error::internal)?;
    jwk.common.key_id = Some(kid.clone());
    jwk.common.public_key_use = Some(PublicKeyUse::Signature);
    let key = DecodingKey::from_jwk(&jwk).map_err(Error::internal)?;
    Ok((SigningKey { kid, algorithm: jose, pair }, VerificationKey { algorithm: jose, key, jwk }))
}

/// What the log of revocations has for a key that was revoked: an id of the form of a session's, which no session has.
pub fn revocation_id(kid: &str) -> SessionId {
    let hash = sha256(format!("postern signing key {kid}").as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(hash.split_at(16).0);
    SessionId(Uuid::from_bytes(id))
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::Validation;
    use serde_json::{Value, json};

    use super::*;

    fn master(byte: u8) -> MasterKey {
        MasterKey::from_bytes([byte; 32])
    }

    #[test]
    fn a_sealed_key_opens_only_under_its_master_key_and_in_its_own_row() {
        for algorithm in SigningAlgorithm::ALL {
            let key = generate(algorithm, &master(1), &Env::system()).expect("a key");
            let open = |sealed: &[u8], kid: &str, name: &str, byte| {
                unseal(sealed, kid, name, &master(byte)).expect("no other error")
            };
            let (sealed, name) = (&key.sealed_private_key, algorithm.as_str());
            let pkcs8 = open(sealed, &key.kid, name, 1).expect("opens");
            assert_eq!(read(&pkcs8, algorithm).expect("a key").0.kid, key.kid);
            assert_eq!(open(sealed, &key.kid, name, 2), None);
            assert_eq!(open(sealed, "another", name, 1), None);
            assert_eq!(open(sealed, &key.kid, "ES384", 1), None);
            assert_eq!(open(&sealed[..8], &key.kid, name, 1), None);
        }
    }

    #[test]
    fn each_algorithm_signs_what_its_public_key_verifies_and_that_has_public_members_only() {
        let common = ["alg", "kid", "kty", "use"];
        for (algorithm, own) in [
            (SigningAlgorithm::Es256, ["crv", "x", "y"].as_slice()),
            (SigningAlgorithm::EdDsa, ["crv", "x"].as_slice()),
            (SigningAlgorithm::Rs256, ["e", "n"].as_slice()),
        ] {
            let (signing, verification) = read(&private_key(algorithm).expect("a key"), algorithm).expect("a key");
            let json = serde_json::to_value(&verification.jwk).expect("JSON");
            let mut members: Vec<_> = json.as_object().expect("a key").keys().map(String::as_str).collect();
            let mut expected = [common.as_slice(), own].concat();
            members.sort_unstable();
            expected.sort_unstable();
            assert_eq!(members, expected);
            assert_eq!((json["alg"].as_str(), json["kid"].as_str()), (Some(algorithm.as_str()), Some(&*signing.kid)));
            if let Some(n) = json["n"].as_str() {
                assert_eq!(BASE64_URL_SAFE_NO_PAD.decode(n).expect("base64url").len() * 8, 3072);
            }

            let token = signing.sign("at+jwt", &json!({"sub": "ada"})).expect("a token");
            let mut validation = Validation::new(verification.algorithm);
            validation.required_spec_claims.clear();
            let read = jsonwebtoken::decode::<Value>(&token, &verification.key, &validation).expect("verifies");
            assert_eq!(read.claims["sub"], "ada");
        }
    }
}
