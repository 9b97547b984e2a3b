//! The entries of the log of revocations.

use time::OffsetDateTime;

use crate::domain::{
    ids::{SessionId, UserId},
    role::Role,
};

/// An entry of the log of revocations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// Numbers are given in the order of writing, which can differ from the order in which entries become visible.
    pub number: i64,
    pub what: Revoked,
    pub revoke_time: OffsetDateTime,
    /// When the last access token that this entry affects has expired.
    pub retain_until: OffsetDateTime,
}

/// What an entry of the log revokes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revoked {
    /// The session ended.
    Session(SessionId),
    /// The account, or the service account, has these roles from now on. `None`: it is disabled or deleted.
    Roles(UserId, Option<Vec<Role>>),
}
