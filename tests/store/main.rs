//! The conformance suite: every step of `postern::store::Store`, each of its outcomes, and the races between them, on
//! every engine. A new backend joins by being added to `support::Engine`.

// Says to clippy what is true anyway: all of this is test code, where `expect` and indexing are welcome.
#![cfg(test)]

#[path = "../support/mod.rs"]
mod support;

mod accounts;
mod atomicity;
mod cancellation;
mod email_changes;
mod fixtures;
mod keys;
mod logout;
mod mail_limits;
mod mail_locks;
mod mail_outbox;
mod mail_races;
mod one_time_tokens;
mod parallel;
mod password_changes;
mod races;
mod rotation;
mod schema;
mod sessions;
