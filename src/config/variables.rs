//! Refuses environment variables whose names begin like a setting but are none.

use clap::CommandFactory;

use super::error::{ConfigError, Faults};

/// Checks the names of environment variables. An unknown name that begins with `POSTERN_` is an error, so that a
/// misspelt setting is not ignored.
pub fn check_variables<C: CommandFactory>(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let known = known_variables(&C::command());
    let mut faults = Faults::default();
    for name in names.filter(|name| name.starts_with("POSTERN_")) {
        if !known.contains(&name) && !is_kubernetes_service_link(&name) {
            let nearest = nearest(&name, &known);
            faults.add(ConfigError::UnknownVariable { name, nearest });
        }
    }
    faults.into_result()
}

/// The known name that a misspelt one probably stands for.
fn nearest(name: &str, known: &[String]) -> Option<String> {
    let distances = known.iter().map(|candidate| (distance(name, candidate), candidate));
    let (distance, candidate) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= 3).then(|| candidate.clone())
}

/// How many characters must be added, removed or replaced to make one text of the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (line, from) in one.bytes().enumerate() {
        let mut above_left = line;
        let mut left = line + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (cell, to) in row.iter_mut().skip(1).zip(other.bytes()) {
            let best = (above_left + usize::from(from != to)).min(left + 1).min(*cell + 1);
            above_left = std::mem::replace(cell, best);
            left = best;
        }
    }
    row.last().copied().unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_is_near_to_the_right_one() {
        let known = ["POSTERN_ISSUER", "POSTERN_ACCESS_TOKEN_TTL"].map(str::to_owned);
        for (name, meant) in [
            ("POSTERN_ISSUR", Some("POSTERN_ISSUER")),
            ("POSTERN_ACCES_TOKEN_TLT", Some("POSTERN_ACCESS_TOKEN_TTL")),
            ("POSTERN_issuer", None),
            ("POSTERN_PASSWORD", None),
        ] {
            assert_eq!(nearest(name, &known).as_deref(), meant, "{name}");
        }
        assert_eq!((distance("", "abc"), distance("abc", ""), distance("kitten", "sitting")), (3, 3, 3));
    }
}
