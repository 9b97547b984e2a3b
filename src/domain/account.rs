//! Accounts: what a username and an email address are, and signing up.
//! Syntax lives in the types' `parse`, uniqueness in the store's schema.

use std::{fmt, time::Duration};

use time::OffsetDateTime;
use unicode_normalization::UnicodeNormalization;

use crate::{
    error::{Error, FieldViolation},
    store::{AccountCreation, NewAccount},
};

use super::{
    Deadline, Postern, UserId,
    admin::Administrator,
    mail::{MailKind, NewMail},
    password::{NewPassword, Password},
    role::{Caller, Role},
    session::Client,
};

/// How long a command waits for a hash.
const COMMAND_PATIENCE: Duration = Duration::from_mins(1);

/// An account, without anything secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub id: UserId,
    pub username: Username,
    pub email: Email,
    pub email_verified: bool,
    /// Sorted by name.
    pub roles: Vec<Role>,
    pub disabled: bool,
    pub create_time: OffsetDateTime,
    pub update_time: OffsetDateTime,
}

/// 1 to 64 characters of `A-Z a-z 0-9 . _ -`, first and last a letter or digit. Kept as it was typed; two that differ
/// only in case are one (the store's unique index is on the lower case). ASCII alone, so that no look-alike passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username(String);

impl Username {
    /// The longest username, in bytes.
    pub const MAX_LENGTH: usize = 64;

