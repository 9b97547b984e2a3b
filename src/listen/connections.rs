//! The connections of one address: how many there are, whose they are, and which one gives way to the next.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use crate::shares::{Share, Shares, client_of};

/// The connections of one address. A clone is a handle to the same ones.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    shares: Shares,
    open: Arc<Mutex<HashMap<u64, Open>>>,
    started: Instant,
}

#[derive(Debug)]
struct Open {
    client: IpAddr,
    activity: Arc<Activity>,
    close: CancellationToken,
    /// Free for the next connection when this one gives way.
    _share: Share,
}

/// What a connection does. Calls change it without a lock.
#[derive(Debug)]
pub(super) struct Activity {
    calls: AtomicUsize,
    /// How many calls have begun so far.
    begun: AtomicU64,
    /// It began like HTTP/1.1.
    is_http1: AtomicBool,
    /// When it was entered or its last call ended, in milliseconds since `started`.
    idle_since: AtomicU64,
    started: Instant,
}

/// An open connection. It is forgotten when this is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    all: Connections,
    number: u64,
    activity: Arc<Activity>,
    /// Cancelled when the connection has to give way.
    pub(super) close: CancellationToken,
}

/// A call on a connection, which is not idle until this is dropped.
#[derive(Debug)]
pub(super) struct Call(Arc<Activity>);

impl Connections {
    pub(super) fn new(most: usize) -> Self {
        Self { shares: Shares::new(most), open: Arc::default(), started: Instant::now() }
    }

    /// Enters a connection under its number. Where its client has its share, or there is no place left, the connection
    /// that has been idle for longest gives way: one of the same client, or else of the client that has most. Returns
    /// nothing if there is none.
    pub(super) fn enter(&self, number: u64, client: IpAddr) -> Option<Connection> {
        let client = client_of(client);
        let mut open = self.lock();
        let share = self.shares.take(Some(client)).or_else(|| {
            let gives_way = longest_idle(&open, client).or_else(|| {
                // Whoever has more than its share takes no place from others.
                let greediest = self.shares.greediest().filter(|_| self.shares.could_take_a_freed_one(client))?;
                longest_idle(&open, greediest)
            })?;
            // Its share goes with it.
            open.remove(&gives_way)?.close.cancel();
            self.shares.take(Some(client))
        })?;
        let (close, activity) = (CancellationToken::new(), Arc::new(Activity::new(self.started)));
        let entry = Open { client, activity: Arc::clone(&activity), close: close.clone(), _share: share };
        open.insert(number, entry);
        Some(Connection { all: self.clone(), number, activity, close })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn longest_idle(open: &HashMap<u64, Open>, client: IpAddr) -> Option<u64> {
    let idle = open.iter().filter(|(_, entry)| entry.client == client && entry.activity.is_idle());
    // Numbers grow, so of two that are idle for equally long the older one gives way.
    let longest = idle.min_by_key(|(number, entry)| (entry.activity.idle_since.load(Ordering::Relaxed), **number));
    longest.map(|(number, _)| *number)
}

impl Activity {
    fn new(started: Instant) -> Self {
        let activity = Self {
            calls: AtomicUsize::new(0),
            begun: AtomicU64::new(0),
            is_http1: AtomicBool::new(false),
            idle_since: AtomicU64::new(0),
            started,
        };
        activity.rest();
        activity
    }

    fn rest(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.idle_since.store(now, Ordering::Relaxed);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.calls.load(Ordering::Relaxed) == 0
    }

    pub(super) fn idle_since(&self) -> Instant {
        self.started + Duration::from_millis(self.idle_since.load(Ordering::Relaxed))
    }

    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    pub(super) fn is_http1(&self) -> bool {
        self.is_http1.load(Ordering::Relaxed)
    }

    pub(super) fn set_http1(&self) {
        self.is_http1.store(true, Ordering::Relaxed);
    }
}

impl Connection {
    pub(super) fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.activity)
    }

    /// Counts a call until the returned value is dropped.
    pub(super) fn call(&self) -> Call {
        self.activity.calls.fetch_add(1, Ordering::Relaxed);
        self.activity.begun.fetch_add(1, Ordering::Relaxed);
        Call(Arc::clone(&self.activity))
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
        self.0.rest();
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
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
    fn whoever_has_more_than_its_share_takes_no_place_from_others() {
        let all = Connections::new(8);
        let others: Vec<_> = (0..6).map(|number| all.enter(number, client(1)).expect("a place")).collect();
        let mine: Vec<_> = (6..8).map(|number| all.enter(number, client(2)).expect("a place")).collect();
        let third = all.enter(8, client(2)).expect("the place of an idle one of mine");
        assert!(mine[0].close.is_cancelled());
        let calls = [mine[1].call(), third.call()];
        let more: Vec<_> = (9..20).map_while(|number| all.enter(number, client(2))).collect();
        let busy: Vec<_> = more.iter().map(Connection::call).collect();
        assert!(others.iter().filter(|other| other.close.is_cancelled()).count() <= 1, "three are its share");
        assert!(all.enter(20, client(2)).is_none());
        drop((calls, busy));
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
