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
mod tls;
mod tokens;
mod traces;
mod value;
mod variables;
mod web_url;

use clap::Args;

use crate::{
    database_url::DatabaseUrl,
    domain::{keyring::KeyPolicy, master_key::MasterKey},
    mail::{Sender, TransportSettings, messages::MailTemplates},
    tls::Tls,
};

use self::error::Faults;

pub use self::{
    accounts::AccountSettings,
    error::ConfigError,
    keys::{MasterKeySettings, SigningKeySettings, master_key_beside},
    limits::LimitSettings,
    listen::ListenSettings,
    log::{LogFormat, LogSettings},
    mail::MailSettings,
    passwords::PasswordSettings,
    store::StoreSettings,
    tls::TlsSettings,
    tokens::TokenSettings,
    traces::{Collector, TraceSampler, TraceSettings},
    value::duration,
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
    pub signing_keys: SigningKeySettings,
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
    #[command(flatten)]
    pub traces: TraceSettings,
}

/// What the settings name, once all of them have been checked. Each file is read once, because it may be a pipe.
#[derive(Debug)]
pub struct Checked {
    pub database: DatabaseUrl,
    /// `None` stands for the key beside a SQLite file.
    pub master_key: Option<MasterKey>,
    /// The master key before that one.
    pub previous_master_key: Option<MasterKey>,
    pub mail_transport: TransportSettings,
    pub mail_from: Sender,
    pub mail_templates: MailTemplates,
    /// `None` without TLS.
    pub tls: Option<Tls>,
    /// What gets the traces, if anything does.
    pub collector: Option<Collector>,
}

impl Config {
    /// Checks what the parser of a single setting cannot check: ranges, files, and settings that depend on each other.
    /// The error names everything that is wrong.
    pub fn check(&self) -> Result<Checked, ConfigError> {
        let mut faults = Faults::default();
        faults.take(self.listen.validate());
        let tls = faults.take(self.listen.tls.load()).flatten();
        faults.take(self.passwords.validate(memory::limit()));
        faults.take(self.limits.validate());
        faults.take(self.signing_keys.validate());
        faults.take(self.tokens.validate());
        let issuer = self.tokens.validate_issuer();
        let public_url = faults.take(self.listen.validate_public_url()).filter(|()| issuer.is_ok());
        let collector = faults.take(self.traces.collector()).flatten();
        let database = faults.take(self.store.database());
        let master_key = database.as_ref().and_then(|it| faults.take(self.master_key.configured(it)));
        let previous_master_key = faults.take(self.master_key.previous()).flatten();
        let mail_transport = faults.take(self.mail.transport());
        // What is derived from a wrong URL is wrong too, and tells nothing more.
        let mail = public_url.map(|()| {
            let from = faults.take(self.mail.from(self.public_url()));
            from.zip(faults.take(self.mail.templates(self.public_url())))
        });
        match (database, master_key, mail_transport, mail.flatten()) {
            (Some(database), Some(master_key), Some(mail_transport), Some((mail_from, mail_templates)))
                if faults.is_empty() =>
            {
                Ok(Checked {
                    database,
                    master_key,
                    previous_master_key,
                    mail_transport,
                    mail_from,
                    mail_templates,
                    tls,
                    collector,
                })
            }
            _ => Err(faults.into_error()),
        }
    }

    /// How signing keys are made and rotated.
    pub fn key_policy(&self) -> KeyPolicy {
        self.signing_keys.policy(self.tokens.token_config().max_access_token_lifetime())
    }

    /// The URL at which clients reach the HTTP address.
    pub fn public_url(&self) -> &str {
        self.listen.public_url.as_deref().unwrap_or(&self.tokens.issuer)
    }
}
