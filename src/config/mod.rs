//! Configuration. Each setting is a flag and an environment variable; `--help` is the reference. There is one file for
//! each group of settings. Secrets are read from the environment or from files, and are never printed.

mod accounts;
mod error;
mod keys;
mod limits;
mod listen;
mod log;
mod mail;
mod mail_url;
mod memory;
mod passwords;
mod store;
mod tokens;
mod value;
mod variables;

use clap::Args;

pub use self::{
    accounts::AccountSettings,
    error::ConfigError,
    keys::{MasterKeySettings, master_key_beside},
    limits::LimitSettings,
    listen::ListenSettings,
    log::{LogFormat, LogSettings},
    mail::MailSettings,
    passwords::PasswordSettings,
    store::StoreSettings,
    tokens::TokenSettings,
    variables::check_variables,
};

/// All settings of `postern serve`.
#[derive(Debug, Clone, Args)]
pub struct Config {
    #[command(flatten)]
    pub listen: ListenSettings,
    #[command(flatten)]
    pub store: StoreSettings,
    #[command(flatten)]
    pub master_key: MasterKeySettings,
    #[command(flatten)]
    pub tokens: TokenSettings,
    #[command(flatten)]
    pub accounts: AccountSettings,
    #[command(flatten)]
    pub passwords: PasswordSettings,
    #[command(flatten)]
    pub mail: MailSettings,
    #[command(flatten)]
    pub limits: LimitSettings,
}

impl Config {
    /// Checks what the parser of a single setting cannot check: ranges, and settings that depend on each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.listen.validate()?;
        self.passwords.validate(memory::limit())?;
        self.limits.validate()?;
        self.tokens.validate()
    }

    /// The URL at which clients reach the HTTP address.
    pub fn public_url(&self) -> &str {
        self.listen.public_url.as_deref().unwrap_or(&self.tokens.issuer)
    }
}
