//! Reserved usernames: names that other people take for the operator or for a part of the service. Nobody can choose
//! one over the network. An operator can give one to an account, and an account that has one keeps it.

use std::{collections::BTreeSet, str::FromStr};

use crate::error::{FieldReason, FieldViolation};

use super::account::Username;

/// The default: the role addresses of RFC 2142, the addresses to which certificate authorities send their challenges,
/// and the names of the operator. The choice follows the much longer list of django-registration
/// (`django_registration.validators`), which also reserves the names of web pages.
pub const DEFAULT_RESERVED: &str = "abuse,admin,administrator,anonymous,contact,help,hostmaster,info,mailer-daemon,me,\
    moderator,no-reply,nobody,noc,noreply,official,operator,owner,postern,postmaster,root,security,staff,superuser,support,\
    sysadmin,system,webmaster";

/// The usernames that nobody can choose. They are compared in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReservedUsernames(BTreeSet<String>);

impl ReservedUsernames {
    /// Refuses a name that is reserved. `field` names it in the error.
    pub fn check(&self, field: &'static str, username: &Username) -> Result<(), FieldViolation> {
        if self.0.contains(&username.as_str().to_ascii_lowercase()) {
            return Err(FieldViolation::new(field, FieldReason::Reserved, "is reserved: choose another one"));
        }
        Ok(())
    }
}

/// Reads names that are separated by commas. An empty text reserves none.
impl FromStr for ReservedUsernames {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        let reserved = names.map(|name| match Username::parse(name) {
            Ok(username) => Ok(username.as_str().to_ascii_lowercase()),
            Err(violation) => Err(format!("{name:?} cannot be a username, which {}", violation.description)),
        });
        reserved.collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_reserved(reserved: &ReservedUsernames, name: &str) -> bool {
        reserved.check("username", &Username::parse(name).expect(name)).is_err()
    }

    #[test]
    fn names_are_compared_in_lower_case_and_as_a_whole() {
        let reserved: ReservedUsernames = " Admin ,root,, billing-team".parse().expect("a list");
        for name in ["admin", "ADMIN", "Root", "billing-team"] {
            assert!(is_reserved(&reserved, name), "{name}");
        }
        for name in ["admins", "the-admin", "ad.min", "support"] {
            assert!(!is_reserved(&reserved, name), "{name}");
        }
    }

    #[test]
    fn an_empty_list_reserves_nothing_and_what_cannot_be_a_username_is_an_error() {
        for empty in ["", " ", ","] {
            assert_eq!(empty.parse(), Ok(ReservedUsernames::default()));
        }
        let refusal = "admin,no reply".parse::<ReservedUsernames>().expect_err("a space");
        assert!(refusal.starts_with("\"no reply\" cannot be a username"), "{refusal}");
    }

    #[test]
    fn the_default_list_is_sorted_and_has_the_names_of_the_operator() {
        let names: Vec<_> = DEFAULT_RESERVED.split(',').collect();
        assert!(names.is_sorted(), "{names:?}");
        let reserved: ReservedUsernames = DEFAULT_RESERVED.parse().expect("a list");
        assert_eq!(reserved.0.len(), names.len());
        for name in ["admin", "administrator", "root", "system", "me", "support", "postern"] {
            assert!(is_reserved(&reserved, name), "{name}");
        }
    }
}
