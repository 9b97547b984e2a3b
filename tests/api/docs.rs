//! Documentation that is generated from the code: the table of settings in `docs/configuration.md` and the OpenAPI
//! description. A test fails if the committed file differs; with UPDATE_DOCS=1 in the environment it writes the file
//! instead. Other tests check what the pages refer to: settings and files.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use clap::CommandFactory;
use postern::{cli::Cli, error::FieldReason};

const HOW_TO_UPDATE: &str = "run UPDATE_DOCS=1 cargo test --test api docs";
const BEGIN: &str = "<!-- configuration:";
const END: &str = "<!-- /configuration -->";

/// Names in the pages that are not settings of `serve`: a variable that Kubernetes sets for a Service called `postern`,
/// and the beginnings of names.
const NOT_SETTINGS: [&str; 3] = ["POSTERN_PORT", "POSTERN_TLS_", "POSTERN_"];

#[test]
fn the_configuration_page_lists_every_setting_as_serve_takes_it() {
    let path = root().join("docs/configuration.md");
    let page = read(&path);
    let begin = page.find(BEGIN).expect("the beginning of the table");
    let table_begin = begin + page[begin..].find('\n').expect("a line") + 1;
    let table_end = page.find(END).expect("the end of the table");
    let table = settings();
    if updating() {
        fs::write(&path, format!("{}{table}{}", &page[..table_begin], &page[table_end..])).expect("the page");
    } else {
        assert_eq!(&page[table_begin..table_end], table, "{HOW_TO_UPDATE}");
    }
}

#[test]
fn every_setting_that_a_page_names_exists() {
    let mut known: BTreeSet<String> = NOT_SETTINGS.map(str::to_owned).into();
    let mut cli = Cli::command();
    cli.build();
    let serve = cli.find_subcommand("serve").expect("postern serve");
    known.extend(serve.get_arguments().filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned())));
    for path in pages() {
        let page = read(&path);
        let words = page.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
        for name in words.filter(|word| word.starts_with("POSTERN_")) {
            assert!(known.contains(name), "{} names {name}, which is no setting", path.display());
        }
    }
}

#[test]
fn every_relative_link_in_a_page_leads_to_a_file() {
    for path in pages() {
        let page = read(&path);
        let directory = path.parent().expect("a directory");
        for (position, found) in page.match_indices("](") {
            let rest = &page[position + found.len()..];
            let target = rest.split(')').next().unwrap_or_default();
            let file = target.split('#').next().unwrap_or_default();
            if !file.is_empty() && !file.contains(':') {
                assert!(directory.join(file).exists(), "{} links to {target}, which is missing", path.display());
            }
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The pages that people read: all Markdown at the root and below `docs`.
fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    for directory in ["", "docs", "docs/decisions"] {
        for entry in fs::read_dir(root().join(directory)).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    assert!(pages.len() > 10, "the pages were not found");
    pages
}

#[expect(clippy::disallowed_methods, reason = "a switch of these tests, not of the service")]
fn updating() -> bool {
    std::env::var("UPDATE_DOCS").is_ok()
}

/// The table: each setting of `postern serve` with its default and its help.
fn settings() -> String {
    let mut cli = Cli::command();
    cli.build();
    let serve = cli.find_subcommand("serve").expect("postern serve");
    let mut table = String::new();
    let mut heading = None;
    for argument in serve.get_arguments() {
        let Some(variable) = argument.get_env() else { continue };
        if heading != argument.get_help_heading() {
            heading = argument.get_help_heading();
            let separator = if table.is_empty() { "" } else { "\n" };
            writeln!(
                table,
                "{separator}**{}**\n\n| variable | default | |\n|---|---|---|",
                heading.expect("a heading")
            )
            .expect("a string grows");
        }
        let help = argument.get_help().expect("help").to_string();
        // A default that is not a literal is stated in the help, in brackets.
        let (help, stated) = match help.rsplit_once(" [default") {
            Some((help, stated)) => {
                (help.to_owned(), stated.trim_end_matches(']').trim_start_matches([':', ' ']).to_owned())
            }
            None => (help, String::new()),
        };
        let literal: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = if literal.is_empty() { stated } else { format!("`{}`", literal.join(" ")) };
        writeln!(table, "| `{}` | {default} | {help} |", variable.to_string_lossy()).expect("a string grows");
    }
    table
}

#[test]
fn the_committed_openapi_description_is_the_one_that_is_served() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let document = postern::http::openapi::contract_document().expect("the contract");
    let current = serde_json::to_string_pretty(&document).expect("JSON") + "\n";
    if updating() {
        fs::write(&path, current).expect("docs/openapi.json");
    } else {
        let is_current = fs::read_to_string(&path).expect("docs/openapi.json") == current;
        assert!(is_current, "{HOW_TO_UPDATE}");
    }
}

#[test]
fn every_reason_of_a_field_is_in_the_documentation() {
    let page = std::fs::read_to_string(root().join("docs/errors.md")).expect("the page");
    let (_, section) = page.split_once("## Reasons of fields").expect("the section");
    let (section, _) = section.split_once("\n## ").expect("another section");
    let listed = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`')).map(|(name, _)| name);
    assert!(listed.eq(FieldReason::ALL.map(FieldReason::as_str)));
}
