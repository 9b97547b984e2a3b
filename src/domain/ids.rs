//! The ids of what the store keeps: each a UUIDv7 of its own type, so that none passes for another.

use std::{fmt, str::FromStr};

use uuid::Uuid;

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

id! {
    /// The id of a service account: the `sub` and the `client_id` of its tokens.
    ServiceAccountId
}

id! {
    /// The id of a key of a service account: the `sid` of the tokens that it gets.
    ServiceKeyId
}

id! {
    /// An access token's id: its `jti`.
    TokenId
}

id! {
    /// Who did something: the id of a user or of a service account.
    ActorId
}

impl From<UserId> for ActorId {
    fn from(id: UserId) -> Self {
        Self(id.0)
    }
}

impl From<ServiceAccountId> for ActorId {
    fn from(id: ServiceAccountId) -> Self {
        Self(id.0)
    }
}
