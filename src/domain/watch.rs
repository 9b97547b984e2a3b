//! What the streams of revocations send: the end of the log, which this replica reads anyway, in one buffer of bounded
//! size, and the position of each stream in it.
//!
//! An entry of the log gets its number when it is written and becomes visible when it is committed, so a later number may
//! become visible first. The buffer has the entries in the order in which they became visible here. A [`Position`] names
//! two numbers: every entry up to `complete` has been sent, by the same rule by which the reader of the log waits for
//! skipped numbers; and nothing after `newest` has. A stream that is resumed gets everything after `complete`, at any
//! replica, first in the order of the numbers. What it had seen between the two comes again.

use std::{
    collections::{BinaryHeap, VecDeque},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use aws_lc_rs::digest;
use time::OffsetDateTime;
use tokio::sync::watch;

use super::{
    ids::{SessionId, UserId},
    ports::{Revocation, Revoked},
};

/// How many entries the buffer keeps: about 6 MiB.
const BUFFERED: usize = 65_536;
/// How many older entries a stream takes from the buffer or the store at once.
const PAGE: u32 = 256;

/// A position in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Every entry up to this number has been sent, and no other one will appear there.
    pub(super) complete: i64,
    /// The sent entry with the highest number. If the log is that of this position, the entry is in it.
    pub(super) newest: Mark,
}

/// An entry, so that it is recognised. The same number is another entry after the database was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    /// 0: there is none yet.
    pub number: i64,
    pub(super) digest: [u8; 8],
}

impl Mark {
    pub fn of(revocation: &Revocation) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(&revocation.number.to_be_bytes());
        match &revocation.what {
            Revoked::Session(id) => hash.update(id.0.as_bytes()),
            Revoked::Roles(id, _) => hash.update(id.0.as_bytes()),
        }
        hash.update(&revocation.retain_until.unix_timestamp_nanos().to_be_bytes());
        let mut digest = [0; 8];
        digest.iter_mut().zip(hash.finish().as_ref()).for_each(|(to, from)| *to = *from);
        Self { number: revocation.number, digest }
    }

    fn max(self, other: Self) -> Self {
        if other.number > self.number { other } else { self }
    }
}

impl Position {
    /// After what `other` has sent too.
    fn and(self, other: Self) -> Self {
        Self { complete: self.complete.max(other.complete), newest: self.newest.max(other.newest) }
    }
}

/// An entry of the log, without its roles: a stream sends those that the account has when it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub number: i64,
    pub subject: Subject,
    pub revoke_time: OffsetDateTime,
    pub forget_time: OffsetDateTime,
}

/// Whose tokens an entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    Session(SessionId),
    Account(UserId),
}

/// An entry that was read from the log.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    entry: Entry,
    mark: Mark,
}

impl From<&Revocation> for Found {
    fn from(revocation: &Revocation) -> Self {
        let subject = match &revocation.what {
            Revoked::Session(session) => Subject::Session(*session),
            Revoked::Roles(account, _) => Subject::Account(*account),
        };
        let Revocation { number, revoke_time, retain_until, .. } = *revocation;
        let entry = Entry { number, subject, revoke_time, forget_time: retain_until };
        Self { entry, mark: Mark::of(revocation) }
    }
}

/// The end of the log, for all streams.
#[derive(Debug)]
pub struct Feed {
    shared: RwLock<Shared>,
    /// Woken by each addition.
    added: watch::Sender<()>,
    most: usize,
    page: u32,
}

#[derive(Debug, Default)]
struct Shared {
    /// Counts the logs: a restored database has another one.
    log: u64,
    /// The oldest first, each with the number up to which everything has been sent after it.
    entries: VecDeque<(Found, i64)>,
    /// How many entries were added before the first of these.
    before: u64,
    /// The highest number of those.
    dropped: i64,
    /// The position after all entries.
    end: Position,
    /// Everything from before this time is among them.
    complete_time: Option<OffsetDateTime>,
}

