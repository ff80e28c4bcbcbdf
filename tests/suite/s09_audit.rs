//! The audit log: what it holds, and that no change of it goes unnoticed.

use std::fs;
use std::path::Path;

use nanite::agent::{actor, reply};
use nanite::audit::{AuditError, AuditLog, AuditOptions, Overflow, Record, verify};
use nanite::clock::Timestamp;
use nanite::packet::Identity;
use nanite::policy::Rules;
use nanite::serializer::{InboundQueue, OpenError, OpenErrorKind};
use tempfile::TempDir;

use crate::harness::system::{System, knows, start};

fn lines(path: &Path) -> Vec<serde_json::Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn refusal(n: u64) -> Record {
    let error = OpenError::new(OpenErrorKind::BadSignature, format!("number {n}"));
    Record::refused(&Identity::agent("fred").unwrap(), Timestamp::from_secs(n), &error, InboundQueue::AgentInbox)
}

/// A closed log of this many lines.
async fn log(path: &Path, count: u64, options: AuditOptions) {
    let log = AuditLog::open(path, options).unwrap();
    for n in 0..count {
        log.record(refusal(n)).await;
    }
}

#[tokio::test]
async fn s09_every_message_and_decision_has_its_line() {
    let (system, dir) = (System::secure(), TempDir::new().unwrap());
    let (at_agent, at_mapper) = (dir.path().join("agent.log"), dir.path().join("mapper.log"));
    let open = |path: &Path| AuditLog::open(path, AuditOptions::default()).unwrap();
    let rules = "[[request]]\nname = \"light\"\ncallers = [\"mapper-*\"]\nservices = [\"/work/light\"]";
    let work = actor("work")
        .expose("light", |secret: String| async move { reply(secret.len()) })
        .expose("heavy", |(): ()| async { reply(()) });
    let agent = system.agent("fred").audit(open(&at_agent)).policy(Rules::from_toml(rules).unwrap()).actor(work);
    let agent = start(agent).await;
    let mapper = system.mapper("m1").audit(open(&at_mapper)).start().await.unwrap();
    knows(&mapper, &["fred"]).await;
    mapper.request("/work/light", "SECRET").await.unwrap();
    mapper.request("/work/heavy", ()).await.unwrap();
    agent.stop().await.unwrap();
    drop(mapper);
    let find = |path: &Path, verdict: &str, kind: &str| {
        let found = lines(path).into_iter().find(|line| line["verdict"] == verdict && line["kind"] == kind);
        found.unwrap_or_else(|| panic!("no {verdict} {kind} in {:#?}", lines(path)))
    };
    let allowed = find(&at_agent, "allowed", "request");
    assert_eq!((&allowed["rule"], &allowed["service"]), (&"light".into(), &"/work/light".into()));
    assert_eq!((&allowed["from"], &allowed["verified"]), (&"mapper-m1".into(), &true.into()));
    let denied = find(&at_agent, "denied", "request");
    assert_eq!((&denied["service"], &denied["why"]), (&"/work/heavy".into(), &"Denied".into()));
    assert_eq!(find(&at_agent, "accepted", "advertise")["channel"], "agent-control");
    assert_eq!(find(&at_mapper, "allowed", "register")["from"], "nanite-fred");
    assert_eq!(find(&at_mapper, "accepted", "result")["from"], "nanite-fred");
    crate::harness::wait_until("the mapper's tasks have let go of the log", async || {
        verify(&at_mapper).unwrap().problems.is_empty()
    })
    .await;
    for path in [&at_agent, &at_mapper] {
        assert!(!fs::read_to_string(path).unwrap().contains("SECRET"), "nothing of a payload is in it");
        assert_eq!(verify(path).unwrap().problems, []);
    }
}

