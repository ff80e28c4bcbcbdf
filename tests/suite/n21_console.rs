//! The console, on a terminal and with a script.

use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use serde_json::Value;

use crate::harness::WAIT_TIMEOUT;
use crate::harness::program::Running;
use crate::harness::site::Site;
use crate::harness::terminal::Terminal;

const UP: &str = "\x1b[A";
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const PROMPT: &str = "nanite> ";

/// A console on a terminal, at its prompt.
fn console(site: &Site) -> Terminal {
    let mut console = Terminal::run(&site.nanite(["console", "--token", "ctl"]));
    console.wait_for("`help` lists the commands");
    console.wait_for(PROMPT);
    // On a slow machine the agent may register later. The space keeps the line out of the history.
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !console.shown().contains(r#""nanite-fred": {"#) {
        assert!(Instant::now() < deadline, "fred is not registered: {}", console.shown());
        console.press(" agents --json\r");
        console.wait_for(r#""agents": {"#);
        console.wait_for(PROMPT);
    }
    console
}

fn with_agent(name: &'static str, programs: &[(&str, &str)]) -> (Site, Running) {
    let site = Site::new(&[&format!("agent {name}"), "mapper ctl"]);
    for (program, lines) in programs {
        site.program(program, lines);
    }
    let agent = site.agent(name, &["--tag", "big"]);
    (site, agent)
}

#[test]
fn n21_console_has_completion_and_history() {
    let (site, _fred) = with_agent("fred", &[("simple/echo", "cat"), ("simple/fail", "echo broken >&2; exit 3")]);
    let mut first = console(&site);
    first.press("/simple/e\t");
    first.wait_for("/simple/echo");
    first.press(" {\"a\": [1, \"b c\"]} --tar\t fr\t\r");
    first.wait_for("--target fred");
    first.wait_for(r#"{"a":[1,"b c"]}"#);
    first.wait_for("1 answered, 0 missing (nanite-fred, ");
    first.wait_for(PROMPT);
    first.press("ser\t\r");
    first.wait_for("/simple/echo");
    first.wait_for("nanite-fred");
    first.wait_for(PROMPT);
    first.press("/simple/fail\r");
    first.wait_for("nanite-fred: failed: ");
    first.wait_for(PROMPT);
    for (line, answer) in [
        ("agents --json", r#""nanite-fred": {"#),
        ("ping all", "nanite-fred: "),
        ("push /simple/echo work", "sent to nanite-fred"),
        ("help", "Send a request to agents"),
        ("help request", "--selector"),
        ("nonsense", "unrecognized subcommand 'nonsense'"),
        ("/not/offered", "no agent offers /not/offered"),
        ("/simple/echo -", "`-` reads a payload from stdin"),
        ("/simple/echo x --via-mapper", "the console is a mapper itself"),
    ] {
        first.press(&format!("{line}\r"));
        first.wait_for(answer);
        first.wait_for(PROMPT);
    }
    first.press(" /simple/echo secret\r");
    first.wait_for("1 answered");
    first.wait_for(PROMPT);
    first.press(CTRL_D);
    let (status, _) = first.wait();
    assert_eq!(status.code(), Some(0));

    let history = site.path("state/nanite/console-history");
    assert_eq!(std::fs::metadata(&history).unwrap().permissions().mode() & 0o777, 0o600);
    let kept = std::fs::read_to_string(&history).unwrap();
    assert!(kept.starts_with("/simple/echo {\"a\": [1, \"b c\"]} --target fred\nservices\n"), "{kept}");
    assert!(!kept.contains("secret"), "a line that begins with a space is not saved");
    let mut second = console(&site);
    second.press(UP);
    second.wait_for("/simple/echo x --via-mapper");
    second.press(CTRL_C);
    second.wait_for("Ctrl-D ends the console");
    second.wait_for(PROMPT);
    second.press("quit\r");
    assert_eq!(second.wait().0.code(), Some(0));
}

#[test]
fn n21_console_shows_intermediate_results_and_ctrl_c_ends_request() {
    let (site, mut fred) = with_agent(
        "fred",
        &[("slow/count", r#"echo '{"key": "step", "value": 1}' >&3; exec sleep 600"#), ("simple/echo", "cat")],
    );
    let mut console = console(&site);
    console.press("request /slow/count --timeout 10m\r");
    console.wait_for("nanite-fred step: 1");
    console.press(CTRL_C);
    console.wait_for("interrupted: further answers are ignored");
    console.wait_for(PROMPT);
    console.press("/simple/echo again\r");
    console.wait_for("again\r\n");
    console.wait_for(PROMPT);
    console.press(CTRL_D);
    assert_eq!(console.wait().0.code(), Some(0));
    fred.wait_for(" is ready: ");
}

#[test]
fn n21_agent_output_cannot_control_terminal() {
    let evil = r"printf '\033]0;owned\007\033[2J\302\233 31m'";
    let part = r#"echo '{"key": "\u001b]0;owned\u0007", "value": "\u001b[2J"}' >&3; echo ok"#;
    let fail = r"printf '\033]0;owned\007' >&2; exit 1";
    let (site, _fred) = with_agent("fred", &[("evil/say", evil), ("evil/part", part), ("evil/fail", fail)]);
    let check = |shown: &str| {
        assert!(!shown.contains("\x1b]0;") && !shown.contains("\x1b[2J") && !shown.contains('\u{9b}'), "{shown:?}");
    };
    let mut console = console(&site);
    // The agent has already replaced control characters in the error of a program.
    let shown =
        [("say", r"\u{1b}]0;owned\u{7}"), ("part", r"\u{1b}]0;owned\u{7}"), ("fail", "\u{fffd}]0;owned\u{fffd}")];
    for (service, harmless) in shown {
        console.press(&format!("/evil/{service}\r"));
        console.wait_for(harmless);
        console.wait_for(PROMPT);
    }
    console.press(CTRL_D);
    check(&console.wait().1);
    for (service, harmless) in shown {
        let service = format!("/evil/{service}");
        let arguments = ["request", &service, "--follow", "--token", "ctl", "--look", "60s", "--timeout", "60s"];
        let mut request = Terminal::run(&site.nanite(arguments));
        request.wait_for(harmless);
        check(&request.wait().1);
    }
}

#[test]
fn n21_script_exit_code_is_first_failure() {
    let (site, _fred) = with_agent("fred", &[("simple/echo", "cat")]);
    let good = b"# list the agents\nagents --json\n\nrequest /simple/echo 'two words'\n/simple/echo [1]\n";
    let ended = site.run_with_input(&["console"], good);
    assert_eq!(ended.code(), 0, "{ended:?}");
    let (json, rest) = ended.out.split_once("\ntwo words\n").unwrap();
    let agents: Value = serde_json::from_str(json).unwrap();
    assert_eq!(agents["agents"]["nanite-fred"]["tags"][0], "big");
    assert_eq!(rest, "[1]\n");
    assert!(!ended.out.contains(PROMPT), "a script gets no prompt");
    let bad =
        site.run_with_input(&["console"], b"/not/offered\nnonsense\n/simple/echo still\nquit\n/simple/echo never\n");
    assert_eq!((bad.code(), bad.out.as_str()), (3, "still\n"), "{}", bad.err);
    assert!(!site.path("state/nanite/console-history").exists(), "a script leaves no history");
}
