//! Limits. Attempts at one account's password, and mails to one address, are counted in the store, for all replicas.
//! What one client may do is counted in the memory of this replica, so with N replicas a client gets up to N times as
//! much.

use std::{
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    time::Duration,
};

use aws_lc_rs::hmac;
use governor::{DefaultKeyedRateLimiter, Quota, clock::Clock};

use crate::error::Error;

use super::{
    account::Email,
    ids::UserId,
    master_key::{Derived, MasterKeys},
};

/// The account whose password is tried: a keyed hash of the address, so that what somebody typed is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttemptSubject(pub [u8; 32]);

impl AttemptSubject {
    /// The account of a caller who is logged in.
    pub fn of_user(user: UserId) -> Self {
        let mut subject = [0; 32];
        for (byte, of_id) in subject.iter_mut().zip(user.0.as_bytes()) {
            *byte = *of_id;
        }
        Self(subject)
    }
}

/// How many failed attempts in a row are allowed, and how long the pauses are after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptPolicy {
    /// Failed attempts that are allowed without a pause.
    pub max_failures: i64,
    /// The pause after the last of them. Each further failure doubles it.
    pub first_delay: Duration,
    pub longest_delay: Duration,
    /// After this long without an attempt, earlier failures no longer count.
    pub window: Duration,
}

impl AttemptPolicy {
    /// The pause after this many failures in a row.
    pub(crate) fn delay_after(&self, failures: i64) -> Duration {
        let Ok(doublings) = u32::try_from(failures - self.max_failures) else {
            return Duration::ZERO;
        };
        self.longest_delay.min(self.first_delay.saturating_mul(2_u32.saturating_pow(doublings)))
    }
}

/// The attempts at one account's password, as the store keeps them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttemptCount {
    /// Failures in a row.
    pub failures: i64,
    /// Attempts that are reserved and not settled yet.
    pub under_way: i64,
}

impl AttemptCount {
    /// Whether one more attempt may be made, once no pause is left: if it and those under way all fail, the allowed number
    /// is not exceeded. After that number, one is made at a time.
    pub(crate) fn allows_another(self, policy: &AttemptPolicy) -> bool {
        self.under_way == 0 || self.failures + self.under_way < policy.max_failures
    }
}

/// How many mails somebody else can cause to be sent to one address: `burst` at once, then one per `interval`. Counted
/// in the store, for all replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressLimit {
    /// At least 1.
    pub burst: u32,
    pub interval: Duration,
}

/// How many mails for a reset an address can get at once beyond its limit.
const RESETS_KEPT: u32 = 3;
/// More mails than any address gets.
const UNLIMITED: u32 = 1_000_000;

impl AddressLimit {
    /// The limit of mails for a reset to an address that has had too many mails of other kinds.
    pub(crate) fn kept_for_resets(self) -> Self {
        Self { burst: self.burst.min(RESETS_KEPT), ..self }
    }

    /// Counts at the same rate, and refuses nothing.
    pub(crate) fn unlimited(self) -> Self {
        Self { burst: UNLIMITED, ..self }
    }

    /// How far ahead of the steady rate the count of an address can be.
    pub(crate) fn furthest(self) -> Duration {
        self.interval.saturating_mul(self.burst)
    }

    /// How far ahead of the steady rate of one mail per interval an address may be.
    pub(crate) fn tolerance(self) -> Duration {
        self.interval.saturating_mul(self.burst.saturating_sub(1))
    }
}

/// The policy for password attempts, and the key of the hash that they are counted under.
pub struct LoginAttempts {
    pub policy: AttemptPolicy,
    key: Derived<hmac::Key>,
}

impl std::fmt::Debug for LoginAttempts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoginAttempts").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl LoginAttempts {
    pub fn new(policy: AttemptPolicy, masters: &MasterKeys) -> Result<Self, Error> {
        let key = masters.derive("login-attempt-subject", |key| Ok(hmac::Key::new(hmac::HMAC_SHA256, key)))?;
        Ok(Self { policy, key })
    }

    /// What attempts at the password of an address are counted under, whether or not an account has the address.
    pub fn subject(&self, email: &Email) -> AttemptSubject {
        let mut subject = [0; 32];
        subject.copy_from_slice(hmac::sign(self.key.active(), email.as_str().as_bytes()).as_ref());
        AttemptSubject(subject)
    }
}

/// A token bucket for each key: for each client address, unless another kind is named.
pub struct RateLimiter<K: Hash + Eq + Clone = IpAddr>(Option<DefaultKeyedRateLimiter<K>>);

impl<K: Hash + Eq + Clone> std::fmt::Debug for RateLimiter<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RateLimiter").finish_non_exhaustive()
    }
}

impl<K: Hash + Eq + Clone> RateLimiter<K> {
    /// Allows `count` calls at once and as many again each minute. `None` means no limit.
    pub fn per_minute(count: Option<NonZeroU32>) -> Self {
        Self(count.map(|count| governor::RateLimiter::keyed(Quota::per_minute(count))))
    }

    /// Counts one call, or returns how long to wait until the next is allowed.
    pub fn check_key(&self, key: &K) -> Result<(), Duration> {
        let Some(limiter) = &self.0 else {
            return Ok(());
        };
        limiter.check_key(key).map_err(|until| until.wait_time_from(limiter.clock().now()))
    }

    /// Drops the buckets that are full again.
    pub fn drop_idle(&self) {
        if let Some(limiter) = &self.0 {
            limiter.retain_recent();
            limiter.shrink_to_fit();
        }
    }
}

impl RateLimiter {
    /// The same for a client. One whose address is unknown is not limited. For IPv6 there is one bucket for each /64, which is
    /// what one customer gets (RFC 6177 §2).
    pub fn check(&self, client: Option<IpAddr>) -> Result<(), Duration> {
        client.map_or(Ok(()), |client| self.check_key(&network(client)))
    }
}

/// The address that stands for a client.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(limit: &RateLimiter, client: &str) -> Result<(), Duration> {
        limit.check(Some(client.parse().expect("an address")))
    }

    #[test]
    fn a_client_gets_its_number_of_calls_and_then_has_to_wait() {
        let limit = RateLimiter::per_minute(NonZeroU32::new(3));
        for _ in 0..3 {
            assert_eq!(check(&limit, "192.0.2.1"), Ok(()));
        }
        let wait = check(&limit, "192.0.2.1").expect_err("a fourth");
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(20), "{wait:?}");
        assert_eq!(check(&limit, "192.0.2.2"), Ok(()), "another client");
        assert!(check(&limit, "::ffff:192.0.2.1").is_err(), "the same address, mapped into IPv6");
    }

    #[test]
    fn an_ipv6_customer_is_one_client() {
        let limit = RateLimiter::per_minute(NonZeroU32::new(1));
        assert_eq!(check(&limit, "2001:db8:1:2::1"), Ok(()));
        assert!(check(&limit, "2001:db8:1:2:ffff::9").is_err());
        assert_eq!(check(&limit, "2001:db8:1:3::1"), Ok(()));
    }

    #[test]
    fn no_count_means_no_limit() {
        let limit = RateLimiter::per_minute(None);
        for _ in 0..1_000 {
            assert_eq!(check(&limit, "192.0.2.1"), Ok(()));
        }
    }
}
