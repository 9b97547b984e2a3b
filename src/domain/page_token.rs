//! Page tokens: the position at which a list continues. A token is encrypted and bound to its query, so nobody can read
//! an address out of one, forge one, or use one with another list.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

use crate::error::Error;

use super::{
    env::Env,
    master_key::{Derived, MasterKeys},
};

/// The length of an AES-GCM nonce, in bytes.
const NONCE_BYTES: usize = 12;

/// Makes and reads page tokens, with a key of their own.
pub struct PageTokens(Derived<LessSafeKey>);

impl std::fmt::Debug for PageTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageTokens([redacted])")
    }
}

impl PageTokens {
    pub fn new(masters: &MasterKeys) -> Result<Self, Error> {
        let key = |key: &[u8]| {
            let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| Error::internal("an AES key has 32 bytes"))?;
            Ok(LessSafeKey::new(key))
        };
        masters.derive("page-token-encryption", key).map(Self)
    }

    /// The token for a position in the list that `query` describes.
    pub fn seal(&self, query: &str, cursor: &str, env: &Env) -> Result<String, Error> {
        let mut sealed = env.random::<NONCE_BYTES>()?.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(&sealed).map_err(|_| Error::internal("a nonce has 12 bytes"))?;
        let mut text = cursor.as_bytes().to_vec();
        self.0
            .active()
            .seal_in_place_append_tag(nonce, Aad::from(query.as_bytes()), &mut text)
            .map_err(|_| Error::internal("a page token could not be encrypted"))?;
        sealed.append(&mut text);
        Ok(BASE64_URL_SAFE_NO_PAD.encode(sealed))
    }

    /// The position in a token, if the token was made for exactly this query.
    pub fn open(&self, query: &str, token: &str) -> Option<String> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).ok()?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE_BYTES)?;
        self.0.each().find_map(|key| {
            let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
            let mut text = sealed.to_vec();
            let cursor = key.open_in_place(nonce, Aad::from(query.as_bytes()), &mut text).ok()?;
            String::from_utf8(cursor.to_vec()).ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::master_key::MasterKey;

    #[test]
    fn a_page_token_works_only_with_its_own_query() {
        let env = Env::system();
        let master = MasterKey::parse(&MasterKey::generate(&env).expect("a key")).expect("a key");
        let pages = PageTokens::new(&master.into()).expect("page tokens");
        let token = pages.seal("users ada", "ada@example.com", &env).expect("a token");
        assert_eq!(pages.open("users ada", &token).as_deref(), Some("ada@example.com"));
        assert_eq!(pages.open("users adb", &token), None);
        assert_eq!(pages.open("users ada", &format!("{token}A")), None);
        assert_eq!(pages.open("users ada", &token[1..]), None);
        assert_eq!(pages.open("users ada", ""), None);
        assert!(!token.contains("ada"));
    }
}
