//! Postern: accounts, passwords and JWT sessions behind gRPC.
//!
//! # Layout
//! | module | what it does | may import |
//! |---|---|---|
//! | [`cli`], `main` | the commands | everything |
//! | [`app`] | builds the parts, connects, starts and stops them | everything |
//! | [`config`] | settings, their names and limits | `database_url`, `domain`, `listen`, `mail`, `tls` (the types of their settings), `error`, `private_file`, `this_machine` |
//! | [`database_url`] | names a database | `private_file` |
//! | [`listen`] | connections | `body`, `shares`, `tls` |
//! | [`grpc`] | the RPCs, and the layers in front of them | `body`, `domain`, `error`, `proto`, `listen` (the client's address), `shares`, `tls` (the client's certificate), `trace` |
//! | [`http`] | REST from the contract, the endpoints of OAuth, the pages that mails link to, keys and discovery, probes and metrics | `body`, `grpc`, `domain`, `error`, `proto`, `listen`, `shares`, `telemetry` (metrics), `tls` (the client's certificate), `trace` |
//! | [`domain`] | the rules, and the ports that a store implements | `error`, `trace` |
//! | [`mail`] | the content of mails, and sending them | `domain` (ids, addresses, the outbox), `error`, `private_file`, `this_machine`, `trace` |
//! | [`body`] | reading bodies within bounds, and keeping something as long as one lives | `shares` |
//! | [`shares`] | places of which there is a bounded number, shared between client addresses | `domain` (which addresses are one client) |
//! | [`tls`] | the certificates of the server and of its clients | `domain` (the names of services), `private_file` |
//! | [`store`] | the two backends | `domain` (the ports), `database_url`, `error`, `private_file`, `this_machine`, `trace` |
//! | [`error`] | why a call fails | nothing here |
//! | [`private_file`] | files and directories that only their owner may read | nothing here |
//! | [`proto`] | the generated contract | nothing here |
//! | [`telemetry`] | logging, metrics, the export of traces | `config`, `trace` |
//! | [`this_machine`] | which hosts are this machine | nothing here |
//! | [`trace`] | spans of calls, and whose traces they are in | nothing here |
//!
//! `tests/api/architecture.rs` reads the `use` declarations, checks this table, and refuses circles.
//! `docs/architecture.md` has the reasons.

pub mod app;
pub mod body;
pub mod cli;
pub mod config;
pub mod database_url;
pub mod domain;
pub mod error;
pub mod grpc;
pub mod http;
pub mod listen;
pub mod mail;
pub mod private_file;
pub mod proto;
pub mod shares;
pub mod store;
pub mod telemetry;
pub mod this_machine;
pub mod tls;
pub mod trace;
