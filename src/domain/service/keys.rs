//! Rotates the signing keys, and what operators do about them. Every replica does what is due; of two that do the same at the
//! same time, one wins.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    domain::{
        audit::Action,
        key_schedule::{self, KeyState, KeyStep},
        keyring::{KeyRotation, ListedKey},
        ports::{KeyChange, KeyEdit, SealedSigningKey},
    },
    error::{Error, StoreError},
};

use super::Service;

/// The shortest time between two readings of the keys that tokens with unknown keys cause.
const UNKNOWN_KEY_PAUSE: Duration = Duration::from_secs(5);
/// The pause after the keys could not be read.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How often a change is tried that other replicas get ahead of.
const ATTEMPTS: u32 = 10;

impl Service {
    /// Reads the keys and does what is due, for ever: at an interval, when a key was revoked, and when a token names a key
    /// that is not known.
    pub async fn run_key_rotation(self: Arc<Self>) {
        loop {
            let pause = match self.advance_keys().await {
                Ok(()) => {
                    metrics::counter!("postern_signing_key_reads_total", "outcome" => "read").increment(1);
                    self.keyring.policy.schedule.reread(&self.keyring.stored())
                }
                Err(error) => {
                    metrics::counter!("postern_signing_key_reads_total", "outcome" => "failed").increment(1);
                    let cause = error.for_operators();
                    // That the database is down is logged elsewhere.
                    if matches!(error, Error::StoreUnavailable(_)) {
                        tracing::debug!(cause, "the signing keys could not be read");
                    } else {
                        tracing::error!(cause, "the signing keys could not be read");
                    }
                    RETRY_PAUSE
                }
            };
            self.measure_signing_key();
            let unknown_named = async {
                tokio::time::sleep(UNKNOWN_KEY_PAUSE).await;
                self.keyring.unknown_named().await;
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.keyring.key_revoked() => {}
                () = unknown_named => {}
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "an age is far smaller than 2^52 seconds")]
    fn measure_signing_key(&self) {
        let now = self.env.now();
        let since = key_schedule::signing(&self.keyring.stored(), now).and_then(key_schedule::signs_since);
        let age = since.map_or(0, |since| (now - since).whole_seconds());
        metrics::gauge!("postern_signing_key_age_seconds").set(age as f64);
    }

    /// Reads the keys and does what is due now.
    pub async fn advance_keys(&self) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let keys = self.read_keys().await?;
            let Some(step) = self.keyring.policy.schedule.due(&keys, self.env.now()) else {
                return Ok(());
            };
            self.take_step(keys, step).await?;
        }
        Ok(())
    }

    async fn read_keys(&self) -> Result<Vec<SealedSigningKey>, Error> {
        let asked_at = Instant::now();
        let stored = self.store.signing_keys().await?;
        self.keyring.install(stored.clone(), asked_at)?;
        // A key can have been revoked since they were read.
        self.keyring.drop_revoked(|id| self.revocations.has(id));
        Ok(stored)
    }

    /// Takes a step that was decided from these keys. `false`: they are others by now.
    async fn take_step(&self, keys: Vec<SealedSigningKey>, step: KeyStep) -> Result<bool, Error> {
        let (edit, event) = match step {
            KeyStep::Add => (KeyEdit::Add(self.new_key(None).await?), None),
            KeyStep::Schedule { kid, sign_time } => {
                let time = sign_time.format(&Rfc3339).map_err(Error::internal)?;
                let event = (Action::SigningKeyScheduled, format!("{kid} signs from {time}"));
                (KeyEdit::Schedule { kid, sign_time }, Some(event))
            }
            KeyStep::Forget { kid } => (KeyEdit::Forget { kid }, None),
        };
        self.change_keys(keys, vec![edit], event).await
    }

    async fn change_keys(
        &self,
        expected: Vec<SealedSigningKey>,
        edits: Vec<KeyEdit>,
        event: Option<(Action, String)>,
    ) -> Result<bool, Error> {
        if let Some((action, detail)) = &event {
            tracing::info!(action = action.as_str(), detail, "the signing keys change");
        }
        let change = KeyChange { expected, edits, event, context: self.audit_context(None, None)? };
        Ok(self.store.change_signing_keys(change).await?)
    }

    /// Makes a key. That of RSA takes up to a second of CPU, so it happens beside the calls.
    async fn new_key(&self, sign_time: Option<OffsetDateTime>) -> Result<SealedSigningKey, Error> {
        let (keyring, env) = (Arc::clone(&self.keyring), self.env.clone());
        let made = tokio::task::spawn_blocking(move || keyring.generate(&env, sign_time)).await;
        made.map_err(Error::internal)?
    }

    /// Makes the next key now, if there is none, and brings it forward as far as verifiers allow that keep the keys as long
    /// as they may.
    pub async fn rotate_keys(&self) -> Result<KeyRotation, Error> {
        for _ in 0..ATTEMPTS {
            let keys = self.read_keys().await?;
            let now = self.env.now();
            if let Some(step) = self.keyring.policy.schedule.bring_forward(&keys, now) {
                self.take_step(keys, step).await?;
                continue;
            }
            let next = keys.iter().find(|key| key_schedule::state(&keys, key, now) == KeyState::Next);
            if let Some((next, sign_time)) = next.and_then(|key| Some((key, key_schedule::signs_since(key)?))) {
                return Ok(KeyRotation { kid: next.kid.clone(), sign_time });
            }
        }
        Err(busy())
    }

    /// Withdraws a key: every replica refuses its tokens within a second, and it is no longer published. If it signed,
    /// another key signs at once: the next one, or a new one, which verifiers may not know for as long as they keep the keys.
    pub async fn revoke_key(&self, kid: &str) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let keys = self.read_keys().await?;
            let now = self.env.now();
            let key = keys.iter().find(|key| key.kid == kid).ok_or(Error::NotFound("signing key"))?;
            let mut edits = vec![KeyEdit::Revoke { kid: kid.to_owned() }];
            if key_schedule::state(&keys, key, now) == KeyState::Signing {
                let next = keys.iter().filter(|key| key_schedule::state(&keys, key, now) == KeyState::Next);
                edits.push(match next.min_by_key(|key| key.create_time) {
                    Some(next) => KeyEdit::Schedule { kid: next.kid.clone(), sign_time: now },
                    None => KeyEdit::Add(self.new_key(Some(now)).await?),
                });
            }
            let event = Some((Action::SigningKeyRevoked, kid.to_owned()));
            if self.change_keys(keys, edits, event).await? {
                self.read_keys().await?;
                return Ok(());
            }
        }
        Err(busy())
    }

    /// Encrypts one signing key with the current master key that is still encrypted with the previous one, and returns its
    /// `kid`. `None`: that is done.
    pub async fn rewrap_next_key(&self) -> Result<Option<String>, Error> {
        for _ in 0..ATTEMPTS {
            let keys = self.read_keys().await?;
            let mut resealed = None;
            for key in &keys {
                if let Some(sealed_private_key) = self.keyring.reseal(key, &self.env)? {
                    resealed = Some((key.kid.clone(), sealed_private_key));
                    break;
                }
            }
            let Some((kid, sealed_private_key)) = resealed else {
                return Ok(None);
            };
            let event = Some((Action::SigningKeyRewrapped, kid.clone()));
            let edit = KeyEdit::Reseal { kid: kid.clone(), sealed_private_key };
            if self.change_keys(keys, vec![edit], event).await? {
                return Ok(Some(kid));
            }
        }
        Err(busy())
    }

    /// The signing keys with their states.
    pub fn list_keys(&self) -> Vec<ListedKey> {
        self.keyring.list(self.env.now())
    }
}

fn busy() -> Error {
    StoreError::Unavailable("other processes changed the signing keys at the same time: try again".into()).into()
}
