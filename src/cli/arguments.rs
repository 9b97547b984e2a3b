//! The arguments and the environment variables of this process, and everything that is wrong with them.
//!
//! clap stops at the first value that it cannot parse, and names the flag even where the value came from a variable. So
//! a variable that it refuses is noted and taken out of its sight, and it parses again.

use std::{any::TypeId, collections::BTreeMap, error::Error as _, ffi::OsString, path::PathBuf};

use clap::{
    Arg, ArgMatches, Command, CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::config::{ConfigError, check_variables};

use super::secrets::secret_argument;

/// The command line without the variables that are wrong, and what is wrong with those.
#[derive(Debug)]
pub(super) struct Given<C> {
    pub(super) cli: C,
    /// What clap has found, for the command that shows where each value comes from.
    pub(super) matches: ArgMatches,
    pub(super) faults: Vec<ConfigError>,
}

/// Why the command line cannot be used at all.
#[derive(Debug)]
pub(super) enum Unusable {
    /// A wrong argument, or a question for help: clap prints it.
    Usage(Box<clap::Error>),
    Config(ConfigError),
}

/// Reads the command line of this process.
pub(super) fn given<C: CommandFactory + FromArgMatches>() -> Result<Given<C>, Unusable> {
    let process = Process { arguments: std::env::args_os().collect(), variables: std::env::vars_os().collect() };
    let names = process.variables.keys().filter_map(|name| name.to_str().map(str::to_owned));
    let mut faults = check_variables::<C>(names).err().map_or_else(Vec::new, ConfigError::into_each);
    let mut command = C::command();
    loop {
        let error = match command.clone().try_get_matches_from(&process.arguments) {
            Ok(matches) => {
                if let Some(fault) = secret_argument(&matches) {
                    return Err(Unusable::Config(ConfigError::SecretArgument(fault)));
                }
                match C::from_arg_matches(&matches) {
                    Ok(cli) => return Ok(Given { cli, matches, faults }),
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        let found = process.wrong_variables(&error, &command);
        if found.is_empty() {
            return Err(Unusable::Usage(Box::new(error)));
        }
        for (variable, fault) in found {
            command = without(command, &variable);
            faults.push(fault);
        }
    }
}

/// What this process was started with.
struct Process {
    arguments: Vec<OsString>,
    variables: BTreeMap<OsString, OsString>,
}

impl Process {
    /// The variables that are the cause of an error, if an argument is not.
    fn wrong_variables(&self, error: &clap::Error, command: &Command) -> Vec<(OsString, ConfigError)> {
        if error.kind() == ErrorKind::InvalidUtf8 {
            return self.not_utf8(command);
        }
        let named = |kind| match error.get(kind) {
            Some(ContextValue::String(name)) => argument(command, name),
            _ => None,
        };
        let Some(wrong) = named(ContextKind::InvalidArg) else {
            return Vec::new();
        };
        if error.kind() == ErrorKind::ArgumentConflict {
            let Some(other) = named(ContextKind::PriorArg) else {
                return Vec::new();
            };
            let fault = || ConfigError::Both(self.source(&wrong), self.source(&other));
            let variables = [&wrong, &other].into_iter().filter_map(|argument| self.variable(argument));
            return variables.take(1).map(|variable| (variable, fault())).collect();
        }
        let Some(name) = self.variable(&wrong) else {
            return Vec::new();
        };
        let value = match error.get(ContextKind::InvalidValue) {
            Some(ContextValue::String(value)) if !wrong.is_hide_env_values_set() => Some(value.clone()),
            _ => None,
        };
        let fault = ConfigError::Malformed { variable: self.source(&wrong), value, problem: problem(error) };
        vec![(name, fault)]
    }

    /// The variables whose values are not UTF-8, apart from paths.
    fn not_utf8(&self, command: &Command) -> Vec<(OsString, ConfigError)> {
        let mut found: Vec<(OsString, ConfigError)> = Vec::new();
        for argument in all_arguments(command) {
            let Some(name) = self.variable(argument) else {
                continue;
            };
            let is_text = argument.get_value_parser().type_id() != TypeId::of::<PathBuf>();
            let is_wrong = self.variables.get(&name).is_some_and(|value| value.to_str().is_none());
            if is_text && is_wrong && !found.iter().any(|(known, _)| *known == name) {
                let variable = name.to_string_lossy().into_owned();
                found
                    .push((name, ConfigError::Malformed { variable, value: None, problem: "is not UTF-8".to_owned() }));
            }
        }
        found
    }

    /// The variable that an argument has its value from, if it is not on the command line.
    fn variable(&self, argument: &Arg) -> Option<OsString> {
        let flag = format!("--{}", argument.get_long()?);
        let is_flag = |given: &OsString| {
            let rest = given.to_str().and_then(|given| given.strip_prefix(&flag));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        };
        let name = argument.get_env().filter(|name| self.variables.contains_key(*name))?;
        (!self.arguments.iter().any(is_flag)).then(|| name.to_owned())
    }

    /// How a value was given: the variable, or the flag.
    fn source(&self, argument: &Arg) -> String {
        let flag = || format!("--{}", argument.get_long().unwrap_or_default());
        self.variable(argument).map_or_else(flag, |name| name.to_string_lossy().into_owned())
    }
}

/// What is wrong with a value.
fn problem(error: &clap::Error) -> String {
    if let Some(cause) = error.source() {
        return match cause.to_string().as_str() {
            "invalid socket address syntax" => "must be an IP address and a port, such as 127.0.0.1:8080".to_owned(),
            "invalid digit found in string" | "cannot parse integer from empty string" => {
                "must be a whole number".to_owned()
            }
            text => text.to_owned(),
        };
    }
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) if !values.is_empty() => format!("must be {}", values.join(" or ")),
        _ => "must not be empty".to_owned(),
    }
}

/// The arguments of a command and those below it.
fn all_arguments(command: &Command) -> Vec<&Arg> {
    let below = command.get_subcommands().flat_map(all_arguments);
    command.get_arguments().chain(below).collect()
}

/// The argument that clap names, such as `--grpc-addr <IP:PORT>`.
fn argument(command: &Command, name: &str) -> Option<Arg> {
    let long = name.strip_prefix("--")?.split([' ', '=', '[']).next()?;
    all_arguments(command).into_iter().find(|argument| argument.get_long() == Some(long)).cloned()
}

/// The command as if a variable were not set.
fn without(command: Command, variable: &OsString) -> Command {
    let unset = |argument: Arg| {
        if argument.get_env() == Some(variable) { argument.env(None::<&'static str>) } else { argument }
    };
    command.mut_args(unset).mut_subcommands(|below| without(below, variable))
}
