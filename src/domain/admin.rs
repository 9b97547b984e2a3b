//! Administration: the parsed parameters of its operations, and who asks for them.

use std::net::IpAddr;

use crate::error::{FieldReason, FieldViolation};

use super::{
    ids::ActorId,
    role::{Caller, Role},
    session::Client,
};

/// The number of entries on a page if the request names none.
const DEFAULT_PAGE_SIZE: u32 = 50;
/// The most entries on a page.
const MAX_PAGE_SIZE: u32 = 200;
/// The longest text to search for, in bytes. No address is longer.
const MAX_QUERY_BYTES: usize = 254;
/// The most roles of one account.
const MAX_ROLES: usize = 32;
/// The longest reason in the audit log, in characters.
const MAX_REASON_CHARS: usize = 500;

/// A page of a list, and the token of the next page.
#[derive(Debug)]
pub struct Page<T> {
    pub entries: Vec<T>,
    /// `None` on the last page.
    pub next: Option<String>,
}

/// Who asks for an administrative step: an admin over the network, or an operator on the command line.
#[derive(Debug, Clone, Copy)]
pub struct Administrator {
    pub id: Option<ActorId>,
    pub ip: Option<IpAddr>,
}

impl Administrator {
    pub fn new(caller: &Caller, client: &Client) -> Self {
        Self { id: Some(caller.id()), ip: client.ip }
    }

    /// An operator on the command line, who works on the store itself.
    pub const COMMAND_LINE: Self = Self { id: None, ip: None };
}

/// The number of entries for a requested page size.
pub fn page_size(asked: i32) -> Result<u32, FieldViolation> {
    match u32::try_from(asked) {
        Ok(0) => Ok(DEFAULT_PAGE_SIZE),
        Ok(size) => Ok(size.min(MAX_PAGE_SIZE)),
        Err(_) => Err(FieldViolation::new("page_size", FieldReason::OutOfRange, "must not be negative")),
    }
}

/// The roles with these names, and `user`; sorted.
pub fn role_set(names: &[String]) -> Result<Vec<Role>, FieldViolation> {
    let mut roles = roles(names)?;
    roles.push(Role::user());
    roles.sort();
    roles.dedup();
    Ok(roles)
}

/// The roles with these names; sorted.
pub fn roles(names: &[String]) -> Result<Vec<Role>, FieldViolation> {
    let violation = |reason, description| Err(FieldViolation::new("roles", reason, description));
    if names.len() > MAX_ROLES {
        return violation(FieldReason::TooMany, "must be at most 32");
    }
    let mut roles = Vec::new();
    for name in names {
        let Some(role) = Role::parse(name) else {
            return violation(
                FieldReason::Malformed,
                "must each be a name such as billing-read: a-z, then a-z, 0-9, _ or -, at most 64",
            );
        };
        roles.push(role);
    }
    roles.sort();
    roles.dedup();
    Ok(roles)
}

/// The prefix to search accounts for.
pub fn search_text(text: &str) -> Result<String, FieldViolation> {
    if text.len() > MAX_QUERY_BYTES || text.contains(char::is_control) {
        return Err(FieldViolation::new(
            "query",
            FieldReason::Malformed,
            "must be at most 254 bytes, without control characters",
        ));
    }
    Ok(text.trim().to_lowercase())
}

/// The reason for disabling an account; `None` if it is empty.
pub fn reason(text: String) -> Result<Option<String>, FieldViolation> {
    if text.chars().count() > MAX_REASON_CHARS || text.contains(char::is_control) {
        return Err(FieldViolation::new(
            "reason",
            FieldReason::Malformed,
            "must be at most 500 characters, in one line",
        ));
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}
