//! The conformance suite: every step of `postern::domain::ports::Store`, each of its outcomes, and the races between
//! them, on every engine. A new backend is tested once it is added to `support::Engine`.

// Tells clippy that all of this is test code, where `expect` and indexing are allowed.
#![cfg(test)]

#[path = "../support/mod.rs"]
mod support;

mod accounts;
mod atomicity;
mod attempts;
mod audit_atomicity;
mod audit_pages;
mod audit_rows;
mod cancellation;
mod database;
mod deletion;
mod disabling;
mod email_changes;
mod fixtures;
mod index_ranges;
mod keys;
mod last_admin;
mod logout;
mod mail_limits;
mod mail_locks;
mod mail_outbox;
mod mail_races;
mod one_time_tokens;
mod own_sessions;
mod parallel;
mod password_changes;
mod races;
mod revocations;
mod roles;
mod rotation;
mod schema;
mod services;
mod sessions;
mod user_lists;
mod usernames;
