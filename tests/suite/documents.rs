//! Checks of the documents: the tests that they name exist, links are not broken, terms are in the glossary, the wording is plain.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::sources::{root, without_comments};

/// The most terms that the glossary may have.
const MAX_TERMS: usize = 40;
/// Words that make a sentence odd; the sentence needs other wording.
const ODD_WORDS: [&str; 3] = ["whom", "of which", "for ever"];

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files below a folder with this extension, as paths from the project's root.
fn files(folder: &str, extension: &str) -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|other| other == extension) {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// The Markdown files in the project's root.
fn root_documents() -> Vec<String> {
    let names = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".md")).collect()
}

/// The names of all tests that run, and of all benchmarks with their files.
fn test_names() -> BTreeSet<String> {
    let mut names: BTreeSet<String> = files("benches", "rs").into_iter().collect();
    for file in files("benches", "rs") {
        names.extend(
            read(&file).split("fn ").skip(1).filter_map(|after| after.split(['(', '<']).next()).map(str::to_owned),
        );
    }
    names.extend(suite_tests());
    if !cfg!(all(feature = "admin", feature = "cedar", feature = "fuzzing", feature = "redis")) {
        // Some tests are not in this program.
        names.extend(files("tests", "rs").iter().flat_map(|file| unit_tests(&read(file))));
    }
    names.extend(files("src", "rs").iter().flat_map(|file| unit_tests(&read(file))));
    names
}

/// The tests of this program, as it lists them itself, without those that are ignored.
fn suite_tests() -> BTreeSet<String> {
    let list = |options: &[&str]| -> BTreeSet<String> {
        let listed = Command::new(std::env::current_exe().unwrap()).args(options).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let tests = listed.lines().filter_map(|line| line.strip_suffix(": test"));
        tests.map(|path| path.rsplit("::").next().unwrap().to_owned()).collect()
    };
    let ignored = list(&["--list", "--format", "terse", "--ignored"]);
    list(&["--list", "--format", "terse"]).difference(&ignored).cloned().collect()
}

/// The unit tests in a source file: functions with an attribute that makes them tests, and none that ignores them.
fn unit_tests(source: &str) -> BTreeSet<String> {
    let code = without_comments(source);
    let mut names = BTreeSet::new();
    let mut attributes: Vec<&str> = Vec::new();
    for line in code.lines().map(str::trim) {
        if line.starts_with("#[") {
            attributes.push(line);
            continue;
        }
        let function = line.trim_start_matches("async ").strip_prefix("fn ");
        let is_test = |attribute: &&str| *attribute == "#[test]" || attribute.starts_with("#[tokio::test");
        if let Some(name) = function.and_then(|after| after.split(['(', '<']).next()) {
            let ignored = attributes.iter().any(|attribute| attribute.starts_with("#[ignore"));
            if attributes.iter().any(is_test) && !ignored {
                names.insert(name.to_owned());
            }
        }
        attributes.clear();
    }
    names
}

#[test]
fn u08_only_tests_that_run_count_as_tests() {
    let source = "#[test]\nfn s01_a() {}\n#[tokio::test(flavor = \"x\")]\nasync fn s01_b() {}\nfn s01_helper() {}\n\
        #[test]\n#[ignore = \"slow\"]\nfn s01_ignored() {}\n// #[test]\n// fn s01_comment() {}\n#[cfg(x)]\nfn s01_other() {}\n\
        let text = \"#[test]\nfn s01_text() {}\";\n";
    assert_eq!(unit_tests(source), ["s01_a", "s01_b"].map(str::to_owned).into());
    let (all, suite) = (test_names(), suite_tests());
    assert!(suite.contains("u08_only_tests_that_run_count_as_tests") && suite.len() > 200, "{suite:?}");
    // A helper of this file, and a name that is only in a text.
    for none in ["test_names", "is_row", "s01_helper", "s01_a"] {
        assert!(!all.contains(none), "{none} is no test");
    }
    assert!(all.contains("s03_certificate_file_name_is_never_a_key_file_name"), "unit tests are missing");
}

