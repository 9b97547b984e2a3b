//! The clock that all replicas share: the database's. Between two polls of the log it goes on by this machine's monotonic clock, which
//! nobody can set.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, Instant},
};

use time::OffsetDateTime;

use crate::{
    domain::env::{Clock as _, SystemClock},
    store::shared::{microseconds, span},
};

/// How far the clock of this machine may differ. Within that it is used: it runs more evenly than what is measured over a
/// network.
const TOLERANCE: time::Duration = time::Duration::seconds(2);

/// The database's clock, as it was measured last.
#[derive(Debug)]
pub(super) struct SharedClock {
    started: Instant,
    /// The time by the database when `started` was, in microseconds since the Unix epoch. `i64::MIN`: not measured yet.
    base: AtomicI64,
}

impl Default for SharedClock {
    fn default() -> Self {
        Self { started: Instant::now(), base: AtomicI64::new(i64::MIN) }
    }
}

impl SharedClock {
    /// Notes that the database said `time` in an answer that took so long, until now.
    pub(super) fn set(&self, time: OffsetDateTime, took: Duration) {
        let was_right = self.offset().abs() <= TOLERANCE;
        let since_start = self.started.elapsed().saturating_sub(took / 2);
        self.base.store(microseconds(time) - span(since_start), Ordering::Relaxed);
        let offset = self.offset();
        if was_right && offset.abs() > TOLERANCE {
            let seconds = offset.whole_seconds();
            tracing::warn!(seconds, "the clock of this machine is not that of the database, whose time is used");
        }
    }

    /// The shared time, when it is `now` by this machine.
    pub(super) fn correct(&self, now: OffsetDateTime) -> OffsetDateTime {
        let offset = self.offset();
        if offset.abs() > TOLERANCE { now.saturating_add(offset) } else { now }
    }

    /// How far the database's clock is ahead of this machine's.
    fn offset(&self) -> time::Duration {
        let base = self.base.load(Ordering::Relaxed);
        if base == i64::MIN {
            return time::Duration::ZERO;
        }
        let shared = base.saturating_add(span(self.started.elapsed()));
        time::Duration::microseconds(shared.saturating_sub(microseconds(SystemClock.now())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_database_is_used_where_it_differs() {
        let clock = SharedClock::default();
        let now = SystemClock.now();
        assert_eq!(clock.correct(now), now, "not measured");
        clock.set(now + TOLERANCE / 2, Duration::ZERO);
        assert_eq!(clock.correct(now), now);
        clock.set(now - time::Duration::days(1), Duration::ZERO);
        let corrected = clock.correct(now);
        assert!((corrected - (now - time::Duration::days(1))).abs() < TOLERANCE, "{corrected}");
    }
}
