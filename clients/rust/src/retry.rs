//! How long to wait before a call is repeated.

use std::time::Duration;

use crate::error::CallError;

/// The pause before the attempt after `failures` failures: as long as the server says, else doubling from 100 ms to 5 s. Up
/// to half of it is added at random, so that many clients do not come back at once.
pub(crate) fn pause(failures: u32, error: &CallError) -> Duration {
    let doubling = Duration::from_millis(100).saturating_mul(1 << failures.min(6)).min(Duration::from_secs(5));
    let base = error.retry_after.unwrap_or(doubling).min(Duration::from_secs(30));
    base + base.mul_f64(fastrand::f64() / 2.0)
}
