//! The service as its callers and its operators meet it: the real app, started for each test on a database of its own.
//! What concerns the contract or the house rather than a call is read from the descriptor and from the sources.

// Says to clippy what is true anyway: all of this is test code, where `expect` and indexing are welcome.
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
mod examples;
mod imports;
mod journey;
mod lifetimes;
mod limits;
mod mail;
mod one_time_tokens;
mod passwords;
mod refresh_tokens;
mod start;
