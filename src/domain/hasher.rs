//! The bounded Argon2id pool. `admission.rs` decides who gets a hash; here it is computed.
//!
//! The pool has a fixed number of threads, and each allocates its memory ("arena") once, with its first hash. The
//! memory of the process therefore stays at base + threads × arena under any load. The threads have a lower
//! operating-system priority than those that serve RPCs: logins may saturate the machine, and a token check stays fast.
//! Work whose caller has gone, or whose deadline has passed, is dropped without hashing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use argon2::{Algorithm, Argon2, Block, Params, Version, password_hash::phc};
use tokio::sync::oneshot;

use crate::{error::Error, trace::Span};

use super::{
    admission::{Admission, Applicant, Place},
    env::{Deadline, Env},
    password::{NewPassword, Password, PasswordHash},
};

/// Length of a salt in bytes (RFC 9106 §3.1 recommends 16).
const SALT_BYTES: usize = 16;
/// Length of a hash in bytes.
const HASH_BYTES: usize = 32;
/// The most memory that a stored hash may need if the configuration asks for less, in KiB. A hash that needs more is
/// refused.
const STORED_MEMORY_CEILING_KIB: u32 = 64 * 1024;
/// The most iterations that a stored hash may need if the configuration asks for fewer.
const STORED_ITERATIONS_CEILING: u32 = 16;
/// The nice(2) value of the hashing threads: the lowest priority. On two cores that logins saturate, the p99 of GetMe
/// was 3.5 ms at nice 10 and 1.0 ms at nice 19, with as many logins.
const NICENESS: i32 = 19;

/// The queue has room for more jobs than there are places, because the place of a caller who has gone is free before a
/// thread has dropped its job.
const JOBS_PER_PLACE: usize = 4;

/// The Argon2id parameters, and how many hashes may run and wait.
#[derive(Debug, Clone)]
pub struct HasherConfig {
    pub memory_kib: u32,
    pub iterations: u32,
    /// The number of hashes that run at the same time.
    pub threads: usize,
    /// The number of hashes that may wait, over all threads.
    pub queue: usize,
    /// The most hashes that run or wait for one account.
    pub attempts_per_account: usize,
}

/// The result of verifying a password.
#[derive(Debug, PartialEq, Eq)]
pub enum Verification {
    /// The password is right. `rehash` is its hash with the current parameters, if the stored hash has others.
    Match {
        rehash: Option<PasswordHash>,
    },
    Mismatch,
}

/// A handle to the pool; the threads end when the last one is dropped.
#[derive(Clone)]
pub struct Hasher {
    queue: flume::Sender<Job>,
    threads: usize,
    admission: Arc<Admission>,
    /// A running mean of the time of one hash, in microseconds. `RetryInfo` is computed from it.
    hash_time: Arc<AtomicU64>,
    /// What the dearest stored hash costs, as [`cost_of`]; 0 if that is not known.
    dearest: Arc<AtomicU64>,
    params: Params,
    env: Env,
    /// Verified in place of the hash of an unknown account. It has the current parameters and matches no password.
    dummy: PasswordHash,
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hasher").field("threads", &self.threads).finish_non_exhaustive()
    }
}

struct Job {
    task: Task,
    queued: Instant,
    deadline: Deadline,
    reply: oneshot::Sender<Result<Outcome, Error>>,
}

enum Task {
    Hash { new: NewPassword, salt: [u8; SALT_BYTES] },
    Verify { password: Password, stored: PasswordHash, rehash_salt: [u8; SALT_BYTES] },
}

enum Outcome {
    Hashed(PasswordHash),
    Verified(Verification),
}

impl Hasher {
    /// Starts the pool. Fails if the parameters are outside what Argon2 allows or a thread cannot be started.
    pub fn start(config: &HasherConfig, env: Env) -> Result<Self, Error> {
        let params = Params::new(config.memory_kib, config.iterations, 1, Some(HASH_BYTES)).map_err(Error::internal)?;
        // Random bytes of the right size; they are not the hash of any password.
        let dummy = encode_phc(&params, &env.random::<SALT_BYTES>()?, &env.random::<HASH_BYTES>()?)?;
        let places = config.queue.saturating_add(config.threads);
        let admission = Admission::new(places, config.attempts_per_account);
        let (queue, jobs) = flume::bounded(places.saturating_mul(JOBS_PER_PLACE));
        let (hash_time, dearest) = (Arc::new(AtomicU64::new(50_000)), Arc::<AtomicU64>::default());
        for number in 0..config.threads {
            let worker = Worker {
                params: params.clone(),
                arena: Vec::new(),
                admission: Arc::clone(&admission),
                hash_time: Arc::clone(&hash_time),
                dearest: Arc::clone(&dearest),
            };
            let jobs = jobs.clone();
            thread::Builder::new()
                .name(format!("hasher-{number}"))
                .spawn(move || worker.run(&jobs))
                .map_err(Error::internal)?;
        }
        Ok(Self { queue, threads: config.threads, admission, hash_time, dearest, params, env, dummy })
    }

