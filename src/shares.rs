//! Places of which there is a bounded number, shared fairly between client addresses: connections, calls, streams.
//!
//! A client may take another place while it has fewer than three times as many as are free. One client alone therefore
//! gets three quarters of them, and two get three sevenths each. When more clients come, those that have more than their
//! new share get no further places until theirs have come back, and then some are free for whoever comes next, however
//! many take all that they can (Choudhury and Hahne, "Dynamic queue length thresholds", 1998).

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::domain::throttle::network;

/// The client that an address belongs to: a network of IPv6 (/64) is one client.
pub fn client_of(address: IpAddr) -> IpAddr {
    network(address)
}

/// How many places a client may have for each free one.
const PER_FREE_PLACE: usize = 3;

/// The places. A clone is a handle to the same places.
#[derive(Debug, Clone)]
pub struct Shares {
    places: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    by_client: HashMap<Option<IpAddr>, usize>,
}

/// A place that is taken. It is free again when this is dropped.
#[derive(Debug)]
pub struct Share {
    shares: Shares,
    client: Option<IpAddr>,
}

impl Shares {
    pub fn new(places: usize) -> Self {
        Self { places, state: Arc::default() }
    }

    /// Takes a place for a client, unless it has its share or there is none. All clients whose address is not known are
    /// one client.
    pub fn take(&self, client: Option<IpAddr>) -> Option<Share> {
        let client = client.map(client_of);
        let mut state = self.lock();
        let free = self.places.saturating_sub(state.taken);
        let taken = state.by_client.get(&client).copied().unwrap_or(0);
        if taken >= free.saturating_mul(PER_FREE_PLACE) {
            return None;
        }
        state.taken += 1;
        state.by_client.insert(client, taken + 1);
        drop(state);
        Some(Share { shares: self.clone(), client })
    }

    /// Whether a client could take a place if one came back that is not its own.
    pub fn could_take_a_freed_one(&self, client: IpAddr) -> bool {
        let state = self.lock();
        let free = self.places.saturating_sub(state.taken).saturating_add(1);
        let taken = state.by_client.get(&Some(client_of(client))).copied().unwrap_or(0);
        taken < free.saturating_mul(PER_FREE_PLACE)
    }

    /// The client that has the most places.
    pub fn greediest(&self) -> Option<IpAddr> {
        self.lock().by_client.iter().max_by_key(|(_, taken)| **taken).and_then(|(client, _)| *client)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.shares.lock();
        state.taken = state.taken.saturating_sub(1);
        if let Some(taken) = state.by_client.get_mut(&self.client) {
            *taken -= 1;
            if *taken == 0 {
                state.by_client.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, iter};

    use super::*;

    fn client(number: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, number])
    }

    fn all_of(shares: &Shares, client: IpAddr) -> Vec<Share> {
        iter::from_fn(|| shares.take(Some(client))).collect()
    }

    #[test]
    fn greedy_clients_leave_places_for_the_next_one() {
        let shares = Shares::new(1_000);
        let mut taken: VecDeque<_> = all_of(&shares, client(0)).into();
        assert_eq!(taken.len(), 750);
        // Each place comes back after a while, and twenty clients want all of them all the time.
        for _ in 0..2_000 {
            taken.pop_front();
            for number in 0..20 {
                taken.extend(all_of(&shares, client(number)));
            }
        }
        let newcomers: Vec<_> = (20..30).map(|number| shares.take(Some(client(number)))).collect();
        assert!(newcomers.iter().all(Option::is_some), "{} are taken", shares.lock().taken);
        drop((taken, newcomers));
        assert!(shares.lock().by_client.is_empty() && shares.lock().taken == 0);
    }

    #[test]
    fn addresses_of_one_network_are_one_client() {
        let shares = Shares::new(4);
        let first = all_of(&shares, "2001:db8::1".parse().expect("an address"));
        assert_eq!(first.len(), 3);
        assert!(shares.take(Some("2001:db8::2".parse().expect("an address"))).is_none());
        assert!(shares.take(Some("2001:db8:0:1::1".parse().expect("an address"))).is_some());
        assert_eq!(shares.greediest(), Some("2001:db8::".parse().expect("an address")));
    }
}
