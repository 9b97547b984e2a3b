//! Roles, and the caller that a verified access token identifies.

use std::fmt;

use super::ids::{ActorId, ServiceAccountId, ServiceKeyId, SessionId, TokenId, UserId};

/// A role's name: `[a-z][a-z0-9_-]{0,63}`. `user` and `admin` are built in; a platform may add its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Role(String);

impl Role {
    /// The role of every account.
    pub const USER: &'static str = "user";
    /// The role that administrative RPCs require.
    pub const ADMIN: &'static str = "admin";

    /// The role of every account.
    pub fn user() -> Self {
        Self(Self::USER.to_owned())
    }

    /// Parses the name of a role.
    pub fn parse(name: &str) -> Option<Self> {
        let mut bytes = name.bytes();
        let first_is_letter = bytes.next().is_some_and(|byte| byte.is_ascii_lowercase());
        let rest_fits = bytes.all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'));
        (first_is_letter && rest_fits && name.len() <= 64).then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The caller that a verified access token identifies. A person never passes for a service, nor a service for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    Person(Person),
    Service(ServiceCaller),
}

/// A person, in one of their sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    pub user_id: UserId,
    pub session_id: SessionId,
    pub roles: Vec<Role>,
}

/// A service, with one of its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceCaller {
    pub account_id: ServiceAccountId,
    pub key_id: ServiceKeyId,
    /// The token that it has presented. `None`: it has presented its secret.
    pub token_id: Option<TokenId>,
    pub roles: Vec<Role>,
}

impl Caller {
    pub fn has_role(&self, name: &str) -> bool {
        self.roles().iter().any(|role| role.as_str() == name)
    }

    pub fn roles(&self) -> &[Role] {
        match self {
            Self::Person(person) => &person.roles,
            Self::Service(service) => &service.roles,
        }
    }

    /// The same caller with the roles that it has now.
    #[must_use]
    pub fn with_roles(self, roles: Vec<Role>) -> Self {
        match self {
            Self::Person(person) => Self::Person(Person { roles, ..person }),
            Self::Service(service) => Self::Service(ServiceCaller { roles, ..service }),
        }
    }

    /// The same caller with the roles that every caller of its kind has: people have one, services none.
    #[must_use]
    pub fn with_least_roles(self) -> Self {
        let roles = match self {
            Self::Person(_) => vec![Role::user()],
            Self::Service(_) => Vec::new(),
        };
        self.with_roles(roles)
    }

    /// Who it is, in the audit log and as the `sub` of its tokens.
    pub fn id(&self) -> ActorId {
        match self {
            Self::Person(person) => person.user_id.into(),
            Self::Service(service) => service.account_id.into(),
        }
    }

    /// The `sid` of its tokens. The log of revocations treats a key like a session: whoever gets tokens from it loses them
    /// when it ends.
    pub fn session(&self) -> SessionId {
        match self {
            Self::Person(person) => person.session_id,
            Self::Service(service) => service.key_id.into(),
        }
    }

    /// What ends this token alone, in the log of revocations: a token of a service that was revoked by itself is in it like a
    /// session. A person's token ends with its session.
    pub fn token(&self) -> Option<SessionId> {
        match self {
            Self::Person(_) => None,
            Self::Service(service) => service.token_id.map(SessionId::from),
        }
    }

    /// The account in the log of revocations, which treats a service account like a user.
    pub fn account(&self) -> UserId {
        match self {
            Self::Person(person) => person.user_id,
            Self::Service(service) => service.account_id.into(),
        }
    }
}

impl From<ServiceKeyId> for SessionId {
    fn from(key: ServiceKeyId) -> Self {
        Self(key.0)
    }
}

impl From<TokenId> for SessionId {
    fn from(token: TokenId) -> Self {
        Self(token.0)
    }
}

impl From<ServiceAccountId> for UserId {
    fn from(account: ServiceAccountId) -> Self {
        Self(account.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_a_lower_case_name_of_at_most_64_bytes() {
        for good in ["user", "admin", "a", "billing-read_2", &"a".repeat(64)] {
            assert!(Role::parse(good).is_some(), "{good}");
        }
        for bad in ["", "User", "1st", "-a", "_a", "a b", "a\n", "é", &"a".repeat(65)] {
            assert!(Role::parse(bad).is_none(), "{bad:?}");
        }
    }
}
