//! Settings of the password policy and of password hashing.

use clap::Args;

use crate::domain::{hasher::HasherConfig, password::PasswordPolicy};

use super::error::ConfigError;

/// The password policy and the parameters of hashing.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Passwords")]
pub struct PasswordSettings {
    /// Memory of one Argon2id hash, in KiB
    #[arg(long, env = "POSTERN_ARGON2_MEMORY_KIB", default_value_t = 19_456, value_name = "KIB",
        value_parser = clap::value_parser!(u32).range(8..=1_048_576))]
    pub argon2_memory_kib: u32,
    /// Iterations of one Argon2id hash
    #[arg(long, env = "POSTERN_ARGON2_ITERATIONS", default_value_t = 2, value_name = "COUNT",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub argon2_iterations: u32,
    /// How many hashes are computed at the same time [default: the number of cores]
    #[arg(long, env = "POSTERN_HASH_THREADS", value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub hash_threads: Option<u16>,
    /// How many hashes may wait for a thread [default: 16 per thread]
    #[arg(long, env = "POSTERN_HASH_QUEUE", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub hash_queue: Option<u32>,
    /// Minimum length of a new password, in characters; NIST SP 800-63B-4 requires 15 if the password is the only
    /// factor
    #[arg(long, env = "POSTERN_PASSWORD_MIN_LENGTH", default_value_t = 8, value_name = "COUNT",
        value_parser = clap::value_parser!(u16).range(1..=256))]
    pub password_min_length: u16,
    /// Minimum zxcvbn score of a new password, from 0 (very easy to guess) to 4 (very hard to guess)
    #[arg(long, env = "POSTERN_PASSWORD_MIN_SCORE", default_value_t = 2, value_name = "SCORE",
        value_parser = clap::value_parser!(u8).range(0..=4))]
    pub password_min_score: u8,
}

impl PasswordSettings {
    /// Checks that the memory for hashing is within the limit of this process, in bytes. Otherwise the process would be
    /// killed by the first logins instead of by its start.
    pub fn validate(&self, limit: Option<u64>) -> Result<(), ConfigError> {
        let threads = u64::try_from(self.threads()).unwrap_or(u64::MAX);
        let needed = threads.saturating_mul(u64::from(self.argon2_memory_kib)).saturating_mul(1024);
        match limit {
            Some(limit) if needed > limit => Err(ConfigError::TooLittleMemory { threads, needed, limit }),
            Some(_) | None => Ok(()),
        }
    }

    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.hash_threads.map_or_else(cores, usize::from)
    }

    /// How many hashes run, how many wait, and how many of them may be for one account.
    pub fn hasher_config(&self, attempts_per_account: u16) -> HasherConfig {
        let threads = self.threads();
        HasherConfig {
            memory_kib: self.argon2_memory_kib,
            iterations: self.argon2_iterations,
            threads,
            attempts_per_account: usize::from(attempts_per_account),
            queue: self.hash_queue.map_or(16 * threads, |queue| usize::try_from(queue).unwrap_or(usize::MAX)),
        }
    }

    /// The rules for a new password. The words of the service's name count as easy to guess.
    pub fn policy(&self, service_name: &str) -> PasswordPolicy {
        let name = service_name.to_lowercase();
        let words = name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        PasswordPolicy {
            min_length: usize::from(self.password_min_length),
            min_score: self.password_min_score,
            common_words: std::iter::once("postern").chain(words).map(str::to_owned).collect(),
        }
    }
}
