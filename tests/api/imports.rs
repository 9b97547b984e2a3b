//! The import graph of `src`: which module names which. It is read from the sources as text, so imports that
//! macros generate are not found. There are none.

use std::collections::{BTreeMap, BTreeSet};

use crate::architecture::{Source, code_of};

/// Each module with the modules that it names. A module is a file; its name is its path, such as `domain::ports`.
pub type Graph = BTreeMap<String, BTreeSet<String>>;

pub fn graph(sources: &[Source]) -> Graph {
    let modules: BTreeSet<String> = sources.iter().map(|source| module_of(&source.path)).collect();
    let named = |source: &Source| {
        let module = module_of(&source.path);
        let paths = paths_in(&source.code);
        let names = paths.iter().filter_map(|path| resolve(&module, path, &modules));
        names.filter(|name| *name != module).collect()
    };
    // The crate root only declares modules, and the binary only calls the library.
    let sources = sources.iter().filter(|source| !["lib.rs", "main.rs"].contains(&source.path.as_str()));
    sources.map(|source| (module_of(&source.path), named(source))).collect()
}

/// The groups of modules in which each reaches all others: the strongly connected components of more than one module.
pub fn circles(graph: &Graph) -> BTreeSet<Vec<String>> {
    let reach = |start: &String| {
        let (mut reached, mut next) = (BTreeSet::new(), vec![start.clone()]);
        while let Some(module) = next.pop() {
            for named in graph.get(&module).into_iter().flatten() {
                if reached.insert(named.clone()) {
                    next.push(named.clone());
                }
            }
        }
        reached
    };
    let reached: BTreeMap<_, _> = graph.keys().map(|module| (module, reach(module))).collect();
    let circle = |module: &String| -> Vec<String> {
        let back = |other: &&String| reached.get(other).is_some_and(|reached| reached.contains(module));
        reached[module].iter().filter(back).cloned().collect()
    };
    graph.keys().map(circle).filter(|circle| circle.len() > 1).collect()
}

/// `domain/ports/mod.rs` is `domain::ports`, and so is `domain/ports.rs`.
fn module_of(path: &str) -> String {
    path.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::")
}

/// Every path in the code, as its segments: those of `use` trees, and those inside expressions and types.
fn paths_in(code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let mut rest = code;
    while let Some(start) = find_use(rest) {
        paths.extend(paths_outside_of_use(&rest[..start]));
        let end = rest[start..].find(';').expect("a use declaration ends in a semicolon") + start;
        expand(&[], &rest[start + "use ".len()..end], &mut paths);
        rest = &rest[end..];
    }
    paths.extend(paths_outside_of_use(rest));
    paths
}

fn find_use(code: &str) -> Option<usize> {
    let starts_word = |position: usize| !code[..position].ends_with(|c: char| c.is_alphanumeric() || c == '_');
    code.match_indices("use ").map(|(position, _)| position).find(|position| starts_word(*position))
}

/// `a::{b, c::{d, self}}` is `a::b`, `a::c::d` and `a::c`.
fn expand(prefix: &[String], tree: &str, paths: &mut Vec<Vec<String>>) {
    let tree = tree.trim();
    let Some((head, group)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        let segments = path.split("::").map(str::trim).filter(|segment| !["", "*"].contains(segment));
        let path: Vec<_> = prefix.iter().cloned().chain(segments.map(str::to_owned)).collect();
        // In a group, `self` is the module of the group.
        let in_group = path.len() > 1 && path.last().is_some_and(|last| last == "self");
        paths.push(if in_group { path[..path.len() - 1].to_vec() } else { path });
        return;
    };
    let head = head.split("::").map(str::trim).filter(|segment| !segment.is_empty()).map(str::to_owned);
    let prefix: Vec<_> = prefix.iter().cloned().chain(head).collect();
    let group = &group[..group.rfind('}').expect("a group ends")];
    let (mut depth, mut item) = (0, 0);
    for (position, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &group[item..position], paths);
                item = position + 1;
            }
            _ => {}
        }
    }
    if !group[item..].trim().is_empty() {
        expand(&prefix, &group[item..], paths);
    }
}

fn paths_outside_of_use(code: &str) -> impl Iterator<Item = Vec<String>> {
    let words = code.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    words.filter(|word| word.contains("::")).map(|word| word.split("::").map(str::to_owned).collect())
}

/// The module to which a path in `module` refers: the longest prefix of the path that is a module.
fn resolve(module: &str, path: &[String], modules: &BTreeSet<String>) -> Option<String> {
    let mut at: Vec<&str> = module.split("::").collect();
    let mut segments = path.iter().map(String::as_str).peekable();
    match segments.peek().copied() {
        Some("crate") => {
            at.clear();
            segments.next();
        }
        Some("self") => {
            segments.next();
        }
        Some("super") => {
            while segments.next_if_eq(&"super").is_some() {
                at.pop();
            }
        }
        // A child module, or the name of another crate or of something that was imported.
        Some(child) => {
            if !modules.contains(&format!("{module}::{child}")) {
                return None;
            }
        }
        None => return None,
    }
    for segment in segments {
        at.push(segment);
        if !modules.contains(&at.join("::")) {
            at.pop();
            break;
        }
    }
    Some(at.join("::")).filter(|found| modules.contains(found))
}

fn source(path: &str, code: &str) -> Source {
    Source { path: path.to_owned(), code: code_of(code) }
}

#[test]
fn a_circle_is_found_through_use_trees_children_and_paths_in_expressions() {
    let circle = |sources: &[Source]| circles(&graph(sources));
    let two = |a: &str, b: &str| [source("a.rs", a), source("b/mod.rs", b), source("b/c.rs", "")];
    assert_eq!(circle(&two("use crate::b::Thing;", "use std::fmt;")), BTreeSet::new());
    let expected = BTreeSet::from([vec!["a".to_owned(), "b".to_owned()]]);
    assert_eq!(circle(&two("use crate::{b::Thing, x};", "fn f() { crate::a::g() }")), expected);
    assert_eq!(circle(&two("use super::b::{self, Thing as T};", "use super::{x, a::{y, z}};")), expected);
    let parent_and_child =
        |child: &str, parent: &str| circle(&[source("b/mod.rs", parent), source("b/c.rs", child), source("a.rs", "")]);
    assert_eq!(parent_and_child("use super::Thing;", "mod c; fn f() {}"), BTreeSet::new());
    let expected = BTreeSet::from([vec!["b".to_owned(), "b::c".to_owned()]]);
    assert_eq!(parent_and_child("use super::Thing;", "mod c; pub use c::*;"), expected);
    assert_eq!(parent_and_child("use super::Thing;", "mod c; fn f() { c::g() }"), expected);
    assert_eq!(parent_and_child("use crate::b::Thing;", "mod c; use self::c::g;"), expected);
}
