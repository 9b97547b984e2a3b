//! How often a client may do what costs somebody else something. Kept in this replica's memory: behind N replicas a client
//! gets up to N times as much.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    time::Duration,
};

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter, clock::Clock};

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
