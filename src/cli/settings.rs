//! `postern config`: looks at the settings of `serve` without a start.

use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command, Subcommand, parser::ValueSource};

use crate::config::Config;

use super::{error::CliError, output, secrets};

#[derive(Debug, Subcommand)]
pub enum Settings {
    /// Check the settings of `serve`, and print every error; the exit code is 0 if there is none. Nothing is opened but
    /// the files that settings name
    Check(Box<Config>),
    /// Print each setting of `serve`: its variable, its value without secrets, and where that comes from (`flag`,
    /// `variable` or `default`), separated by tabs
    Show(Box<Config>),
}

impl Settings {
    /// The settings that the command was given.
    pub(super) fn config(&self) -> &Config {
        match self {
            Self::Check(config) | Self::Show(config) => config,
        }
    }
}

/// Runs a command. `given` is what was parsed for it and `command` its definition, both with the arguments that all commands
/// have.
pub(super) fn run(settings: &Settings, command: &Command, given: &ArgMatches) -> Result<ExitCode, CliError> {
    settings.config().check()?;
    match settings {
        Settings::Check(_) => output::line("the settings are valid")?,
        Settings::Show(_) => {
            for (argument, variable) in
                command.get_arguments().filter_map(|argument| Some((argument, argument.get_env()?)))
            {
                let (value, source) = effective(argument, given);
                output::line(&format!("{}\t{value}\t{source}", variable.to_string_lossy()))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The value of a setting, and where it comes from. `-` stands for a setting that is not set and has no default of its own.
fn effective(argument: &Arg, given: &ArgMatches) -> (String, &'static str) {
    let name = argument.get_id().as_str();
    let source = match given.value_source(name) {
        Some(ValueSource::CommandLine) => "flag",
        Some(ValueSource::EnvVariable) => "variable",
        _ => "default",
    };
    let values: Vec<_> = given.get_raw(name).into_iter().flatten().map(|value| value.to_string_lossy()).collect();
    (if values.is_empty() { "-".to_owned() } else { secrets::shown(name, &values.join(",")) }, source)
}
