//! What a service needs of Postern: an access token of its own ([`TokenSource`]), a verifier of other people's
//! ([`Verifier`]), the revocations ([`RevocationFeed`]), the demands of its methods ([`Guard`], [`Demand`]), and errors by
//! their reason ([`CallError`]). `README.md` shows each.
//!
//! Verifying is offline: it costs no call. Without a feed a token is accepted until it expires, also after a logout.

mod channel;
mod clock;
mod demand;
mod error;
mod feed;
mod guard;
mod keys;
mod retry;
mod revocations;
mod tokens;
mod verifier;

/// The contract: messages and stubs, generated from `proto/`.
#[expect(
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod proto {
    tonic::include_proto!("postern.auth.v1");
}

pub use channel::endpoint;
pub use clock::Clock;
pub use demand::{Demand, Demands};
pub use error::{CallError, FieldViolation, Reason, VerifyError};
pub use feed::{FeedOptions, RevocationFeed};
pub use guard::{Gate, Guard, GuardGrpc, GuardHttp, Guarded};
pub use keys::KeySource;
pub use revocations::{Revocations, WhenUnknown};
pub use tokens::{AuthorizeLayer, Authorized, Credentials, InMemory, RefreshTokenStore, TokenError, TokenSource};
pub use verifier::{Caller, SubjectType, Verifier, VerifierBuilder};
