//! What a route demands of its callers, where a proxy asks Postern about each request. A proxy that asks with words that
//! are not understood gets a refusal: a typo must not open a door.

use std::{fmt, num::NonZeroU32, sync::Arc};

use governor::{DefaultDirectRateLimiter, Quota};

use super::{
    role::{Caller, Role},
    token::{AccessTokenError, VerifiedToken},
};

/// What a route demands. Without any demand, every caller with a valid access token may pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demands {
    /// The caller has this role now.
    role: Option<Role>,
    /// The caller is a person whose address was verified when the token was minted.
    verified_email: bool,
    /// The caller is a service.
    service: bool,
    /// A request without a token passes too, as nobody's. One with a token that is not valid does not.
    allow_anonymous: bool,
}

/// Why demands were not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDemands {
    #[error(
        "there is no demand {0}: the demands are require_role, require_verified_email, require_service and allow_anonymous"
    )]
    Unknown(DemandName),
    #[error("{0} is there twice")]
    Twice(DemandName),
    #[error("{0} must be true or false")]
    NoBoolean(DemandName),
    #[error("require_role must be one role, such as admin")]
    NoRole,
    #[error("allow_anonymous contradicts the other demands: nobody checks them of a caller without a token")]
    Contradiction,
}

/// The name of a demand, as somebody wrote it: quoted and cut, since it may be a stranger's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DemandName(String);

/// The longest name of a demand in a message, in characters.
const LONGEST_NAME: usize = 40;

impl DemandName {
    fn new(name: &str) -> Self {
        Self(name.chars().take(LONGEST_NAME).collect())
    }
}

impl fmt::Display for DemandName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// The credential of a request that a proxy asks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential<'a> {
    /// No bearer token.
    Absent,
    Token(&'a str),
    /// Something that may be several tokens, or none.
    Unclear,
}

/// Who passes.
#[derive(Debug)]
pub enum Passing {
    Anonymous,
    /// With what the token says, and the roles that the caller has now.
    Caller(Arc<VerifiedToken>, Caller),
}

/// Why a request does not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    TokenMissing,
    /// Includes that it is not known whether the token was revoked.
    Token(AccessTokenError),
    RoleMissing,
    EmailNotVerified,
    NoService,
    Demands(InvalidDemands),
}

impl Demands {
    /// Reads the demands of a route, as pairs of a name and a value.
    pub fn parse<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, InvalidDemands> {
        let (mut role, mut verified_email, mut service, mut allow_anonymous) = (None, None, None, None);
        for (name, value) in pairs {
            let quoted = || DemandName::new(name);
            let is_first = match name {
                "require_role" => role.replace(Role::parse(value).ok_or(InvalidDemands::NoRole)?).is_none(),
                "require_verified_email" => verified_email.replace(boolean(name, value)?).is_none(),
                "require_service" => service.replace(boolean(name, value)?).is_none(),
                "allow_anonymous" => allow_anonymous.replace(boolean(name, value)?).is_none(),
                _ => return Err(InvalidDemands::Unknown(quoted())),
            };
            if !is_first {
                return Err(InvalidDemands::Twice(quoted()));
            }
        }
        let demands = Self {
            role,
            verified_email: verified_email.unwrap_or(false),
            service: service.unwrap_or(false),
            allow_anonymous: allow_anonymous.unwrap_or(false),
        };
        let demands_something = demands.role.is_some() || demands.verified_email || demands.service;
        if demands.allow_anonymous && demands_something { Err(InvalidDemands::Contradiction) } else { Ok(demands) }
    }