    /// A hash with the current parameters that matches no password.
    pub fn no_password(&self) -> PasswordHash {
        self.dummy.clone()
    }

    /// Takes a place, before anything is spent on a call that needs a hash.
    pub async fn admit(&self, applicant: Applicant, deadline: Deadline) -> Result<Place, Error> {
        let per_hash = self.hash_time() / u32::try_from(self.threads).unwrap_or(u32::MAX).max(1);
        let waiting = Span::part("wait to hash");
        let place = waiting.run(self.admission.take(applicant, deadline, per_hash)).await;
        report_depth(self.queue.len(), &self.admission);
        place
    }

    /// Learns the parameters of stored passwords, from their PHC strings up to the salt. As long as some cost more than the
    /// current ones, every wrong password costs as much, so that the time does not tell which account has such a hash, or
    /// that there is an account.
    pub fn expect_stored(&self, parameters: &[String]) {
        let parsed = parameters.iter().filter_map(|text| phc::PasswordHash::new(text).ok());
        let allowed = parsed
            .filter_map(|phc| Params::try_from(&phc).ok())
            .filter(|params| is_within_ceilings(params, &self.params));
        self.dearest.store(allowed.map(|params| cost_of(&params)).max().unwrap_or(0), Ordering::Relaxed);
    }

    /// How long one hash takes on one thread, by a running mean.
    pub fn hash_time(&self) -> Duration {
        Duration::from_micros(self.hash_time.load(Ordering::Relaxed))
    }

    /// Judges a new password and hashes it.
    pub async fn hash(&self, place: &Place, new: NewPassword, deadline: Deadline) -> Result<PasswordHash, Error> {
        let task = Task::Hash { new, salt: self.env.random()? };
        match Span::part("hash password").run(self.submit(place, task, deadline)).await? {
            Outcome::Hashed(hash) => Ok(hash),
            Outcome::Verified(_) => Err(Error::internal("the hasher verified what it was to hash")),
        }
    }

    /// Verifies a password against the stored hash of its account, or against the dummy if there is no account. Both
    /// take the same path and cost the same. Without an account the result is always a mismatch.
    pub async fn verify(
        &self,
        place: &Place,
        password: Password,
        stored: Option<PasswordHash>,
        deadline: Deadline,
    ) -> Result<Verification, Error> {
        let account_exists = stored.is_some();
        let stored = stored.unwrap_or_else(|| self.dummy.clone());
        let task = Task::Verify { password, stored, rehash_salt: self.env.random()? };
        match Span::part("verify password").run(self.submit(place, task, deadline)).await? {
            Outcome::Verified(verification) if account_exists => Ok(verification),
            Outcome::Verified(_) => Ok(Verification::Mismatch),
            Outcome::Hashed(_) => Err(Error::internal("the hasher hashed what it was to verify")),
        }
    }

