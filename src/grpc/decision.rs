//! A decision about a request that a proxy asks about, in the terms of HTTP: what `Check` (`ext_authz.rs`) and the
//! HTTP address (`http/forward_auth.rs`) answer. Knows neither of their formats.

use std::{borrow::Cow, sync::Arc};

use tonic::Code;

use crate::{
    domain::{
        demands::{Credential, Demands, InvalidDemands, Passing, Refusal},
        role::{Caller, Role},
        service::Service,
        token::{AccessTokenError, VerifiedToken},
    },
    error::Error,
};

use super::authenticate::token_in;

/// The headers by which the service behind the proxy knows the caller.
const USER_ID: &str = "x-postern-user-id";
const SESSION_ID: &str = "x-postern-session-id";
const USERNAME: &str = "x-postern-username";
const EMAIL: &str = "x-postern-email";
const ROLES: &str = "x-postern-roles";
const SUBJECT_TYPE: &str = "x-postern-subject-type";
const IDENTITY: [&str; 6] = [USER_ID, SESSION_ID, USERNAME, EMAIL, ROLES, SUBJECT_TYPE];

/// The message while the log of revocations cannot be read.
const UNDECIDED: &str = "access tokens cannot be checked at the moment";

/// What becomes of a request.
#[derive(Debug)]
pub enum Decision {
    Allowed(Allowed),
    Denied(Denied),
}

/// A request that passes.
#[derive(Debug)]
pub struct Allowed {
    /// The headers of the request that are replaced.
    pub identity: Vec<(&'static str, String)>,
    /// The headers of the request that are removed: those of the caller's identity that are not replaced.
    pub removed: Vec<&'static str>,
    /// The caller and its token. `None` for an anonymous caller.
    pub caller: Option<(Arc<VerifiedToken>, Caller)>,
}

/// A request that does not pass.
#[derive(Debug)]
pub struct Denied {
    /// 401, 403 or 503.
    pub http: u16,
    /// For callers that speak gRPC.
    pub code: Code,
    pub message: Cow<'static, str>,
    /// `WWW-Authenticate` (RFC 6750 §3).
    pub challenge: Option<String>,
    /// `Retry-After`, in seconds.
    pub retry_after: Option<&'static str>,
}

/// Decides about a request with these values of `authorization`, on a route with these demands.
pub fn decide<'a>(
    service: &Service,
    authorization: impl IntoIterator<Item = &'a [u8]>,
    demands: Result<Demands, InvalidDemands>,
) -> Decision {
    match service.check(credential(authorization), demands) {
        Ok(Passing::Anonymous) => {
            Decision::Allowed(Allowed { identity: Vec::new(), removed: IDENTITY.to_vec(), caller: None })
        }
        Ok(Passing::Caller(token, caller)) => identify(token, caller).map_or_else(
            || {
                tracing::error!("a claim of an access token cannot be the value of a header");
                Decision::Denied(Denied::undecided())
            },
            Decision::Allowed,
        ),
        Err(refusal) => Decision::Denied(refusal.into()),
    }
}

/// Reads `authorization`. Proxies join the values of a header that comes twice with a comma, which no bearer token contains.
fn credential<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Credential<'a> {
    let mut values = values.into_iter();
    let Some(value) = values.next() else {
        return Credential::Absent;
    };
    match str::from_utf8(value) {
        Ok(value) if values.next().is_none() && !value.contains(',') => {
            token_in(value).map_or(Credential::Absent, Credential::Token)
        }
        _ => Credential::Unclear,
    }
}

/// The identity of a caller as headers. `None` if a value cannot stand in one: the rules for names, addresses and roles
/// allow visible ASCII only.
fn identify(token: Arc<VerifiedToken>, caller: Caller) -> Option<Allowed> {
    let roles: Vec<_> = caller.roles().iter().map(Role::as_str).collect();
    let email = token.account.email.as_ref().map(|email| email.address.clone());
    let values = [
        (USER_ID, Some(caller.id().to_string())),
        (SESSION_ID, Some(caller.session().to_string())),
        (USERNAME, Some(token.account.username.clone())),
        (EMAIL, email),
        (ROLES, Some(roles.join(","))),
        (SUBJECT_TYPE, Some(subject_type(&caller).to_owned())),
    ];
    let (mut identity, mut removed) = (Vec::with_capacity(values.len()), Vec::new());
    for (name, value) in values {
        match value {
            // An empty value would be read as none by some and not by others.
            None => removed.push(name),
            Some(value) if value.is_empty() => removed.push(name),
            Some(value) if value.bytes().all(|byte| byte.is_ascii_graphic()) => identity.push((name, value)),
            Some(_) => return None,
        }
    }
    Some(Allowed { identity, removed, caller: Some((token, caller)) })
}

