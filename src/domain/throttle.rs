//! How often something may be tried. Guesses at one account's password are counted in the store, for all replicas; what
//! one client may do is kept in this replica's memory, so that behind N replicas it gets up to N times as much.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    time::Duration,
};

use aws_lc_rs::hmac;
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter, clock::Clock};

use crate::{
    error::Error,
    store::{AttemptPolicy, AttemptSubject, LoginAttempt, Reservation},
};

use super::{
    Deadline, Postern,
    account::Email,
    hasher::Verification,
    keyring::MasterKey,
    password::{Password, PasswordHash},
    session::Client,
};

/// How guesses at passwords are counted, and what the addresses are hashed with that they are counted under.
pub struct Guesses {
    pub policy: AttemptPolicy,
    key: hmac::Key,
}

impl std::fmt::Debug for Guesses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guesses").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Guesses {
    pub fn new(policy: AttemptPolicy, master: &MasterKey) -> Result<Self, Error> {
        let key = master.derive("login-attempt-subject")?;
        Ok(Self { policy, key: hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()) })
    }

    /// What guesses at the password of an address are counted under, whether or not an account has it.
    pub fn subject(&self, email: &Email) -> AttemptSubject {
        let mut subject = [0; 32];
        subject.copy_from_slice(hmac::sign(&self.key, email.as_str().as_bytes()).as_ref());
        AttemptSubject(subject)
    }
}

impl Postern {
    /// Reserves a guess at the password of an address, before anything is spent on it.
    pub(super) async fn reserve_guess(&self, email: &Email, client: &Client) -> Result<AttemptSubject, Error> {
        self.clients.take(client.ip).map_err(|retry_after| throttled("client", retry_after))?;
        let subject = self.guesses.subject(email);
        let attempt = LoginAttempt { subject, policy: self.guesses.policy, now: self.env.now() };
        match self.store.reserve_attempt(attempt).await? {
            Reservation::Reserved => Ok(subject),
            Reservation::Blocked { retry_after } => Err(throttled("account", retry_after)),
        }
    }
}

impl Postern {
    /// Makes a guess that was reserved. One that fails for want of time or room says nothing about the password, and does
    /// not count: a machine that is busy must not lock anybody out.
    pub(super) async fn guess(
        &self,
        subject: AttemptSubject,
        password: Password,
        stored: Option<PasswordHash>,
        deadline: Deadline,
    ) -> Result<Verification, Error> {
        let verification = self.hasher.verify(password, stored, deadline).await;
        if verification.is_err()
            && let Err(error) = self.store.guess_was_not_made(subject).await
        {
            tracing::debug!(%error, "a guess that was not made counts all the same");
        }
        verification
    }
}

fn throttled(limit: &'static str, retry_after: Duration) -> Error {
    metrics::counter!("postern_logins_throttled_total", "limit" => limit).increment(1);
    Error::Throttled { retry_after }
}

/// A token bucket for each client address; for IPv6, for each /64, which is what one customer gets (RFC 6177 §2).
pub struct ClientLimit(Option<DefaultKeyedRateLimiter<IpAddr>>);

impl std::fmt::Debug for ClientLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientLimit").finish_non_exhaustive()
    }
}

impl ClientLimit {
    /// So many at once, and as many again each minute; `None` for no limit.
    pub fn per_minute(count: Option<NonZeroU32>) -> Self {
        Self(count.map(|count| RateLimiter::keyed(Quota::per_minute(count))))
    }

    /// Takes one, or says how long to wait for the next. A client whose address is not known is not limited.
    pub fn take(&self, client: Option<IpAddr>) -> Result<(), Duration> {
        let (Some(limiter), Some(client)) = (&self.0, client) else {
            return Ok(());
        };
        limiter.check_key(&network(client)).map_err(|until| until.wait_time_from(limiter.clock().now()))
    }

    /// Forgets the clients whose buckets are full again.
    pub fn forget_idle(&self) {
        if let Some(limiter) = &self.0 {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }
}

/// What counts as one client.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(limit: &ClientLimit, client: &str) -> Result<(), Duration> {
        limit.take(Some(client.parse().expect("an address")))
    }

    #[test]
    fn a_client_gets_so_many_and_then_has_to_wait() {
        let limit = ClientLimit::per_minute(NonZeroU32::new(3));
        for _ in 0..3 {
            assert_eq!(take(&limit, "192.0.2.1"), Ok(()));
        }
        let wait = take(&limit, "192.0.2.1").expect_err("a fourth");
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(20), "{wait:?}");
        assert_eq!(take(&limit, "192.0.2.2"), Ok(()), "another client");
        assert!(take(&limit, "::ffff:192.0.2.1").is_err(), "the same in IPv6's clothes");
    }

    #[test]
    fn an_ipv6_customer_is_one_client() {
        let limit = ClientLimit::per_minute(NonZeroU32::new(1));
        assert_eq!(take(&limit, "2001:db8:1:2::1"), Ok(()));
        assert!(take(&limit, "2001:db8:1:2:ffff::9").is_err());
        assert_eq!(take(&limit, "2001:db8:1:3::1"), Ok(()));
    }

    #[test]
    fn none_is_no_limit() {
        let limit = ClientLimit::per_minute(None);
        for _ in 0..1_000 {
            assert_eq!(take(&limit, "192.0.2.1"), Ok(()));
        }
    }
}
