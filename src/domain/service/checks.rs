//! Decisions about requests that a proxy asks about. They cost CPU and memory, and no statement.

use std::{fmt, num::NonZeroU32};

use governor::{DefaultDirectRateLimiter, Quota};

use crate::domain::{
    demands::{Credential, Demands, InvalidDemands, Passing, Refusal},
    token::AccessTokenError,
};

use super::Service;

impl Service {
    /// Decides about a request. The token is checked as that of a call to Postern itself.
    pub fn check(
        &self,
        credential: Credential<'_>,
        demands: Result<Demands, InvalidDemands>,
    ) -> Result<Passing, Refusal> {
        let decided = demands
            .map_err(Refusal::Demands)
            .and_then(|demands| demands.decide(credential, |token| self.verified(token)));
        if let Err(Refusal::Demands(error)) = &decided
            && self.demand_warnings.is_due()
        {
            tracing::warn!(%error, "a proxy asks about requests with demands that are not understood: they are denied");
        }
        metrics::counter!(CHECKS, "outcome" => outcome(&decided)).increment(1);
        decided
    }
}

/// The log lines about demands that are not understood: ten a minute. There is one such request for each of a route that is
/// configured wrongly, and strangers may be able to send some.
pub struct DemandWarnings(DefaultDirectRateLimiter);

const WARNINGS_A_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(9);

impl Default for DemandWarnings {
    fn default() -> Self {
        Self(DefaultDirectRateLimiter::direct(Quota::per_minute(WARNINGS_A_MINUTE)))
    }
}

impl fmt::Debug for DemandWarnings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DemandWarnings")
    }
}

impl DemandWarnings {
    fn is_due(&self) -> bool {
        self.0.check().is_ok()
    }
}

/// The counter of decisions.
pub const CHECKS: &str = "postern_checks_total";
/// The outcome of a check that could not be decided.
pub const UNAVAILABLE: &str = "unavailable";

fn outcome(decided: &Result<Passing, Refusal>) -> &'static str {
    match decided {
        Ok(Passing::Caller(..)) => "allowed",
        Ok(Passing::Anonymous) => "anonymous",
        Err(Refusal::Token(AccessTokenError::RevocationUnknown)) => UNAVAILABLE,
        Err(Refusal::TokenMissing | Refusal::Token(_)) => "unauthenticated",
        Err(Refusal::RoleMissing | Refusal::EmailNotVerified | Refusal::NoService) => "forbidden",
        Err(Refusal::Demands(_)) => "misconfigured",
    }
}
