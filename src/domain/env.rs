//! Time and randomness. Both are passed in, so that tests can move the clock. `clippy.toml` bans every other source.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use time::OffsetDateTime;
use uuid::Uuid;

use crate::error::Error;

/// A source of the current time.
pub trait Clock: Send + Sync + 'static {
    /// The current time in UTC.
    fn now(&self) -> OffsetDateTime;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock that all other code asks")]
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }
}

/// A clock for tests. It stands still until it is moved.
#[derive(Debug)]
pub struct ManualClock(Mutex<OffsetDateTime>);

impl ManualClock {
    pub fn new(now: OffsetDateTime) -> Self {
        Self(Mutex::new(now))
    }

    /// Moves the clock; a negative duration moves it back.
    pub fn advance(&self, by: time::Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += by;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> OffsetDateTime {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A clock whose time is corrected.
struct CorrectedClock<F> {
    clock: Arc<dyn Clock>,
    correct: F,
}

impl<F: Fn(OffsetDateTime) -> OffsetDateTime + Send + Sync + 'static> Clock for CorrectedClock<F> {
    fn now(&self) -> OffsetDateTime {
        (self.correct)(self.clock.now())
    }
}

/// When the caller stops waiting. Work that cannot finish by then is dropped, not done late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

/// The clock and the source of randomness that the domain works with.
#[derive(Clone)]
pub struct Env {
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env").finish_non_exhaustive()
    }
}

impl Env {
    /// The machine's clock and the operating system's randomness.
    pub fn system() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// A given clock and the operating system's randomness.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self { clock }
    }

    /// The same, with a clock that is corrected: `correct` makes of the time of this machine the time that all replicas
    /// share.
    #[must_use]
    pub fn corrected(self, correct: impl Fn(OffsetDateTime) -> OffsetDateTime + Send + Sync + 'static) -> Self {
        Self::with_clock(Arc::new(CorrectedClock { clock: self.clock, correct }))
    }

    /// The current time in whole microseconds. PostgreSQL stores no finer unit, so a time reads back as it was written.
    pub fn now(&self) -> OffsetDateTime {
        let now = self.clock.now();
        now.replace_nanosecond(now.nanosecond() / 1_000 * 1_000).unwrap_or(now)
    }

    /// Unpredictable bytes, fit for keys and salts.
    pub fn random<const N: usize>(&self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        aws_lc_rs::rand::fill(&mut bytes)
            .map_err(|_| Error::internal("the operating system provided no randomness"))?;
        Ok(bytes)
    }

    /// A new UUIDv7 (RFC 9562 §5.7): ordered by time, 74 random bits.
    pub fn uuid(&self) -> Result<Uuid, Error> {
        let milliseconds = u64::try_from(self.now().unix_timestamp_nanos() / 1_000_000).map_err(Error::internal)?;
        Ok(uuid::Builder::from_unix_timestamp_millis(milliseconds, &self.random()?).into_uuid())
    }
}
