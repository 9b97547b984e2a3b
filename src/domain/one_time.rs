//! One-time tokens: what a mail carries so that its reader can prove having read it. A token is its id and an HMAC over
//! everything that it is bound to, so the database need not hold it; whether it is still good is a row there.

use std::time::Duration;

use aws_lc_rs::hmac;
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use uuid::Uuid;

use crate::error::Error;

use super::{MailId, UserId, account::Email, keyring::MasterKey, mail::MailKind};

const ID_BYTES: usize = 16;
/// Of HMAC-SHA-256, untruncated.
const MAC_BYTES: usize = 32;

/// What a token is good for. One account has at most one live token for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    VerifyEmail,
    ResetPassword,
    ChangeEmail,
}

impl Purpose {
    pub const ALL: [Self; 3] = [Self::VerifyEmail, Self::ResetPassword, Self::ChangeEmail];

    /// The purpose as the database has it, and as it goes into the HMAC.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VerifyEmail => "verify_email",
            Self::ResetPassword => "reset_password",
            Self::ChangeEmail => "change_email",
        }
    }

    /// The purpose of that name, if it is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.as_str() == name)
    }

    /// The mail that carries such a token.
    pub fn carrier(self) -> MailKind {
        match self {
            Self::VerifyEmail => MailKind::VerifyEmail,
            Self::ResetPassword => MailKind::ResetPassword,
            Self::ChangeEmail => MailKind::ConfirmEmailChange,
        }
    }

    /// How long such a token lives, counted from when its mail was asked for.
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

/// A token as somebody presented it: nothing is known of it yet but its form.
#[derive(Debug)]
pub struct PresentedToken {
    pub id: MailId,
    mac: [u8; MAC_BYTES],
}

impl PresentedToken {
    /// Reads the one form that a token has: 64 characters of base64url.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; ID_BYTES + MAC_BYTES] = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
        let (id, mac) = bytes.split_first_chunk::<ID_BYTES>()?;
        Some(Self { id: MailId(Uuid::from_bytes(*id)), mac: mac.try_into().ok()? })
    }
}

/// Makes and recognises tokens, under a key of their own.
pub struct OneTimeTokens(hmac::Key);

impl std::fmt::Debug for OneTimeTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OneTimeTokens([redacted])")
    }
}

impl OneTimeTokens {
    pub fn new(master: &MasterKey) -> Result<Self, Error> {
        let key = master.derive("one-time-token-signing")?;
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, key.as_slice())))
    }

    /// The token of a grant: always the same, so that a mail that is sent again says the same.
    pub fn mint(&self, grant: &OneTimeGrant) -> String {
        let mac = hmac::sign(&self.0, &bound(grant));
        BASE64_URL_SAFE_NO_PAD.encode([grant.id.0.as_bytes().as_slice(), mac.as_ref()].concat())
    }

    /// Whether a presented token is the one of a grant; takes the same time whatever is wrong with it.
    pub fn is_of(&self, presented: &PresentedToken, grant: &OneTimeGrant) -> bool {
        presented.id == grant.id && hmac::verify(&self.0, &bound(grant), &presented.mac).is_ok()
    }
}

/// What the HMAC covers: every part either of fixed length or last.
fn bound(grant: &OneTimeGrant) -> Vec<u8> {
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

    fn tokens(byte: u8) -> OneTimeTokens {
        let mut bytes = [byte; 32];
        bytes[0] = !byte;
        let text = base64::prelude::BASE64_STANDARD.encode(bytes);
        OneTimeTokens::new(&MasterKey::parse(&text).expect("a master key")).expect("tokens")
    }

    fn grant() -> OneTimeGrant {
        OneTimeGrant {
            id: MailId(Uuid::from_u128(1)),
            purpose: Purpose::ResetPassword,
            user_id: UserId(Uuid::from_u128(2)),
            email: Email::parse("ada@example.com").expect("an address"),
        }
    }

    fn is_of(text: &str, grant: &OneTimeGrant) -> bool {
        PresentedToken::parse(text).is_some_and(|presented| tokens(1).is_of(&presented, grant))
    }

    #[test]
    fn a_token_is_bound_to_all_that_it_was_made_for() {
        let token = tokens(1).mint(&grant());
        assert_eq!(token.len(), 64);
        assert_eq!(token, tokens(1).mint(&grant()), "a mail that is sent again says the same");
        assert!(is_of(&token, &grant()));
        let of_another = [
            OneTimeGrant { id: MailId(Uuid::from_u128(3)), ..grant() },
            OneTimeGrant { purpose: Purpose::ChangeEmail, ..grant() },
            OneTimeGrant { user_id: UserId(Uuid::from_u128(3)), ..grant() },
            OneTimeGrant { email: Email::parse("eve@example.com").expect("an address"), ..grant() },
        ];
        for other in of_another {
            assert!(!is_of(&token, &other), "{other:?}");
        }
        assert!(!is_of(&tokens(2).mint(&grant()), &grant()), "made under another master key");
    }

    #[test]
    fn a_token_has_one_form() {
        let token = tokens(1).mint(&grant());
        for position in 0..token.len() {
            let mut bent = token.clone().into_bytes();
            bent[position] = if bent[position] == b'A' { b'B' } else { b'A' };
            assert!(!is_of(std::str::from_utf8(&bent).expect("ASCII"), &grant()), "{position}");
        }
        let padded = format!("{token}=");
        let longer = format!("{token}AAAA");
        let spaced = format!(" {token}");
        for bad in ["", "A", &token[1..], &token[..63], &padded, &longer, &spaced] {
            assert!(PresentedToken::parse(bad).is_none(), "{bad}");
        }
    }
}
