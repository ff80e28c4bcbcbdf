//! u01: `nanite demo`, as its users run it.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The command, in a directory of its own where nothing may be left behind.
fn demo(arguments: &[&str]) -> (Command, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nanite"));
    command.arg("demo").args(arguments).current_dir(&dir).stdin(Stdio::null());
    command.env_clear().env("TMPDIR", dir.path()).env("HOME", dir.path());
    (command, dir)
}

fn run(arguments: &[&str]) -> Output {
    let (mut command, dir) = demo(arguments);
    let output = command.output().unwrap();
    let left: Vec<_> = std::fs::read_dir(&dir).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect()
}

#[test]
fn u01_the_facts_in_json() {
    let output = run(&["--json"]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{}", text(&output.stdout));
    let facts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&facts["ok"], &facts["problems"]), (&Value::Bool(true), &serde_json::json!([])));

    let names: Vec<_> = facts["certificates"]["issued"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["the CA", "mapper-tower", "nanite-ada", "nanite-bob"]);
    let tags: Vec<_> = facts["agents"].as_array().unwrap().iter().map(|agent| strings(&agent["tags"])).collect();
    assert_eq!(tags, [vec!["top-secret"], vec![]]);

    let by: Vec<_> = facts["requests"].as_array().unwrap().iter().map(|asked| asked["by"].as_str().unwrap()).collect();
    assert_eq!(by, ["least_loaded", "random", "rr", "all", "target", "tag"]);
    let (ada, bob) = ("nanite-ada", "nanite-bob");
    for asked in facts["requests"].as_array().unwrap() {
        let from = strings(&asked["answered_by"]);
        match asked["by"].as_str().unwrap() {
            "least_loaded" => assert_eq!(from, [ada, ada, ada], "the load of ada is lower"),
            "random" => assert!(from.len() == 6 && from.iter().all(|one| [ada, bob].contains(one)), "{from:?}"),
            "rr" => assert!(from == [ada, bob, ada, bob] || from == [bob, ada, bob, ada], "{from:?}"),
            "all" => assert_eq!(from, [ada, bob]),
            "target" => assert_eq!(from, [bob]),
            "tag" => assert_eq!(from, [ada], "only ada carries it"),
            other => panic!("{other}"),
        }
        let results = asked["results"].as_object().unwrap();
        assert!(!results.is_empty() && results.values().all(|value| value == "THE EAGLE LANDS AT MIDNIGHT"));
    }
    let parts: Vec<_> = facts["parts"]["parts"].as_array().unwrap().iter().map(|part| &part[1]).collect();
    assert_eq!(parts, ["the", "eagle", "lands", "at", "midnight"]);
    assert_eq!(facts["parts"]["result"], "5 words");
    let codes: Vec<_> = facts["failures"].as_array().unwrap().iter().map(|failed| &failed["code"]).collect();
    assert_eq!(codes, ["failed", "no_target"]);
    assert_eq!(facts["failures"][0]["message"], "invalid digit found in string");

    let broker = &facts["broker"];
    assert_eq!(broker["plaintext_found"], 0);
    assert!(broker["messages"].as_u64() > Some(30) && broker["smallest"].as_u64() > Some(100), "{broker}");
    for word in broker["searched"].as_array().unwrap() {
        assert!(word["found_when_plain"].as_u64() > Some(0), "the search finds what is there: {word}");
        assert_eq!(word["found"].as_u64() == Some(0), word["secret"] == true, "{word}");
    }

    let refused: Vec<_> =
        facts["refusals"].as_array().unwrap().iter().map(|one| (&one["attack"], &one["refused"])).collect();
    let expected = [
        ("forged", "UnknownSigner"),
        ("changed", "BadSignature"),
        ("replayed", "Replayed"),
        ("re-targeted", "WrongDestination"),
        ("wrong role", "NotAuthorized"),
        ("old", "NotFresh"),
        ("noise", "Malformed"),
        ("downgraded", "Unsupported"),
    ];
    assert_eq!(refused.len(), expected.len());
    assert!(refused.iter().zip(expected).all(|((attack, kind), (a, k))| *attack == a && *kind == k), "{refused:?}");
    assert!(facts["refusals"].as_array().unwrap().iter().all(|one| one["handler_ran"] == false));

    for (rates, of) in facts["rates"].as_array().unwrap().iter().zip(["secure", "plain"]) {
        assert_eq!(rates["of"], of);
        for rate in rates["at"].as_array().unwrap() {
            assert!(rate["round_trips"].as_u64() > Some(0) && rate["failed"] == 0, "{rate}");
        }
    }
    assert_eq!(facts["rates"].as_array().unwrap().len(), 2);
}

#[test]
fn u01_in_a_pipe_it_is_plain_and_80_columns_wide() {
    let output = run(&[]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    let said = text(&output.stdout);
    assert!(!said.contains('\x1b'), "{said:?}");
    assert!(said.lines().all(|line| line.chars().count() <= 80 && !line.ends_with(' ')), "{said}");
    for word in ["least_loaded", "UnknownSigner", "Replayed", "WrongDestination", "All is as it should be"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(!said.contains("NO"), "{said}");
}

/// What it writes to a terminal.
fn on_a_terminal(no_color: Option<&str>) -> String {
    let pty = nix::pty::openpty(None, None).unwrap();
    let (mut command, _dir) = demo(&[]);
    if let Some(value) = no_color {
        command.env("NO_COLOR", value);
    }
    let mut child = command.stdout(pty.slave).stderr(Stdio::null()).spawn().unwrap();
    // The command holds the terminal's other end: without it, reading ends when the program does.
    drop(command);
    let (mut said, mut terminal, mut some) = (Vec::new(), File::from(pty.master), [0; 4096]);
    while let Ok(read) = terminal.read(&mut some) {
        if read == 0 {
            break;
        }
        said.extend_from_slice(&some[..read]);
    }
    assert!(child.wait().unwrap().success());
    String::from_utf8(said).unwrap()
}

#[test]
fn u01_on_a_terminal_it_is_coloured_unless_no_color_says_otherwise() {
    assert!(on_a_terminal(None).contains("\x1b[32mok\x1b[0m"));
    assert!(!on_a_terminal(Some("1")).contains('\x1b'));
}
