//! The in-memory set of what was revoked before it expired. Checking an access token therefore costs no I/O, and a
//! revoked token is refused on every replica within a second. The set is read from the store's log of revocations,
//! which is the authority.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use dashmap::DashMap;
use time::OffsetDateTime;
use tokio::sync::Mutex;

use crate::error::StoreError;

use super::{
    ids::{SessionId, UserId},
    ports::{LONGEST_WRITE, REVOCATIONS_AT_ONCE, Revocation, Revoked, Store},
    role::{Caller, Role},
    token::AccessTokenError,
    watch::{Feed, Found},
};

/// After this long without reading the log, tokens are refused: any of them may have been revoked.
const MAX_STALENESS: Duration = Duration::from_secs(30);
/// How long a number that was skipped may still appear.
const GAP_PATIENCE: Duration = Duration::from_secs(30);
const _: () = assert!(GAP_PATIENCE.as_secs() > LONGEST_WRITE.as_secs(), "a write may still commit its number");
/// The most skipped numbers to wait for.
const MOST_GAPS: i64 = 10_000;
/// How many numbers before the first entry that a new reader sees it waits for.
const FIRST_GAPS: i64 = 100;
/// How often the reader notes how far it has read.
const NOTE_INTERVAL: Duration = Duration::from_mins(1);

/// The set, and the position up to which the log was read. Whoever checks a token waits for nobody: the set is split
/// into parts, each with a lock of its own that is held for one entry. A million ended sessions take about 85 MiB.
#[derive(Debug)]
pub struct Revocations {
    /// Each with the time until which it has to be kept, in milliseconds since `started`. No clock can move that.
    sessions: DashMap<SessionId, u64>,
    roles: DashMap<UserId, (Standing, u64)>,
    /// How long an entry is kept at least, whatever the clocks say: as long as an access token can be presented.
    shortest: Duration,
    started: Instant,
    /// When the log was read last, in milliseconds since `started`, plus one; 0 before the first time.
    read_at: AtomicU64,
    reader: Mutex<LogReader>,
    /// What the streams send.
    feed: Feed,
}

#[derive(Debug, Default)]
struct LogReader {
    cursor: LogCursor,
    /// What is to be forgotten, the earliest first. Nothing walks the set to find it.
    forgetting: BinaryHeap<Reverse<(u64, Forgotten)>>,
    /// Whose roles another log told, before the database was restored from a backup.
    of_another_log: Vec<UserId>,
    /// How far the log was read at some moments, in milliseconds since the start: the oldest first.
    notes: VecDeque<(u64, i64)>,
    /// Up to which number every entry has been in memory for as long as an access token can be presented.
    settled: i64,
    /// When the last read began that succeeded.
    began: Option<Instant>,
}

/// What the tokens of an account are good for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    Roles(Vec<Role>),
    /// For the roles that everybody has: what others it has is not known after a restore.
    Unsure,
    /// For nothing.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Forgotten {
    Session(SessionId),
    Roles(UserId),
}

/// An entry gets its number when it is written and becomes visible when it is committed, so a later number may become
/// visible first. Numbers that were skipped are therefore requested again.
#[derive(Debug, Default)]
pub(super) struct LogCursor {
    after: i64,
    /// The entry with number `after`.
    last: Option<Revocation>,
    missed: BTreeMap<i64, Instant>,
}

impl LogCursor {
    /// Whether this is another log than the one that was read before: the last entry of that is not in it. The database
    /// was restored from a backup.
    fn is_of_another_log(&self, seen: &[Revocation]) -> bool {
        let Some(last) = &self.last else {
            return false;
        };
        let same = |entry: &Revocation| {
            (entry.number, &entry.what, entry.retain_until) == (last.number, &last.what, last.retain_until)
        };
        !seen.iter().any(same)
    }

    /// The number after which the log is read, and the numbers that are requested as well. The last entry is read again
    /// each time: it tells whether this is still the same log.
    pub(super) fn wanted(&self) -> (i64, Vec<i64>) {
        (self.after, self.missed.keys().copied().chain([self.after]).collect())
    }

    /// Takes note of what was read. Returns the entries that are new.
    pub(super) fn advance(&mut self, seen: &[Revocation], now: Instant) -> Vec<Found> {
        let before = self.last.as_ref().map(|last| last.number);
        for revocation in seen {
            self.missed.remove(&revocation.number);
            if revocation.number <= self.after {
                continue;
            }
            // A new reader waits only for entries that are being written at this moment.
            let from = if self.after == 0 { revocation.number - FIRST_GAPS } else { self.after + 1 };
            let from = from.max(revocation.number - MOST_GAPS).max(1);
            self.missed.extend((from..revocation.number).map(|number| (number, now)));
            self.after = revocation.number;
            self.last = Some(revocation.clone());
        }
        self.missed.retain(|_, since| now.duration_since(*since) < GAP_PATIENCE);
        seen.iter().filter(|entry| Some(entry.number) != before).map(Found::from).collect()
    }

    /// The lowest number that was skipped and may still appear.
    pub(super) fn lowest_missed(&self) -> Option<i64> {
        self.missed.first_key_value().map(|(number, _)| *number)
    }
}

