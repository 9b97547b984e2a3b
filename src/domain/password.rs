//! Passwords: how one is read, what a new one must satisfy, and the PHC string that is stored. `hasher.rs` computes the
//! hashes.

use std::{fmt, sync::Arc};

use secrecy::{ExposeSecret, SecretString};
use unicode_normalization::UnicodeNormalization;
use zeroize::{Zeroize, Zeroizing};

use crate::error::{FieldReason, FieldViolation};

/// The longest password, in bytes as received. No passphrase is that long.
pub const MAX_BYTES: usize = 1024;

/// The most characters whose strength is estimated. The time of the estimate grows with the square of their number, and
/// a password whose first 36 characters are weak is refused whatever follows.
const MAX_ESTIMATED_CHARS: usize = 36;
/// A password of at most this many characters is judged in less than a millisecond.
const SHORT: usize = 16;
/// The symbols that can stand for a letter, where there are several for one letter. zxcvbn tries every combination that
/// a password allows, and their number multiplies (dropbox/zxcvbn#326): a hundred bytes kept a core busy for a second.
const SUBSTITUTES: [&str; 7] = ["4@", "({[<", "69", "1!|", "1|7", "$5", "+7"];
/// The most combinations that the estimate tries. Digits alone come to this number.
const MAX_COMBINATIONS: usize = 4;

/// A password, prepared as RFC 8265 §4.2 (`OpaqueString`) says: every Unicode space becomes U+0020, the text is
/// normalized to NFC, and control characters are refused. It is not truncated, and its case is kept.
#[derive(Debug)]
pub struct Password(SecretString);

impl Password {
    /// Prepares the value of a request's field.
    pub fn parse(field: &'static str, mut received: String) -> Result<Self, FieldViolation> {
        let violation = if received.is_empty() {
            Some((FieldReason::Required, "is required"))
        } else if received.len() > MAX_BYTES {
            Some((FieldReason::TooLong, "must be at most 1024 bytes"))
        } else if received.chars().any(char::is_control) {
            Some((FieldReason::Malformed, "must not contain control characters"))
        } else {
            None
        };
        if let Some((reason, description)) = violation {
            received.zeroize();
            return Err(FieldViolation::new(field, reason, description));
        }
        let prepared: String = received.chars().map(|c| if c.is_whitespace() { ' ' } else { c }).nfc().collect();
        received.zeroize();
        Ok(Self(SecretString::from(prepared)))
    }

    pub fn as_bytes(&self) -> &[u8] {
        self.0.expose_secret().as_bytes()
    }
}

/// A new password that is long enough. How easy it is to guess is judged before it is hashed.
#[derive(Debug)]
pub struct NewPassword {
    /// The name of its field in the request.
    field: &'static str,
    password: Password,
    /// What an attacker knows of the account.
    account_words: Vec<String>,
    policy: Arc<PasswordPolicy>,
}

impl NewPassword {
    /// Checks the length.
    pub fn new(policy: &Arc<PasswordPolicy>, field: &'static str, password: Password) -> Result<Self, FieldViolation> {
        policy.check_length(field, &password)?;
        Ok(Self { field, password, account_words: Vec::new(), policy: Arc::clone(policy) })
    }

    /// Adds what an attacker knows of the account, such as username and email address.
    #[must_use]
    pub fn of_account(mut self, words: [&str; 2]) -> Self {
        self.account_words.extend(words.map(str::to_owned));
        self
    }

    /// Checks how easy the password is to guess. Takes some milliseconds of CPU, so the hashing threads do it.
    pub fn check_strength(&self) -> Result<(), FieldViolation> {
        self.policy.check_strength(self.field, &self.password, &self.account_words)
    }

    pub fn password(&self) -> &Password {
        &self.password
    }
}

/// What a new password must satisfy. Login does not check it: an old password still works after the policy has changed.
#[derive(Debug, Clone)]
pub struct PasswordPolicy {
    /// The minimum length, in code points.
    pub min_length: usize,
    /// The minimum zxcvbn score, 0 to 4.
    pub min_score: u8,
    /// Words that an attacker would try for every account of this deployment, such as the service's name.
    pub common_words: Vec<String>,
}

