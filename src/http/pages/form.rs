//! Reads the form of a page, and accepts only what browsers send. Checks the syntax of the token and that the two
//! passwords are the same; the RPC checks everything else.

use axum::body::Body;
use http::{HeaderMap, header};
use zeroize::{Zeroize, Zeroizing};

use crate::{body::ReadError, http::call};

/// The names of the fields. All but the last are those of the contract.
pub const TOKEN: &str = "token";
pub const EMAIL: &str = "email";
pub const NEW_PASSWORD: &str = "new_password";
pub const REPEAT_PASSWORD: &str = "repeat_password";

const CONTENT_TYPE: &str = "application/x-www-form-urlencoded";
/// The length of a token in characters: 48 bytes in base64url.
const TOKEN_LENGTH: usize = 64;

/// Why a form could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormError {
    /// It is not `application/x-www-form-urlencoded`.
    MediaType,
    Body(ReadError),
    /// No browser sends this: a field twice, or text that is not UTF-8. Also used if the RPC refuses a field that the
    /// form does not show.
    Malformed,
}

/// Why the passwords have to be typed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasswordError {
    /// The two fields differ.
    NotTheSame,
    /// The policy refused it for these reasons. Each continues a sentence that starts with "The new password".
    NotAccepted(Vec<String>),
}

/// A text with the syntax of a token. Any other text is refused and not shown again.
pub struct Token(String);

impl Token {
    fn parse(text: &str) -> Option<Self> {
        let is_valid = text.len() == TOKEN_LENGTH
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        is_valid.then(|| Self(text.to_owned()))
    }

    /// The token of a link. Mail programs may have added other parameters.
    pub fn of_query(query: &str) -> Option<Self> {
        let mut tokens = form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name == TOKEN);
        let (_, token) = tokens.next()?;
        // If there are two tokens, it is unknown which one the mail contained.
        if tokens.next().is_some() { None } else { Self::parse(&token) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether the query of a link has no token at all, so it is not one of a mail.
pub fn has_no_token(query: &str) -> bool {
    form_urlencoded::parse(query.as_bytes()).all(|(name, _)| name != TOKEN)
}

/// The fields of a form. A field that was not sent is empty.
#[derive(Default)]
pub struct Form {
    token: String,
    email: String,
    new_password: Zeroizing<String>,
    repeat_password: Zeroizing<String>,
}

impl Form {
    /// Reads the form of a request and wipes the body.
    pub async fn read(headers: &HeaderMap, body: Body) -> Result<Self, FormError> {
        let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case(CONTENT_TYPE) {
            return Err(FormError::MediaType);
        }
        let body = call::read_body(body).await.map_err(FormError::Body)?;
        Self::parse(&Zeroizing::new(Vec::from(body)))
    }

    fn parse(body: &[u8]) -> Result<Self, FormError> {
        let mut form = Self::default();
        for (name, value) in form_urlencoded::parse(body) {
            let field = match name.as_ref() {
                TOKEN => &mut form.token,
                EMAIL => &mut form.email,
                NEW_PASSWORD => &mut *form.new_password,
                REPEAT_PASSWORD => &mut *form.repeat_password,
                // Browser extensions add fields of their own.
                _ => continue,
            };
            let mut value = value.into_owned();
            // Invalid UTF-8 arrives as U+FFFD, and would become a password that was never typed.
            if !field.is_empty() || value.contains(char::REPLACEMENT_CHARACTER) {
                value.zeroize();
                return Err(FormError::Malformed);
            }
            *field = value;
        }
        Ok(form)
    }

    pub fn token(&self) -> Option<Token> {
        Token::parse(&self.token)
    }

    /// The address of a form that has no token: it asks for a mail.
    pub fn email(&self) -> Option<&str> {
        (self.token.is_empty() && !self.email.is_empty()).then_some(self.email.as_str())
    }

    /// The new password, if both fields are the same.
    pub fn into_new_password(self) -> Result<Zeroizing<String>, PasswordError> {
        if self.new_password == self.repeat_password { Ok(self.new_password) } else { Err(PasswordError::NotTheSame) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "AZaz09-_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

    fn parse(body: &str) -> Result<Form, FormError> {
        Form::parse(body.as_bytes())
    }

    #[test]
    fn only_the_exact_syntax_of_a_token_is_accepted() {
        assert!(Token::of_query(&format!("token={GOOD}")).is_some());
        assert!(Token::of_query(&format!("utm_source=mail&token={GOOD}&x=1")).is_some());
        let invalid = [
            String::new(),
            "token=".to_owned(),
            format!("Token={GOOD}"),
            format!("token={}", &GOOD[1..]),
            format!("token={GOOD}A"),
            format!("token={GOOD}%20"),
            format!("token=%2B{}", &GOOD[1..]),
            format!("token=%C3%A9{}", &GOOD[2..]),
            format!("token=%22{}", &GOOD[1..]),
            format!("token=<{}", &GOOD[1..]),
            format!("token={GOOD}&token={GOOD}"),
            format!("token={GOOD}&token="),
        ];
        for query in invalid {
            assert!(Token::of_query(&query).is_none(), "{query}");
        }
    }

    #[test]
    fn a_password_is_read_as_it_was_typed() {
        let form = parse("new_password=+caf%C3%A9%26%3D%2B%25+&token=x&repeat_password=+caf%C3%A9%26%3D%2B%25+");
        let password = form.expect("a form").into_new_password().expect("a password");
        assert_eq!(*password, " café&=+% ");
    }

    #[test]
    fn passwords_that_differ_are_refused() {
        for (one, other) in [("correct", "Correct"), ("correct", "correct+"), ("correct", ""), ("", "correct")] {
            let form = parse(&format!("new_password={one}&repeat_password={other}")).expect("a form");
            assert_eq!(form.into_new_password().expect_err("different"), PasswordError::NotTheSame);
        }
        assert!(parse("new_password=correct").expect("a form").into_new_password().is_err());
    }

    #[test]
    fn forms_that_no_browser_sends_are_refused() {
        for body in ["new_password=a&new_password=b", "token=a&token=a", "new_password=%FF", "new_password=caf%E9"] {
            assert_eq!(parse(body).err(), Some(FormError::Malformed), "{body}");
        }
    }
}
