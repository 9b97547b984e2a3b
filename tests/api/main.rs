//! Tests of the service as callers and operators use it: each test starts the real app on its own database. Tests of
//! the contract and of the architecture read the descriptor and the sources.

// Tells clippy that all of this is test code, where `expect` and indexing are allowed.
#![cfg(test)]

#[path = "../support/app.rs"]
mod app;
#[path = "../support/mod.rs"]
mod support;

mod access_tokens;
mod architecture;
mod config;
mod contract;
mod docs;
mod imports;
mod journey;
mod lifetimes;
mod limits;
mod mail;
mod one_time_tokens;
mod passwords;
mod refresh_tokens;
mod service_tokens;
mod siege;
mod start;
