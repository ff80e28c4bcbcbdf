//! The documents are true: the tests that they name exist, and their links lead somewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files below a folder with this ending, with their paths from the project's root.
fn files(folder: &str, ending: &str) -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == ending) {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// The names of all tests and benchmarks, and the files of the benchmarks.
fn shown() -> BTreeSet<String> {
    let mut names: BTreeSet<String> = files("benches", "rs").into_iter().collect();
    for file in ["src", "tests", "benches"].map(|folder| files(folder, "rs")).concat() {
        for after in read(&file).split("fn ").skip(1) {
            names.extend(after.split(['(', '<']).next().map(str::to_owned));
        }
    }
    names
}

/// What stands between backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Whether a word in a document can name a test or a benchmark.
fn is_row(word: &str) -> bool {
    let bytes = word.as_bytes();
    bytes.len() >= 3 && b"nsdpu".contains(&bytes[0]) && bytes[1..3].iter().all(u8::is_ascii_digit)
}

#[test]
fn u08_every_feature_names_tests_that_exist() {
    let (list, shown) = (read("docs/features.md"), shown());
    let mut rows = BTreeSet::new();
    for line in list.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [row, what, by] = cells[..] else { panic!("three cells are needed: {line}") };
        if row == "row" {
            continue;
        }
        assert!(is_row(row) && row.len() == 3, "{line}");
        assert!(rows.insert(row.to_owned()), "{row} stands there twice");
        assert!(what.len() > 20, "{line}");
        let names = quoted(by);
        assert!(!names.is_empty(), "{row} is shown by nothing");
        for name in names {
            assert!(shown.contains(name), "{row} is shown by {name}, which does not exist");
        }
    }
    assert!(rows.len() > 20, "{rows:?}");
}

/// The promises of SECURITY.md.
fn promises(text: &str) -> Vec<String> {
    let section = text.split("## Promises").nth(1).unwrap().split("\n## ").next().unwrap();
    // A promise begins with its number at the beginning of a line, and goes on in lines that are moved in.
    let mut promises: Vec<String> = Vec::new();
    for line in section.lines() {
        match promises.last_mut() {
            Some(promise) if line.starts_with(' ') => {
                promise.push(' ');
                promise.push_str(line.trim());
            }
            _ if line.starts_with(|c: char| c.is_ascii_digit()) => promises.push(line.to_owned()),
            _ => {}
        }
    }
    promises
}

/// The tests that a promise names.
fn tests_of(promise: &str) -> Vec<&str> {
    quoted(promise).into_iter().filter(|word| is_row(word)).collect()
}

#[test]
fn s13_the_evidence_is_of_these_promises() {
    let text = read("SECURITY.md");
    let table = text.split("<!-- evidence: ").nth(1).unwrap().split("<!-- end of the evidence -->").next().unwrap();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|line| line.split(" | ").collect())
        .filter(|cells: &Vec<&str>| cells[0].parse::<u32>().is_ok())
        .collect();
    let promises = promises(&text);
    assert_eq!(rows.len(), promises.len(), "make evidence");
    for (promise, row) in promises.iter().zip(rows) {
        let tests = tests_of(promise).len().to_string();
        assert!(promise.starts_with(&format!("{}. **{}", row[0], row[1])), "make evidence: {row:?} is not {promise}");
        assert_eq!(row[2..], [tests.as_str(), tests.as_str()], "make evidence: {promise}");
    }
}

#[test]
fn s13_every_promise_names_tests_that_exist() {
    let (text, shown) = (read("SECURITY.md"), shown());
    let promises = promises(&text);
    for (number, promise) in (1..).zip(&promises) {
        assert!(promise.starts_with(&format!("{number}. ")), "{promise}");
        let names = tests_of(promise);
        assert!(!names.is_empty(), "no test holds this promise: {promise}");
        for name in names {
            assert!(shown.contains(name), "promise {number} is held by {name}, which does not exist");
        }
    }
    assert!(promises.len() >= 10, "{promises:?}");
}

#[test]
fn u08_links_lead_somewhere() {
    let documents = [files("docs", "md"), files("examples", "md"), vec!["certs/README.md".to_owned()]].concat();
    let at_the_top = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let documents: Vec<String> = documents.into_iter().chain(at_the_top.filter(|name| name.ends_with(".md"))).collect();
    assert!(documents.len() > 8, "{documents:?}");
    let mut broken = Vec::new();
    for document in documents {
        let folder = root().join(&document).parent().unwrap().to_owned();
        for link in read(&document).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap();
            if !path.is_empty() && !link.contains("://") && !folder.join(path).exists() {
                broken.push(format!("{document}: {link}"));
            }
        }
    }
    assert_eq!(broken, [""; 0]);
}
