//! The connections of one address: how many there are, whose they are, and which one gives way to the next.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio_util::sync::CancellationToken;

use crate::shares::{Share, Shares, client_of};

/// The connections of one address. A clone is a handle to the same ones.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    shares: Shares,
    open: Arc<Mutex<HashMap<u64, Open>>>,
}

#[derive(Debug)]
struct Open {
    client: IpAddr,
    calls: usize,
    idle_since: Instant,
    close: CancellationToken,
    /// Free for the next connection when this one gives way.
    _share: Share,
}

/// An open connection. It is forgotten when this is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    all: Connections,
    number: u64,
    /// Cancelled when the connection has to give way.
    pub(super) close: CancellationToken,
}

/// A call on a connection, which is not idle until this is dropped.
#[derive(Debug)]
pub(super) struct Call {
    all: Connections,
    number: u64,
}

impl Connections {
    pub(super) fn new(most: usize) -> Self {
        Self { shares: Shares::new(most), open: Arc::default() }
    }

    /// Enters a connection under its number. Where its client has its share, or there is no place left, the connection
    /// that has been idle for longest gives way: one of the same client, or else of the client that has most. Returns
    /// nothing if none of these is idle.
    pub(super) fn enter(&self, number: u64, client: IpAddr) -> Option<Connection> {
        let client = client_of(client);
        let mut open = self.lock();
        let share = self.shares.take(Some(client)).or_else(|| {
            let gives_way = longest_idle(&open, client)
                .or_else(|| self.shares.greediest().and_then(|greediest| longest_idle(&open, greediest)))?;
            // Its share goes with it.
            open.remove(&gives_way)?.close.cancel();
            self.shares.take(Some(client))
        })?;
        let close = CancellationToken::new();
        let entry = Open { client, calls: 0, idle_since: Instant::now(), close: close.clone(), _share: share };
        open.insert(number, entry);
        Some(Connection { all: self.clone(), number, close })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn longest_idle(open: &HashMap<u64, Open>, client: IpAddr) -> Option<u64> {
    let idle = open.iter().filter(|(_, entry)| entry.client == client && entry.calls == 0);
    idle.min_by_key(|(_, entry)| entry.idle_since).map(|(number, _)| *number)
}

impl Connection {
    /// Counts a call until the returned value is dropped.
    pub(super) fn call(&self) -> Call {
        if let Some(entry) = self.all.lock().get_mut(&self.number) {
            entry.calls += 1;
        }
        Call { all: self.all.clone(), number: self.number }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let entry = self.all.lock().remove(&self.number);
        drop(entry);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(entry) = self.all.lock().get_mut(&self.number) {
            entry.calls = entry.calls.saturating_sub(1);
            entry.idle_since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, number])
    }

    #[test]
    fn an_idle_connection_of_the_same_client_gives_way_first() {
        let all = Connections::new(8);
        let mine: Vec<_> = (0..6).map(|number| all.enter(number, client(1)).expect("a place")).collect();
        let busy = mine[0].call();
        let another = all.enter(6, client(1)).expect("a place");
        assert!(!mine[0].close.is_cancelled(), "it has a call");
        assert!(mine[1].close.is_cancelled());
        assert_eq!(mine.iter().filter(|connection| connection.close.is_cancelled()).count(), 1);
        drop((busy, another));
    }

    #[test]
    fn a_new_client_gets_the_place_of_an_idle_connection_of_the_greediest() {
        let all = Connections::new(8);
        let crowd: Vec<_> = (0..6).map(|number| all.enter(number, client(1)).expect("a place")).collect();
        let others: Vec<_> = (6..8).map(|number| all.enter(number, client(2)).expect("a place")).collect();
        assert!(all.enter(8, client(3)).is_some());
        assert!(crowd[0].close.is_cancelled() && others.iter().all(|other| !other.close.is_cancelled()));
    }

    #[test]
    fn connections_with_calls_give_way_to_nobody() {
        let all = Connections::new(4);
        let busy: Vec<_> = (0..3).map(|number| all.enter(number, client(1)).expect("a place")).collect();
        let calls: Vec<_> = busy.iter().map(Connection::call).collect();
        assert!(all.enter(3, client(1)).is_none());
        assert!(all.enter(4, client(2)).is_some());
        drop(calls);
        assert!(all.enter(5, client(1)).is_some());
        drop(busy);
        assert!(all.lock().len() <= 1);
    }
}
