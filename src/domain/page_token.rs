//! Page tokens: the position at which a list continues. A token is encrypted and bound to its query, so nobody can read
//! an address out of one, forge one, or use one with another list.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};

use crate::error::Error;

use super::{env::Env, master_key::MasterKey};

/// The length of an AES-GCM nonce, in bytes.
const NONCE_BYTES: usize = 12;

/// Makes and reads page tokens, with a key of their own.
pub struct PageTokens(LessSafeKey);

impl std::fmt::Debug for PageTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageTokens([redacted])")
    }
}

impl PageTokens {
    pub fn new(master: &MasterKey) -> Result<Self, Error> {
        let key = master.derive("page-token-encryption")?;
        let key =
            UnboundKey::new(&AES_256_GCM, key.as_slice()).map_err(|_| Error::internal("an AES key has 32 bytes"))?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// The token for a position in the list that `query` describes.
    pub fn seal(&self, query: &str, cursor: &str, env: &Env) -> Result<String, Error> {
        let mut sealed = env.random::<NONCE_BYTES>()?.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(&sealed).map_err(|_| Error::internal("a nonce has 12 bytes"))?;
        let mut text = cursor.as_bytes().to_vec();
        self.0
            .seal_in_place_append_tag(nonce, Aad::from(query.as_bytes()), &mut text)
            .map_err(|_| Error::internal("a page token could not be encrypted"))?;
        sealed.append(&mut text);
        Ok(BASE64_URL_SAFE_NO_PAD.encode(sealed))
    }

    /// The position in a token, if the token was made for exactly this query.
    pub fn open(&self, query: &str, token: &str) -> Option<String> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).ok()?;
        let (nonce, text) = bytes.split_at_checked(NONCE_BYTES)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut text = text.to_vec();
        let cursor = self.0.open_in_place(nonce, Aad::from(query.as_bytes()), &mut text).ok()?;
        String::from_utf8(cursor.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_token_works_only_with_its_own_query() {
        let env = Env::system();
        let master = MasterKey::parse(&MasterKey::generate(&env).expect("a key")).expect("a key");
        let pages = PageTokens::new(&master).expect("page tokens");
        let token = pages.seal("users ada", "ada@example.com", &env).expect("a token");
        assert_eq!(pages.open("users ada", &token).as_deref(), Some("ada@example.com"));
        assert_eq!(pages.open("users adb", &token), None);
        assert_eq!(pages.open("users ada", &format!("{token}A")), None);
        assert_eq!(pages.open("users ada", &token[1..]), None);
        assert_eq!(pages.open("users ada", ""), None);
        assert!(!token.contains("ada"));
    }
}