/// The text between backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Whether a word in a document is the name of a test or a benchmark: it begins with a row.
fn is_row(word: &str) -> bool {
    let bytes = word.as_bytes();
    bytes.len() >= 3 && b"nsdpu".contains(&bytes[0]) && bytes[1..3].iter().all(u8::is_ascii_digit)
}

#[test]
fn u08_every_feature_names_tests_that_exist() {
    let (list, tests) = (read("docs/features.md"), test_names());
    let mut rows = BTreeSet::new();
    for line in list.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [row, what, by] = cells[..] else { panic!("three cells are needed: {line}") };
        if row == "row" {
            continue;
        }
        assert!(is_row(row) && row.len() == 3, "{line}");
        assert!(rows.insert(row.to_owned()), "{row} is listed twice");
        assert!(what.len() > 20, "{line}");
        let names = quoted(by);
        assert!(!names.is_empty(), "{row} names no test");
        for name in names {
            assert!(tests.contains(name), "{row} names {name}, which does not exist");
        }
    }
    assert!(rows.len() > 20, "{rows:?}");
}

/// The promises of SECURITY.md.
fn promises(text: &str) -> Vec<String> {
    let section = text.split("## Promises").nth(1).unwrap().split("\n## ").next().unwrap();
    // A promise starts with its number at the start of a line; its other lines are indented.
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
fn s13_the_evidence_table_matches_the_promises() {
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
    let (text, tests) = (read("SECURITY.md"), test_names());
    let promises = promises(&text);
    for (number, promise) in (1..).zip(&promises) {
        assert!(promise.starts_with(&format!("{number}. ")), "{promise}");
        let names = tests_of(promise);
        assert!(!names.is_empty(), "this promise names no test: {promise}");
        for name in names {
            assert!(tests.contains(name), "promise {number} names {name}, which does not exist");
        }
    }
    assert!(promises.len() >= 10, "{promises:?}");
}

#[test]
fn u08_links_in_documents_are_not_broken() {
    let documents =
        [files("docs", "md"), files("examples", "md"), vec!["certs/README.md".to_owned()], root_documents()].concat();
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

/// A text in lower case without anything but letters and digits: so `InFlightPublish` is found for `in-flight publish`.
fn squeezed(text: &str) -> String {
    text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[test]
fn u10_glossary_has_at_most_40_terms_and_each_is_used() {
    let glossary = read("docs/glossary.md");
    let rows: Vec<&str> = glossary.lines().filter_map(|line| line.strip_prefix("| **")).collect();
    let terms: Vec<&str> = rows.iter().map(|row| row.split("**").next().unwrap()).collect();
    assert!((20..=MAX_TERMS).contains(&terms.len()), "{} terms: {terms:?}", terms.len());
    assert_eq!(terms.iter().collect::<BTreeSet<_>>().len(), terms.len(), "a term is listed twice: {terms:?}");
    let documents = [files("docs", "md"), files("src", "rs"), root_documents()].concat();
    let texts = documents.iter().filter(|file| *file != "docs/glossary.md").map(|file| squeezed(&read(file)));
    let text: String = texts.collect();
    let unused: Vec<_> = terms.iter().filter(|term| !text.contains(&squeezed(term))).collect();
    assert!(unused.is_empty(), "neither in the documents nor in the code: {unused:?}");
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        assert!(read(document).contains("](docs/glossary.md)"), "{document} has no link to the glossary");
    }
}

/// Whether a text contains a word, or several, and not only as a part of another word.
fn has_word(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = text.match_indices(word).map(|(at, _)| (&text[..at], &text[at + word.len()..]));
    found.any(|(before, after)| !before.ends_with(is_part) && !after.starts_with(is_part))
}

#[test]
fn u10_documents_and_code_use_plain_words() {
    let documents = root_documents().into_iter().filter(|name| name != "CHANGELOG.md").collect();
    let mut found = Vec::new();
    for file in [files("docs", "md"), files("src", "rs"), documents].concat() {
        for (number, line) in (1..).zip(read(&file).lines()) {
            for odd in ODD_WORDS.iter().filter(|odd| has_word(&line.to_lowercase(), odd)) {
                found.push(format!("{file}:{number}: `{odd}`: {}", line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{} lines need other words: {found:#?}", found.len());
}
