//! One-time tokens: a mail carries one, and who presents it proves to have read the mail. A token is its id and an HMAC
//! over everything that it is bound to, so the database does not hold it. A row there says whether it is still live.

use std::time::Duration;

use aws_lc_rs::hmac;
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use uuid::Uuid;

use crate::error::Error;

use super::{
    account::Email,
    ids::{MailId, UserId},
    master_key::{Derived, MasterKeys},
};

const ID_BYTES: usize = 16;
/// The length of an HMAC-SHA-256, in bytes.
const MAC_BYTES: usize = 32;

/// What a token may be used for. An account has at most one live token for each purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    VerifyEmail,
    ResetPassword,
    ChangeEmail,
}

impl Purpose {
    pub const ALL: [Self; 3] = [Self::VerifyEmail, Self::ResetPassword, Self::ChangeEmail];

    /// The name of the purpose in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VerifyEmail => "verify_email",
            Self::ResetPassword => "reset_password",
            Self::ChangeEmail => "change_email",
        }
    }

    /// The purpose with this name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.as_str() == name)
    }

    /// The path of the built-in page that accepts such a token, below the public URL.
    pub fn page_path(self) -> &'static str {
        match self {
            Self::VerifyEmail => "/verify-email",
            Self::ResetPassword => "/reset-password",
            Self::ChangeEmail => "/confirm-email-change",
        }
    }

    /// How long such a token lives, counted from when its mail was requested.
    pub fn lifetime(self) -> Duration {
        match self {
            Self::VerifyEmail | Self::ChangeEmail => Duration::from_hours(24),
            Self::ResetPassword => Duration::from_mins(30),
        }
    }
}

/// What a token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OneTimeGrant {
    pub id: MailId,
    pub purpose: Purpose,
    pub user_id: UserId,
    /// The address that it was mailed to.
    pub email: Email,
}

/// A presented token. Only its form has been checked.
#[derive(Debug)]
pub struct PresentedToken {
    pub id: MailId,
    mac: [u8; MAC_BYTES],
}

impl PresentedToken {
    /// Reads 64 characters of base64url, the only form of a token.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; ID_BYTES + MAC_BYTES] = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
        let (id, mac) = bytes.split_first_chunk::<ID_BYTES>()?;
        Some(Self { id: MailId(Uuid::from_bytes(*id)), mac: mac.try_into().ok()? })
    }
}

/// Mints and verifies one-time tokens, with a key of their own.
pub struct OneTimeTokens(Derived<hmac::Key>);

impl std::fmt::Debug for OneTimeTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OneTimeTokens([redacted])")
    }
}

impl OneTimeTokens {
    pub fn new(masters: &MasterKeys) -> Result<Self, Error> {
        masters.derive("one-time-token-signing", |key| Ok(hmac::Key::new(hmac::HMAC_SHA256, key))).map(Self)
    }

    /// The token for a grant. Equal grants give equal tokens, so a mail that is sent twice carries the same token.
    pub fn mint(&self, grant: &OneTimeGrant) -> String {
        let mac = hmac::sign(self.0.active(), &signed_bytes(grant));
        BASE64_URL_SAFE_NO_PAD.encode([grant.id.0.as_bytes().as_slice(), mac.as_ref()].concat())
    }

    /// Whether a presented token is the token for a grant. Runs in constant time, whatever is wrong with the token.
    pub fn matches(&self, presented: &PresentedToken, grant: &OneTimeGrant) -> bool {
        let bytes = signed_bytes(grant);
        let matches = |key| hmac::verify(key, &bytes, &presented.mac).is_ok();
        presented.id == grant.id && self.0.each().fold(false, |found, key| found | matches(key))
    }
}

/// The bytes that the HMAC covers. Every part has a fixed length, except the last.
fn signed_bytes(grant: &OneTimeGrant) -> Vec<u8> {
    let purpose = match grant.purpose {
        Purpose::VerifyEmail => 1,
        Purpose::ResetPassword => 2,
        Purpose::ChangeEmail => 3,
    };
    let ids = [grant.id.0.as_bytes().as_slice(), grant.user_id.0.as_bytes()].concat();
    [&[purpose], ids.as_slice(), grant.email.as_str().as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::master_key::MasterKey;

    fn tokens(byte: u8) -> OneTimeTokens {
        OneTimeTokens::new(&MasterKey::from_bytes([byte; 32]).into()).expect("tokens")
    }

    fn grant() -> OneTimeGrant {
        OneTimeGrant {
            id: MailId(Uuid::from_u128(1)),
            purpose: Purpose::ResetPassword,
            user_id: UserId(Uuid::from_u128(2)),
            email: Email::parse("ada@example.com").expect("an address"),
        }
    }

    fn matches(text: &str, grant: &OneTimeGrant) -> bool {
        PresentedToken::parse(text).is_some_and(|presented| tokens(1).matches(&presented, grant))
    }

    #[test]
    fn a_token_is_bound_to_every_part_of_its_grant() {
        let token = tokens(1).mint(&grant());
        assert_eq!(token.len(), 64);
        assert_eq!(token, tokens(1).mint(&grant()), "a mail that is sent twice carries the same token");
        assert!(matches(&token, &grant()));
        let of_another = [
            OneTimeGrant { id: MailId(Uuid::from_u128(3)), ..grant() },
            OneTimeGrant { purpose: Purpose::ChangeEmail, ..grant() },
            OneTimeGrant { user_id: UserId(Uuid::from_u128(3)), ..grant() },
            OneTimeGrant { email: Email::parse("eve@example.com").expect("an address"), ..grant() },
        ];
        for other in of_another {
            assert!(!matches(&token, &other), "{other:?}");
        }
        assert!(!matches(&tokens(2).mint(&grant()), &grant()), "made under another master key");
    }

    #[test]
    fn a_token_has_only_one_spelling() {
        let token = tokens(1).mint(&grant());
        for position in 0..token.len() {
            let mut bent = token.clone().into_bytes();
            bent[position] = if bent[position] == b'A' { b'B' } else { b'A' };
            assert!(!matches(std::str::from_utf8(&bent).expect("ASCII"), &grant()), "{position}");
        }
        let padded = format!("{token}=");
        let longer = format!("{token}AAAA");
        let spaced = format!(" {token}");
        for bad in ["", "A", &token[1..], &token[..63], &padded, &longer, &spaced] {
            assert!(PresentedToken::parse(bad).is_none(), "{bad}");
        }
    }
}
