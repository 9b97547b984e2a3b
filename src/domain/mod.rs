//! The rules of Postern: accounts, passwords, tokens and sessions. The domain knows no transport and no database
//! driver; `tests/api/architecture.rs` reads the sources to make sure.
//!
//! * [`ids`] and [`env`](mod@env) are the ground: they name no other file of the domain.
//! * The files beside this one hold the types and the rules, one subject each.
//! * [`ports`] says what the domain needs from a store.
//! * [`service`] is the roof: the operations that transports and the command line call.

pub mod account;
pub mod admin;
pub mod admission;
pub mod audit;
pub mod demands;
pub mod digest;
pub mod env;
pub mod hasher;
pub mod ids;
pub mod key_schedule;
pub mod keyring;
pub mod mail;
pub mod master_key;
pub mod one_time;
pub mod page_token;
pub mod password;
pub mod ports;
pub mod refresh;
pub mod reserved;
pub mod revocation;
pub mod role;
pub mod seen;
pub mod service;
pub mod service_account;
pub mod service_identity;
pub mod session;
pub mod signing_key;
pub mod streams;
pub mod throttle;
pub mod token;
pub mod watch;
