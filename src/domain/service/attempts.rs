//! Password attempts: each is limited by client and by account, and has a place with the hasher, before anything is
//! spent on it.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use crate::{
    domain::{
        account::Email,
        admission::{Applicant, Place},
        env::Deadline,
        hasher::Verification,
        ids::{ActorId, UserId},
        password::Password,
        ports::{Credentials, LoginAttempt, LoginStart, Reservation, Store},
        session::Client,
        throttle::AttemptSubject,
    },
    error::Error,
};

use super::Service;

/// The shortest pause before a caller asks again, while so many attempts at its account are under way that one more
/// could be one too many.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// A reserved attempt. One that is dropped before it is settled is given back, so that neither a busy machine nor
/// somebody who cancels calls keeps the owner of an account out.
pub(super) struct Attempt {
    attempt: LoginAttempt,
    /// Taken when it is settled.
    store: Option<Arc<dyn Store>>,
}

impl Attempt {
    /// The attempt, to be settled by a step that does more than that.
    pub(super) fn into_subject(mut self) -> AttemptSubject {
        self.store = None;
        self.attempt.subject
    }

    /// The password was right, and no session is opened.
    pub(super) async fn succeeded(mut self) -> Result<(), Error> {
        match self.store.take() {
            Some(store) => Ok(store.attempt_succeeded(self.attempt.subject).await?),
            None => Ok(()),
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // In a task of its own: the future that drops this may be dropped itself.
        let (Some(store), Ok(runtime)) = (self.store.take(), Handle::try_current()) else {
            return;
        };
        let subject = self.attempt.subject;
        runtime.spawn(async move {
            if let Err(error) = store.attempt_abandoned(subject).await {
                tracing::debug!(%error, "an abandoned attempt could not be given back: it is forgotten after a while");
            }
        });
    }
}

impl Service {
    /// Takes a place for a password of this client: before the first statement, because a refusal must cost nothing. It
    /// counts against the client's limit.
    pub(super) async fn admit(
        &self,
        client: Option<IpAddr>,
        account: Option<AttemptSubject>,
        deadline: Deadline,
    ) -> Result<Place, Error> {
        // Nobody waits for a hash that a database that is down makes useless.
        self.store.ensure_reachable()?;
        self.login_limiter.check(client).map_err(|retry_after| throttled("client", retry_after))?;
        self.hasher.admit(Applicant { client, account }, deadline).await
    }

    /// Reserves an attempt at the password of an address, and looks its account up. `subject` stands for the address.
    pub(super) async fn start_login(
        &self,
        email: &Email,
        subject: AttemptSubject,
        deadline: Deadline,
    ) -> Result<(Attempt, Option<Credentials>), Error> {
        let attempt = self.attempt(subject);
        let patience = self.patience(deadline);
        let account = loop {
            match self.store.start_login(attempt, email).await? {
                LoginStart::Reserved(account) => break account,
                LoginStart::Blocked { retry_after } => return Err(throttled("account", retry_after)),
                LoginStart::Busy => patience.pause().await?,
            }
        };
        Ok((self.reserved(attempt), account))
    }

    /// Reserves an attempt at the password of an account that has been looked up.
    pub(super) async fn reserve_attempt(&self, email: &Email, deadline: Deadline) -> Result<Attempt, Error> {
        let attempt = self.attempt(self.login_attempts.subject(email));
        let patience = self.patience(deadline);
        loop {
            match self.store.reserve_attempt(attempt).await? {
                Reservation::Reserved => return Ok(self.reserved(attempt)),
                Reservation::Blocked { retry_after } => return Err(throttled("account", retry_after)),
                Reservation::Busy => patience.pause().await?,
            }
        }
    }

    /// The password of a reserved attempt was wrong, or its account may not log in.
    pub(super) async fn attempt_failed(
        &self,
        mut attempt: Attempt,
        user: Option<UserId>,
        actor: Option<ActorId>,
        client: &Client,
    ) -> Result<(), Error> {
        let context = self.audit_context(actor, client.ip)?;
        match attempt.store.take() {
            Some(store) => Ok(store.attempt_failed(attempt.attempt, user, context).await?),
            None => Ok(()),
        }
    }

    /// Verifies the password of an account that has been looked up. A wrong one counts as a failed login.
    pub(super) async fn verify_password(
        &self,
        place: &Place,
        account: &Credentials,
        password: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let user = &account.user;
        let attempt = self.reserve_attempt(&user.email, deadline).await?;
        match self.hasher.verify(place, password, Some(account.password_hash.clone()), deadline).await? {
            Verification::Match { rehash: _ } => attempt.succeeded().await,
            Verification::Mismatch => {
                self.attempt_failed(attempt, Some(user.id), Some(user.id.into()), client).await?;
                Err(Error::InvalidCredentials)
            }
        }
    }

    fn attempt(&self, subject: AttemptSubject) -> LoginAttempt {
        LoginAttempt { subject, policy: self.login_attempts.policy, now: self.env.now() }
    }

    fn reserved(&self, attempt: LoginAttempt) -> Attempt {
        Attempt { attempt, store: Some(Arc::clone(&self.store)) }
    }

    fn patience(&self, deadline: Deadline) -> Patience {
        Patience {
            until: deadline.0,
            // The attempts that are under way take about as long.
            pause: self.hasher.hash_time().max(BUSY_PAUSE),
        }
    }
}

/// How often a caller asks again while attempts at its account are under way, and for how long. Those who wait have
/// places, of which an account has only its share.
struct Patience {
    until: Instant,
    pause: Duration,
}

impl Patience {
    async fn pause(&self) -> Result<(), Error> {
        if Instant::now() + self.pause >= self.until {
            return Err(Error::Overloaded { retry_after: self.pause });
        }
        tokio::time::sleep(self.pause).await;
        Ok(())
    }
}

fn throttled(limit: &'static str, retry_after: Duration) -> Error {
    metrics::counter!("postern_logins_throttled_total", "limit" => limit).increment(1);
    Error::Throttled { retry_after }
}
