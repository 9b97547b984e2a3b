//! Which access tokens have come back: for each session the newest generation of which this replica has verified an access
//! token, until that is written to the session's row.
//!
//! Whoever presents an access token has received the answer that it came in, and with it the refresh token of the same
//! generation. So the answer was not lost, and the refresh token before it has no more use. `refresh.rs` decides what
//! follows from that. A call pays for a look into memory; once a second, what is new is written in one statement.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::ids::SessionId;

/// How many sessions may wait to be written. Each takes about 50 bytes. What finds no room counts as not seen, and is
/// noted again with the next call.
const MOST_WAITING: usize = 100_000;

/// A generation of a session's tokens of which an access token came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenGeneration {
    pub session: SessionId,
    /// How many times the session had been rotated when the token was minted.
    pub generation: i64,
}

/// What waits to be written.
#[derive(Debug, Default)]
pub struct SeenGenerations {
    waiting: Mutex<HashMap<SessionId, i64>>,
}

impl SeenGenerations {
    /// Notes that an access token of a generation was verified. `false` if there is no room.
    pub fn note(&self, seen: SeenGeneration) -> bool {
        let mut waiting = self.waiting();
        let is_full = waiting.len() >= MOST_WAITING;
        match waiting.entry(seen.session) {
            Entry::Occupied(mut newest) => {
                let newest = newest.get_mut();
                *newest = seen.generation.max(*newest);
            }
            Entry::Vacant(_) if is_full => return false,
            Entry::Vacant(place) => drop(place.insert(seen.generation)),
        }
        true
    }

    /// The newest generation of a session that waits to be written; 0 if there is none.
    pub fn newest(&self, session: SessionId) -> i64 {
        self.waiting().get(&session).copied().unwrap_or_default()
    }

    /// At most `limit` of those that wait. They go on waiting until they are written, so that [`newest`](Self::newest)
    /// knows them meanwhile.
    pub fn waiting_at_most(&self, limit: usize) -> Vec<SeenGeneration> {
        let waiting = self.waiting();
        waiting
            .iter()
            .take(limit)
            .map(|(session, generation)| SeenGeneration { session: *session, generation: *generation })
            .collect()
    }

    /// These are written.
    pub fn written(&self, written: &[SeenGeneration]) {
        let mut waiting = self.waiting();
        for seen in written {
            if let Entry::Occupied(newest) = waiting.entry(seen.session)
                && *newest.get() <= seen.generation
            {
                newest.remove();
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<SessionId, i64>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn seen(session: u128, generation: i64) -> SeenGeneration {
        SeenGeneration { session: SessionId(Uuid::from_u128(session)), generation }
    }

    #[test]
    fn the_newest_generation_waits_until_it_is_written() {
        let generations = SeenGenerations::default();
        for generation in [2, 3, 1] {
            assert!(generations.note(seen(1, generation)));
        }
        let batch = generations.waiting_at_most(10);
        assert_eq!(batch, [seen(1, 3)]);
        assert_eq!(generations.newest(seen(1, 0).session), 3, "while it is written, too");
        generations.note(seen(1, 4));
        generations.written(&batch);
        assert_eq!(generations.newest(seen(1, 0).session), 4, "this came meanwhile");
        generations.written(&[seen(1, 4)]);
        assert_eq!(generations.newest(seen(1, 0).session), 0);
    }

    #[test]
    fn there_is_room_for_a_bounded_number_of_sessions() {
        let generations = SeenGenerations::default();
        for session in 0..MOST_WAITING as u128 {
            assert!(generations.note(seen(session, 1)));
        }
        assert!(!generations.note(seen(u128::MAX, 1)));
        assert!(generations.note(seen(0, 2)), "a session that waits already needs no room");
        generations.written(&generations.waiting_at_most(1));
        assert!(generations.note(seen(u128::MAX, 1)));
    }
}
