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
/// About 150 MB of revocations.
#[cfg(not(test))]
const MAX_ENTRIES: usize = 1_000_000;
#[cfg(test)]
const MAX_ENTRIES: usize = 3;

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
    /// Until then something matters that found no room.
    lost_until: i64,
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
                let is_known = known.ended.contains_key(&ended.session_id);
                if known.has_room(is_known, forget_time) {
                    known.ended.insert(ended.session_id, forget_time);
                }
            }
            Some(Event::RolesChanged(changed)) => {
                let is_known = known.accounts.contains_key(&changed.user_id);
                if known.has_room(is_known, forget_time) {
                    let account = Account { roles: changed.roles, disabled: changed.disabled, forget_time };
                    known.accounts.insert(changed.user_id, account);
                }
            }
            Some(Event::Heartbeat(heartbeat)) => {
                // If the clock of this machine is slow, the time is that of the message's arrival, and not a later one.
                let now = self.clock.since_epoch();
                known.complete_time = heartbeat.complete_time.as_ref().map(|time| since_epoch(time).min(now));
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
        is_fresh && self.clock.seconds() >= known.lost_until
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Whether something can be remembered. If it is new and there is no room, what was revoked is unknown until it does not
    /// matter any more.
    fn has_room(&mut self, is_known: bool, forget_time: i64) -> bool {
        let has_room = is_known || self.ended.len() + self.accounts.len() < MAX_ENTRIES;
        if !has_room {
            self.lost_until = self.lost_until.max(forget_time);
        }
        has_room
    }

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

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        time::UNIX_EPOCH,
    };

    use super::*;
    use crate::{
        proto::{Heartbeat, SessionEnded},
        verifier::SubjectType,
    };

    fn clock(seconds: u64) -> (Clock, Arc<AtomicU64>) {
        let now = Arc::new(AtomicU64::new(seconds));
        let read = Arc::clone(&now);
        (Clock::new(move || UNIX_EPOCH + Duration::from_secs(read.load(Ordering::SeqCst))), now)
    }

    fn time(seconds: i64) -> Timestamp {
        Timestamp { seconds, nanos: 0 }
    }

    fn heartbeat(complete: i64) -> WatchRevocationsResponse {
        let event = Some(Event::Heartbeat(Heartbeat { complete_time: Some(time(complete)) }));
        WatchRevocationsResponse { event, ..WatchRevocationsResponse::default() }
    }

    fn ended(session: &str, forget: i64) -> WatchRevocationsResponse {
        let event = Some(Event::SessionEnded(SessionEnded { session_id: session.to_owned() }));
        WatchRevocationsResponse { event, forget_time: Some(time(forget)), ..WatchRevocationsResponse::default() }
    }

    fn caller(session: &str) -> Arc<Caller> {
        Arc::new(Caller {
            subject: "s".to_owned(),
            subject_type: SubjectType::User,
            client_id: "postern".to_owned(),
            session_id: session.to_owned(),
            token_id: "t".to_owned(),
            username: "ada".to_owned(),
            email: None,
            email_verified: None,
            roles: Vec::new(),
            expire_time: i64::MAX,
        })
    }

    #[test]
    fn a_heartbeat_from_the_future_does_not_vouch_for_it() {
        let (clock, now) = clock(1_000);
        let state = Revocations::new(WhenUnknown::Refuse, Duration::from_secs(30), clock);
        state.apply(heartbeat(10_000));
        assert!(state.is_complete());
        now.store(1_031, Ordering::SeqCst);
        assert!(!state.is_complete());
    }

    #[test]
    fn what_finds_no_room_makes_revocations_unknown_until_it_does_not_matter() {
        let (clock, now) = clock(1_000);
        let state = Revocations::new(WhenUnknown::Refuse, Duration::from_hours(1), clock);
        state.apply(heartbeat(1_000));
        for session in ["a", "b", "c"] {
            state.apply(ended(session, 1_100));
        }
        assert!(state.check(&caller("z")).is_ok());
        state.apply(ended("d", 1_200));
        state.apply(ended("a", 1_100));
        assert_eq!(state.check(&caller("z")), Err(VerifyError::RevocationsUnknown));
        assert_eq!(state.check(&caller("a")), Err(VerifyError::SessionRevoked));
        now.store(1_206, Ordering::SeqCst);
        state.apply(heartbeat(1_206));
        assert!(state.check(&caller("z")).is_ok());
        assert!(state.check(&caller("a")).is_ok(), "forgotten, and its tokens have expired");
    }
}
