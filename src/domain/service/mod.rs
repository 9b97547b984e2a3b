//! The service: every operation that a transport or the command line can ask for. It holds the collaborators and calls
//! the store; the types and the rules that it works with stand in the other files of the domain, which never name it.
//!
//! One file for each subject. Each operation takes values that are parsed already and returns domain values or an
//! [`Error`].

mod admin;
mod attempts;
pub mod checks;
mod counters;
mod email_change;
mod keys;
mod mail;
mod password_change;
mod purge;
mod revocations;
mod seen;
mod services;
mod sessions;
mod sign_up;
mod username_change;
pub mod watch;

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use crate::error::Error;

pub use self::counters::count_from_zero;

use super::{
    audit::AuditContext,
    demands::DemandWarnings,
    env::Env,
    hasher::Hasher,
    ids::{ActorId, AuditEventId, ServiceAccountId},
    keyring::Keyring,
    mail::MailPolicy,
    one_time::OneTimeTokens,
    page_token::PageTokens,
    password::PasswordPolicy,
    ports::Store,
    reserved::ReservedUsernames,
    revocation::Revocations,
    seen::SeenGenerations,
    service_account::VerifiedSecrets,
    session::SessionPolicy,
    streams::Streams,
    throttle::{LoginAttempts, RateLimiter},
    token::Tokens,
};

/// The service with its collaborators. A transport holds one of these and nothing below it.
pub struct Service {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) env: Env,
    pub(crate) tokens: Tokens,
    pub(crate) keyring: Arc<Keyring>,
    pub(crate) hasher: Hasher,
    pub(crate) passwords: Arc<PasswordPolicy>,
    pub(crate) reserved_usernames: ReservedUsernames,
    pub(crate) sessions: SessionPolicy,
    pub(crate) one_time: Arc<OneTimeTokens>,
    pub(crate) mails: MailPolicy,
    pub(crate) login_attempts: LoginAttempts,
    /// Password attempts of one client.
    pub(crate) login_limiter: RateLimiter,
    /// Sign-ups of one client.
    pub(crate) sign_up_limiter: RateLimiter,
    /// Tokens that one service revokes.
    pub(crate) token_revocation_limiter: RateLimiter<ServiceAccountId>,
    pub(crate) revocations: Revocations,
    pub(crate) seen: SeenGenerations,
    /// Secrets of services that were verified a moment ago.
    pub(crate) verified_secrets: VerifiedSecrets,
    pub(crate) pages: PageTokens,
    pub(crate) streams: Streams,
    /// How long audit rows are kept.
    pub(crate) audit_retention: Duration,
    /// Log lines about demands that are not understood.
    pub(crate) demand_warnings: DemandWarnings,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").finish_non_exhaustive()
    }
}

impl Service {
    /// The context of a step that runs now.
    fn audit_context(&self, actor: Option<ActorId>, client_ip: Option<IpAddr>) -> Result<AuditContext, Error> {
        let now = self.env.now();
        let event = AuditEventId(self.env.uuid()?);
        Ok(AuditContext { event, now, actor, client_ip, retain_until: now + self.tokens.max_access_token_lifetime() })
    }

    /// The context of a second event of the same step, which comes after the first in the audit log. Ids of the same
    /// millisecond have no order.
    fn audit_context_after(&self, first: &AuditContext) -> Result<AuditContext, Error> {
        loop {
            let event = AuditEventId(self.env.uuid()?);
            if event.0 > first.event.0 {
                return Ok(AuditContext { event, ..*first });
            }
        }
    }
}
