//! Roles, and the caller that a verified access token identifies.

use std::fmt;

use super::ids::{SessionId, UserId};

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

/// The caller that a verified access token identifies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub user_id: UserId,
    pub session_id: SessionId,
    pub roles: Vec<Role>,
}

impl Caller {
    pub fn has_role(&self, name: &str) -> bool {
        self.roles.iter().any(|role| role.as_str() == name)
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