impl Revocations {
    /// An empty set, which refuses every token until the log was read. `lifetime` is the longest time between minting an
    /// access token and the last moment that a replica accepts it.
    pub fn new(lifetime: Duration) -> Self {
        Self {
            sessions: DashMap::new(),
            roles: DashMap::new(),
            shortest: lifetime,
            started: Instant::now(),
            read_at: AtomicU64::new(0),
            reader: Mutex::default(),
            feed: Feed::default(),
        }
    }

    /// Reads the new entries of the log.
    ///
    /// If the database was restored from a backup, its log is another one, and its numbers may be lower. Then every token
    /// is refused until the log has been read from its start.
    pub async fn poll(&self, store: &dyn Store, now: OffsetDateTime) -> Result<(), StoreError> {
        let mut reader = self.reader.lock().await;
        self.read_log(&mut reader, store, now).await
    }

    /// The same, unless another read begins meanwhile. Many callers at once cause few reads.
    pub async fn poll_unless_read(&self, store: &dyn Store, now: OffsetDateTime) -> Result<(), StoreError> {
        let asked_at = Instant::now();
        let mut reader = self.reader.lock().await;
        if reader.began.is_some_and(|began| began >= asked_at) {
            return Ok(());
        }
        self.read_log(&mut reader, store, now).await
    }

    async fn read_log(&self, reader: &mut LogReader, store: &dyn Store, now: OffsetDateTime) -> Result<(), StoreError> {
        let began = Instant::now();
        loop {
            let asked_at = self.started.elapsed();
            let (after, wanted) = reader.cursor.wanted();
            let seen = store.revocations(after, &wanted).await?;
            if reader.cursor.is_of_another_log(&seen) {
                self.start_again(reader);
                continue;
            }
            let new = seen.iter().filter(|entry| entry.number > after).count();
            let found = reader.cursor.advance(&seen, self.started + asked_at);
            self.add(seen, now, &mut reader.forgetting);
            // Afterwards, so that whoever is told of an entry is refused what it revokes.
            self.feed.add(&found, reader.cursor.lowest_missed());
            if new < REVOCATIONS_AT_ONCE as usize {
                self.narrow_roles_of_another_log(reader);
                self.forget(&mut reader.forgetting);
                reader.note(milliseconds(asked_at), milliseconds(self.shortest));
                self.read_at.store(milliseconds(asked_at) + 1, Ordering::Release);
                self.feed.is_complete_at(now);
                reader.began = Some(began);
                return Ok(());
            }
        }
    }

    /// Up to which number every entry has been in memory for as long as an access token can be presented. Only those may be
    /// deleted from the log: what a wrong clock says does not count.
    pub async fn settled(&self) -> i64 {
        self.reader.lock().await.settled
    }

    /// Prepares for reading another log from its start. Until that is done, every token is refused. Sessions that have ended
    /// stay ended.
    fn start_again(&self, reader: &mut LogReader) {
        tracing::warn!("the log of revocations is another one: the database was restored; reading it from the start");
        self.read_at.store(0, Ordering::Release);
        reader.of_another_log.extend(self.roles.iter().map(|entry| *entry.key()));
        self.roles.clear();
        reader.cursor = LogCursor::default();
        reader.notes.clear();
        reader.settled = 0;
        self.feed.start_again();
    }

    /// What the streams of revocations send.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// What the log says of the tokens of an account. `None`: nothing that still matters.
    pub fn standing(&self, account: UserId) -> Option<Standing> {
        self.roles.get(&account).map(|standing| standing.0.clone())
    }

    /// Whoever had other roles by the log from before has none but the one of all users now, until the tokens from before
    /// have expired: the restored database may not know the role in them.
    fn narrow_roles_of_another_log(&self, reader: &mut LogReader) {
        let until = self.kept_until(Duration::ZERO);
        for user in reader.of_another_log.drain(..) {
            if !self.roles.contains_key(&user) {
                self.roles.insert(user, (Standing::Unsure, until));
                reader.forgetting.push(Reverse((until, Forgotten::Roles(user))));
            }
        }
    }

    /// Until when an entry is kept that may be forgotten after so long.
    fn kept_until(&self, time_left: Duration) -> u64 {
        milliseconds(self.started.elapsed().saturating_add(time_left.max(self.shortest)))
    }

    fn add(&self, seen: Vec<Revocation>, now: OffsetDateTime, forgetting: &mut BinaryHeap<Reverse<(u64, Forgotten)>>) {
        for revocation in seen {
            let time_left = Duration::try_from(revocation.retain_until - now).unwrap_or_default();
            let mut until = self.kept_until(time_left);
            let entry = match revocation.what {
                Revoked::Session(session) => {
                    // The last entry is read at every poll. It does not have to be kept longer for that.
                    if self.sessions.contains_key(&session) {
                        continue;
                    }
                    self.sessions.insert(session, until);
                    Forgotten::Session(session)
                }
                Revoked::Roles(user, roles) => {
                    let roles = roles.map_or(Standing::Refused, Standing::Roles);
                    if let Some(before) = self.roles.get(&user) {
                        until = until.max(before.1);
                        if before.0 == roles {
                            continue;
                        }
                    }
                    self.roles.insert(user, (roles, until));
                    Forgotten::Roles(user)
                }
            };
            forgetting.push(Reverse((until, entry)));
        }
    }

