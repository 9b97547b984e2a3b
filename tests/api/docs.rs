//! Documentation that is generated from the code: the table of settings in `docs/configuration.md` and the OpenAPI
//! description. A test fails if the committed file differs; with UPDATE_DOCS=1 in the environment it writes the file
//! instead.

use std::{fmt::Write as _, fs, path::Path};

use clap::CommandFactory;
use postern::cli::Cli;

const HOW_TO_UPDATE: &str = "run UPDATE_DOCS=1 cargo test --test api docs";
const BEGIN: &str = "<!-- configuration:";
const END: &str = "<!-- /configuration -->";

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

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
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
        assert_eq!(fs::read_to_string(&path).expect("docs/openapi.json"), current, "{HOW_TO_UPDATE}");
    }
}