impl Default for Feed {
    fn default() -> Self {
        Self::of_size(BUFFERED, PAGE)
    }
}

impl Feed {
    fn of_size(most: usize, page: u32) -> Self {
        Self { shared: RwLock::default(), added: watch::Sender::new(()), most, page }
    }

    /// Adds what one read of the log has found, in the order of the numbers. `missing` is the lowest number that was skipped
    /// and may still appear.
    pub fn add(&self, found: &[Found], missing: Option<i64>) {
        let mut shared = self.write();
        let mut rest = found.iter().peekable();
        while let Some(added) = rest.next() {
            let newest = shared.end.newest.max(added.mark);
            // The next ones have not been sent yet.
            let next = rest.peek().map(|next| next.entry.number);
            let waited_for = next.into_iter().chain(missing).min().unwrap_or(i64::MAX);
            let complete = newest.number.min(waited_for - 1).max(shared.end.complete);
            shared.end = Position { complete, newest };
            if shared.entries.len() == self.most
                && let Some((dropped, _)) = shared.entries.pop_front()
            {
                shared.before += 1;
                shared.dropped = shared.dropped.max(dropped.entry.number);
            }
            shared.entries.push_back((*added, complete));
        }
        let end = missing.map_or(shared.end.newest.number, |missing| missing - 1);
        shared.end.complete = shared.end.complete.max(end);
        drop(shared);
        if !found.is_empty() {
            self.added.send_replace(());
        }
    }

    /// Everything that was in the log at this time has been added.
    pub fn is_complete_at(&self, time: OffsetDateTime) {
        let mut shared = self.write();
        shared.complete_time = shared.complete_time.max(Some(time));
    }

    /// The log is another one. All streams end.
    pub fn start_again(&self) {
        let mut shared = self.write();
        *shared = Shared { log: shared.log + 1, ..Shared::default() };
        drop(shared);
        self.added.send_replace(());
    }

    /// The newest entry.
    pub fn newest(&self) -> Mark {
        self.read().end.newest
    }

    /// Which log this is.
    pub fn log(&self) -> u64 {
        self.read().log
    }

    /// Begins a stream after a position in a log. If it is another one by now, the stream ends at once.
    pub fn subscribe(&self, log: u64, position: Position) -> Subscription {
        let shared = self.read();
        let older = Older {
            after: position.complete,
            up_to: shared.end.newest.number,
            complete: shared.end.complete,
            page: VecDeque::new(),
            has_more: position.complete < shared.end.newest.number,
        };
        Subscription {
            log,
            position,
            next: shared.before + shared.entries.len() as u64,
            older: Some(older),
            complete_time: None,
            added: self.added.subscribe(),
        }
    }

    /// What a stream does next.
    pub fn next(&self, stream: &mut Subscription) -> Next {
        stream.added.mark_unchanged();
        let shared = self.read();
        if stream.log != shared.log {
            return Next::AnotherLog;
        }
        let Some(mut index) = stream.next.checked_sub(shared.before) else {
            return Next::FellBehind;
        };
        if let Some(older) = &mut stream.older {
            if older.page.is_empty() && older.has_more && older.after >= shared.dropped {
                older.add(&shared.first(self.page, older.after, older.up_to), self.page);
            }
            if let Some(Found { entry, mark }) = older.page.pop_front() {
                let after = Position { complete: entry.number.min(older.complete), newest: mark };
                stream.position = stream.position.and(after);
                return Next::Send(entry);
            }
            if older.has_more {
                return Next::Read { after: older.after, up_to: older.up_to, limit: self.page };
            }
            stream.position.complete = stream.position.complete.max(older.complete);
            stream.older = None;
        }
        while let Some((found, complete)) = usize::try_from(index).ok().and_then(|index| shared.entries.get(index)) {
            index += 1;
            stream.next += 1;
            if found.entry.number > stream.position.complete {
                stream.position = stream.position.and(Position { complete: *complete, newest: found.mark });
                return Next::Send(found.entry);
            }
        }
        stream.position = stream.position.and(shared.end);
        stream.complete_time = shared.complete_time;
        Next::Wait
    }