impl PasswordPolicy {
    /// Checks the length of a new password.
    fn check_length(&self, field: &'static str, password: &Password) -> Result<(), FieldViolation> {
        if password.0.expose_secret().chars().count() < self.min_length {
            return Err(FieldViolation::new(
                field,
                FieldReason::TooShort,
                format!("must be at least {} characters", self.min_length),
            ));
        }
        Ok(())
    }

    /// Checks what can be checked in less than a millisecond: for a request that is refused anyway, so that its answer
    /// names every bad field.
    pub fn check_cheaply(&self, field: &'static str, password: &Password) -> Result<(), FieldViolation> {
        self.check_length(field, password)?;
        let is_short = password.0.expose_secret().chars().count() <= SHORT;
        if is_short { self.check_strength(field, password, &[]) } else { Ok(()) }
    }

    /// Checks how easy a new password is to guess.
    fn check_strength(
        &self,
        field: &'static str,
        password: &Password,
        account_words: &[String],
    ) -> Result<(), FieldViolation> {
        let text = password.0.expose_secret();
        let bounds = EstimateBounds::of(text);
        // zxcvbn matches each word as a whole, so the parts of `ada@example.com` are added as words too. The words get
        // the same bounds as the password, or they would not be found in it.
        let words: Vec<String> = account_words
            .iter()
            .flat_map(|word| std::iter::once(word.as_str()).chain(word.split(['@', '.', '_', '-', '+'])))
            .chain(self.common_words.iter().map(String::as_str))
            .filter(|word| word.len() > 2)
            .map(|word| bounds.apply(word).to_string())
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let estimate = zxcvbn::zxcvbn(&bounds.apply(text), &words);
        if u8::from(estimate.score()) >= self.min_score {
            return Ok(());
        }
        let warning = estimate.feedback().and_then(zxcvbn::feedback::Feedback::warning);
        let description = warning.map_or_else(
            || "is too easy to guess: use more words, or less common ones".to_owned(),
            |warning| format!("is too easy to guess: {warning}"),
        );
        Err(FieldViolation::new(field, FieldReason::TooWeak, description))
    }
}

/// What a password's estimate leaves out, so that its cost is bounded: characters beyond the first 36, and symbols that
/// would allow too many combinations. Digits are always kept: they are part of common passwords, of dates and of
/// sequences.
struct EstimateBounds {
    /// The symbols that are replaced.
    replaced: Vec<char>,
}

impl EstimateBounds {
    fn of(password: &str) -> Self {
        let characters = || password.chars().take(MAX_ESTIMATED_CHARS);
        let mut kept: Vec<char> = characters().filter(char::is_ascii_digit).collect();
        let mut replaced = Vec::new();
        for c in characters().filter(|c| SUBSTITUTES.iter().any(|symbols| symbols.contains(*c))) {
            if kept.contains(&c) || replaced.contains(&c) {
                continue;
            }
            kept.push(c);
            if combinations(&kept) > MAX_COMBINATIONS {
                kept.pop();
                replaced.push(c);
            }
        }
        kept.zeroize();
        Self { replaced }
    }

    /// The text within the bounds. A symbol is replaced by a character that zxcvbn knows nothing about, each symbol by
    /// its own, so that the text keeps its repetitions.
    fn apply(&self, text: &str) -> Zeroizing<String> {
        // Unicode's private use area starts at U+E000.
        let replacement = |c: char| char::from_u32(0xE000 + u32::from(c)).unwrap_or(char::REPLACEMENT_CHARACTER);
        let mut bounded = Zeroizing::new(String::with_capacity(4 * MAX_ESTIMATED_CHARS));
        for c in text.chars().take(MAX_ESTIMATED_CHARS) {
            bounded.push(if self.replaced.contains(&c) { replacement(c) } else { c });
        }
        bounded
    }
}

/// How many combinations of substitutions zxcvbn tries for a text with these characters.
fn combinations(characters: &[char]) -> usize {
    let present = |symbols: &&str| symbols.chars().filter(|symbol| characters.contains(symbol)).count().max(1);
    SUBSTITUTES.iter().map(present).product()
}

/// The stored form of a password: a PHC string with the Argon2id parameters, the salt and the hash.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(String);

impl PasswordHash {
    /// Takes a PHC string as it is. It is parsed when a password is verified against it.
    pub fn from_phc(phc: String) -> Self {
        Self(phc)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash([redacted])")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> PasswordPolicy {
        PasswordPolicy { min_length: 8, min_score: 2, common_words: vec!["postern".to_owned()] }
    }

