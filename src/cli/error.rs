//! The error of a command: what is printed, and the exit code. `docs/errors.md` lists every message.
//!
//! There is no conversion from every error. An error of the domain hides its cause from callers, and a command would
//! then print "internal error". So each type that a command can fail with says here what the operator reads.

use std::{error::Error as StdError, io, process::ExitCode};

use crate::{
    app::BuildError,
    config::ConfigError,
    error::{Error, FieldViolation, StoreError, causes},
    store::{OpenError, sqlite::BackupError},
    telemetry::TelemetryError,
};

/// The exit code if the command line or a setting is wrong: to run the command again does not help.
pub(super) const WRONG_SETTINGS: u8 = 2;
/// What a shell reports of a program that ended because nobody reads its output any more: 128 and the number of
/// SIGPIPE.
const OUTPUT_CLOSED: u8 = 141;

/// Why a command failed.
#[derive(Debug)]
pub enum CliError {
    /// The command line or a setting is wrong.
    Settings(String),
    /// Everything else.
    Failed(String),
    /// Nobody reads the output any more. Nothing is printed, as for every Unix tool.
    OutputClosed,
}

impl CliError {
    /// Why standard output could not be written.
    pub(super) fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::Failed(format!("standard output cannot be written: {error}"))
        }
    }

    /// An error that only says what failed, with the cause that it hides.
    pub(super) fn with_causes(what: &str, error: &(dyn StdError + 'static)) -> Self {
        Self::Failed(format!("{what}: {}", causes(error)))
    }

    /// Prints the error and returns the exit code.
    pub(super) fn report(&self) -> ExitCode {
        match self {
            Self::Settings(text) => {
                print(text);
                ExitCode::from(WRONG_SETTINGS)
            }
            Self::Failed(text) => {
                print(text);
                ExitCode::FAILURE
            }
            Self::OutputClosed => ExitCode::from(OUTPUT_CLOSED),
        }
    }
}

/// Nobody can be told that standard error is closed.
fn print(text: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), format!("postern: {text}\n").as_bytes());
}

impl From<Error> for CliError {
    fn from(error: Error) -> Self {
        let remedy = match &error {
            Error::EmailTaken => "`postern user list --query ADDRESS` shows it",
            Error::UsernameTaken => "choose another one; `postern user list --query NAME` shows it",
            Error::ServiceNameTaken => "choose another one; `postern service list` shows all",
            Error::NotFound("service account") => "`postern service list` lists all service accounts",
            Error::NotFound("key of this service account") => {
                "`postern service key list --name NAME` lists the keys of an account"
            }
            Error::NotFound("enabled user") => "`postern user enable` enables an account again",
            Error::NotFound("signing key") => "`postern keys list --states` lists them",
            Error::NotFound(_) => "`postern user list` lists all accounts",
            Error::LastAdmin => {
                "make another account an admin first, with `postern user set-roles --email ADDRESS --role admin`"
            }
            _ => return Self::Failed(error.for_operators()),
        };
        Self::Failed(format!("{error}: {remedy}"))
    }
}

impl From<FieldViolation> for CliError {
    fn from(violation: FieldViolation) -> Self {
        Error::from(violation).into()
    }
}

impl From<StoreError> for CliError {
    fn from(error: StoreError) -> Self {
        Self::Failed(causes(&error))
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        if error.is_wrong_setting() { Self::Settings(error.to_string()) } else { Self::Failed(error.to_string()) }
    }
}

impl From<TelemetryError> for CliError {
    fn from(error: TelemetryError) -> Self {
        Self::Settings(error.to_string())
    }
}

impl From<BuildError> for CliError {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Config(error) => error.into(),
            BuildError::Store(error) => error.into(),
            BuildError::Domain(error) => error.into(),
            BuildError::Telemetry(error) => error.into(),
            BuildError::Mail(_) | BuildError::Listen { .. } => Self::Failed(error.to_string()),
        }
    }
}

impl From<OpenError> for CliError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Url(_) => Self::Settings(error.to_string()),
            other => Self::Failed(causes(&other)),
        }
    }
}

impl From<BackupError> for CliError {
    fn from(error: BackupError) -> Self {
        Self::Failed(error.to_string())
    }
}