    /// Decides about a request. `verify` is how Postern checks an access token.
    pub fn decide<E>(&self, credential: Credential<'_>, verify: E) -> Result<Passing, Refusal>
    where
        E: FnOnce(&str) -> Result<(Arc<VerifiedToken>, Caller), AccessTokenError>,
    {
        let (token, caller) = match credential {
            Credential::Absent if self.allow_anonymous => return Ok(Passing::Anonymous),
            Credential::Absent => return Err(Refusal::TokenMissing),
            Credential::Unclear => return Err(Refusal::Token(AccessTokenError::Invalid)),
            Credential::Token(token) => verify(token).map_err(Refusal::Token)?,
        };
        if self.service && !matches!(caller, Caller::Service(_)) {
            return Err(Refusal::NoService);
        }
        let has_verified_email = token.account.email.as_ref().is_some_and(|email| email.is_verified);
        if self.verified_email && !has_verified_email {
            return Err(Refusal::EmailNotVerified);
        }
        if self.role.as_ref().is_some_and(|role| !caller.has_role(role.as_str())) {
            return Err(Refusal::RoleMissing);
        }
        Ok(Passing::Caller(token, caller))
    }
}

fn boolean(name: &str, value: &str) -> Result<bool, InvalidDemands> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(InvalidDemands::NoBoolean(DemandName::new(name))),
    }
}

/// The log lines about demands that are not understood: ten a minute. There is one such request for each of a route that is
/// configured wrongly, and strangers may be able to send some.
pub struct DemandWarnings(DefaultDirectRateLimiter);

const WARNINGS_A_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(9);

impl Default for DemandWarnings {
    fn default() -> Self {
        Self(DefaultDirectRateLimiter::direct(Quota::per_minute(WARNINGS_A_MINUTE)))
    }
}

impl fmt::Debug for DemandWarnings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DemandWarnings")
    }
}

impl DemandWarnings {
    /// Whether another line may be written.
    pub fn is_due(&self) -> bool {
        self.0.check().is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Demands, InvalidDemands> {
        Demands::parse(pairs.iter().copied())
    }

    #[test]
    fn every_demand_is_read() {
        assert_eq!(parse(&[]), Ok(Demands::default()));
        let demands =
            parse(&[("require_role", "admin"), ("require_verified_email", "true"), ("require_service", "false")]);
        let role = Role::parse("admin");
        assert_eq!(demands, Ok(Demands { role, verified_email: true, ..Demands::default() }));
        let anonymous = parse(&[("allow_anonymous", "true"), ("require_service", "false")]);
        assert_eq!(anonymous, Ok(Demands { allow_anonymous: true, ..Demands::default() }));
        assert_eq!(parse(&[("require_service", "true")]), Ok(Demands { service: true, ..Demands::default() }));
    }

    #[test]
    fn what_is_not_understood_is_an_error_and_never_no_demand() {
        for (pairs, told) in [
            (&[("require_rol", "admin")][..], "require_rol"),
            (&[("Require_Role", "admin")], "Require_Role"),
            (&[("", "")], "there is no demand"),
            (&[("require_role", "")], "one role"),
            (&[("require_role", "admin,user")], "one role"),
            (&[("require_role", "Admin")], "one role"),
            (&[("require_verified_email", "yes")], "true or false"),
            (&[("require_service", "")], "true or false"),
            (&[("allow_anonymous", "True")], "true or false"),
            (&[("require_role", "user"), ("require_role", "admin")], "twice"),
            (&[("require_role", "user"), ("allow_anonymous", "true")], "contradicts"),
            (&[("require_service", "true"), ("allow_anonymous", "true")], "contradicts"),
        ] {
            let error = parse(pairs).expect_err("an error").to_string();
            assert!(error.contains(told), "{pairs:?}: {error}");
        }
    }

    #[test]
    fn the_name_of_an_unknown_demand_is_quoted_and_cut() {
        let error = parse(&[(&format!("a\n{}", "b".repeat(1_000)), "")]).expect_err("an error").to_string();
        assert!(error.contains("\"a\\nbbb") && !error.contains('\n') && error.len() < 200, "{error}");
    }

    #[test]
    fn only_a_request_without_any_token_is_anonymous() {
        let open = parse(&[("allow_anonymous", "true")]).expect("demands");
        let expired = |_: &str| Err(AccessTokenError::Expired);
        assert!(matches!(open.decide(Credential::Absent, expired), Ok(Passing::Anonymous)));
        assert_eq!(open.decide(Credential::Token("t"), expired).err(), Some(Refusal::Token(AccessTokenError::Expired)));
        assert_eq!(open.decide(Credential::Unclear, expired).err(), Some(Refusal::Token(AccessTokenError::Invalid)));
        let closed = Demands::default();
        assert_eq!(closed.decide(Credential::Absent, expired).err(), Some(Refusal::TokenMissing));
    }
}