    pub fn parse(text: &str) -> Result<Self, FieldViolation> {
        let violation = |description: &str| Err(FieldViolation::new("username", description));
        if text.is_empty() {
            return violation("is required");
        }
        if text.len() > Self::MAX_LENGTH {
            return violation("must be at most 64 characters");
        }
        if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
            return violation("may only contain letters A-Z and a-z, digits, dots, underscores and hyphens");
        }
        let ends_well = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        if !ends_well(text.as_bytes().first()) || !ends_well(text.as_bytes().last()) {
            return violation("must start and end with a letter or a digit");
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An email address in its one canonical form: an unquoted local part in lower case, and the domain in ASCII
/// (IDNA A-labels, lower case). Two spellings of one address are equal; look-alikes are not.
///
/// Stricter than RFC 5321 where leniency helps nobody: no quoted local parts, no address literals, no comments, no
/// non-ASCII local part, and a domain has a dot.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Email(String);

impl Email {
    /// The longest address, in bytes (RFC 5321 §4.5.3.1.3, less the angle brackets).
    pub const MAX_LENGTH: usize = 254;
    /// The longest local part, in bytes (RFC 5321 §4.5.3.1.1).
    const MAX_LOCAL_PART: usize = 64;

    pub fn parse(text: &str) -> Result<Self, FieldViolation> {
        let violation = |description: &str| FieldViolation::new("email", description);
        if text.is_empty() {
            return Err(violation("is required"));
        }
        if text.len() > Self::MAX_LENGTH {
            return Err(violation("must be at most 254 bytes"));
        }
        let (local, domain) = text.rsplit_once('@').ok_or_else(|| violation("must be of the form name@domain"))?;
        if local.is_empty() || local.len() > Self::MAX_LOCAL_PART || !local.split('.').all(is_atom) {
            return Err(violation(
                "the part before the @ must be 1 to 64 of the ASCII characters that mail allows there without quotes",
            ));
        }
        let not_a_domain = || violation("the part after the @ must be a domain name such as example.com");
        let domain = domain_in_ascii(domain).ok_or_else(not_a_domain)?;
        let labels: Vec<_> = domain.split('.').collect();
        if labels.len() < 2 || !labels.iter().all(|label| is_host_label(label)) {
            return Err(not_a_domain());
        }
        let canonical = format!("{}@{domain}", local.to_ascii_lowercase());
        if canonical.len() > Self::MAX_LENGTH {
            return Err(violation("must be at most 254 bytes"));
        }
        Ok(Self(canonical))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Addresses are personal data: a debug print, and with it the log, shows the domain only.
impl fmt::Debug for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let domain = self.0.rsplit_once('@').map_or("", |(_, domain)| domain);
        write!(f, "Email(…@{domain})")
    }
}

/// The A-labels of a domain, in lower case. IDNA maps full-width letters, ligatures, invisible characters and the like
/// to what they look like; those are refused, because look-alikes must not meet in one account. Only case may differ, and
/// how accents are composed.
fn domain_in_ascii(domain: &str) -> Option<String> {
    let ascii = idna::domain_to_ascii_cow(domain.as_bytes(), idna::AsciiDenyList::STD3).ok()?.into_owned();
    let lower: String = domain.to_lowercase().nfc().collect();
    // The Kelvin sign's lower case is an ASCII k.
    let becomes_ascii = |c: char| !c.is_ascii() && c.to_lowercase().any(|lower| lower.is_ascii());
    let as_typed = lower == ascii || lower == idna::domain_to_unicode(&ascii).0;
    (as_typed && !domain.contains(becomes_ascii)).then_some(ascii)
}

/// RFC 5321 §4.1.2 `Atom`.
fn is_atom(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~".contains(&byte))
}

/// RFC 5321 §4.1.2 `sub-domain`, at most 63 bytes (RFC 1035 §2.3.4).
fn is_host_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// What signing up takes, parsed.
#[derive(Debug)]
pub struct SignUp {
    pub username: Username,
    pub email: Email,
    pub password: NewPassword,
}

impl Postern {
    /// Accepts or refuses a new password by the deployment's policy, given what is known of its account.
    pub fn accept_password(
        &self,
        field: &'static str,
        password: Password,
        account_words: &[&str],
    ) -> Result<NewPassword, FieldViolation> {
        self.passwords.accept(field, password, account_words)
    }

    /// Creates an account with the role `user`, and mails its address a token to verify it by.
    ///
    /// The password is hashed even if the address turns out to be taken: whoever asks for a thousand addresses pays for
    /// a thousand hashes. Where the deployment conceals which accounts exist, a taken address is answered like a free
    /// one, and its owner is mailed instead.
    pub async fn sign_up(&self, request: SignUp, client: &Client, deadline: Deadline) -> Result<User, Error> {
        let concealed = self.concealed(&request.email)?;
        self.register(request, concealed, Some(client), deadline).await
    }

    /// By the owner, or on the command line, where there is no client.
    async fn register(
        &self,
        request: SignUp,
        concealed: Option<NewMail>,
        client: Option<&Client>,
        deadline: Deadline,
    ) -> Result<User, Error> {
        // Nobody hashes for a database that is away.
        self.store.known_reachable()?;
        let SignUp { username, email, password } = request;
        let password_hash = self.hasher.hash(password.into_password(), deadline).await?;
        let id = UserId(self.env.uuid()?);
        let verification = self.mail_to(MailKind::VerifyEmail, email.clone(), Some(id))?;
        let occasion = self.occasion(client.map(|_| id), client.and_then(|client| client.ip))?;
        // What it will be if nothing is in the way, and what it is said to be where that is concealed.
        let user = User {
            id,
            username: username.clone(),
            email: email.clone(),
            email_verified: false,
            roles: vec![Role::user()],
            disabled: false,
            create_time: occasion.now,
            update_time: occasion.now,
        };
        let account = NewAccount {
            id,
            username,
            email,
            password_hash,
            occasion,
            concealed,
            verification,
            limit: self.mails.per_address,
        };
        let conceal = account.concealed.is_some();
        match self.store.create_account(account).await? {
            AccountCreation::Created(user) => Ok(user),
            AccountCreation::EmailTaken if conceal => Ok(user),
            AccountCreation::EmailTaken => Err(Error::EmailTaken),
            AccountCreation::UsernameTaken => Err(Error::UsernameTaken),
        }
    }

    /// Creates an account with these roles, for an operator. Its owner is mailed as after any sign-up.
    pub async fn create_account(&self, request: SignUp, roles: Vec<Role>) -> Result<User, Error> {
        // A command has no caller who would wait less.
        let deadline = Deadline(std::time::Instant::now() + COMMAND_PATIENCE);
        let user = self.register(request, None, None, deadline).await?;
        self.set_roles(user.id, roles, Administrator::COMMAND_LINE).await
    }

    /// The account of an address.
    pub async fn user_of(&self, email: &Email) -> Result<User, Error> {
        Ok(self.store.credentials(email).await?.ok_or(Error::NotFound("user"))?.user)
    }

    /// The caller's account as it is now.
    ///
    /// The session is looked up with it, so that an ended session is refused here from the moment it ended.
    pub async fn me(&self, caller: &Caller) -> Result<User, Error> {
        self.store.user_of_session(caller.session_id, caller.user_id).await?.ok_or(Error::SessionRevoked)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> String {
        Email::parse(text).unwrap_or_else(|violation| panic!("{text}: {violation:?}")).as_str().to_owned()
    }

    #[test]
    fn an_address_has_one_canonical_form() {
        assert_eq!(canonical("Ada@Example.COM"), "ada@example.com");
        assert_eq!(canonical("ada+tag@example.com"), "ada+tag@example.com");
        assert_eq!(canonical("ada@bücher.example"), "ada@xn--bcher-kva.example");
        assert_eq!(canonical("ada@BÜCHER.example"), canonical("ada@xn--bcher-kva.example"));
        assert_eq!(canonical("ada@bu\u{308}cher.example"), canonical("ada@xn--bcher-kva.example"));
    }

    #[test]
    fn a_look_alike_domain_is_another_address() {
        assert_ne!(canonical("ada@exаmple.com"), canonical("ada@example.com"), "the first has a Cyrillic а");
    }

    #[test]
    fn what_is_no_plain_address_is_refused() {
        let long_local = format!("{}@example.com", "a".repeat(65));
        let long = format!("a@{}.com", "a.".repeat(130));
        for bad in [
            "",
            "ada",
            "@example.com",
            "ada@",
            "ada@localhost",
            "ada@-example.com",
            "ada@example-.com",
            "ada@ex ample.com",
            "ada lovelace@example.com",
            "ada@example.com\r\nBcc: x@example.com",
            "ada\0@example.com",
            "ada@example.com\0",
            " ada@example.com",
            "ada@example.com ",
            ".ada@example.com",
            "ada.@example.com",
            "a..da@example.com",
            "\"ada\"@example.com",
            "ada@[127.0.0.1]",
            "ada@example..com",
            "ada@.example.com",
            "ada@example.com.",
            "аda@example.com",
            "ada@exam_ple.com",
            "ada@ｅｘａｍｐｌｅ.com",
            "ada@exam\u{200b}ple.com",
            "ada@ﬁsh.com",
            "ada@\u{212a}elvin.com",
            "ada@example\u{3002}com",
            "ada@example.com\u{202e}",
            "ada@b@example.com",
            "ada(x)@example.com",
            &long_local,
            &long,
        ] {
            assert!(Email::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_debug_print_of_an_address_hides_its_owner() {
        let email = Email::parse("ada.lovelace@example.com").expect("an address");
        assert_eq!(format!("{email:?}"), "Email(…@example.com)");
    }

    #[test]
    fn usernames_are_plain_ascii_names() {
        for good in ["a", "Ada", "ada.lovelace", "ada_l-2", "007", &"a".repeat(64)] {
            assert!(Username::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            " ",
            "ada lovelace",
            ".ada",
            "ada-",
            "ada@example.com",
            "adа",
            "a\n",
            "a\0b",
            "a\u{200b}",
            &"a".repeat(65),
        ] {
            assert!(Username::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_an_address_never_panics_and_is_idempotent(text in "\\PC{0,40}@?\\PC{0,40}") {
            if let Ok(email) = Email::parse(&text) {
                prop_assert_eq!(Email::parse(email.as_str()), Ok(email.clone()));
                prop_assert!(email.as_str().is_ascii());
                prop_assert!(!email.as_str().bytes().any(|byte| byte.is_ascii_control() || byte.is_ascii_uppercase()));
            }
        }
    }
}
