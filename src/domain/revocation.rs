//! What access tokens are dead before their time, in memory: so that checking one costs no I/O, and one that is revoked
//! dies on every replica within a second. Fed from the store's log, which is the truth; loses nothing but time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use time::OffsetDateTime;
use tokio::sync::Mutex;

use crate::{
    error::Error,
    store::{Revocation, Revoked, Store, StoreError},
};

use super::{
    Postern, SessionId, UserId,
    role::{Caller, Role},
    token::AccessTokenFault,
};

/// How often the log is read where nothing wakes the reader.
const POLL_INTERVAL: Duration = Duration::from_millis(400);
/// If the log could not be read for so long, nobody knows what is revoked: checks fail.
const MAX_STALENESS: Duration = Duration::from_secs(30);
/// How long a number that was skipped may still turn up: longer than any write takes.
const GAP_PATIENCE: Duration = Duration::from_secs(30);
/// The most skipped numbers that are waited for.
const MOST_GAPS: i64 = 10_000;
/// And of them, how many before the first line that a new reader sees.
const FIRST_GAPS: i64 = 100;

/// The revoked set, and where in the log its reader is.
#[derive(Debug, Default)]
pub struct Revocations {
    known: RwLock<Known>,
    reader: Mutex<Reader>,
}

#[derive(Debug, Default)]
struct Known {
    /// Until when each matters.
    sessions: HashMap<SessionId, OffsetDateTime>,
    roles: HashMap<UserId, (Vec<Role>, OffsetDateTime)>,
    read_at: Option<Instant>,
}

/// Numbers are given when a line is written and seen when it is committed, so a later one may be seen first: those that
/// were skipped are asked for again.
#[derive(Debug, Default)]
struct Reader {
    after: i64,
    missed: BTreeMap<i64, Instant>,
}

impl Reader {
    fn advance(&mut self, seen: &[Revocation], now: Instant) {
        for revocation in seen {
            self.missed.remove(&revocation.number);
            if revocation.number <= self.after {
                continue;
            }
            // Before the first line of all there is nothing to wait for but what is being written right now.
            let from = if self.after == 0 { revocation.number - FIRST_GAPS } else { self.after + 1 };
            let from = from.max(revocation.number - MOST_GAPS).max(1);
            self.missed.extend((from..revocation.number).map(|number| (number, now)));
            self.after = revocation.number;
        }
        self.missed.retain(|_, since| now.duration_since(*since) < GAP_PATIENCE);
    }
}

impl Revocations {
    /// Reads what is new in the log.
    pub async fn catch_up(&self, store: &dyn Store, now: OffsetDateTime) -> Result<(), StoreError> {
        let mut reader = self.reader.lock().await;
        let asked_at = Instant::now();
        let missed: Vec<i64> = reader.missed.keys().copied().collect();
        let seen = store.revocations(reader.after, &missed).await?;
        reader.advance(&seen, asked_at);
        let mut known = self.write();
        for revocation in seen {
            match revocation.what {
                Revoked::Session(session) => drop(known.sessions.insert(session, revocation.forget_time)),
                Revoked::Roles(user, roles) => drop(known.roles.insert(user, (roles, revocation.forget_time))),
            }
        }
        known.sessions.retain(|_, forget_time| *forget_time > now);
        known.roles.retain(|_, (_, forget_time)| *forget_time > now);
        known.read_at = Some(asked_at);
        Ok(())
    }

    /// The caller as it is by now, if its session has not ended.
    pub fn judge(&self, caller: Caller) -> Result<Caller, AccessTokenFault> {
        let known = self.read();
        if known.read_at.is_none_or(|read_at| read_at.elapsed() > MAX_STALENESS) {
            return Err(AccessTokenFault::Undecided);
        }
        if known.sessions.contains_key(&caller.session_id) {
            return Err(AccessTokenFault::Revoked);
        }
        match known.roles.get(&caller.user_id) {
            Some((roles, _)) => Ok(Caller { roles: roles.clone(), ..caller }),
            None => Ok(caller),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Postern {
    /// Keeps up with the log, for ever: at once where the store says that there is something new, else by asking.
    pub async fn follow_revocations(&self) {
        loop {
            if let Err(error) = self.catch_up().await {
                tracing::debug!(%error, "the log of revocations could not be read");
            }
            tokio::select! {
                () = self.store.revocation_written() => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    /// Reads the log before the first call is answered.
    pub async fn catch_up_on_revocations(&self) -> Result<(), Error> {
        Ok(self.catch_up().await?)
    }

    /// Reads what is new in the log: after a step that revokes, before it is answered, so that on this replica nothing
    /// of it is alive when its caller hears of it.
    async fn catch_up(&self) -> Result<(), StoreError> {
        self.revocations.catch_up(self.store.as_ref(), self.env.now()).await
    }

    /// The same where the step is done whatever becomes of the reading: the next poll makes up for it.
    pub(super) async fn spread(&self) {
        if let Err(error) = self.catch_up().await {
            tracing::debug!(%error, "a revocation is written, and will be read with the next poll");
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn line(number: i64) -> Revocation {
        let session = SessionId(Uuid::from_u128(number.unsigned_abs().into()));
        Revocation { number, what: Revoked::Session(session), forget_time: OffsetDateTime::UNIX_EPOCH }
    }

    fn missed(reader: &Reader) -> Vec<i64> {
        reader.missed.keys().copied().collect()
    }

    #[test]
    fn a_number_that_was_skipped_is_asked_for_until_it_is_seen() {
        let (mut reader, now) = (Reader::default(), Instant::now());
        reader.advance(&[line(3), line(4)], now);
        assert_eq!((reader.after, missed(&reader)), (4, vec![1, 2]), "these may be under way");
        reader.advance(&[line(6), line(9)], now);
        assert_eq!((reader.after, missed(&reader)), (9, vec![1, 2, 5, 7, 8]));
        reader.advance(&[line(2), line(7)], now);
        assert_eq!((reader.after, missed(&reader)), (9, vec![1, 5, 8]));
        reader.advance(&[], now + GAP_PATIENCE);
        assert_eq!((reader.after, missed(&reader)), (9, Vec::new()), "they were rolled back");
    }
}