    /// Drops the entries whose time is over.
    fn forget(&self, forgetting: &mut BinaryHeap<Reverse<(u64, Forgotten)>>) {
        let now = milliseconds(self.started.elapsed());
        while let Some(Reverse((until, entry))) = forgetting.peek().copied()
            && until <= now
        {
            forgetting.pop();
            match entry {
                Forgotten::Session(session) => drop(self.sessions.remove_if(&session, |_, until| *until <= now)),
                Forgotten::Roles(user) => drop(self.roles.remove_if(&user, |_, (_, until)| *until <= now)),
            }
        }
    }

    /// Whether the log has an entry for this id. Signing keys, and tokens that were revoked by themselves, have one too.
    pub fn has(&self, id: SessionId) -> bool {
        self.sessions.contains_key(&id)
    }

    /// Returns the caller with its current roles, or why its token is no longer valid.
    pub fn check(&self, caller: Caller) -> Result<Caller, AccessTokenError> {
        let read_at = self.read_at.load(Ordering::Acquire);
        if read_at == 0 || milliseconds(self.started.elapsed()) >= read_at + milliseconds(MAX_STALENESS) {
            return Err(AccessTokenError::RevocationUnknown);
        }
        if self.has(caller.session()) || caller.token().is_some_and(|token| self.has(token)) {
            return Err(AccessTokenError::Revoked);
        }
        match self.roles.get(&caller.account()) {
            Some(current) => match &current.0 {
                Standing::Roles(roles) => Ok(caller.with_roles(roles.clone())),
                Standing::Unsure => Ok(caller.with_least_roles()),
                Standing::Refused => Err(AccessTokenError::Revoked),
            },
            None => Ok(caller),
        }
    }
}

impl LogReader {
    /// Notes how far the log has been read now, and finds up to where that is long enough ago.
    fn note(&mut self, now: u64, lifetime: u64) {
        let is_due =
            self.notes.back().is_none_or(|(noted, _)| now.saturating_sub(*noted) >= milliseconds(NOTE_INTERVAL));
        if is_due && self.cursor.missed.is_empty() {
            self.notes.push_back((now, self.cursor.after));
        }
        while let Some((noted, after)) = self.notes.front().copied()
            && noted.saturating_add(lifetime) <= now
        {
            self.notes.pop_front();
            self.settled = after;
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn line(number: i64) -> Revocation {
        let session = SessionId(Uuid::from_u128(number.unsigned_abs().into()));
        Revocation {
            number,
            what: Revoked::Session(session),
            revoke_time: OffsetDateTime::UNIX_EPOCH,
            retain_until: OffsetDateTime::UNIX_EPOCH,
        }
    }

    fn missed(cursor: &LogCursor) -> Vec<i64> {
        cursor.missed.keys().copied().collect()
    }

    #[test]
    fn a_skipped_number_is_requested_until_it_is_seen() {
        let (mut cursor, now) = (LogCursor::default(), Instant::now());
        cursor.advance(&[line(3), line(4)], now);
        assert_eq!((cursor.after, missed(&cursor)), (4, vec![1, 2]), "these may be about to commit");
        cursor.advance(&[line(6), line(9)], now);
        assert_eq!((cursor.after, missed(&cursor)), (9, vec![1, 2, 5, 7, 8]));
        cursor.advance(&[line(2), line(7)], now);
        assert_eq!((cursor.after, missed(&cursor)), (9, vec![1, 5, 8]));
        cursor.advance(&[], now + GAP_PATIENCE);
        assert_eq!((cursor.after, missed(&cursor)), (9, Vec::new()), "they were rolled back");
    }

    #[test]
    fn a_log_without_the_last_entry_that_was_read_is_another_one() {
        let mut cursor = LogCursor::default();
        assert!(!cursor.is_of_another_log(&[]), "nothing was read before");
        cursor.advance(&[line(3), line(4)], Instant::now());
        assert!(!cursor.is_of_another_log(&[line(4), line(5)]));
        let other = Revocation { what: line(7).what, ..line(4) };
        for restored in [vec![], vec![line(5)], vec![other, line(5)]] {
            assert!(cursor.is_of_another_log(&restored), "{restored:?}");
        }
    }

    #[test]
    fn what_was_read_is_settled_after_the_lifetime_of_a_token() {
        let mut reader = LogReader::default();
        reader.cursor.after = 5;
        reader.note(0, 900_000);
        reader.cursor.after = 9;
        reader.note(59_000, 900_000);
        reader.note(899_000, 900_000);
        assert_eq!(reader.settled, 0);
        reader.note(900_000, 900_000);
        assert_eq!(reader.settled, 5);
        reader.note(1_799_000, 900_000);
        assert_eq!(reader.settled, 9);
    }
}
