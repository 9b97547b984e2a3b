//! Decisions about requests that a proxy asks about. They cost CPU and memory, and no statement.

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
