//! What was revoked, as the messages of `WatchRevocations` say. It knows nothing of connections.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use prost_types::Timestamp;

use crate::{
    clock::Clock,
    error::VerifyError,
    proto::{WatchRevocationsResponse, watch_revocations_response::Event},
    verifier::Caller,
};

/// Tokens are accepted this long after they expired, so revocations are remembered as long.
const LEEWAY: i64 = 5;
/// More than Postern keeps in its own memory. Beyond it, what was revoked counts as unknown.
const MAX_ENTRIES: usize = 1_000_000;

/// What a service does while it does not know what was revoked: before the first answer of Postern, and when Postern or its
/// database could not be reached for a while. There is no default, because both choices hurt somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenUnknown {
    /// Refuse every token ([`VerifyError::RevocationsUnknown`]): nobody who was logged out gets in, and nobody else either.
    Refuse,
    /// Accept tokens until they expire: the service goes on, and for as long a logout may go unnoticed.
    Accept,
}

/// The state that a feed keeps. Tests can feed it messages of their own.
#[derive(Debug)]
pub struct Revocations {
    when_unknown: WhenUnknown,
    max_staleness: Duration,
    clock: Clock,
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Ids of sessions, keys and single tokens, and until when each is remembered.
    ended: HashMap<String, i64>,
    accounts: HashMap<String, Account>,
    /// Everything that was acknowledged before this time is here. Since 1970.
    complete_time: Option<Duration>,
    cursor: String,
    /// Not before this time is there anything to forget again.
    purge_time: i64,
}

#[derive(Debug)]
struct Account {
    roles: Vec<String>,
    disabled: bool,
    forget_time: i64,
}

impl Revocations {
    /// Nothing is known yet. After `max_staleness` without news from Postern, what was revoked counts as unknown.
    pub fn new(when_unknown: WhenUnknown, max_staleness: Duration, clock: Clock) -> Self {
        Self { when_unknown, max_staleness, clock, known: RwLock::default() }
    }

    /// Takes a message. Taking one twice changes nothing.
    pub fn apply(&self, message: WatchRevocationsResponse) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.purge(self.clock.seconds());
        let forget_time = message.forget_time.map_or(i64::MAX, |time| time.seconds.saturating_add(1 + LEEWAY));
        match message.event {
            Some(Event::SessionEnded(ended)) => {
                known.ended.insert(ended.session_id, forget_time);
            }
            Some(Event::RolesChanged(changed)) => {
                let account = Account { roles: changed.roles, disabled: changed.disabled, forget_time };
                known.accounts.insert(changed.user_id, account);
            }
            Some(Event::Heartbeat(heartbeat)) => {
                known.complete_time = heartbeat.complete_time.as_ref().map(since_epoch);
            }
            // A kind of message that this release does not know says nothing about tokens that it could check.
            None => {}
        }
        known.cursor = message.cursor;
    }

    /// Whether everything that was revoked until a moment ago is known.
    pub fn is_complete(&self) -> bool {
        self.is_complete_in(&self.read())
    }

    /// Where the stream goes on after a break. Empty: from the start.
    pub(crate) fn cursor(&self) -> String {
        self.read().cursor.clone()
    }

    pub(crate) fn forget_cursor(&self) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).cursor.clear();
    }

    /// The caller with the roles of this moment, unless the token was revoked.
    pub fn check(&self, caller: &Arc<Caller>) -> Result<Arc<Caller>, VerifyError> {
        let known = self.read();
        if known.ended.contains_key(&caller.session_id) || known.ended.contains_key(&caller.token_id) {
            return Err(VerifyError::SessionRevoked);
        }
        let account = known.accounts.get(&caller.subject);
        if account.is_some_and(|account| account.disabled) {
            return Err(VerifyError::SessionRevoked);
        }
        if self.when_unknown == WhenUnknown::Refuse && !self.is_complete_in(&known) {
            return Err(VerifyError::RevocationsUnknown);
        }
        Ok(match account {
            Some(account) if account.roles != caller.roles => {
                Arc::new(Caller { roles: account.roles.clone(), ..Caller::clone(caller) })
            }
            Some(_) | None => Arc::clone(caller),
        })
    }

    fn is_complete_in(&self, known: &Known) -> bool {
        let staleness = |time: Duration| self.clock.since_epoch().saturating_sub(time);
        let is_fresh = known.complete_time.is_some_and(|time| staleness(time) <= self.max_staleness);
        is_fresh && known.ended.len() + known.accounts.len() <= MAX_ENTRIES
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Forgets what no living token can be affected by, once a minute.
    fn purge(&mut self, now: i64) {
        if now < self.purge_time {
            return;
        }
        self.ended.retain(|_, forget_time| *forget_time > now);
        self.accounts.retain(|_, account| account.forget_time > now);
        self.purge_time = now.saturating_add(60);
    }
}

fn since_epoch(time: &Timestamp) -> Duration {
    Duration::new(time.seconds.try_into().unwrap_or(0), time.nanos.try_into().unwrap_or(0))
}
