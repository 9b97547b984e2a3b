//! Tokens that were verified before: their signature need not be checked again.

use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::verifier::Verified;

/// Bounded; the least used tokens are forgotten.
#[derive(Debug)]
pub(crate) struct VerifiedTokens(Cache<Box<str>, Arc<Verified>>);

impl VerifiedTokens {
    pub(crate) fn new(capacity: usize) -> Self {
        Self(Cache::new(capacity))
    }

    pub(crate) fn get(&self, token: &str) -> Option<Arc<Verified>> {
        self.0.get(token)
    }

    pub(crate) fn insert(&self, token: &str, verified: &Arc<Verified>) {
        self.0.insert(token.into(), Arc::clone(verified));
    }
}
