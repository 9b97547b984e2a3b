//! Which settings are secrets. They are refused on the command line, where everybody who can list processes would see them,
//! and are not printed.

use clap::{ArgMatches, parser::ValueSource};

/// The settings that are or may contain a secret: the name of the argument, whether its value is a URL, and what to set
/// instead.
const SECRETS: [(&str, bool, &str); 5] = [
    ("master_key", false, "POSTERN_MASTER_KEY or POSTERN_MASTER_KEY_FILE"),
    ("previous_master_key", false, "POSTERN_PREVIOUS_MASTER_KEY or POSTERN_PREVIOUS_MASTER_KEY_FILE"),
    ("database_url", true, "POSTERN_DATABASE_URL or POSTERN_DATABASE_URL_FILE"),
    ("mail_url", true, "POSTERN_MAIL_URL, POSTERN_MAIL_URL_FILE or POSTERN_MAIL_PASSWORD_FILE"),
    ("otlp_headers", false, "OTEL_EXPORTER_OTLP_HEADERS or OTEL_EXPORTER_OTLP_HEADERS_FILE"),
];

/// What is wrong, if a secret was given as an argument and not in the environment.
pub(super) fn secret_argument(given: &ArgMatches) -> Option<String> {
    let fault = SECRETS.iter().find(|(name, is_url, _)| {
        let text = argument(given, name);
        text.is_some_and(|text| !is_url || has_password(&text))
    });
    let fault = fault.map(|(name, _, instead)| {
        let flag = name.replace('_', "-");
        format!("--{flag} would show a secret to everybody who can list processes: set {instead} instead")
    });
    fault.or_else(|| given.subcommand().and_then(|(_, given)| secret_argument(given)))
}

/// The value of a setting as people may see it.
pub(super) fn shown(name: &str, value: &str) -> String {
    match SECRETS.iter().find(|(secret, ..)| *secret == name) {
        Some((_, is_url, _)) if !is_url || has_password(value) => "(hidden)".to_owned(),
        _ => value.to_owned(),
    }
}

/// The value of an argument that the command line has.
fn argument(given: &ArgMatches, name: &str) -> Option<String> {
    let is_known = given.try_contains_id(name).unwrap_or(false);
    if !is_known || given.value_source(name) != Some(ValueSource::CommandLine) {
        return None;
    }
    given.get_raw(name)?.next().map(|text| text.to_string_lossy().into_owned())
}

/// Whether a URL contains a password: after the user, or as a parameter of a PostgreSQL URL.
fn has_password(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let user = rest.rsplit_once('@').map_or("", |(user, _)| user);
    user.contains(':') || rest.contains("password=")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_password_after_its_user_or_as_a_parameter() {
        for url in [
            "postgres://ada:hunter2@db/postern",
            "postgres://db/postern?user=ada&password=hunter2",
            "smtps://ada:hunt@er2@mail.example.com:465",
            "smtp://:hunter2@mail.example.com",
        ] {
            assert!(has_password(url), "{url}");
        }
        for url in ["postgres://ada@db:5432/postern?sslmode=disable", "sqlite:a:b.db", "log:", "smtp://mail:25"] {
            assert!(!has_password(url), "{url}");
        }
    }
}