    fn read(&self) -> RwLockReadGuard<'_, Shared> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Shared> {
        self.shared.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// The first `most` entries of the buffer with numbers after `after`, up to `up_to`, in the order of their numbers.
    fn first(&self, most: u32, after: i64, up_to: i64) -> Vec<Found> {
        let mut first = BinaryHeap::new();
        for (index, (found, _)) in self.entries.iter().enumerate() {
            let number = found.entry.number;
            if number <= after || number > up_to {
                continue;
            }
            if first.len() < most as usize {
                first.push((number, index));
            } else if let Some(mut last) = first.peek_mut()
                && number < last.0
            {
                *last = (number, index);
            }
        }
        first.into_sorted_vec().into_iter().filter_map(|(_, index)| Some(self.entries.get(index)?.0)).collect()
    }
}

/// What a stream does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Send(Entry),
    /// Read a page of older entries from the store, and add it with [`Subscription::add_page`].
    Read {
        after: i64,
        up_to: i64,
        limit: u32,
    },
    /// Everything has been sent.
    Wait,
    /// The next entry is not in the buffer any more.
    FellBehind,
    /// The database was restored.
    AnotherLog,
}

/// A stream's position, and what it has read of older entries.
#[derive(Debug)]
pub struct Subscription {
    log: u64,
    position: Position,
    /// The next entry of the buffer, counted from the first that ever was in it.
    next: u64,
    /// What has to be sent before it.
    older: Option<Older>,
    /// Everything from before this time has been sent.
    complete_time: Option<OffsetDateTime>,
    added: watch::Receiver<()>,
}

/// The entries up to the newest one that was known when the stream began, in the order of their numbers, so that a stream
/// comes further each time that it is resumed. What became visible later is sent afterwards, also if its number is lower.
#[derive(Debug)]
struct Older {
    after: i64,
    up_to: i64,
    /// Up to here no entry can appear any more.
    complete: i64,
    page: VecDeque<Found>,
    has_more: bool,
}

impl Older {
    fn add(&mut self, page: &[Found], limit: u32) {
        self.after = page.last().map_or(self.after, |last| last.entry.number);
        self.has_more = page.len() >= limit as usize && self.after < self.up_to;
        self.page.extend(page);
    }
}

impl Subscription {
    /// The position after what was sent.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Everything from before this time has been sent.
    pub fn complete_time(&self) -> Option<OffsetDateTime> {
        self.complete_time
    }

    /// Adds a page that was read from the store, of at most `limit` entries.
    pub fn add_page(&mut self, page: &[Revocation], limit: u32) {
        if let Some(older) = &mut self.older {
            older.add(&page.iter().map(Found::from).collect::<Vec<_>>(), limit);
        }
    }

    /// Waits until something was added since [`Feed::next`] was asked last.
    pub async fn added(&mut self) {
        if self.added.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        time::{Duration, Instant},
    };

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::domain::revocation::LogCursor;

    fn line(number: i64) -> Revocation {
        let (what, time) =
            (Revoked::Session(SessionId(Uuid::from_u128(number.unsigned_abs().into()))), OffsetDateTime::UNIX_EPOCH);
        Revocation { number, what, revoke_time: time, retain_until: time }
    }

    /// The log, as transactions write it.
    #[derive(Default)]
    struct Log {
        numbers: i64,
        open: BTreeSet<i64>,
        visible: BTreeMap<i64, Revocation>,
        /// What was visible when each number was given.
        before: BTreeMap<i64, BTreeSet<i64>>,
    }

