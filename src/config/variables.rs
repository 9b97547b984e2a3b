//! Refuses environment variables whose names begin like a setting but are none.

use clap::CommandFactory;

use super::error::ConfigError;

/// Reserved names of security settings that are not implemented yet. To ignore such a setting would be dangerous.
const NOT_IMPLEMENTED: [&str; 6] = [
    "POSTERN_PREVIOUS_MASTER_KEY",
    "POSTERN_PREVIOUS_MASTER_KEY_FILE",
    "POSTERN_SIGNING_ALGORITHM",
    "POSTERN_TLS_CERT",
    "POSTERN_TLS_KEY",
    "POSTERN_TLS_CLIENT_CA",
];

/// Checks the names of environment variables. An unknown name that begins with `POSTERN_` is an error, so that a
/// misspelt setting is not ignored.
pub fn check_variables<C: CommandFactory>(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let known = known_variables(&C::command());
    for name in names.filter(|name| name.starts_with("POSTERN_")) {
        if NOT_IMPLEMENTED.contains(&name.as_str()) {
            return Err(ConfigError::NotImplemented(name));
        } else if !known.contains(&name) && !is_kubernetes_service_link(&name) {
            return Err(ConfigError::UnknownVariable(name));
        }
    }
    Ok(())
}

/// The variables of all settings of a command and its subcommands.
fn known_variables(command: &clap::Command) -> Vec<String> {
    let own = command.get_arguments().filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()));
    own.chain(command.get_subcommands().flat_map(known_variables)).collect()
}

/// Kubernetes sets variables in every pod for each service: for one with the name
/// `postern`, `POSTERN_SERVICE_HOST`, `POSTERN_PORT`, `POSTERN_PORT_50051_TCP_ADDR` and so on. They are not settings.
fn is_kubernetes_service_link(name: &str) -> bool {
    name == "POSTERN_PORT"
        || ["POSTERN_PORT_", "POSTERN_SERVICE_HOST", "POSTERN_SERVICE_PORT"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}
