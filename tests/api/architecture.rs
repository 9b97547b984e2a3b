//! Rules of the architecture that no compiler checks: which module may import which, that no modules import each other
//! in a circle, how long a file may be, and where nothing may panic. They are read from the sources as text, without
//! comments and strings.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::imports;

const MOST_LINES: usize = 600;

/// The top-level modules that each one may name. `app`, `cli` and `main` may name all of them.
const RULES: [(&str, &[&str]); 18] = [
    ("body", &["shares"]),
    ("config", &["database_url", "domain", "error", "listen", "mail", "private_file", "this_machine", "tls"]),
    ("database_url", &["private_file"]),
    ("domain", &["error", "trace"]),
    ("error", &[]),
    ("grpc", &["body", "domain", "error", "listen", "proto", "shares", "tls", "trace"]),
    ("http", &["body", "domain", "error", "grpc", "listen", "proto", "shares", "telemetry", "tls", "trace"]),
    ("lib", &[]),
    ("listen", &["body", "shares", "tls"]),
    ("mail", &["domain", "error", "private_file", "this_machine", "trace"]),
    ("private_file", &[]),
    ("proto", &[]),
    ("shares", &["domain"]),
    ("store", &["database_url", "domain", "error", "private_file", "this_machine", "trace"]),
    ("telemetry", &["config", "trace"]),
    ("this_machine", &[]),
    ("tls", &["domain", "private_file"]),
    ("trace", &[]),
];

/// Crates that the domain must not know: transports and database drivers.
const TRANSPORTS_AND_DRIVERS: [&str; 12] = [
    "axum",
    "h2",
    "http",
    "http_body_util",
    "hyper",
    "hyper_util",
    "lettre",
    "sqlx",
    "tonic",
    "tonic_types",
    "tower",
    "prost",
];

/// The files that may use the database driver. The steps of the store, which stand beside them, may not.
const SQL_FILES: [&str; 5] =
    ["store/opening.rs", "store/queries.rs", "store/rows.rs", "store/shared.rs", "store/statement.rs"];
const SQL_ROOMS: [&str; 2] = ["store/postgres/", "store/sqlite/"];

pub struct Source {
    /// The path below `src`.
    pub path: String,
    /// The code without comments, strings and tests.
    pub code: String,
}

impl Source {
    /// The top-level module of this file.
    fn module(&self) -> &str {
        self.path.split(['/', '.']).next().expect("a name")
    }

    /// The words of the code.
    fn words(&self) -> impl Iterator<Item = &str> {
        self.code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
    }

    /// The top-level modules that this file names.
    fn named_modules(&self) -> BTreeSet<&str> {
        let mut modules = BTreeSet::new();
        for (position, found) in self.code.match_indices("crate::") {
            let rest = &self.code[position + found.len()..];
            if let Some(list) = rest.strip_prefix('{') {
                modules.extend(first_words_of_list(list));
            } else {
                modules.extend(first_word(rest));
            }
        }
        // These forms would name modules in ways that this test does not recognize.
        assert!(!self.code.contains("$crate") && !self.code.contains("postern::"), "{}", self.path);
        assert!(!self.code.contains("super::super::super"), "{}", self.path);
        modules
    }
}

fn first_word(text: &str) -> Option<&str> {
    text.trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next().filter(|word| !word.is_empty())
}

/// The first words of a list up to its closing brace: a, d and e for `a::{b, c}, d, e::f}…`.
fn first_words_of_list(list: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let (mut depth, mut item) = (0, 0);
    for (position, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                words.extend(first_word(&list[item..position]));
                item = position + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    words
}

/// The source without comments and without the text in quotes.
pub fn code_of(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if c == '"' {
            end_of_quote(rest, '"')
        } else if rest.starts_with("'\\") || (c == '\'' && rest.chars().nth(2) == Some('\'')) {
            // This is a character. A lifetime has no second quote there.
            end_of_quote(rest, '\'')
        } else {
            code.push(c);
            c.len_utf8()
        };
        rest = &rest[skipped..];
    }
    code
}

