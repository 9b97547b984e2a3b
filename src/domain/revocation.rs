//! The in-memory set of what was revoked before it expired. Checking an access token therefore costs no I/O, and a
//! revoked token is refused on every replica within a second. The set is read from the store's log of revocations,
//! which is the authority.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use time::OffsetDateTime;
use tokio::sync::Mutex;

use crate::error::StoreError;

use super::{
    ids::{SessionId, UserId},
    ports::{LONGEST_WRITE, Revocation, Revoked, Store},
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

/// The set, and the position up to which the log was read.
#[derive(Debug, Default)]
pub struct Revocations {
    revoked: RwLock<RevokedSet>,
    cursor: Mutex<LogCursor>,
}

#[derive(Debug, Default)]
struct RevokedSet {
    /// Each with the time until which it has to be kept.
    sessions: HashMap<SessionId, OffsetDateTime>,
    roles: HashMap<UserId, (Vec<Role>, OffsetDateTime)>,
    read_at: Option<Instant>,
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
        let mut cursor = self.cursor.lock().await;
        let asked_at = Instant::now();
        let missed: Vec<i64> = cursor.missed.keys().copied().collect();
        let seen = store.revocations(cursor.after, &missed).await?;
        cursor.advance(&seen, asked_at);
        let mut set = self.write();
        for revocation in seen {
            match revocation.what {
                Revoked::Session(session) => drop(set.sessions.insert(session, revocation.retain_until)),
                Revoked::Roles(user, roles) => drop(set.roles.insert(user, (roles, revocation.retain_until))),
            }
        }
        set.sessions.retain(|_, retain_until| *retain_until > now);
        set.roles.retain(|_, (_, retain_until)| *retain_until > now);
        set.read_at = Some(asked_at);
        Ok(())
    }

    /// Returns the caller with its current roles, or why its token is no longer valid.
    pub fn check(&self, caller: Caller) -> Result<Caller, AccessTokenError> {
        let set = self.read();
        if set.read_at.is_none_or(|read_at| read_at.elapsed() > MAX_STALENESS) {
            return Err(AccessTokenError::RevocationUnknown);
        }
        if set.sessions.contains_key(&caller.session_id) {
            return Err(AccessTokenError::Revoked);
        }
        match set.roles.get(&caller.user_id) {
            Some((roles, _)) => Ok(Caller { roles: roles.clone(), ..caller }),
            None => Ok(caller),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, RevokedSet> {
        self.revoked.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, RevokedSet> {
        self.revoked.write().unwrap_or_else(PoisonError::into_inner)
    }
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
