//! Accounts: what a username and an email address are. Syntax is checked in the types' `parse`; the store's schema
//! keeps them unique.

use std::{borrow::Cow, fmt};

use time::OffsetDateTime;
use unicode_normalization::UnicodeNormalization;

use crate::error::{FieldReason, FieldViolation};

use super::{ids::UserId, password::Password, role::Role};

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

impl User {
    /// Whether it gives its address up to another account that proves to own it. Somebody signed up with it, and neither a
    /// mail nor an operator has confirmed that it is theirs. An account that an operator gave a role, or disabled, stays as
    /// the operator left it. See decision 0040.
    pub fn yields_address(&self) -> bool {
        !self.email_verified && !self.disabled && self.roles == [Role::user()]
    }
}

/// A username: 1 to 64 characters of `A-Z a-z 0-9 . _ -`; the first and the last are a letter or a digit. It is stored
/// as it was typed. Two that differ only in case count as one: the store's unique index is on the lower case. Only
/// ASCII is allowed, so that no character can be confused with another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username(String);

impl Username {
    /// The longest username, in bytes.
    pub const MAX_LENGTH: usize = 64;

    pub fn parse(text: &str) -> Result<Self, FieldViolation> {
        let violation = |reason, description: &str| Err(FieldViolation::new("username", reason, description));
        if text.is_empty() {
            return Err(FieldViolation::required("username"));
        }
        if text.len() > Self::MAX_LENGTH {
            return violation(FieldReason::TooLong, "must be at most 64 characters");
        }
        if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
            return violation(
                FieldReason::Malformed,
                "may only contain letters A-Z and a-z, digits, dots, underscores and hyphens",
            );
        }
        let ends_well = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        if !ends_well(text.as_bytes().first()) || !ends_well(text.as_bytes().last()) {
            return violation(FieldReason::Malformed, "must start and end with a letter or a digit");
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An email address in its canonical form: an unquoted local part in lower case, and the domain in ASCII (IDNA
/// A-labels, lower case). Two spellings of one address are equal; addresses that merely look alike are not.
///
/// Stricter than RFC 5321: no quoted local parts, no address literals, no comments, no non-ASCII local part, and a
/// domain has a dot.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Email(String);

impl Email {
    /// The longest address, in bytes (RFC 5321 §4.5.3.1.3, less the angle brackets).
    pub const MAX_LENGTH: usize = 254;

    /// Reads what somebody typed. White space around it is dropped, as web forms do.
    pub fn parse(text: &str) -> Result<Self, FieldViolation> {
        let text = text.trim();
        if text.is_empty() {
            return Err(FieldViolation::required("email"));
        }
        let reason = if text.len() > Self::MAX_LENGTH { FieldReason::TooLong } else { FieldReason::Malformed };
        Self::canonical(text).map(Self).map_err(|problem| FieldViolation::new("email", reason, problem))
    }

    /// The canonical form, or what is wrong with the text.
    fn canonical(text: &str) -> Result<String, Cow<'static, str>> {
        const TOO_LONG: &str = "must be at most 254 bytes";
        if text.len() > Self::MAX_LENGTH {
            return Err(TOO_LONG.into());
        }
        if text.contains(char::is_whitespace) {
            return Err("must not contain a space or a line break".into());
        }
        if text.contains(is_invisible) {
            return Err("must not contain a control character or another character that cannot be seen".into());
        }
        let (local, domain) = text.rsplit_once('@').ok_or("must contain an @, as in name@example.com")?;
        if local.contains('@') {
            return Err("must contain only one @".into());
        }
        check_local_part(local)?;
        let canonical = format!("{}@{}", local.to_ascii_lowercase(), canonical_domain(domain)?);
        if canonical.len() > Self::MAX_LENGTH { Err(TOO_LONG.into()) } else { Ok(canonical) }
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

/// Checks that the part before the @ is a dot-string of 1 to 64 bytes (RFC 5321 §4.1.2 and §4.5.3.1.1).
fn check_local_part(local: &str) -> Result<(), Cow<'static, str>> {
    let not_allowed = |c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-/=?^_`{|}~.".contains(c));
    if local.is_empty() {
        return Err("needs a name before the @".into());
    }
    if !local.is_ascii() {
        return Err("must have only letters without accents, digits and other ASCII characters before the @".into());
    }
    if local.len() > 64 {
        return Err("must have at most 64 characters before the @".into());
    }
    if let Some(character) = local.chars().find(|c| not_allowed(*c)) {
        return Err(format!("must not contain {character} before the @").into());
    }
    if local.split('.').any(str::is_empty) {
        return Err("must not have a dot at the start or the end of the part before the @, or two dots in a row".into());
    }
    Ok(())
}

/// The canonical form of the part after the @: two or more labels (RFC 5321 §4.1.2 `sub-domain`) of at most 63 bytes
/// (RFC 1035 §2.3.4).
fn canonical_domain(domain: &str) -> Result<String, &'static str> {
    if domain.is_empty() {
        return Err("needs a domain after the @, such as example.com");
    }
    if domain.starts_with('[') {
        return Err("must have a domain name after the @, and not an IP address");
    }
    if domain.split('.').any(str::is_empty) {
        return Err("must not have a dot at the start or the end of the domain, or two dots in a row");
    }
    if domain.split('.').any(|label| label.starts_with('-') || label.ends_with('-')) {
        return Err("must not have a hyphen at the start or the end of a part of the domain");
    }
    if domain.bytes().any(|byte| byte.is_ascii() && !byte.is_ascii_alphanumeric() && !matches!(byte, b'-' | b'.')) {
        return Err("must have only letters, digits, hyphens and dots after the @");
    }
    let canonical = domain_in_ascii(domain).ok_or("must have a domain name after the @, such as example.com")?;
    let labels: Vec<_> = canonical.split('.').collect();
    if labels.len() < 2 {
        return Err("must have a whole domain name after the @, such as example.com");
    }
    if labels.iter().any(|label| label.len() > 63) {
        return Err("must have at most 63 characters between two dots of the domain");
    }
    if labels.into_iter().all(is_host_label) {
        Ok(canonical)
    } else {
        Err("must have a domain name after the @, such as example.com")
    }
}

/// The A-labels of a domain, in lower case. IDNA maps full-width letters, ligatures, invisible characters and so on to
/// the plain characters that they resemble. Such input is refused: an address may differ from its canonical form only
/// in case and in how accents are composed.
fn domain_in_ascii(domain: &str) -> Option<String> {
    let ascii = idna::domain_to_ascii_cow(domain.as_bytes(), idna::AsciiDenyList::STD3).ok()?.into_owned();
    let lower: String = domain.to_lowercase().nfc().collect();
    // The Kelvin sign's lower case is an ASCII k.
    let becomes_ascii = |c: char| !c.is_ascii() && c.to_lowercase().any(|lower| lower.is_ascii());
    let as_typed = lower == ascii || lower == idna::domain_to_unicode(&ascii).0;
    (as_typed && !domain.contains(becomes_ascii)).then_some(ascii)
}

/// Whether a label has only the characters of a host name, and no hyphen at its ends.
fn is_host_label(label: &str) -> bool {
    !label.is_empty()
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Whether a character has no shape of its own: control characters, and the format characters that copied text brings
/// along (zero-width characters, direction marks, the soft hyphen, the byte order mark).
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The parsed fields of a sign-up.
#[derive(Debug)]
pub struct SignUp {
    pub username: Username,
    pub email: Email,
    pub password: Password,
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
    fn white_space_around_an_address_is_dropped() {
        for space in [" ", "   ", "\t", "\n", "\r\n", "\u{a0}", "\u{3000}", "\u{2028}"] {
            for typed in [format!("{space}ada@example.com"), format!("ada@example.com{space}")] {
                assert_eq!(canonical(&typed), "ada@example.com", "{typed:?}");
            }
            assert_eq!(Email::parse(space).expect_err("nothing").description, "is required");
        }
        let longest = format!("{}@{}.example", "a".repeat(64), ["b".repeat(60).as_str(); 2].join("."));
        assert_eq!(canonical(&format!("{}{longest}\n", " ".repeat(100))), longest);
    }

    #[test]
    fn an_error_names_what_is_wrong_with_the_address() {
        for (typed, named) in [
            ("ada lovelace@example.com", "a space or a line break"),
            ("ada@example.com\r\nBcc: x@example.com", "a space or a line break"),
            ("ada@exam\u{a0}ple.com", "a space or a line break"),
            ("ada\0@example.com", "cannot be seen"),
            ("ada@exam\u{200b}ple.com", "cannot be seen"),
            ("ada@example.com\u{202e}", "cannot be seen"),
            ("ada.example.com", "must contain an @"),
            ("ada@b@example.com", "only one @"),
            ("@example.com", "a name before the @"),
            ("josé@example.com", "without accents"),
            (&format!("{}@example.com", "a".repeat(65)), "at most 64 characters before"),
            ("\"ada\"@example.com", "contain \" before"),
            ("<ada@example.com", "contain < before"),
            ("mailto:ada@example.com", "contain : before"),
            ("ada(x)@example.com", "contain ( before"),
            ("ada.@example.com", "a dot at the start or the end of the part before"),
            ("a..da@example.com", "two dots in a row"),
            ("ada@", "needs a domain"),
            ("ada@[127.0.0.1]", "not an IP address"),
            ("ada@example.com.", "the end of the domain"),
            ("ada@-example.com", "a hyphen"),
            ("ada@exam_ple.com", "only letters, digits, hyphens and dots after"),
            ("ada@example.com>", "only letters, digits, hyphens and dots after"),
            ("ada@example,com", "only letters, digits, hyphens and dots after"),
            ("ada@localhost", "a whole domain name"),
            (&format!("ada@{}.com", "a".repeat(64)), "at most 63 characters"),
            ("ada@ﬁsh.com", "a domain name after the @"),
            (&format!("ada@{}com", "a.".repeat(130)), "at most 254 bytes"),
        ] {
            let violation = Email::parse(typed).expect_err(typed);
            assert!(violation.description.contains(named), "{typed:?}: {}", violation.description);
            assert!(!violation.description.contains(typed.trim()), "{violation:?}");
        }
    }

    #[test]
    fn a_look_alike_domain_is_another_address() {
        assert_ne!(canonical("ada@exаmple.com"), canonical("ada@example.com"), "the first has a Cyrillic а");
    }

    #[test]
    fn anything_but_a_plain_address_is_refused() {
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
