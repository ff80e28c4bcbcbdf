//! The structure of the source code: which module may use which (the table in ARCHITECTURE.md), no circles, files of a readable size.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::harness::sources::{Source, circles, named_modules, root, rust_files, sources, uses};

/// The most lines in a file.
const MAX_LINES: usize = 500;
/// The number of files that `src` has to stay below.
const MAX_FILES: usize = 175;

/// One row of the table of modules in ARCHITECTURE.md.
struct Row {
    module: String,
    may_use: BTreeSet<String>,
}

/// The table of modules in ARCHITECTURE.md, in its order. `every module` allows all of them.
fn table() -> Vec<Row> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let section = text.split("\n## Modules\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows: Vec<Vec<&str>> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"))
        .map(|line| line.split(" | ").collect())
        .collect();
    let module = |row: &Vec<&str>| row[0].trim_end_matches('`').to_owned();
    let all: BTreeSet<String> = rows.iter().map(module).collect();
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    rows.iter()
        .map(|row| {
            let [_, _, may_use] = row[..] else { panic!("a row has three cells: {row:?}") };
            let may_use = if may_use.starts_with("every module") { all.clone() } else { quoted(may_use) };
            Row { module: module(row), may_use }
        })
        .collect()
}

#[test]
fn layers_import_only_what_is_below_them() {
    let table = table();
    let rows: BTreeMap<&str, &BTreeSet<String>> = table.iter().map(|row| (row.module.as_str(), &row.may_use)).collect();
    let mut wrong = BTreeSet::new();
    for source in sources().iter().filter(|source| !["lib", "main"].contains(&source.module.as_str())) {
        let file = source.path.display();
        let Some(may_use) = rows.get(source.module.as_str()) else {
            wrong.insert(format!("{file}: the module `{}` is not in the table", source.module));
            continue;
        };
        for name in named_modules(&source.code) {
            let is_module = rows.contains_key(name.as_str());
            if is_module && name != source.module && !may_use.contains(&name) {
                wrong.insert(format!("{file}: `{}` may not use `{name}`", source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "not allowed by the table in ARCHITECTURE.md: {wrong:#?}");
}

#[test]
fn the_table_of_modules_is_complete_and_ordered_from_the_bottom_up() {
    let table = table();
    let modules: BTreeSet<&str> = table.iter().map(|row| row.module.as_str()).collect();
    assert_eq!(modules.len(), table.len(), "a module has two rows");
    let sources = sources();
    let real: BTreeSet<&str> = sources.iter().map(|source| source.module.as_str()).collect();
    let real: BTreeSet<&str> = real.into_iter().filter(|module| !["lib", "main"].contains(module)).collect();
    assert_eq!(modules, real, "the table lists other modules than `src` has");
    let mut below = BTreeSet::new();
    for row in &table {
        if row.may_use.len() < table.len() {
            let above: Vec<_> = row.may_use.difference(&below).collect();
            assert!(above.is_empty(), "`{}` may use {above:?}, which have no row above it", row.module);
        }
        below.insert(row.module.clone());
    }
}

#[test]
fn no_file_of_src_imports_another_in_a_circle() {
    let circles = circles(&uses(&sources()));
    assert!(circles.is_empty(), "{} circles of files: {circles:#?}", circles.len());
}

#[test]
fn src_has_a_limited_number_of_files() {
    let count = rust_files("src").len();
    assert!(count < MAX_FILES, "src has {count} files; merge those that split one idea");
}

#[test]
fn no_file_has_more_than_500_lines() {
    let mut long = Vec::new();
    for file in ["src", "tests"].map(rust_files).concat() {
        let lines = fs::read_to_string(root().join(&file)).unwrap().lines().count();
        if lines > MAX_LINES {
            long.push(format!("{}: {lines} lines", file.display()));
        }
    }
    assert!(long.is_empty(), "more than {MAX_LINES} lines: {long:#?}");
}

#[test]
fn only_security_marks_a_message_as_verified() {
    for source in sources() {
        let defines = source.path == Path::new("serializer/mod.rs");
        if source.module == "security" || defines {
            continue;
        }
        for constructor in ["Inbound::verified", "Verified {", "Provenance::Verified(Box"] {
            let is_word = |at: usize| !source.code[..at].ends_with(char::is_alphanumeric);
            let used = source.code.match_indices(constructor).any(|(at, _)| is_word(at));
            assert!(!used, "{} uses `{constructor}`", source.path.display());
        }
    }
}

#[test]
fn each_wrapped_library_is_used_in_one_place() {
    let places: &[(&str, &[&str])] = &[
        ("lapin::", &["transport/amqp"]),
        ("AUTH_ENVELOPED_DATA", &["security/cms"]),
        ("rcgen::", &["certs"]),
        ("redis::aio", &["mapper/redis"]),
        ("clap::", &["cli", "main.rs"]),
    ];
    for source in sources() {
        for (name, allowed) in places {
            let inside = allowed.iter().any(|place| source.path.to_str().unwrap().starts_with(place));
            assert!(inside || !source.code.contains(name), "{} uses {name}", source.path.display());
        }
    }
}

#[test]
fn module_names_are_found_in_every_form_of_import() {
    let code = "use crate::{a::{B, c}, d};\nuse crate::e::F; fn x() -> crate::g::H {}\ncrate::Name";
    assert_eq!(named_modules(code).into_iter().collect::<Vec<_>>(), ["a", "d", "e", "g"]);
}

#[test]
fn circles_are_found_through_reexports_and_parents() {
    let source = |path: &str, code: &str| Source {
        path: path.into(),
        module: path.split('/').next().unwrap().to_owned(),
        code: code.to_owned(),
    };
    let in_a = |mod_rs: &str, b: &str, c: &str| {
        let files = [("lib.rs", "pub mod a;"), ("a/mod.rs", mod_rs), ("a/b.rs", b), ("a/c.rs", c)];
        circles(&uses(&files.map(|(path, code)| source(path, code)))).len()
    };
    // Two files that use each other through the re-exports of their parent.
    assert_eq!(
        in_a("mod b; mod c;\npub use b::B; pub use c::C;", "use super::C; struct B;", "use super::B; struct C;"),
        1
    );
    // A parent with a type that its child uses, and which uses the child.
    assert_eq!(in_a("mod b; mod c;\nstruct A; fn run() { b::run() }", "use super::A; fn run() {}", ""), 1);
    // The parent only re-exports; unit tests do not count.
    let test = "struct C; #[cfg(test)] mod tests { use crate::a::b::B; }";
    assert_eq!(in_a("mod b; mod c;\npub use b::B; struct A;", "use super::{A, c::C}; struct B;", test), 0);
}