    impl Log {
        fn begin(&mut self) {
            self.numbers += 1;
            self.open.insert(self.numbers);
            self.before.insert(self.numbers, self.visible.keys().copied().collect());
        }

        fn finish(&mut self, which: usize, commits: bool) {
            let Some(number) = self.open.iter().nth(which % self.open.len().max(1)).copied() else {
                return;
            };
            self.open.remove(&number);
            if commits {
                self.visible.insert(number, line(number));
            }
        }

        fn read(&self, after: i64, up_to: i64, limit: u32) -> Vec<Revocation> {
            self.visible.range(after + 1..=up_to).take(limit as usize).map(|(_, line)| line.clone()).collect()
        }
    }

    struct Replica {
        cursor: LogCursor,
        feed: Feed,
    }

    impl Replica {
        fn new(buffered: usize) -> Self {
            Self { cursor: LogCursor::default(), feed: Feed::of_size(buffered, 2) }
        }

        fn poll(&mut self, log: &Log, now: Instant) {
            let (after, wanted) = self.cursor.wanted();
            let seen = log.visible.values().filter(|line| line.number > after || wanted.contains(&line.number));
            let found = self.cursor.advance(&seen.cloned().collect::<Vec<_>>(), now);
            self.feed.add(&found, self.cursor.lowest_missed());
        }
    }

    /// A client with a stream at one of two replicas.
    struct World {
        log: Log,
        replicas: [Replica; 2],
        now: Instant,
        at: usize,
        stream: Subscription,
        /// The cursor of the last message.
        cursor: Position,
        /// In the order in which they arrived first.
        seen: Vec<i64>,
    }

    impl World {
        fn new(buffered: usize) -> Self {
            let replicas = [Replica::new(buffered), Replica::new(buffered)];
            let stream = replicas[0].feed.subscribe(0, Position::default());
            let (log, cursor) = (Log::default(), Position::default());
            Self { log, replicas, now: Instant::now(), at: 0, stream, cursor, seen: Vec::new() }
        }

        fn poll(&mut self, replica: usize) {
            self.replicas[replica].poll(&self.log, self.now);
        }

        fn resume(&mut self, replica: usize) {
            self.poll(replica);
            assert!(self.cursor.newest.number <= self.replicas[replica].feed.newest().number);
            self.stream = self.replicas[replica].feed.subscribe(0, self.cursor);
            self.at = replica;
        }

        /// One step of the stream. `false`: everything was sent.
        fn step(&mut self) -> bool {
            match self.replicas[self.at].feed.next(&mut self.stream) {
                Next::Send(entry) => {
                    self.cursor = self.stream.position();
                    if !self.seen.contains(&entry.number) {
                        self.seen.push(entry.number);
                    }
                }
                Next::Read { after, up_to, limit } => {
                    self.stream.add_page(&self.log.read(after, up_to, limit), limit);
                }
                Next::Wait => {
                    self.cursor = self.stream.position();
                    return false;
                }
                Next::FellBehind => self.resume(self.at),
                Next::AnotherLog => panic!("the log is the same"),
            }
            true
        }

        fn pass_patience(&mut self) {
            self.log.open.clear();
            self.poll(0);
            self.poll(1);
            self.now += Duration::from_secs(31); // Longer than a reader of the log waits for a number.
        }

        fn finish(mut self) {
            self.pass_patience();
            self.poll(self.at);
            while self.step() {}
            let committed: BTreeSet<_> = self.log.visible.keys().copied().collect();
            assert_eq!(self.seen.iter().copied().collect::<BTreeSet<_>>(), committed, "each arrives");
            assert_eq!(self.cursor.complete, self.cursor.newest.number, "nothing is waited for");
            for (at, number) in self.seen.iter().enumerate() {
                let earlier: BTreeSet<_> = self.seen[..at].iter().copied().collect();
                assert!(self.log.before[number].is_subset(&earlier), "{number} in {:?}", self.seen);
            }
        }
    }