/// The position after the closing quote of a text that begins with a quote.
fn end_of_quote(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (position, c) in text.char_indices().skip(1) {
        if !escaped && c == quote {
            return position + 1;
        }
        escaped = !escaped && c == '\\';
    }
    panic!("a quote without an end: {}", text.lines().next().unwrap_or_default())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a directory with one of these endings, without hidden directories.
fn files(directory: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a plain name").to_owned();
        if path.is_dir() && !name.starts_with(['.', '_']) {
            found.extend(files(&path, endings));
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
    found
}

fn sources() -> Vec<Source> {
    let directory = root().join("src");
    let mut sources = Vec::new();
    for file in files(&directory, &[".rs"]) {
        let text = fs::read_to_string(&file).expect("a source");
        let (service, tests) = text.split_once("\n#[cfg(test)]\n").unwrap_or((&text, "mod tests {\n}\n"));
        let path = file.strip_prefix(&directory).expect("below src").to_str().expect("a plain name").to_owned();
        // Code after the tests would not be checked.
        assert!(tests.starts_with("mod tests {\n") && tests.trim_end().ends_with('}'), "{path}: the tests are last");
        assert_eq!(tests.lines().filter(|line| *line == "}").count(), 1, "{path}: the tests are last");
        // A visibility is not an import, and a constant assertion cannot fail at run time.
        let code = code_of(service).replace("pub(in crate::store)", "pub").replace("const _: () = assert!", "");
        sources.push(Source { path, code });
    }
    assert!(sources.len() > 20, "only {} sources were found", sources.len());
    sources
}

#[test]
fn the_reader_of_sources_skips_comments_and_strings() {
    let source = r#"
        //! sqlx
        use crate::{app, config::Config, store::{self, sqlite}}; // use crate::cli;
        fn f<'a>(x: &'a str) -> char { g("crate::grpc \" tonic", '"', '\'', 'x'); crate::listen::serve() }
    "#;
    let source = Source { path: "domain/mod.rs".to_owned(), code: code_of(source) };
    assert_eq!(source.module(), "domain");
    assert_eq!(source.named_modules(), BTreeSet::from(["app", "config", "listen", "store"]));
    let words: Vec<_> = source.words().collect();
    assert!(words.contains(&"sqlite") && words.contains(&"serve") && words.contains(&"a"));
    assert!(!words.contains(&"sqlx") && !words.contains(&"tonic") && !words.contains(&"cli"));
}

#[test]
fn no_modules_import_each_other_in_a_circle() {
    let graph = imports::graph(&sources());
    assert!(graph.values().flatten().count() > 200, "only a few imports were found: {graph:?}");
    let circles = imports::circles(&graph);
    assert!(circles.is_empty(), "these modules import each other in a circle: {circles:#?}");
}

#[test]
fn every_module_imports_only_what_it_may() {
    let mut modules = BTreeSet::new();
    for source in sources() {
        let module = source.module().to_owned();
        modules.insert(module.clone());
        if ["app", "cli", "main"].contains(&module.as_str()) {
            continue;
        }
        let (_, may) = RULES.iter().find(|(name, _)| *name == module).unwrap_or_else(|| panic!("{module} has no rule"));
        for named in source.named_modules() {
            assert!(named == module || may.contains(&named), "src/{} names crate::{named}", source.path);
        }
    }
    for (module, _) in RULES {
        assert!(modules.contains(module), "{module} has a rule and is not there");
    }
}

#[test]
fn the_layout_in_lib_rs_says_the_same() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).expect("lib.rs");
    for (module, may) in RULES.iter().filter(|(module, _)| *module != "lib") {
        let row = lib.lines().find(|line| line.starts_with(&format!("//! | [`{module}`]"))).expect(module);
        let named: BTreeSet<_> = row.split('|').nth(3).expect("a third column").split('`').skip(1).step_by(2).collect();
        assert_eq!(named, may.iter().copied().collect(), "{row}");
    }
}

#[test]
fn the_domain_names_no_transport_and_no_driver() {
    for source in sources().iter().filter(|source| ["domain", "error"].contains(&source.module())) {
        for word in source.words() {
            assert!(!TRANSPORTS_AND_DRIVERS.contains(&word), "src/{} names {word}", source.path);
            assert!(!["sqlite", "postgres", "grpc", "proto"].contains(&word), "src/{} names {word}", source.path);
        }
    }
}

#[test]
fn only_the_store_uses_sqlx_and_only_app_and_cli_open_a_store() {
    for source in sources() {
        let speaks_sql = source.words().any(|word| word == "sqlx");
        let may =
            SQL_FILES.contains(&source.path.as_str()) || SQL_ROOMS.iter().any(|module| source.path.starts_with(module));
        assert!(may || !speaks_sql, "src/{}: sqlx", source.path);
        let names_backend = source.words().any(|word| ["SqliteStore", "PostgresStore"].contains(&word));
        assert!(!names_backend || source.module() == "store", "src/{} names a backend", source.path);
        let opens_one = source.code.contains("store::connect");
        assert!(!opens_one || ["app", "cli"].contains(&source.module()), "src/{} opens a store", source.path);
    }
}

#[test]
fn only_the_mail_module_uses_lettre() {
    for source in sources() {
        let speaks_smtp = source.words().any(|word| word == "lettre");
        assert!(!speaks_smtp || source.module() == "mail", "src/{} names lettre", source.path);
    }
}

#[test]
fn nothing_in_the_service_unwraps_expects_or_panics() {
    for source in sources() {
        for forbidden in [
            ".unwrap()",
            ".expect(",
            ".unwrap_err()",
            ".expect_err(",
            "panic!",
            "todo!",
            "unimplemented!",
            "unreachable!",
            "assert!",
            "assert_eq!",
            "assert_ne!",
            "dbg!",
            "process::abort",
        ] {
            assert!(!source.code.contains(forbidden), "src/{} has {forbidden}", source.path);
        }
    }
}

#[test]
fn nothing_is_allowed_that_the_lints_forbid() {
    for source in sources() {
        assert!(!source.code.contains("#[allow") && !source.code.contains("#![allow"), "src/{}", source.path);
        assert!(!source.words().any(|word| word == "unsafe"), "src/{}", source.path);
    }
}

#[test]
fn no_file_is_too_long_and_every_module_has_a_description() {
    let mut seen = 0;
    for directory in ["benches", "migrations", "proto", "src", "tests"] {
        for file in files(&root().join(directory), &[".rs", ".py", ".sql", ".proto"]) {
            let text = fs::read_to_string(&file).expect("a source");
            let lines = text.lines().count();
            assert!(lines <= MOST_LINES, "{} has {lines} lines", file.display());
            let is_rust = file.extension().is_some_and(|extension| extension == "rs");
            assert!(!is_rust || text.starts_with("//! "), "{} does not say what it owns", file.display());
            seen += 1;
        }
    }
    assert!(seen > 40, "only {seen} files were found");
}

#[test]
fn every_migration_is_in_the_list_of_its_backend() {
    for backend in ["postgres", "sqlite"] {
        let code = fs::read_to_string(root().join(format!("src/store/{backend}/mod.rs"))).expect("a backend");
        for file in fs::read_dir(root().join("migrations").join(backend)).expect("migrations") {
            let name = file.expect("a file").file_name().into_string().expect("UTF-8");
            assert!(code.contains(&format!("migrations/{backend}/{name}")), "{name} of {backend} is not applied");
        }
    }
}
