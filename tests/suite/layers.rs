//! The layers hold: who may import whom, and what only one place may do. Read from the source itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each part of the crate may name, beside itself. `clock` is for all. What is not in this table may not exist.
const LAYERS: &[(&str, &[&str])] = &[
    ("clock", &[]),
    ("limits", &[]),
    ("packet", &[]),
    ("serializer", &["packet"]),
    ("certs", &["packet"]),
    ("security", &["serializer", "certs", "packet"]),
    ("transport", &[]),
    ("policy", &["serializer", "packet"]),
    ("audit", &["policy", "serializer", "packet"]),
    ("link", &["audit", "policy", "serializer", "transport", "packet"]),
    ("request", NODE),
    ("agent", NODE),
    ("mapper", NODE),
    ("proxy", NODE),
    ("files", NODE),
    ("admin", &["mapper", "request", "packet", "policy", "serializer"]),
    ("cli", EVERYTHING),
    ("main", EVERYTHING),
    ("lib", EVERYTHING),
];

/// What runs on a node: it holds an `Arc<dyn Serializer>`, and knows neither certificates nor envelopes.
const NODE: &[&str] =
    &["link", "audit", "policy", "serializer", "transport", "packet", "request", "agent", "mapper", "proxy", "files"];

const EVERYTHING: &[&str] = &[
    "packet",
    "serializer",
    "certs",
    "security",
    "transport",
    "policy",
    "audit",
    "link",
    "request",
    "agent",
    "mapper",
    "proxy",
    "files",
    "admin",
    "cli",
];

struct Source {
    /// The part of the crate: the first component below `src`.
    part: String,
    path: PathBuf,
    /// Without comments.
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let relative = path.strip_prefix(&root).unwrap();
                let part = relative.components().next().unwrap().as_os_str().to_str().unwrap();
                let text = fs::read_to_string(&path).unwrap();
                let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
                let code = code.collect::<Vec<_>>().join("\n");
                found.push(Source { part: part.trim_end_matches(".rs").to_owned(), path: relative.to_owned(), code });
            }
        }
    }
    assert!(found.len() > 50, "the source was found");
    found
}

/// The parts that a source names by `crate::`.
fn named(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        let Some(group) = rest.strip_prefix('{') else {
            names.insert(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut start = true;
        for (index, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = true,
                c if c.is_whitespace() => {}
                _ if start && depth == 0 => {
                    names.insert(word(&group[index..]));
                    start = false;
                }
                _ => {}
            }
        }
    }
    // What stands at the root and is no part: macros, and types that are exported there.
    names.retain(|name| name.chars().next().is_some_and(char::is_lowercase));
    names
}

#[test]
fn layers_import_only_what_is_below_them() {
    let mut wrong = Vec::new();
    for source in sources() {
        let Some((_, allowed)) = LAYERS.iter().find(|(part, _)| *part == source.part) else {
            wrong.push(format!("{} has no layer", source.path.display()));
            continue;
        };
        for name in named(&source.code) {
            let is_part = LAYERS.iter().any(|(part, _)| *part == name);
            if is_part
                && name != source.part
                && name != "clock"
                && name != "limits"
                && !allowed.contains(&name.as_str())
            {
                wrong.push(format!("{} names {name}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn only_security_says_that_a_message_is_verified() {
    for source in sources() {
        let defines = source.path == Path::new("serializer/mod.rs");
        if source.part == "security" || defines {
            continue;
        }
        for makes in ["Inbound::verified", "Verified {", "Provenance::Verified(Box"] {
            let word = |at: usize| !source.code[..at].ends_with(char::is_alphanumeric);
            let made = source.code.match_indices(makes).any(|(at, _)| word(at));
            assert!(!made, "{} has `{makes}`", source.path.display());
        }
    }
}

#[test]
fn libraries_stay_behind_one_door() {
    let doors: &[(&str, &[&str])] = &[
        ("lapin::", &["transport/amqp"]),
        ("AUTH_ENVELOPED_DATA", &["security/cms"]),
        ("rcgen::", &["certs"]),
        ("redis::aio", &["mapper/redis"]),
        ("clap::", &["cli", "main.rs"]),
    ];
    for source in sources() {
        for (name, places) in doors {
            let inside = places.iter().any(|place| source.path.to_str().unwrap().starts_with(place));
            assert!(inside || !source.code.contains(name), "{} names {name}", source.path.display());
        }
    }
}

#[test]
fn what_is_named_is_found_in_every_form() {
    let code = "use crate::{a::{B, c}, d};\nuse crate::e::F; fn x() -> crate::g::H {}\ncrate::Name";
    assert_eq!(named(code).into_iter().collect::<Vec<_>>(), ["a", "d", "e", "g"]);
}