    /// Every order of these numbers.
    fn orders(numbers: &[i64]) -> Vec<Vec<i64>> {
        if numbers.is_empty() {
            return vec![Vec::new()];
        }
        let first = |number: &i64| {
            let others: Vec<_> = numbers.iter().copied().filter(|other| other != number).collect();
            orders(&others).into_iter().map(|rest| [vec![*number], rest].concat()).collect::<Vec<_>>()
        };
        numbers.iter().flat_map(first).collect()
    }

    /// Four entries commit in every order, each of the replicas reads the log after some of them, and the stream goes over
    /// to the other replica after each number of steps. One of the entries may be rolled back.
    #[test]
    fn each_entry_arrives_in_whatever_order_they_commit_and_wherever_the_stream_is_resumed() {
        let numbers = [1, 2, 3, 4];
        for order in orders(&numbers) {
            for (polls, moves) in (0..81).flat_map(|polls| (0..=4).map(move |moves| (polls, moves))) {
                for (lost, buffered) in (0..=4).flat_map(|lost| [1, 9].map(|buffered| (lost, buffered))) {
                    let mut world = World::new(buffered);
                    for _ in numbers {
                        world.log.begin();
                    }
                    for (time, number) in order.iter().enumerate() {
                        let which = world.log.open.iter().position(|open| open == number).expect("it is open");
                        world.log.finish(which, *number != lost);
                        let who = polls / 3_u32.pow(u32::try_from(time).expect("small")) % 3;
                        for replica in (0..2).filter(|replica| who != u32::from(*replica == 0)) {
                            world.poll(replica);
                        }
                        while world.step() {}
                        if time == moves {
                            world.resume(1);
                        }
                    }
                    world.finish();
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

        /// The same with many entries, any of which may be written after others were acknowledged, with replicas that
        /// restart, and with steps of the stream between all of that.
        #[test]
        fn each_entry_arrives_after_those_that_were_acknowledged_before_it(
            buffered in 1_usize..8,
            events in proptest::collection::vec((0_u8..14, 0_usize..8), 0..120),
        ) {
            let mut world = World::new(buffered);
            for (event, which) in events {
                match event {
                    0..3 => world.log.begin(),
                    3..6 => world.log.finish(which, true),
                    6 => world.log.finish(which, false),
                    7..9 => world.poll(which % 2),
                    9..12 => drop(world.step()),
                    12 => world.resume(which % 2),
                    _ if which == 0 => world.pass_patience(),
                    _ if which == 1 => {
                        world.replicas[1] = Replica::new(buffered);
                        world.resume(1);
                    }
                    _ => {}
                }
            }
            world.finish();
        }
    }

    #[test]
    fn a_stream_that_is_too_slow_or_of_another_log_is_ended() {
        let feed = Feed::of_size(2, 2);
        let found =
            |numbers: std::ops::RangeInclusive<i64>| -> Vec<Found> { numbers.map(|n| (&line(n)).into()).collect() };
        let mut stream = feed.subscribe(feed.log(), Position::default());
        feed.add(&found(1..=2), None);
        assert!(matches!(feed.next(&mut stream), Next::Send(entry) if entry.number == 1));
        feed.add(&found(3..=3), None);
        assert!(matches!(feed.next(&mut stream), Next::Send(entry) if entry.number == 2));
        feed.add(&found(4..=5), None);
        assert_eq!(feed.next(&mut stream), Next::FellBehind);
        assert_eq!(stream.position().complete, 2);
        let mut stream = feed.subscribe(feed.log(), stream.position());
        assert_eq!(feed.next(&mut stream), Next::Read { after: 2, up_to: 5, limit: 2 });
        feed.start_again();
        assert_eq!(feed.next(&mut stream), Next::AnotherLog);
        assert_eq!(feed.next(&mut feed.subscribe(feed.log(), Position::default())), Next::Wait);
    }
}