#[tokio::test]
async fn s09_a_cut_changed_or_reordered_line_is_found() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("audit.log");
    log(&path, 20, AuditOptions::default()).await;
    let whole = fs::read_to_string(&path).unwrap();
    let report = verify(&path).unwrap();
    assert_eq!((report.lines, report.first, report.problems), (20, 1, vec![]));
    let all: Vec<&str> = whole.lines().collect();
    let join = |lines: &[&str]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let without = |n: usize| join(&[&all[..n], &all[n + 1..]].concat());
    let mut swapped = all.clone();
    swapped.swap(3, 4);
    for (what, text) in [
        ("a line is taken out", without(7)),
        (
            "the first line is taken out, and the head of the chain with it",
            without(0).replacen("\"seq\":2", "\"seq\":1", 1),
        ),
        ("the last line is cut", without(19)),
        ("all but one are cut", join(&all[..1])),
        ("everything is cut", String::new()),
        ("two lines are swapped", join(&swapped)),
        ("a word is changed", whole.replacen("BadSignature", "Malformed", 3)),
        ("the last line is changed", whole.replace("number 19", "number 91")),
        ("a line stands twice", join(&[&all[..5], &all[4..]].concat())),
        ("half a line at the end", whole[..whole.len() - 10].to_owned()),
        ("rubbish between", whole.replacen('\n', "\nrubbish\n", 1)),
    ] {
        fs::write(&path, text).unwrap();
        assert_ne!(verify(&path).unwrap().problems, [], "{what}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(verify(&path).unwrap().problems, []);
}

#[tokio::test]
async fn s09_the_chain_goes_on_across_files_and_processes() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("audit.log");
    let options = || {
        let mut options = AuditOptions::default();
        options.rotate_at = 2000;
        options
    };
    log(&path, 15, options()).await;
    log(&path, 15, options()).await;
    let report = verify(&path).unwrap();
    assert!(report.files.len() > 2, "{report:?}");
    assert_eq!((report.lines, report.problems), (30, vec![]));
    // A whole file in the middle is missing.
    fs::rename(dir.path().join("audit.log.2"), dir.path().join("elsewhere")).unwrap();
    fs::rename(dir.path().join("audit.log.3"), dir.path().join("audit.log.2")).unwrap_or_default();
    assert_ne!(verify(&path).unwrap().problems, []);
}

#[tokio::test]
async fn s09_a_crash_leaves_a_gap_that_is_said_and_a_strange_file_is_not_continued() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("audit.log");
    log(&path, 3, AuditOptions::default()).await;
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{whole}{{\"seq\":4,\"pr")).unwrap();
    log(&path, 1, AuditOptions::default()).await;
    assert_eq!(verify(&path).unwrap().problems, []);
    assert_eq!(lines(&path)[3]["verdict"], "gap");
    assert_eq!(lines(&path)[4]["why"], "number 0");
    fs::write(&path, "a shopping list\n").unwrap();
    assert!(matches!(AuditLog::open(&path, AuditOptions::default()), Err(AuditError::Broken { .. })));
    assert!(matches!(AuditLog::open("/nowhere/audit.log", AuditOptions::default()), Err(AuditError::Io { .. })));
}

#[tokio::test]
async fn s09_more_than_can_be_written_waits_or_is_counted() {
    let dir = TempDir::new().unwrap();
    let mut options = AuditOptions::default();
    options.capacity = 1;
    let blocking = dir.path().join("block.log");
    log(&blocking, 2000, options).await;
    assert_eq!(verify(&blocking).unwrap().lines, 2000);
    options.overflow = Overflow::Drop;
    let path = dir.path().join("drop.log");
    let dropping = AuditLog::open(&path, options).unwrap();
    let mut n = 0;
    while dropping.dropped() == 0 {
        dropping.record(refusal(n)).await;
        n += 1;
    }
    let dropped = dropping.dropped();
    drop(dropping);
    let report = verify(&path).unwrap();
    assert_eq!(report.problems, []);
    let gaps: u64 =
        lines(&path).iter().filter(|line| line["verdict"] == "gap").map(|line| line["count"].as_u64().unwrap()).sum();
    assert_eq!(gaps, dropped);
    let records = lines(&path).iter().filter(|line| line["verdict"] == "refused").count() as u64;
    assert_eq!(records + dropped, n);
}
