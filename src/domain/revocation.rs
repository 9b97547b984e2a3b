//! The in-memory set of what was revoked before it expired. Checking an access token therefore costs no I/O, and a
//! revoked token is refused on every replica within a second. The set is read from the store's log of revocations,
//! which is the authority.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
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

/// The set, and the position up to which the log was read. Whoever checks a token waits for nobody: the set is split
/// into parts, each with a lock of its own that is held for one entry. A million ended sessions take about 85 MiB.
#[derive(Debug)]
pub struct Revocations {
    /// Each with the second until which it has to be kept (Unix time).
    sessions: DashMap<SessionId, i64>,
    roles: DashMap<UserId, (Vec<Role>, i64)>,
    started: Instant,
    /// When the log was read last, in milliseconds since `started`, plus one; 0 before the first time.
    read_at: AtomicU64,
    reader: Mutex<LogReader>,
}

impl Default for Revocations {
    fn default() -> Self {
        Self {
            sessions: DashMap::new(),
            roles: DashMap::new(),
            started: Instant::now(),
            read_at: AtomicU64::new(0),
            reader: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct LogReader {
    cursor: LogCursor,
    /// What is to be forgotten, the earliest first. Nothing walks the set to find it.
    forgetting: BinaryHeap<Reverse<(i64, Forgotten)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Forgotten {
    Session(SessionId),
    Roles(UserId),
}

/// An entry gets its number when it is written and becomes visible when it is committed, so a later number may become
/// visible first. Numbers that were skipped are therefore requested again.
#[derive(Debug, Default)]
struct LogCursor {
    after: i64,
    missed: BTreeMap<i64, Instant>,
}

impl LogCursor {
    fn advance(&mut self, seen: &[Revocation], now: Instant) {
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
        }
        self.missed.retain(|_, since| now.duration_since(*since) < GAP_PATIENCE);
    }
}

impl Revocations {
    /// Reads the new entries of the log.
    pub async fn poll(&self, store: &dyn Store, now: OffsetDateTime) -> Result<(), StoreError> {
        let mut reader = self.reader.lock().await;
        let reader = &mut *reader;
        loop {
            let asked_at = self.started.elapsed();
            let missed: Vec<i64> = reader.cursor.missed.keys().copied().collect();
            let seen = store.revocations(reader.cursor.after, &missed).await?;
            let is_all = seen.len() < REVOCATIONS_AT_ONCE as usize;
            reader.cursor.advance(&seen, self.started + asked_at);
            self.add(seen, &mut reader.forgetting);
            if is_all {
                self.forget(&mut reader.forgetting, now.unix_timestamp());
                self.read_at.store(milliseconds(asked_at) + 1, Ordering::Release);
                return Ok(());
            }
        }
    }

    fn add(&self, seen: Vec<Revocation>, forgetting: &mut BinaryHeap<Reverse<(i64, Forgotten)>>) {
        for revocation in seen {
            // Rounded up: it is kept a little longer rather than shorter.
            let until = revocation.retain_until.unix_timestamp() + 1;
            let entry = match revocation.what {
                Revoked::Session(session) => {
                    self.sessions.insert(session, until);
                    Forgotten::Session(session)
                }
                Revoked::Roles(user, roles) => {
                    self.roles.insert(user, (roles, until));
                    Forgotten::Roles(user)
                }
            };
            forgetting.push(Reverse((until, entry)));
        }
    }

    /// Drops the entries whose time is over. A later entry about the same user or session has a later time.
    fn forget(&self, forgetting: &mut BinaryHeap<Reverse<(i64, Forgotten)>>, now: i64) {
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

    /// Returns the caller with its current roles, or why its token is no longer valid.
    pub fn check(&self, caller: Caller) -> Result<Caller, AccessTokenError> {
        let read_at = self.read_at.load(Ordering::Acquire);
        if read_at == 0 || milliseconds(self.started.elapsed()) >= read_at + milliseconds(MAX_STALENESS) {
            return Err(AccessTokenError::RevocationUnknown);
        }
        if self.sessions.contains_key(&caller.session_id) {
            return Err(AccessTokenError::Revoked);
        }
        match self.roles.get(&caller.user_id) {
            Some(current) => Ok(Caller { roles: current.0.clone(), ..caller }),
            None => Ok(caller),
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
        Revocation { number, what: Revoked::Session(session), retain_until: OffsetDateTime::UNIX_EPOCH }
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
}
