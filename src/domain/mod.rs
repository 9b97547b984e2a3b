//! What Postern is about: accounts, passwords, tokens and sessions, and the rules that hold for them.
//! It never names a transport or a database driver; a test reads the `use` lines to make sure.

pub mod account;
pub mod address;
pub mod admin;
pub mod audit;
pub mod env;
pub mod hasher;
mod housekeeping;
pub mod keyring;
pub mod mail;
pub mod one_time;
pub mod page;
pub mod password;
pub mod password_change;
pub mod revocation;
pub mod role;
pub mod session;
pub mod throttle;
pub mod token;

use std::{fmt, str::FromStr, sync::Arc, time::Instant};

use uuid::Uuid;

use crate::store::Store;

use self::{
    env::Env,
    hasher::Hasher,
    mail::MailPolicy,
    one_time::OneTimeTokens,
    page::PageTokens,
    password::PasswordPolicy,
    revocation::Revocations,
    session::SessionPolicy,
    throttle::{ClientLimit, Guesses},
    token::Tokens,
};

/// The service itself: every rule with the collaborators it needs. Transports hold one of these and nothing below it.
/// Its methods live where their subject does: [`account`], [`address`], [`admin`], [`password_change`], [`session`], [`token`].
pub struct Postern {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) env: Env,
    pub(crate) tokens: Tokens,
    pub(crate) hasher: Hasher,
    pub(crate) passwords: PasswordPolicy,
    pub(crate) sessions: SessionPolicy,
    pub(crate) one_time: Arc<OneTimeTokens>,
    pub(crate) mails: MailPolicy,
    pub(crate) guesses: Guesses,
    /// Logins and other guesses by one client.
    pub(crate) clients: ClientLimit,
    pub(crate) revocations: Revocations,
    pub(crate) pages: PageTokens,
    /// How long audit rows are kept.
    pub(crate) audit_retention: std::time::Duration,
}

impl fmt::Debug for Postern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postern").finish_non_exhaustive()
    }
}

/// By when the caller wants its answer. Work that can no longer meet it is dropped, not done late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

/// Defines an id: a UUIDv7 that cannot be taken for another kind of id.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                Uuid::try_parse(text).map(Self)
            }
        }
    };
}

id! {
    /// An account's id: the `sub` of its tokens. Never reused, so a re-registered address is another account.
    UserId
}
id! {
    /// An audit row's id.
    AuditEventId
}
id! {
    /// A mail's id in the outbox, and of the one-time token in it.
    MailId
}
id! {
    /// A session's id: the `sid` of its tokens.
    SessionId
}
