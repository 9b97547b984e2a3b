//! The conformance suite: every step of `postern::store::Store`, each of its outcomes, and the races between them, on
//! every engine. A new backend joins by being added to `support::Engine`.

// Says to clippy what is true anyway: all of this is test code, where `expect` and indexing are welcome.
#![cfg(test)]

#[path = "../support/mod.rs"]
mod support;

mod accounts;
mod cancellation;
mod fixtures;
mod keys;
mod logout;
mod races;
mod rotation;
mod schema;
mod sessions;
