//! `postern service`: operators manage service accounts and their keys directly in the database, by the rules that admins
//! have over the network. The audit log names no actor. A running server notices a change within half a second.

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::{Args, Subcommand};
use time::OffsetDateTime;

use crate::{
    app,
    config::{Config, duration},
    domain::{
        admin::{Administrator, reason, roles},
        env::Env,
        ids::{ServiceAccountId, ServiceKeyId},
        role::Role,
        service::Service as Domain,
        service_account::{ServiceAccount, ServiceKey, ServiceName, description},
    },
    error::{Error, FieldReason, FieldViolation},
};

use super::{error::CliError, output, server::Server};

/// How many accounts one query reads.
const PAGE_SIZE: u32 = 200;

#[derive(Debug, Subcommand)]
pub enum Service {
    /// Create a service account; it gets tokens once it has a key
    Create {
        #[command(flatten)]
        selector: ServiceSelector,
        /// A role; can be given several times
        #[arg(long = "role", value_name = "ROLE")]
        roles: Vec<String>,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// List service accounts, one per line: id (the client id), name, roles, state
    List {
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Replace the roles of a service account
    SetRoles {
        #[command(flatten)]
        selector: ServiceSelector,
        /// A role; can be given several times
        #[arg(long = "role", value_name = "ROLE")]
        roles: Vec<String>,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Refuse tokens to a service account, also those that it has
    Disable {
        #[command(flatten)]
        selector: ServiceSelector,
        /// The reason, for the audit log
        #[arg(long, default_value = "", value_name = "TEXT")]
        reason: String,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Let a disabled service account get tokens again
    Enable {
        #[command(flatten)]
        selector: ServiceSelector,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Delete a service account and its keys, for good; tokens that it has are refused
    Delete {
        #[command(flatten)]
        selector: ServiceSelector,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Manage the keys of a service account
    #[command(subcommand)]
    Key(Key),
}

#[derive(Debug, Subcommand)]
pub enum Key {
    /// Create a key and print its secret, which is stored nowhere; the ids go to standard error
    Create {
        #[command(flatten)]
        selector: ServiceSelector,
        /// Where the secret is used, for people
        #[arg(long, default_value = "", value_name = "TEXT")]
        description: String,
        /// How long the key can be used; by default it does not expire
        #[arg(long, value_parser = duration, value_name = "DURATION")]
        expires_in: Option<Duration>,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// List keys, one per line: id, creation, expiry, hour of the last use, description
    List {
        #[command(flatten)]
        selector: ServiceSelector,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Delete a key; tokens that it got are refused
    Delete {
        #[command(flatten)]
        selector: ServiceSelector,
        /// Id of the key
        #[arg(long, value_name = "ID")]
        key: String,
        #[command(flatten)]
        config: Box<Server>,
    },
}

/// The service account that a command is about.
#[derive(Debug, Args)]
pub struct ServiceSelector {
    /// Name of the service account, such as billing-worker
    #[arg(long, value_name = "NAME")]
    name: String,
}

impl Service {
    /// The settings of the server that the command was given.
    pub(super) fn config(&self) -> &Config {
        match self {
            Self::Create { config, .. }
            | Self::List { config, .. }
            | Self::SetRoles { config, .. }
            | Self::Disable { config, .. }
            | Self::Enable { config, .. }
            | Self::Delete { config, .. }
            | Self::Key(Key::Create { config, .. } | Key::List { config, .. } | Key::Delete { config, .. }) => {
                &config.config
            }
        }
    }
}

pub async fn run(command: Service) -> Result<ExitCode, CliError> {
    let by = Administrator::COMMAND_LINE;
    match command {
        Service::Create { selector, roles: names, config } => {
            let (name, roles) = (ServiceName::parse(&selector.name)?, roles(&names)?);
            let domain = app::domain(&config.config, Env::system()).await?;
            print(&domain.create_service(name, roles, by).await?)?;
        }
        Service::List { config } => list(&config.config).await?,
        Service::SetRoles { selector, roles: names, config } => {
            let roles = roles(&names)?;
            let (domain, account) = selector.find(&config.config).await?;
            print(&domain.set_service_roles(account.id, roles, by).await?)?;
        }
        Service::Disable { selector, reason: text, config } => {
            let reason = reason(text)?;
            let (domain, account) = selector.find(&config.config).await?;
            print(&domain.disable_service(account.id, reason, by).await?)?;
        }
        Service::Enable { selector, config } => {
            let (domain, account) = selector.find(&config.config).await?;
            print(&domain.enable_service(account.id, by).await?)?;
        }
        Service::Delete { selector, config } => {
            let (domain, account) = selector.find(&config.config).await?;
            domain.delete_service(account.id, by).await?;
            print_as(&account, "deleted")?;
        }
        Service::Key(command) => run_key(command, by).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn run_key(command: Key, by: Administrator) -> Result<(), CliError> {
    match command {
        Key::Create { selector, description: text, expires_in, config } => {
            let description = description(text)?;
            let (domain, account) = selector.find(&config.config).await?;
            let expire_time = expires_in.map(|lifetime| end_of(lifetime, domain.env.now())).transpose()?;
            let (key, secret) = domain.create_service_key(account.id, description, expire_time, by).await?;
            // Before the secret, so that whoever reads both sees the ids first.
            let expires = moment(key.expire_time)?;
            output::note(&format!("client id: {}\nkey: {}\nexpires: {expires}", account.id, key.id));
            output::line(secret.expose())
        }
        Key::List { selector, config } => {
            let (domain, account) = selector.find(&config.config).await?;
            domain.list_service_keys(account.id).await?.iter().try_for_each(print_key)
        }
        Key::Delete { selector, key, config } => {
            let Ok(key) = key.parse::<ServiceKeyId>() else {
                return Err(FieldViolation::new(
                    "key",
                    FieldReason::Malformed,
                    "must be an id, as `postern service key list` shows it",
                )
                .into());
            };
            let (domain, account) = selector.find(&config.config).await?;
            domain.delete_service_key(account.id, key, by).await?;
            output::line(&format!("{key}\tdeleted"))
        }
    }
}

/// Reads the store alone: that needs no keys, and creates nothing.
async fn list(config: &Config) -> Result<(), CliError> {
    let store = app::existing_store(&config.check()?.database).await?;
    let mut after: Option<ServiceAccountId> = None;
    loop {
        let page = store.list_services(after, PAGE_SIZE).await?;
        page.iter().try_for_each(print)?;
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = Some(last.id);
    }
}

impl ServiceSelector {
    async fn find(&self, config: &Config) -> Result<(Arc<Domain>, ServiceAccount), CliError> {
        let name = ServiceName::parse(&self.name)?;
        let domain = app::existing_domain(config, Env::system()).await?;
        let account = domain.service_by_name(name.as_str()).await?;
        Ok((domain, account))
    }
}

fn end_of(lifetime: Duration, now: OffsetDateTime) -> Result<OffsetDateTime, Error> {
    let lifetime = time::Duration::try_from(lifetime).ok();
    let end = lifetime.and_then(|lifetime| now.checked_add(lifetime));
    end.ok_or_else(|| Error::field("expire_time", FieldReason::OutOfRange, "is too far away"))
}

/// Prints an account as one line, with tabs between the fields.
fn print(account: &ServiceAccount) -> Result<(), CliError> {
    print_as(account, if account.disabled { "disabled" } else { "enabled" })
}

fn print_as(account: &ServiceAccount, state: &str) -> Result<(), CliError> {
    let roles: Vec<_> = account.roles.iter().map(Role::as_str).collect();
    output::line(&format!("{}\t{}\t{}\t{state}", account.id, account.name.as_str(), roles.join(",")))
}

fn print_key(key: &ServiceKey) -> Result<(), CliError> {
    let [created, expires, used] = [Some(key.create_time), key.expire_time, key.last_use_time].map(moment);
    output::line(&format!("{}\t{}\t{}\t{}\t{}", key.id, created?, expires?, used?, key.description))
}

/// A time that may never come or have come.
fn moment(time: Option<OffsetDateTime>) -> Result<String, CliError> {
    time.map_or_else(|| Ok("never".to_owned()), output::time)
}
