//! u01: `nanite demo` as a program.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The command, in an empty directory that must stay empty.
fn demo(arguments: &[&str]) -> (Command, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nanite"));
    command.arg("demo").args(arguments).current_dir(&dir).stdin(Stdio::null());
    command.env_clear().env("TMPDIR", dir.path()).env("HOME", dir.path()).env("TERM", "xterm");
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
    list.as_array().unwrap().iter().map(|item| item.as_str().unwrap()).collect()
}

#[test]
fn u01_json_report() {
    let output = run(&["--json"]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{}", text(&output.stdout));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["ok"], &report["problems"]), (&Value::Bool(true), &serde_json::json!([])));

    let names: Vec<_> =
        report["certificates"]["issued"].as_array().unwrap().iter().map(|issued| &issued["name"]).collect();
    assert_eq!(names, ["the CA", "mapper-tower", "nanite-ada", "nanite-bob"]);
    let tags: Vec<_> = report["agents"].as_array().unwrap().iter().map(|agent| strings(&agent["tags"])).collect();
    assert_eq!(tags, [vec!["top-secret"], vec![]]);

    let by: Vec<_> =
        report["requests"].as_array().unwrap().iter().map(|request| request["by"].as_str().unwrap()).collect();
    assert_eq!(by, ["least_loaded", "random", "rr", "all", "target", "tag"]);
    let (ada, bob) = ("nanite-ada", "nanite-bob");
    for request in report["requests"].as_array().unwrap() {
        let from = strings(&request["answered_by"]);
        match request["by"].as_str().unwrap() {
            "least_loaded" => assert_eq!(from, [ada, ada, ada], "the load of ada is lower"),
            "random" => assert!(from.len() == 6 && from.iter().all(|agent| [ada, bob].contains(agent)), "{from:?}"),
            "rr" => assert!(from == [ada, bob, ada, bob] || from == [bob, ada, bob, ada], "{from:?}"),
            "all" => assert_eq!(from, [ada, bob]),
            "target" => assert_eq!(from, [bob]),
            "tag" => assert_eq!(from, [ada], "only ada has the tag"),
            other => panic!("{other}"),
        }
        let results = request["results"].as_object().unwrap();
        assert!(!results.is_empty() && results.values().all(|value| value == "THE EAGLE LANDS AT MIDNIGHT"));
    }
    let parts: Vec<_> = report["parts"]["parts"].as_array().unwrap().iter().map(|part| &part[1]).collect();
    assert_eq!(parts, ["the", "eagle", "lands", "at", "midnight"]);
    assert_eq!(report["parts"]["result"], "5 words");
    let codes: Vec<_> = report["failures"].as_array().unwrap().iter().map(|failed| &failed["code"]).collect();
    assert_eq!(codes, ["failed", "no_target"]);
    assert_eq!(report["failures"][0]["message"], "invalid digit found in string");

    let broker = &report["broker"];
    assert_eq!(broker["plaintext_found"], 0);
    assert!(broker["messages"].as_u64() > Some(30) && broker["smallest"].as_u64() > Some(100), "{broker}");
    for word in broker["searched"].as_array().unwrap() {
        assert!(word["found_when_plain"].as_u64() > Some(0), "the search finds plain text: {word}");
        assert_eq!(word["found"].as_u64() == Some(0), word["secret"] == true, "{word}");
    }

    let refused: Vec<_> =
        report["refusals"].as_array().unwrap().iter().map(|attack| (&attack["attack"], &attack["refused"])).collect();
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
    assert!(report["refusals"].as_array().unwrap().iter().all(|attack| attack["handler_ran"] == false));

    for (rates, of) in report["rates"].as_array().unwrap().iter().zip(["secure", "plain"]) {
        assert_eq!(rates["of"], of);
        for rate in rates["at"].as_array().unwrap() {
            assert!(rate["round_trips"].as_u64() > Some(0) && rate["failed"] == 0, "{rate}");
        }
    }
    assert_eq!(report["rates"].as_array().unwrap().len(), 2);
}

#[test]
fn u01_output_in_a_pipe_is_plain_and_80_columns_wide() {
    let ended = run(&[]);
    assert_eq!((ended.status.code(), text(&ended.stderr)), (Some(0), ""));
    let output = text(&ended.stdout);
    assert!(!output.contains('\x1b'), "{output:?}");
    assert!(output.lines().all(|line| line.chars().count() <= 80 && !line.ends_with(' ')), "{output}");
    for word in ["least_loaded", "UnknownSigner", "Replayed", "WrongDestination", "Everything as expected"] {
        assert!(output.contains(word), "{word}: {output}");
    }
    assert!(!output.contains("NO"), "{output}");
}

/// Its output on a terminal.
fn on_a_terminal(no_color: Option<&str>) -> String {
    let pty = nix::pty::openpty(None, None).unwrap();
    let (mut command, _dir) = demo(&[]);
    if let Some(value) = no_color {
        command.env("NO_COLOR", value);
    }
    command.env("TERM", "xterm");
    let mut child = command.stdout(pty.slave).stderr(Stdio::null()).spawn().unwrap();
    // The command holds the other end of the terminal: without it, reading ends with the program.
    drop(command);
    let (mut output, mut terminal, mut some) = (Vec::new(), File::from(pty.master), [0; 4096]);
    while let Ok(read) = terminal.read(&mut some) {
        if read == 0 {
            break;
        }
        output.extend_from_slice(&some[..read]);
    }
    assert!(child.wait().unwrap().success());
    String::from_utf8(output).unwrap()
}

#[test]
fn u01_output_on_a_terminal_is_coloured_unless_no_color_is_set() {
    assert!(on_a_terminal(None).contains("\x1b[32mok\x1b[0m"));
    assert!(!on_a_terminal(Some("1")).contains('\x1b'));
}
