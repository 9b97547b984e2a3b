//! `postern user`: operators manage accounts directly in the database. The rules are the same as over the network: for
//! example, the last admin cannot be removed. The audit log names no actor. A running server notices a change within
//! half a second.

use std::{
    io::{self, BufRead as _, IsTerminal as _},
    process::ExitCode,
};

use clap::{Args, Subcommand};
use zeroize::Zeroizing;

use crate::{
    app,
    config::Config,
    domain::{
        account::{Email, SignUp, User as Account, Username},
        admin::{Administrator, reason, role_set},
        env::Env,
        password::{MAX_BYTES, Password},
        ports::{UserOrder, UserPage},
        service::Service,
    },
};

use super::{error::CliError, output, server::Server};

/// How many accounts one query reads.
const PAGE_SIZE: u32 = 200;

#[derive(Debug, Subcommand)]
pub enum User {
    /// Create an account; the password is read from a prompt, or from standard input if that is not a terminal
    Create {
        #[arg(long, value_name = "NAME")]
        username: String,
        #[arg(long, value_name = "ADDRESS")]
        email: String,
        /// A role in addition to `user`; can be given several times
        #[arg(long = "role", value_name = "ROLE")]
        roles: Vec<String>,
        /// Mail a link that verifies the address; otherwise the address counts as verified
        #[arg(long)]
        unverified: bool,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// List accounts, one per line: id, username, email, roles, state
    List {
        /// Only accounts whose email or username starts with this text
        #[arg(long, default_value = "", value_name = "TEXT")]
        query: String,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Replace the roles of an account; every account keeps the role `user`
    SetRoles {
        #[command(flatten)]
        selector: AccountSelector,
        /// A role in addition to `user`; can be given several times
        #[arg(long = "role", value_name = "ROLE")]
        roles: Vec<String>,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Prevent an account from logging in, and end its sessions
    Disable {
        #[command(flatten)]
        selector: AccountSelector,
        /// The reason, for the audit log
        #[arg(long, default_value = "", value_name = "TEXT")]
        reason: String,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Let a disabled account log in again
    Enable {
        #[command(flatten)]
        selector: AccountSelector,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Delete an account and everything that belongs to it, for good
    Delete {
        #[command(flatten)]
        selector: AccountSelector,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Print a link that resets the password of an account; it works once, for 30 minutes
    ResetPasswordLink {
        #[command(flatten)]
        selector: AccountSelector,
        #[command(flatten)]
        config: Box<Server>,
    },
}

/// The account that a command changes.
#[derive(Debug, Args)]
pub struct AccountSelector {
    /// Email address of the account
    #[arg(long, value_name = "ADDRESS")]
    email: String,
}

impl User {
    /// The settings of the server that the command was given.
    pub(super) fn config(&self) -> &Config {
        match self {
            Self::Create { config, .. }
            | Self::List { config, .. }
            | Self::SetRoles { config, .. }
            | Self::Disable { config, .. }
            | Self::Enable { config, .. }
            | Self::Delete { config, .. }
            | Self::ResetPasswordLink { config, .. } => &config.config,
        }
    }
}

pub async fn run(command: User) -> Result<ExitCode, CliError> {
    let by = Administrator::COMMAND_LINE;
    match command {
        User::Create { username, email, roles, unverified, config } => {
            create(&username, &email, &roles, !unverified, &config.config).await?;
        }
        User::List { query, config } => list(&query, &config.config).await?,
        User::SetRoles { selector, roles, config } => {
            let roles = role_set(&roles)?;
            let (service, account) = selector.find(&config.config).await?;
            print(&service.set_roles(account.id, roles, by).await?)?;
        }
        User::Disable { selector, reason: text, config } => {
            let reason = reason(text)?;
            let (service, account) = selector.find(&config.config).await?;
            print(&service.disable_user(account.id, reason, by).await?)?;
        }
        User::Enable { selector, config } => {
            let (service, account) = selector.find(&config.config).await?;
            print(&service.enable_user(account.id, by).await?)?;
        }
        User::Delete { selector, config } => {
            let (service, account) = selector.find(&config.config).await?;
            service.delete_user(account.id, by).await?;
            print_as(&account, "deleted")?;
        }
        User::ResetPasswordLink { selector, config } => {
            let (service, account) = selector.find(&config.config).await?;
            let token = service.issue_reset_token(&account.email).await?;
            let templates = config.config.mail.templates(config.config.public_url())?;
            output::line(&templates.links.reset_password.with_token(&token))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(
    username: &str,
    email: &str,
    roles: &[String],
    verified: bool,
    config: &Config,
) -> Result<(), CliError> {
    let username = Username::parse(username)?;
    let email = Email::parse(email)?;
    let roles = role_set(roles)?;
    let service = app::domain(config, Env::system()).await?;
    let password = Password::parse("password", read_password()?)?;
    let account = service.create_account(SignUp { username, email, password }, roles, verified).await?;
    app::close_store(service.store.as_ref()).await;
    if !verified && config.tokens.require_verified_email {
        output::note(
            "POSTERN_REQUIRE_VERIFIED_EMAIL is set: this account cannot log in before its owner has used the link in the \
             mail, or one from `postern user reset-password-link`.",
        );
    }
    print(&account)
}

/// Reads the store alone: that needs no keys, and creates nothing.
async fn list(query: &str, config: &Config) -> Result<(), CliError> {
    let query = crate::domain::admin::search_text(query)?;
    let store = app::existing_store(&config.check()?.database).await?;
    let mut next = Some(UserOrder::of_query(&query));
    while let Some(order) = next {
        let page = store.list_users(UserPage { order: order.clone(), limit: PAGE_SIZE }).await?;
        page.iter().try_for_each(print)?;
        next = order.after_page(page.last());
    }
    Ok(())
}

impl AccountSelector {
    async fn find(&self, config: &Config) -> Result<(std::sync::Arc<Service>, Account), CliError> {
        let email = Email::parse(&self.email)?;
        let service = app::existing_domain(config, Env::system()).await?;
        let account = service.user_of(&email).await?;
        Ok((service, account))
    }
}

/// Prints an account as one line, with tabs between the fields.
fn print(account: &Account) -> Result<(), CliError> {
    print_as(
        account,
        match (account.disabled, account.email_verified) {
            (true, _) => "disabled",
            (false, true) => "verified",
            (false, false) => "unverified",
        },
    )
}

fn print_as(account: &Account, state: &str) -> Result<(), CliError> {
    let roles: Vec<_> = account.roles.iter().map(crate::domain::role::Role::as_str).collect();
    let (id, username, email) = (account.id, account.username.as_str(), account.email.as_str());
    output::line(&format!("{id}\t{username}\t{email}\t{}\t{state}", roles.join(",")))
}

/// Reads a password twice from a prompt, or once from the first line of standard input if that is not a terminal.
fn read_password() -> Result<String, CliError> {
    let unreadable = |error: &io::Error| CliError::with_causes("the password cannot be read", error);
    if !io::stdin().is_terminal() {
        let mut line = Zeroizing::new(Vec::new());
        // The longest password, one byte more to detect a longer one, and the line end.
        let mut input = io::Read::take(io::stdin().lock(), MAX_BYTES as u64 + 3);
        input.read_until(b'\n', &mut line).map_err(|error| unreadable(&error))?;
        let line = std::str::from_utf8(&line).map_err(|_| CliError::Failed("the password is not UTF-8".to_owned()))?;
        let password = line.trim_end_matches(['\n', '\r']);
        if password.is_empty() {
            let told = "there is no password: the first line of standard input is empty; pipe it in, or run this at a \
                        terminal to be asked for it";
            return Err(CliError::Failed(told.to_owned()));
        }
        return Ok(password.to_owned());
    }
    let ask = |prompt| rpassword::prompt_password(prompt).map(Zeroizing::new).map_err(|error| unreadable(&error));
    let (password, repeated) = (ask("Password: ")?, ask("Again: ")?);
    if *password != *repeated {
        return Err(CliError::Failed("the two passwords are not the same: run the command again".to_owned()));
    }
    Ok(password.to_string())
}
