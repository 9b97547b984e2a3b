//! Postern: accounts, passwords and JWT sessions behind gRPC.
//!
//! # Layout
//! | room | owns | may import |
//! |---|---|---|
//! | [`cli`], `main` | the commands | everything |
//! | [`app`] | putting the parts together; start and stop | everything |
//! | [`config`] | settings, their names and limits | `domain`, `store`, `mail`, `listen` (their settings' types), `error` |
//! | [`listen`] | connections | nothing here |
//! | [`grpc`] | the RPCs and what stands before them | `domain`, `error`, `proto`, `listen` (the peer's address) |
//! | [`http`] | REST from the contract, the pages that mails link to, keys and discovery, probes and metrics | `grpc`, `domain`, `error`, `proto`, `listen`, `telemetry` (metrics) |
//! | [`domain`] | the rules | `store` (the trait), `error` |
//! | [`mail`] | what mails say, and sending them | `domain` (ids, addresses), `store` (the outbox), `error` |
//! | [`store`] | the trait, its two backends | `domain` types |
//! | [`error`] | why a call fails | `store` (its error) |
//! | [`proto`] | the generated contract | nothing here |
//! | [`telemetry`] | logging, metrics | `config` |
//!
//! `tests/api/house.rs` reads the `use` lines and holds the rooms to this table. `docs/architecture.md` has the reasons.

pub mod app;
pub mod cli;
pub mod config;
pub mod domain;
pub mod error;
pub mod grpc;
pub mod http;
pub mod listen;
pub mod mail;
pub mod proto;
pub mod store;
pub mod telemetry;
