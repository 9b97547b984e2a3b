//! Client authentication (RFC 6749 section 2.3): reads the credentials of a request. It verifies none; the gRPC layers do.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, HeaderValue, header};
use percent_encoding::percent_decode_str;
use zeroize::Zeroizing;

use crate::{domain::service_account::ClientSecret, domain::token::CLIENT_ID, grpc::ClientCredentials};

use super::{error::OAuthError, parameters::Parameters};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// How the client of a request authenticates.
#[derive(Debug)]
pub enum Presented {
    /// It does not say who it is, or it is the client of all people, which has no secret.
    Nothing,
    Credentials(ClientCredentials),
    /// By an access token: the value of the header.
    Bearer(HeaderValue),
}

impl Presented {
    /// By at most one method.
    pub fn read(headers: &HeaderMap, parameters: &Parameters) -> Result<Self, OAuthError> {
        let (id, secret) = (parameters.get("client_id"), parameters.get("client_secret"));
        // Methods that the metadata does not name (RFC 7521).
        if parameters.get("client_assertion").is_some() || parameters.get("client_assertion_type").is_some() {
            return Err(OAuthError::invalid_client());
        }
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let Some(value) = values.next() else {
            return match (id, secret) {
                (Some(id), Some(secret)) => credentials(id.to_owned(), secret.to_owned()),
                (None, Some(_)) => Err(OAuthError::invalid_request("client_id is required with client_secret")),
                (id, None) => without_secret(id),
            };
        };
        if values.next().is_some() || secret.is_some() {
            return Err(OAuthError::invalid_request("the client authenticates in two ways"));
        }
        let text = value.to_str().map_err(|_| OAuthError::invalid_client())?;
        let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
        if scheme.eq_ignore_ascii_case("bearer") {
            return Ok(Self::Bearer(value.clone()));
        }
        let (user, password) = Some(rest)
            .filter(|_| scheme.eq_ignore_ascii_case("basic"))
            .and_then(basic)
            .ok_or_else(OAuthError::invalid_client)?;
        if id.is_some_and(|id| id != user) {
            return Err(OAuthError::invalid_request("client_id is not the client of the authorization header"));
        }
        if password.is_empty() { without_secret(Some(&user)) } else { credentials(user, password.to_string()) }
    }
}

fn credentials(id: String, secret: String) -> Result<Presented, OAuthError> {
    let secret = ClientSecret::presented(secret).map_err(|_too_long| OAuthError::invalid_client())?;
    Ok(Presented::Credentials(ClientCredentials { id, secret }))
}

fn without_secret(id: Option<&str>) -> Result<Presented, OAuthError> {
    match id {
        None | Some(CLIENT_ID) => Ok(Presented::Nothing),
        Some(_) => Err(OAuthError::invalid_client()),
    }
}

/// The id and the secret of `Basic …`, each of which is encoded like the value of a form first (section 2.3.1).
fn basic(encoded: &str) -> Option<(String, Zeroizing<String>)> {
    let bytes = Zeroizing::new(BASE64.decode(encoded.trim_matches(' ')).ok()?);
    let (id, secret) = std::str::from_utf8(&bytes).ok()?.split_once(':')?;
    Some((from_form(id)?, Zeroizing::new(from_form(secret)?)))
}

fn from_form(text: &str) -> Option<String> {
    let spaced = Zeroizing::new(text.replace('+', " "));
    percent_decode_str(&spaced).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_credentials_are_decoded_twice() {
        let read = |text: &str| basic(&base64::prelude::BASE64_STANDARD.encode(text));
        let expected = |id: &str, secret: &str| Some((id.to_owned(), Zeroizing::new(secret.to_owned())));
        assert_eq!(read("id:secret"), expected("id", "secret"));
        assert_eq!(read("a%3Ab+c:%25%2B%26%C3%A9+x%3A:y"), expected("a:b c", "%+&\u{e9} x::y"));
        assert_eq!(read("id:"), expected("id", ""));
        assert_eq!(read("no colon"), None);
        assert_eq!(read("id:%FF"), None);
        assert_eq!(basic("aWQ6c2VjcmV0LTE"), expected("id", "secret-1"), "without padding");
        assert_eq!(basic("***"), None);
    }
}
