//! Steps that are the same on every backend. A step decides in code what happens, and does it with the verbs of a
//! [`WriteTransaction`]. The rules of a step stand here once: what ends, what is voided, what is audited, and in which
//! order rows are locked.
//!
//! Order of locks, so that no two steps wait for each other: the row of the user first, then its sessions, tokens and
//! mails.

mod accounts;
mod admin;
mod keys;
mod mail;
mod purge;
mod services;
mod sessions;
mod transaction;

pub(super) use accounts::create_account;
pub(super) use keys::first_signing_key;
pub(super) use mail::{issue_token, prepare, request_mail};
pub(super) use sessions::{apply_logout, carried_on, end_reused_session, end_surplus_sessions, open_session, replayed};
pub(super) use transaction::{
    ANOTHER_ADMIN_ENABLED, Backend, Budget, Dialect, WriteTransaction, abandon_attempt, bind_mail, bind_session,
    forgive_attempts, write,
};
