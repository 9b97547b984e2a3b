//! How long to wait before a call is repeated.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use crate::error::CallError;

/// The pause before the attempt after `failures` failures: as long as the server says, else doubling from 100 ms to 5 s. Up
/// to half of it is added at random, so that many clients do not come back at once.
pub(crate) fn pause(failures: u32, error: &CallError) -> Duration {
    let doubling = Duration::from_millis(100).saturating_mul(1 << failures.min(6)).min(Duration::from_secs(5));
    let base = error.retry_after.unwrap_or(doubling).min(Duration::from_secs(30));
    base + base.mul_f64(random() / 2.0)
}

/// A number from 0 to 1. The hasher of the standard library has random keys, and nothing here needs more.
fn random() -> f64 {
    let bits = RandomState::new().hash_one(0);
    #[expect(clippy::cast_precision_loss, reason = "a pause needs no more precision")]
    let fraction = bits as f64 / u64::MAX as f64;
    fraction
}