    /// Whoever has a place finds room in the queue, unless it is full of the work of callers who have gone.
    async fn submit(&self, _place: &Place, task: Task, deadline: Deadline) -> Result<Outcome, Error> {
        let (reply, answer) = oneshot::channel();
        let submitted = self.queue.try_send(Job { task, queued: Instant::now(), deadline, reply });
        report_depth(self.queue.len(), &self.admission);
        match submitted {
            Ok(()) => answer.await.map_err(|_| Error::internal("a hasher thread died"))?,
            Err(flume::TrySendError::Full(_)) => Err(Error::Overloaded { retry_after: self.hash_time() }),
            Err(flume::TrySendError::Disconnected(_)) => Err(Error::internal("the hasher threads are gone")),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a queue is far shorter than 2^52")]
fn report_depth(queued: usize, admission: &Admission) {
    metrics::gauge!("postern_hash_queue_depth").set((queued + admission.waiting()) as f64);
}

/// One thread of the pool, with its arena.
struct Worker {
    params: Params,
    arena: Vec<Block>,
    admission: Arc<Admission>,
    hash_time: Arc<AtomicU64>,
    dearest: Arc<AtomicU64>,
}

impl Worker {
    fn run(mut self, jobs: &flume::Receiver<Job>) {
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::warn!(%error, "a hashing thread could not lower its priority: logins may slow other calls down");
        }
        while let Ok(job) = jobs.recv() {
            report_depth(jobs.len(), &self.admission);
            if job.reply.is_closed() {
                continue;
            }
            let started = Instant::now();
            metrics::histogram!("postern_hash_wait_seconds").record(started.duration_since(job.queued));
            let outcome = if started >= job.deadline.0 {
                Err(Error::DeadlineExceeded)
            } else {
                let outcome = self.perform(job.task);
                metrics::histogram!("postern_hash_duration_seconds").record(started.elapsed());
                outcome
            };
            // Fails if the caller has gone meanwhile, and then nobody needs the answer.
            let _ = job.reply.send(outcome);
        }
    }

    fn perform(&mut self, task: Task) -> Result<Outcome, Error> {
        match task {
            Task::Hash { new, salt } => {
                new.check_strength()?;
                self.hash(new.password(), &salt).map(Outcome::Hashed)
            }
            Task::Verify { password, stored, rehash_salt } => {
                self.verify(&password, &stored, &rehash_salt).map(Outcome::Verified)
            }
        }
    }

    fn hash(&mut self, password: &Password, salt: &[u8]) -> Result<PasswordHash, Error> {
        let params = self.params.clone();
        let output = self.argon2id(&params, password, salt)?;
        encode_phc(&params, salt, &output)
    }

    fn verify(
        &mut self,
        password: &Password,
        stored: &PasswordHash,
        rehash_salt: &[u8],
    ) -> Result<Verification, Error> {
        let stored = StoredHash::parse(stored, &self.params)?;
        let computed = self.argon2id(&stored.params, password, &stored.salt)?;
        let matches = aws_lc_rs::constant_time::verify_slices_are_equal(&computed, &stored.hash).is_ok();
        if matches {
            let is_current = stored.has_parameters(&self.params);
            let rehash = if is_current { None } else { Some(self.hash(password, rehash_salt)?) };
            return Ok(Verification::Match { rehash });
        }
        self.pad(&stored.params, password, rehash_salt)?;
        Ok(Verification::Mismatch)
    }

    /// Spends the difference between what the dearest hash costs, stored or with the current parameters, and what was
    /// spent. A wrong password then takes as long for every account as for an unknown one. Argon2's time is proportional
    /// to memory × iterations.
    fn pad(&mut self, spent: &Params, password: &Password, salt: &[u8]) -> Result<(), Error> {
        let dearest = cost_of(&self.params).max(self.dearest.load(Ordering::Relaxed));
        match padding(dearest.saturating_sub(cost_of(spent)), &self.params)? {
            Some(params) => self.argon2id(&params, password, salt).map(drop),
            None => Ok(()),
        }
    }

    fn argon2id(&mut self, params: &Params, password: &Password, salt: &[u8]) -> Result<[u8; HASH_BYTES], Error> {
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.clone());
        let mut output = [0; HASH_BYTES];
        let (blocks, started) = (params.block_count(), Instant::now());
        // Allocated for the first hash and kept: a replica that has hashed nothing yet needs no memory for it.
        if self.arena.is_empty() {
            self.arena = vec![Block::default(); self.params.block_count()];
        }
        // A hash from before the memory setting was lowered needs more than the arena, up to the ceiling.
        let mut larger;
        let arena = if let Some(arena) = self.arena.get_mut(..blocks) {
            arena
        } else {
            larger = vec![Block::default(); blocks];
            larger.as_mut_slice()
        };
        argon2
            .hash_password_into_with_memory(password.as_bytes(), salt, &mut output, arena)
            .map_err(Error::internal)?;
        if params == &self.params {
            self.record(started.elapsed());
        }
        Ok(output)
    }

    /// Adds one measurement to the running mean. Threads may overwrite each other: it is an estimate.
    fn record(&self, elapsed: Duration) {
        let mean = self.hash_time.load(Ordering::Relaxed);
        let sample = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        self.hash_time.store((mean.saturating_mul(7).saturating_add(sample)) / 8, Ordering::Relaxed);
    }
}

/// The parameters of a hash with this cost that needs no more memory than the live ones. `None` if the cost is too small.
fn padding(cost: u64, live: &Params) -> Result<Option<Params>, Error> {
    let iterations = cost.div_ceil(u64::from(live.m_cost())).max(1);
    let memory = u32::try_from(cost / iterations).map_err(Error::internal)?;
    if memory < Params::MIN_M_COST {
        return Ok(None);
    }
    let iterations = u32::try_from(iterations).map_err(Error::internal)?;
    Params::new(memory, iterations, 1, Some(HASH_BYTES)).map(Some).map_err(Error::internal)
}

/// What a hash with these parameters costs, in KiB × iterations.
fn cost_of(params: &Params) -> u64 {
    u64::from(params.m_cost()) * u64::from(params.t_cost())
}

fn is_within_ceilings(params: &Params, live: &Params) -> bool {
    params.m_cost() <= live.m_cost().max(STORED_MEMORY_CEILING_KIB)
        && params.t_cost() <= live.t_cost().max(STORED_ITERATIONS_CEILING)
        && params.p_cost() <= 16
}

/// A parsed PHC string whose cost is within the ceilings.
struct StoredHash {
    params: Params,
    salt: Vec<u8>,
    hash: [u8; HASH_BYTES],
}

impl StoredHash {
    fn parse(stored: &PasswordHash, live: &Params) -> Result<Self, Error> {
        let broken = |what: &str| Error::internal(format!("a stored password hash {what}"));
        let phc = phc::PasswordHash::new(stored.as_str()).map_err(|_| broken("is not a PHC string"))?;
        if phc.algorithm != Algorithm::Argon2id.ident() {
            return Err(broken("is not Argon2id"));
        }
        if phc.version != Some(Version::V0x13.into()) {
            return Err(broken("is not of Argon2 version 19"));
        }
        let params = Params::try_from(&phc).map_err(|_| broken("has parameters outside what Argon2 allows"))?;
        if !is_within_ceilings(&params, live) {
            return Err(broken("demands more memory or time than the ceiling allows"));
        }
        let salt = phc.salt.ok_or_else(|| broken("has no salt"))?;
        let hash = phc.hash.ok_or_else(|| broken("has no hash"))?;
        let hash = hash.as_bytes().try_into().map_err(|_| broken("is not 32 bytes long"))?;
        Ok(Self { params, salt: salt.as_ref().to_vec(), hash })
    }

