//! The audit log: what it records, and that every manipulation is detected.

use std::fs;
use std::path::Path;

use nanite::agent::{actor, reply};
use nanite::audit::{AuditError, AuditLog, AuditOptions, Overflow, Record, verify};
use nanite::clock::Timestamp;
use nanite::packet::Identity;
use nanite::policy::Rules;
use nanite::serializer::{InboundQueue, OpenError, OpenErrorKind};
use tempfile::TempDir;

use crate::harness::program::{nanite, run};
use crate::harness::system::{System, start, wait_until_known};
use crate::harness::wait_until;

fn lines(path: &Path) -> Vec<serde_json::Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn refusal(n: u64) -> Record {
    let error = OpenError::new(OpenErrorKind::BadSignature, format!("number {n}"));
    Record::refused(&Identity::agent("fred").unwrap(), Timestamp::from_secs(n), &error, InboundQueue::AgentInbox)
}

/// Writes a log with this many lines.
async fn write_log(path: &Path, count: u64, options: AuditOptions) {
    let log = AuditLog::open(path, options).unwrap();
    for n in 0..count {
        log.record(refusal(n)).await;
    }
}

#[tokio::test]
async fn s09_records_every_message_and_decision() {
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
    wait_until_known(&mapper, &["fred"]).await;
    mapper.request("/work/light", "SECRET").await.unwrap();
    mapper.request("/work/heavy", ()).await.unwrap();
    agent.stop().await.unwrap();
    drop(mapper);
    let find = async |path: &Path, verdict: &str, kind: &str| {
        let mut found = None;
        wait_until(&format!("{verdict} {kind} is recorded"), async || {
            let text = fs::read_to_string(path).unwrap();
            let mut lines = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            found = lines.find(|line| line["verdict"] == verdict && line["kind"] == kind);
            found.is_some()
        })
        .await;
        found.unwrap()
    };
    let allowed = find(&at_agent, "allowed", "request").await;
    assert_eq!((&allowed["rule"], &allowed["service"]), (&"light".into(), &"/work/light".into()));
    assert_eq!((&allowed["from"], &allowed["verified"]), (&"mapper-m1".into(), &true.into()));
    let denied = find(&at_agent, "denied", "request").await;
    assert_eq!((&denied["service"], &denied["why"]), (&"/work/heavy".into(), &"Denied".into()));
    assert_eq!(find(&at_agent, "accepted", "advertise").await["channel"], "agent-control");
    assert_eq!(find(&at_mapper, "allowed", "register").await["from"], "nanite-fred");
    assert_eq!(find(&at_mapper, "accepted", "result").await["from"], "nanite-fred");
    for path in [&at_agent, &at_mapper] {
        assert!(!fs::read_to_string(path).unwrap().contains("SECRET"), "no payload in the log");
        // Tasks may still write a line.
        wait_until("the log is intact", async || verify(path).unwrap().problems.is_empty()).await;
    }
}

#[tokio::test]
async fn s09_verify_detects_removed_changed_and_reordered_lines() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("audit.log");
    write_log(&path, 20, AuditOptions::default()).await;
    let intact = fs::read_to_string(&path).unwrap();
    let report = verify(&path).unwrap();
    assert_eq!((report.lines, report.first_seq, report.problems), (20, 1, vec![]));
    let all: Vec<&str> = intact.lines().collect();
    let join = |lines: &[&str]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let without = |n: usize| join(&[&all[..n], &all[n + 1..]].concat());
    let mut swapped = all.clone();
    swapped.swap(3, 4);
    for (change, text) in [
        ("a line removed", without(7)),
        ("the first line removed, the second renumbered", without(0).replacen("\"seq\":2", "\"seq\":1", 1)),
        ("the last line removed", without(19)),
        ("all lines but one removed", join(&all[..1])),
        ("all lines removed", String::new()),
        ("two lines swapped", join(&swapped)),
        ("a word changed", intact.replacen("BadSignature", "Malformed", 3)),
        ("the last line changed", intact.replace("number 19", "number 91")),
        ("a line duplicated", join(&[&all[..5], &all[4..]].concat())),
        ("the last line incomplete", intact[..intact.len() - 10].to_owned()),
        ("garbage inserted", intact.replacen('\n', "\nrubbish\n", 1)),
    ] {
        fs::write(&path, text).unwrap();
        assert_ne!(verify(&path).unwrap().problems, [], "{change}");
    }
    fs::write(&path, &intact).unwrap();
    assert_eq!(verify(&path).unwrap().problems, []);
}

#[tokio::test]
async fn s09_chain_continues_across_rotation_and_restart() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("audit.log");
    let options = AuditOptions::new().max_file_bytes(2000);
    write_log(&path, 15, options).await;
    write_log(&path, 15, options).await;
    let report = verify(&path).unwrap();
    assert!(report.files.len() > 2, "{report:?}");
    assert_eq!((report.lines, report.problems), (30, vec![]));
    // A rotated file in the middle is missing.
    fs::rename(dir.path().join("audit.log.2"), dir.path().join("elsewhere")).unwrap();
    fs::rename(dir.path().join("audit.log.3"), dir.path().join("audit.log.2")).unwrap_or_default();
    assert_ne!(verify(&path).unwrap().problems, []);
}

#[tokio::test]
async fn s09_crash_is_recorded_as_gap_and_foreign_file_is_rejected() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("audit.log");
    write_log(&path, 3, AuditOptions::default()).await;
    let intact = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{intact}{{\"seq\":4,\"pr")).unwrap();
    write_log(&path, 1, AuditOptions::default()).await;
    assert_eq!(verify(&path).unwrap().problems, []);
    assert_eq!(lines(&path)[3]["verdict"], "gap");
    assert_eq!(lines(&path)[4]["why"], "number 0");
    fs::write(&path, "a shopping list\n").unwrap();
    assert!(matches!(AuditLog::open(&path, AuditOptions::default()), Err(AuditError::Broken { .. })));
    assert!(matches!(AuditLog::open("/nowhere/audit.log", AuditOptions::default()), Err(AuditError::Io { .. })));
}

#[tokio::test]
async fn s09_overflow_blocks_or_drops_and_counts() {
    let dir = TempDir::new().unwrap();
    let options = AuditOptions::new().queue_capacity(1);
    let blocking = dir.path().join("block.log");
    write_log(&blocking, 2000, options).await;
    assert_eq!(verify(&blocking).unwrap().lines, 2000);
    let path = dir.path().join("drop.log");
    let dropping = AuditLog::open(&path, options.overflow(Overflow::Drop)).unwrap();
    let mut n = 0;
    wait_until("dropped events are recorded while the log is open", async || {
        for _ in 0..1000 {
            dropping.record(refusal(n)).await;
            n += 1;
        }
        fs::read_to_string(&path).unwrap().contains("\"verdict\":\"gap\"")
    })
    .await;
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

#[test]
fn s09_nanite_audit_verify_reports_problems() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("audit.log");
    let verify = |options: &[&str]| run(nanite(["audit", "verify", file.to_str().unwrap()]).args(options));
    assert_eq!(verify(&[]).code(), 6, "there is no log");
    let line = r#"{"seq":2,"prev":"00","verdict":"refused"}"#;
    fs::write(&file, format!("{line}\n{line}\n")).unwrap();
    let broken = verify(&["--json"]);
    assert_eq!(broken.code(), 6, "{broken:?}");
    let report: serde_json::Value = serde_json::from_str(&broken.out).unwrap();
    assert_eq!(report["problems"].as_array().unwrap().len(), 2, "{report}");
}
