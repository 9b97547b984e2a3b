//! `postern keys`: operators look at the signing keys and change them, directly in the database. A running server notices a
//! revocation within a second, and everything else when it reads the keys the next time.

use std::process::ExitCode;

use clap::Subcommand;

use crate::{app, config::Config, domain::env::Env, error::Error};

use super::{error::CliError, output, server::Server};

#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Print the public keys as a JWK Set (RFC 7517), for services that verify access tokens
    List {
        /// Print the state of each key instead, one key per line: id, algorithm, state, since when or from when it signs
        #[arg(long)]
        states: bool,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Publish the next key now, so that it signs as soon as every verifier knows it
    Rotate {
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Withdraw a key at once: its tokens are refused, and another key signs
    Revoke {
        /// Id of the key
        // One of 64 begins with a hyphen: it is base64url.
        #[arg(value_name = "KID", allow_hyphen_values = true)]
        kid: String,
        #[command(flatten)]
        config: Box<Server>,
    },
    /// Encrypt the signing keys with a new master key; POSTERN_PREVIOUS_MASTER_KEY is the old one
    Rewrap {
        #[command(flatten)]
        config: Box<Server>,
    },
}

impl Keys {
    /// The settings of the server that the command was given.
    pub(super) fn config(&self) -> &Config {
        match self {
            Self::List { config, .. }
            | Self::Rotate { config }
            | Self::Revoke { config, .. }
            | Self::Rewrap { config } => &config.config,
        }
    }
}

pub async fn run(command: Keys) -> Result<ExitCode, CliError> {
    let env = Env::system();
    match command {
        Keys::List { states, config } => {
            let keyring = app::existing_keys(&config.config, &env).await?;
            if states {
                for key in keyring.list(env.now()) {
                    let time = key.sign_time.map_or_else(|| Ok("-".to_owned()), output::time)?;
                    output::line(&format!("{}\t{}\t{}\t{time}", key.kid, key.algorithm, key.state.as_str()))?;
                }
            } else {
                output::line(&serde_json::to_string_pretty(&keyring.jwks()).map_err(Error::internal)?)?;
            }
        }
        Keys::Rotate { config } => {
            let service = app::existing_domain(&config.config, env).await?;
            let next = service.rotate_keys().await?;
            output::line(&format!("{}\t{}", next.kid, output::time(next.sign_time)?))?;
            output::note("It is published now and signs from then on.");
        }
        Keys::Revoke { kid, config } => {
            let service = app::existing_domain(&config.config, env).await?;
            service.revoke_key(&kid).await?;
            let seconds = service.keys_max_age().as_secs();
            output::note(&format!(
                "Postern refuses its tokens within a second. Services that verify tokens on their own refuse them as soon as \
                 they fetch the keys again, which is after {seconds} seconds if they obey Cache-Control."
            ));
        }
        Keys::Rewrap { config } => {
            let service = app::existing_domain(&config.config, env).await?;
            while let Some(kid) = service.rewrap_next_key().await? {
                output::line(&kid)?;
            }
            output::note("Every signing key is encrypted with POSTERN_MASTER_KEY.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Command};
    use super::Keys;

    #[test]
    fn an_id_that_begins_with_a_hyphen_is_no_option() {
        for id in ["-Lz0Ei2rOey3bjLboW", "--z0Ei2rOey3bjLboW", "-_", "a-b"] {
            let cli = Cli::try_parse_from(["postern", "keys", "revoke", id, "--data-dir", "/data"]).expect(id);
            let Command::Keys(Keys::Revoke { kid, .. }) = cli.command else { panic!("another command") };
            assert_eq!(kid, id);
        }
    }
}