    fn has_parameters(&self, live: &Params) -> bool {
        (self.params.m_cost(), self.params.t_cost(), self.params.p_cost())
            == (live.m_cost(), live.t_cost(), live.p_cost())
            && self.salt.len() == SALT_BYTES
    }
}

fn encode_phc(params: &Params, salt: &[u8], output: &[u8]) -> Result<PasswordHash, Error> {
    let phc = phc::PasswordHash {
        algorithm: Algorithm::Argon2id.ident(),
        version: Some(Version::V0x13.into()),
        params: params.try_into().map_err(|error| Error::internal(format!("{error}")))?,
        salt: Some(phc::Salt::new(salt).map_err(Error::internal)?),
        hash: Some(phc::Output::new(output).map_err(Error::internal)?),
    };
    Ok(PasswordHash::from_phc(phc.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(memory_kib: u32, iterations: u32) -> Params {
        Params::new(memory_kib, iterations, 1, Some(HASH_BYTES)).expect("parameters")
    }

    #[test]
    fn a_padding_costs_the_difference_and_needs_no_more_memory_than_a_hash() {
        let live = params(19_456, 2);
        for other in [params(19_456, 3), params(19_456, 16), params(64 * 1_024, 1), params(64 * 1_024, 16)] {
            let missing = cost_of(&other) - cost_of(&live);
            let padding = padding(missing, &live).expect("parameters").expect("a hash");
            assert!(padding.m_cost() <= live.m_cost(), "{padding:?}");
            assert!(cost_of(&padding).abs_diff(missing) <= missing / 100, "{padding:?} for {missing}");
        }
        assert!(padding(0, &live).expect("parameters").is_none());
    }

    #[test]
    fn the_dearest_stored_parameters_are_learnt_and_those_above_the_ceiling_are_not() {
        let config = HasherConfig { memory_kib: 64, iterations: 1, threads: 1, queue: 1, attempts_per_account: 1 };
        let hasher = Hasher::start(&config, Env::system()).expect("a pool");
        let learnt = |stored: &[&str]| {
            hasher.expect_stored(&stored.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
            hasher.dearest.load(Ordering::Relaxed)
        };
        let stored = ["$argon2id$v=19$m=19456,t=2,p=1", "$argon2id$v=19$m=64,t=1,p=1", "", "!"];
        assert_eq!(learnt(&stored), 19_456 * 2);
        assert_eq!(learnt(&["$argon2id$v=19$m=19456,t=99,p=1"]), 0, "it would be refused");
        assert_eq!(learnt(&[]), 0, "they are gone");
    }
}
