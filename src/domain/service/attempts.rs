//! Password attempts: each is limited by client and by account before anything is hashed for it.

use std::time::Duration;

use crate::{
    domain::{
        account::Email,
        env::Deadline,
        hasher::Verification,
        password::{Password, PasswordHash},
        ports::{LoginAttempt, Reservation},
        session::Client,
        throttle::AttemptSubject,
    },
    error::Error,
};

use super::Service;

impl Service {
    /// Reserves an attempt at the password of an address, before anything is spent on it.
    pub(super) async fn reserve_attempt(&self, email: &Email, client: &Client) -> Result<AttemptSubject, Error> {
        self.login_limiter.check(client.ip).map_err(|retry_after| throttled("client", retry_after))?;
        let subject = self.login_attempts.subject(email);
        let attempt = LoginAttempt { subject, policy: self.login_attempts.policy, now: self.env.now() };
        match self.store.reserve_attempt(attempt).await? {
            Reservation::Reserved => Ok(subject),
            Reservation::Blocked { retry_after } => Err(throttled("account", retry_after)),
        }
    }
    /// Verifies the password of a reserved attempt. If the hasher rejects it (queue full, deadline passed), the attempt
    /// does not count: a busy machine must not lock anybody out.
    pub(super) async fn verify_attempt(
        &self,
        subject: AttemptSubject,
        password: Password,
        stored: Option<PasswordHash>,
        deadline: Deadline,
    ) -> Result<Verification, Error> {
        let verification = self.hasher.verify(password, stored, deadline).await;
        if verification.is_err()
            && let Err(error) = self.store.attempt_abandoned(subject).await
        {
            tracing::debug!(%error, "an abandoned attempt could not be taken back and counts as a failure");
        }
        verification
    }
}

fn throttled(limit: &'static str, retry_after: Duration) -> Error {
    metrics::counter!("postern_logins_throttled_total", "limit" => limit).increment(1);
    Error::Throttled { retry_after }
}