/// The name of a kind of caller, as in `IntrospectToken` and in the claims.
pub fn subject_type(caller: &Caller) -> &'static str {
    match caller {
        Caller::Person(_) => "user",
        Caller::Service(_) => "service",
    }
}

impl Denied {
    /// A request that nobody can decide about.
    pub fn undecided() -> Self {
        let message = UNDECIDED.into();
        Self { http: 503, code: Code::Unavailable, message, challenge: None, retry_after: Some("1") }
    }

    /// A request that nothing can help.
    pub fn forbidden(message: impl Into<Cow<'static, str>>) -> Self {
        let message = message.into();
        Self { http: 403, code: Code::PermissionDenied, message, challenge: None, retry_after: None }
    }

    fn unauthenticated(message: String, challenge: String) -> Self {
        let (code, message) = (Code::Unauthenticated, message.into());
        Self { http: 401, code, message, challenge: Some(challenge), retry_after: None }
    }

    fn insufficient(message: String) -> Self {
        let challenge = format!("Bearer error=\"insufficient_scope\", error_description=\"{message}\"");
        Self { challenge: Some(challenge), ..Self::forbidden(message) }
    }
}

impl From<Refusal> for Denied {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Token(AccessTokenError::RevocationUnknown) => Self::undecided(),
            // RFC 6750 §3.1: no error code where there is no token.
            Refusal::TokenMissing => Self::unauthenticated(Error::TokenMissing.to_string(), "Bearer".to_owned()),
            Refusal::Token(fault) => {
                let message = Error::from(fault).to_string();
                let challenge = format!("Bearer error=\"invalid_token\", error_description=\"{message}\"");
                Self::unauthenticated(message, challenge)
            }
            Refusal::RoleMissing => Self::insufficient(Error::RoleRequired.to_string()),
            Refusal::EmailNotVerified => Self::insufficient(Error::EmailNotVerified.to_string()),
            Refusal::NoService => Self::insufficient(Error::ServiceRequired.to_string()),
            // What is wrong is for the operator, in the log.
            Refusal::Demands(_) => Self::forbidden("this route is not configured correctly"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_single_bearer_token_counts() {
        let of = |values: &[&'static [u8]]| credential(values.iter().copied());
        assert_eq!(of(&[]), Credential::Absent);
        assert_eq!(of(&[b"Basic YTpi"]), Credential::Absent);
        assert_eq!(of(&[b"bEaReR   a.b.c"]), Credential::Token("a.b.c"));
        assert_eq!(of(&[b"Bearer"]), Credential::Token(""));
        for unclear in [
            &[b"Bearer a.b.c" as &[u8], b"Bearer a.b.c"][..],
            &[b"Basic YTpi", b"Bearer a.b.c"],
            &[b"Bearer a.b.c,Bearer a.b.c"],
            &[b"Basic YTpi,Bearer a.b.c"],
            &[b"Bearer a.b.c\xff"],
            &[b"\xff"],
        ] {
            assert_eq!(of(unclear), Credential::Unclear, "{unclear:?}");
        }
    }

    #[test]
    fn what_may_have_been_revoked_is_denied_with_503() {
        let Denied { http, code, challenge, retry_after, .. } =
            Refusal::Token(AccessTokenError::RevocationUnknown).into();
        assert_eq!((http, code, challenge, retry_after), (503, Code::Unavailable, None, Some("1")));
    }

    #[test]
    fn a_message_can_stand_in_a_header_and_says_what_a_client_may_know() {
        let faults = [AccessTokenError::Invalid, AccessTokenError::Expired, AccessTokenError::Revoked];
        let refusals = faults.map(Refusal::Token).into_iter().chain([
            Refusal::TokenMissing,
            Refusal::RoleMissing,
            Refusal::EmailNotVerified,
            Refusal::NoService,
        ]);
        for refusal in refusals {
            let Denied { http, message, challenge, .. } = refusal.clone().into();
            let challenge = challenge.expect("a challenge");
            assert!(challenge.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '), "{challenge}");
            assert!(!message.contains('"'), "{message}");
            assert_eq!(challenge.contains("error="), refusal != Refusal::TokenMissing, "{challenge}");
            assert_eq!(http == 403, challenge.contains("insufficient_scope"), "{challenge}");
        }
    }
}
