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
        service::Service,
    },
    error::{Error, FieldViolation},
};

use super::error::CliError;

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

/// The settings of the server, so that a command runs with the server's environment variables.
#[derive(Debug, Args)]
pub struct Server {
    #[command(flatten)]
    config: Config,
}

pub async fn run(command: User) -> Result<ExitCode, CliError> {
    match command {
        User::Create { username, email, roles, config } => create(&username, &email, &roles, &config.config).await?,
        User::List { query, config } => list(&query, &config.config).await?,
        User::SetRoles { selector, roles, config } => {
            let roles = role_set(&roles).map_err(violation_message)?;
            let (service, account) = selector.find(&config.config).await?;
            print(&service.set_roles(account.id, roles, Administrator::COMMAND_LINE).await.map_err(operator_error)?);
        }
        User::Disable { selector, reason: text, config } => {
            let reason = reason(text).map_err(violation_message)?;
            let (service, account) = selector.find(&config.config).await?;
            print(
                &service.disable_user(account.id, reason, Administrator::COMMAND_LINE).await.map_err(operator_error)?,
            );
        }
        User::ResetPasswordLink { selector, config } => {
            let (service, account) = selector.find(&config.config).await?;
            let token = service.issue_reset_token(&account.email).await.map_err(operator_error)?;
            let templates = config.config.mail.templates(config.config.public_url())?;
            println!("{}", templates.links.reset_password.with_token(&token));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(username: &str, email: &str, roles: &[String], config: &Config) -> Result<(), CliError> {
    let username = Username::parse(username).map_err(violation_message)?;
    let email = Email::parse(email).map_err(violation_message)?;
    let roles = role_set(roles).map_err(violation_message)?;
    let service = app::domain(config, Env::system()).await?;
    let password = Password::parse("password", read_password()?).map_err(violation_message)?;
    let account = service.create_account(SignUp { username, email, password }, roles).await.map_err(operator_error)?;
    print(&account);
    app::close_store(service.store.as_ref()).await;
    Ok(())
}

async fn list(query: &str, config: &Config) -> Result<(), CliError> {
    let query = crate::domain::admin::search_text(query).map_err(violation_message)?;
    let service = app::domain(config, Env::system()).await?;
    let mut cursor = String::new();
    loop {
        let page = service.list_users(PAGE_SIZE, &cursor, &query).await.map_err(operator_error)?;
        page.entries.iter().for_each(print);
        match page.next {
            Some(next) => cursor = next,
            None => return Ok(()),
        }
    }
}

impl AccountSelector {
    async fn find(&self, config: &Config) -> Result<(std::sync::Arc<Service>, Account), CliError> {
        let email = Email::parse(&self.email).map_err(violation_message)?;
        let service = app::domain(config, Env::system()).await?;
        let account = service.user_of(&email).await.map_err(operator_error)?;
        Ok((service, account))
    }
}

/// Prints an account as one line, with tabs between the fields.
fn print(account: &Account) {
    let roles: Vec<_> = account.roles.iter().map(crate::domain::role::Role::as_str).collect();
    let state = match (account.disabled, account.email_verified) {
        (true, _) => "disabled",
        (false, true) => "verified",
        (false, false) => "unverified",
    };
    let (id, username, email) = (account.id, account.username.as_str(), account.email.as_str());
    println!("{id}\t{username}\t{email}\t{}\t{state}", roles.join(","));
}

/// Reads a password twice from a prompt, or once from the first line of standard input if that is not a terminal.
fn read_password() -> io::Result<String> {
    if !io::stdin().is_terminal() {
        let mut line = Zeroizing::new(Vec::new());
        // The longest password, one byte more to detect a longer one, and the line end.
        io::Read::take(io::stdin().lock(), MAX_BYTES as u64 + 3).read_until(b'\n', &mut line)?;
        let line = std::str::from_utf8(&line).map_err(|_| io::Error::other("the password is not UTF-8"))?;
        return Ok(line.trim_end_matches(['\n', '\r']).to_owned());
    }
    let password = Zeroizing::new(rpassword::prompt_password("Password: ")?);
    let repeated = Zeroizing::new(rpassword::prompt_password("Again: ")?);
    if *password != *repeated {
        return Err(io::Error::other("the two passwords are not the same"));
    }
    Ok(password.to_string())
}

fn violation_message(FieldViolation { field, description }: FieldViolation) -> CliError {
    format!("{field} {description}").into()
}

/// The error with its cause. An operator may see the cause; a caller over the network may not.
fn operator_error(error: Error) -> CliError {
    match error {
        Error::Internal(cause) => cause,
        Error::StoreUnavailable(cause) => cause.into(),
        Error::InvalidFields(violations) => {
            violations.into_iter().map(|it| violation_message(it).to_string()).collect::<Vec<_>>().join("; ").into()
        }
        other => other.into(),
    }
}