    fn judge(policy: PasswordPolicy, text: &str, words: &[&str]) -> Result<(), FieldViolation> {
        let password = Password::parse("password", text.to_owned()).expect("a password");
        let words = [words.first().copied().unwrap_or_default(), words.get(1).copied().unwrap_or_default()];
        NewPassword::new(&Arc::new(policy), "password", password)?.of_account(words).check_strength()
    }

    fn accepts(text: &str, words: &[&str]) -> bool {
        judge(policy(), text, words).is_ok()
    }

    fn bytes(text: &str) -> Vec<u8> {
        Password::parse("password", text.to_owned()).expect("a password").as_bytes().to_vec()
    }

    #[test]
    fn the_same_characters_typed_either_way_are_one_password() {
        assert_eq!(bytes("caf\u{e9} au lait"), bytes("cafe\u{301} au\u{a0}lait"));
    }

    #[test]
    fn compatibility_characters_and_case_stay_apart() {
        assert_ne!(bytes("\u{fb01}shing"), bytes("fishing"));
        assert_ne!(bytes("Passphrase"), bytes("passphrase"));
    }

    #[test]
    fn size_is_limited_in_bytes_and_nothing_is_cut_off() {
        assert!(Password::parse("password", String::new()).is_err());
        assert!(Password::parse("password", "a".repeat(MAX_BYTES)).is_ok());
        assert!(Password::parse("password", "a".repeat(MAX_BYTES + 1)).is_err());
        assert_ne!(bytes(&"a".repeat(MAX_BYTES)), bytes(&"a".repeat(MAX_BYTES - 1)));
    }

    #[test]
    fn control_characters_are_refused() {
        for bad in ["correct\0horse", "correct\nhorse", "correct\thorse", "correct\u{7f}horse", "correct\u{85}horse"] {
            assert!(Password::parse("password", bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn length_counts_code_points() {
        assert!(!accepts("żółćźń7", &[]));
        assert!(accepts("żółćźńą7", &[]));
    }

    #[test]
    fn guessable_passwords_are_refused() {
        for weak in ["password", "12345678", "qwertyuiop", "letmein1"] {
            assert!(!accepts(weak, &[]), "{weak}");
        }
        assert!(accepts("correct horse battery staple", &[]));
    }

    #[test]
    fn the_accounts_own_words_count_as_guesses() {
        assert!(accepts("wolframite77", &[]));
        assert!(!accepts("wolframite77", &["wolframite"]));
        assert!(!accepts("wolframite77", &["ada", "ada@wolframite.example"]));
    }

    #[test]
    fn neither_passwords_nor_hashes_print() {
        let password = Password::parse("password", "correct horse".to_owned()).expect("a password");
        assert!(!format!("{password:?}").contains("horse"));
        let hash = PasswordHash::from_phc("$argon2id$secret".to_owned());
        assert!(!format!("{hash:?}").contains("secret"));
    }

    #[test]
    fn the_estimate_sees_a_bounded_number_of_characters_and_of_substitutions() {
        let bounded = |text: &str| EstimateBounds::of(text).apply(text);
        let hostile = "4@8({[<369!1|0$5+7%2".repeat(5);
        for text in [hostile.as_str(), &hostile.chars().rev().collect::<String>(), "1|!7+$5({[<4@69", "({[<@!|$+"] {
            let characters: Vec<_> = bounded(text).chars().collect();
            assert_eq!(characters.len(), text.chars().count().min(MAX_ESTIMATED_CHARS));
            assert!(combinations(&characters) <= MAX_COMBINATIONS, "{text:?}");
        }
        assert!(combinations(&hostile.chars().collect::<Vec<_>>()) > 100);
        for ordinary in ["correct horse battery staple 7", "12345678901234567890", "P@ssw0rd!", "Tr0ub4dor&3"] {
            assert_eq!(bounded(ordinary).as_str(), ordinary);
        }
    }

    #[test]
    fn the_accounts_own_words_are_found_within_the_bounds_of_the_estimate() {
        let long = format!("{}@example.com", "q7x".repeat(20));
        // The first has so many ambiguous digits that its @ is replaced; the second is longer than what is estimated.
        for email in ["1b86260e1ba749bc@example.com", &long] {
            assert!(judge(policy(), email, &[email]).is_err(), "{email}");
        }
    }
}
