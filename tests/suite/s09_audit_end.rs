//! The end of the audit log: what the head file detects, what a crash leaves, and how the log is bounded.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nanite::audit::{AuditError, AuditLog, AuditOptions, Record, verify, verify_with_head};
use nanite::clock::Timestamp;
use nanite::packet::Identity;
use nanite::serializer::{InboundQueue, OpenError, OpenErrorKind};
use nanite::transport::{Destination, PublishRequest, Transport, topology};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::program::{nanite, run};
use crate::harness::site::Site;
use crate::harness::system::{System, start};
use crate::harness::{WAIT_TIMEOUT, wait_until};

const CUT_BY_CRASH: &str = "the last line was cut by a crash";
const END_MISSING: &str = "lines at the end were missing at a start: removed, or lost in a power failure";
const END_CHANGED: &str = "lines at the end were changed before a start";
const HEAD_MISSING: &str = "the head file was missing at a start: lines at the end may have been removed";
const HEAD_INVALID: &str = "the head file was not readable at a start: lines at the end may have been removed";
const LEFT_OUT: &str = "more messages were refused for this reason than are recorded";

/// A log in a directory of its own.
struct Log {
    dir: TempDir,
    path: PathBuf,
}

impl Log {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("audit.log");
        Self { dir, path }
    }

    /// A log with lines from a process that has ended.
    async fn with_lines(count: u64) -> Self {
        let log = Self::new();
        log.write(count, AuditOptions::new()).await;
        log
    }

    fn open(&self, options: AuditOptions) -> AuditLog {
        AuditLog::open(&self.path, options).unwrap()
    }

    /// A process opens the log, writes lines, and ends.
    async fn write(&self, count: u64, options: AuditOptions) {
        let log = self.open(options);
        for n in 0..count {
            log.record(refusal(n, OpenErrorKind::BadSignature)).await;
        }
    }

    fn head_path(&self) -> PathBuf {
        self.dir.path().join("audit.log.head")
    }

    fn head(&self) -> Value {
        serde_json::from_slice(&fs::read(self.head_path()).unwrap()).unwrap()
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.path).unwrap()
    }

    /// The reasons and numbers of the gap records.
    fn gaps(&self) -> Vec<(String, u64)> {
        let gaps = lines(&self.path).into_iter().filter(|line| line["verdict"] == "gap");
        gaps.map(|line| (line["why"].as_str().unwrap().to_owned(), line["count"].as_u64().unwrap())).collect()
    }

    fn problems(&self) -> Vec<String> {
        verify(&self.path).unwrap().problems.into_iter().map(|problem| problem.reason).collect()
    }

    /// The numbers of the rotated files.
    fn rotated(&self) -> Vec<u64> {
        let names = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let suffix = |name: std::ffi::OsString| name.to_str()?.strip_prefix("audit.log.")?.parse().ok();
        let mut numbers: Vec<u64> = names.filter_map(suffix).collect();
        numbers.sort();
        numbers
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    // The last line may be half written.
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn refusal(second: u64, kind: OpenErrorKind) -> Record {
    let error = OpenError::new(kind, format!("number {second}"));
    Record::refused(&Identity::agent("fred").unwrap(), Timestamp::from_secs(second), &error, InboundQueue::AgentInbox)
}

#[tokio::test]
async fn s09_lines_that_were_cut_off_are_recorded_at_the_next_start() {
    type Change = fn(&Log);
    let changes: [(&str, Change, &str, u64); 6] = [
        ("five lines removed", |log| keep(log, 15), END_MISSING, 5),
        ("all lines removed", |log| keep(log, 0), END_MISSING, 20),
        ("the file removed", |log| fs::remove_file(&log.path).unwrap(), END_MISSING, 20),
        ("the last line changed", |log| replace(log, "number 19", "number 91"), END_CHANGED, 0),
        ("the head file removed", |log| fs::remove_file(log.head_path()).unwrap(), HEAD_MISSING, 0),
        ("the head file destroyed", |log| fs::write(log.head_path(), "").unwrap(), HEAD_INVALID, 0),
    ];
    for (what, change, reason, count) in changes {
        let log = Log::with_lines(20).await;
        assert_eq!(log.problems(), Vec::<String>::new());
        change(&log);
        log.write(1, AuditOptions::new()).await;
        assert_eq!(log.gaps(), [(reason.to_owned(), count)], "{what}");
        assert!(log.problems().contains(&reason.to_owned()), "{what}: {:?}", log.problems());
        // Later starts neither hide nor repeat it.
        log.write(1, AuditOptions::new()).await;
        assert_eq!(log.gaps().len(), 1, "{what}");
        assert!(log.problems().contains(&reason.to_owned()), "{what}: {:?}", log.problems());
    }
}

/// Leaves this many lines in a log.
fn keep(log: &Log, count: usize) {
    let kept: String = log.text().split_inclusive('\n').take(count).collect();
    fs::write(&log.path, kept).unwrap();
}

fn replace(log: &Log, from: &str, to: &str) {
    let text = log.text();
    assert!(text.contains(from));
    fs::write(&log.path, text.replace(from, to)).unwrap();
}

#[tokio::test]
async fn s09_log_continues_after_the_line_that_the_head_names() {
    let log = Log::with_lines(20).await;
    let intact = log.text();
    keep(&log, 15);
    log.write(1, AuditOptions::new()).await;
    let after = lines(&log.path);
    assert_eq!((&after[15]["seq"], &after[15]["verdict"]), (&json!(21), &json!("gap")));
    // The removed lines fit in again: nothing but the record remains.
    let rest: String = log.text().split_inclusive('\n').skip(15).collect();
    fs::write(&log.path, format!("{intact}{rest}")).unwrap();
    assert_eq!(log.problems(), [END_MISSING]);
    assert_eq!(verify(&log.path).unwrap().lines, 21);
}

#[tokio::test]
async fn s09_head_behind_the_log_is_a_crash_and_not_a_manipulation() {
    let log = Log::with_lines(10).await;
    let behind = fs::read(log.head_path()).unwrap();
    log.write(10, AuditOptions::new()).await;
    let text = log.text();
    for head in [behind.as_slice(), format!("{{\"seq\":0,\"hash\":\"{}\"}}", "0".repeat(64)).as_bytes()] {
        fs::write(log.head_path(), head).unwrap();
        fs::write(&log.path, &text).unwrap();
        log.write(1, AuditOptions::new()).await;
        assert_eq!((log.gaps(), log.problems()), (vec![], vec![]));
        assert_eq!(log.head()["seq"], 21);
    }
    // Not so when lines that the head covers were written anew.
    fs::write(log.head_path(), &behind).unwrap();
    let forged = text.lines().take(9).map(|line| format!("{line}\n")).collect::<String>();
    fs::write(&log.path, forged).unwrap();
    fs::remove_file(log.head_path()).unwrap();
    log.write(10, AuditOptions::new()).await;
    fs::write(log.head_path(), &behind).unwrap();
    log.write(1, AuditOptions::new()).await;
    assert!(log.gaps().contains(&(END_CHANGED.to_owned(), 0)), "{:?}", log.gaps());
}

#[tokio::test]
async fn s09_head_is_written_from_the_start_and_while_the_node_runs() {
    let log = Log::new();
    let open = log.open(AuditOptions::new());
    assert_eq!(log.head(), json!({"seq": 0, "hash": "0".repeat(64)}));
    for n in 1..=3 {
        open.record(refusal(n, OpenErrorKind::BadSignature)).await;
        wait_until("the head names the last line", async || log.head()["seq"] == n).await;
    }
    drop(open);
    assert_eq!(log.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn s09_file_that_is_no_log_is_not_changed() {
    let log = Log::new();
    for text in ["a shopping list", "a shopping list\n", "{\"seq\":1}\n", "\n\n"] {
        fs::write(&log.path, text).unwrap();
        let opened = AuditLog::open(&log.path, AuditOptions::new());
        assert!(matches!(opened, Err(AuditError::Broken { .. })), "{text:?}");
        assert_eq!(log.text(), text);
    }
}

/// Not a test: the process that `s09_killed_process_leaves_an_intact_log` kills.
#[tokio::test]
#[ignore = "run by another test, as a process of its own"]
async fn s09_writes_until_it_is_killed() {
    let path = std::env::var_os("AUDIT_LOG").expect("run by another test");
    let log = AuditLog::open(path, killed_options()).unwrap();
    for n in 0.. {
        log.record(refusal(n, OpenErrorKind::BadSignature)).await;
        if n % 10 == 0 {
            writeln!(std::io::stdout(), "written").unwrap();
        }
    }
}

fn killed_options() -> AuditOptions {
    AuditOptions::new().max_file_bytes(20_000).keep_files(5)
}

#[tokio::test]
async fn s09_killed_process_leaves_an_intact_log() {
    let log = Log::new();
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "s09_audit_end::s09_writes_until_it_is_killed", "--ignored", "--nocapture"])
            .env("AUDIT_LOG", &log.path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // At another moment each time.
        let output = BufReader::new(child.stdout.take().unwrap());
        let written = output.lines().map_while(Result::ok).filter(|line| line.ends_with("written"));
        let count = written.take(1 + round * 7).count();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(count, 1 + round * 7, "it wrote until it was killed");
        let report = verify(&log.path).unwrap();
        let whole = |reason: &str| reason != "not an audit log line, or incomplete";
        assert!(!report.problems.iter().any(|problem| whole(&problem.reason)), "round {round}: {report:?}");
    }
    log.write(1, killed_options()).await;
    let report = verify(&log.path).unwrap();
    assert_eq!(report.problems, []);
    assert!(report.first_seq > 1 && report.lines > 100, "old files were removed: {report:?}");
    let gaps: Vec<Value> =
        report.files.iter().flat_map(|file| lines(file)).filter(|line| line["verdict"] == "gap").collect();
    assert!(gaps.iter().all(|gap| gap["why"] == CUT_BY_CRASH), "{gaps:?}");
}

#[tokio::test]
async fn s09_refused_messages_are_limited_for_each_reason_and_counted() {
    let log = Log::new();
    let open = log.open(AuditOptions::new());
    for _ in 0..1000 {
        open.record(refusal(1, OpenErrorKind::BadSignature)).await;
    }
    for _ in 0..5 {
        open.record(refusal(1, OpenErrorKind::Replayed)).await;
    }
    let count = |verdict: &str, kind: OpenErrorKind| {
        let all = lines(&log.path)
            .into_iter()
            .filter(move |line| line["verdict"] == verdict && line["step"] == kind.as_str());
        all.map(|line| line["count"].as_u64().unwrap_or(1)).sum::<u64>()
    };
    // Soon, and not only at the end.
    wait_until("those left out are counted", async || count("gap", OpenErrorKind::BadSignature) == 980).await;
    assert_eq!(count("refused", OpenErrorKind::BadSignature), 20);
    assert_eq!((count("refused", OpenErrorKind::Replayed), count("gap", OpenErrorKind::Replayed)), (5, 0));
    // In the next second they are recorded again; what is left out at the end is counted at the end.
    for _ in 0..22 {
        open.record(refusal(2, OpenErrorKind::BadSignature)).await;
    }
    drop(open);
    assert_eq!(count("refused", OpenErrorKind::BadSignature), 40);
    assert_eq!(count("gap", OpenErrorKind::BadSignature), 982);
    assert!(log.gaps().iter().all(|(why, _)| why == LEFT_OUT), "{:?}", log.gaps());
    assert_eq!(log.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn s09_flood_of_refused_messages_writes_few_lines() {
    const MESSAGES: u64 = 2000;
    let (system, log) = (System::secure(), Log::new());
    let agent = start(system.agent("fred").audit(log.open(AuditOptions::new()))).await;
    let attacker = system.connect();
    let serializer = system.serializer(&Identity::mapper("m1").unwrap());
    let queue = topology::agent_inbox("nanite-fred").name;
    let started = std::time::Instant::now();
    for n in 0..MESSAGES {
        let message = PublishRequest::new(Destination::queue(&queue), format!("rubbish {n}").into_bytes());
        attacker.publish(message.content_type(serializer.content_type()), WAIT_TIMEOUT).await.unwrap();
    }
    let refused = || -> (u64, u64) {
        let lines = lines(&log.path);
        let of = |verdict: &str| lines.iter().filter(|line| line["verdict"] == verdict).cloned().collect::<Vec<_>>();
        (of("refused").len() as u64, of("gap").iter().map(|gap| gap["count"].as_u64().unwrap()).sum())
    };
    wait_until("all are recorded or counted", async || refused().0 + refused().1 == MESSAGES).await;
    let seconds = started.elapsed().as_secs() + 2;
    assert!(refused().0 <= 20 * seconds, "{:?} in {seconds} s", refused());
    agent.stop().await.unwrap();
}

#[tokio::test]
async fn s09_old_files_beyond_the_limit_are_removed() {
    let log = Log::new();
    let options = AuditOptions::new().max_file_bytes(2000).keep_files(2);
    log.write(100, options).await;
    let copy = log.dir.path().join("copy");
    fs::copy(log.head_path(), &copy).unwrap();
    log.write(1, options).await;
    let rotated = log.rotated();
    assert_eq!((rotated.len(), rotated[1]), (2, rotated[0] + 1));
    assert!(rotated[0] > 5, "numbers are not used again: {rotated:?}");
    let report = verify(&log.path).unwrap();
    assert_eq!((&report.problems, report.files.len()), (&vec![], 3));
    assert_eq!((report.first_seq > 1, report.first_seq + report.lines), (true, 102));
    assert_eq!(verify_with_head(&log.path, &copy).unwrap().problems, []);
    assert_eq!(log.gaps(), []);
    // None may be kept.
    log.write(30, options.keep_files(0)).await;
    assert_eq!((log.rotated(), log.problems()), (vec![], vec![]));
}

#[tokio::test]
async fn s09_copy_of_the_head_detects_a_forged_history() {
    let log = Log::with_lines(20).await;
    let copy = log.dir.path().join("copy");
    fs::copy(log.head_path(), &copy).unwrap();
    // Who can write both files removes them, and lets a node write others.
    fs::remove_file(&log.path).unwrap();
    fs::remove_file(log.head_path()).unwrap();
    let forged = log.open(AuditOptions::new());
    for n in 0..30 {
        forged.record(refusal(n, OpenErrorKind::Replayed)).await;
    }
    drop(forged);
    assert_eq!(log.problems(), Vec::<String>::new());
    let report = verify_with_head(&log.path, &copy).unwrap();
    let [problem] = report.problems.as_slice() else { panic!("{report:?}") };
    assert_eq!((&problem.file, problem.line), (&copy, 0));
    let verify = |arguments: &[&str]| {
        run(nanite(["audit", "verify", "audit.log"]).args(arguments).current_dir(log.dir.path())).code()
    };
    assert_eq!((verify(&[]), verify(&["--head", "audit.log.head"]), verify(&["--head", "copy"])), (0, 0, 6));
}

#[test]
fn s09_nanite_agent_starts_and_records_that_its_log_was_cut() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let arguments = ["agent", "--token", "fred", "--audit", "fred.audit", "--audit-keep", "3"];
    let stop = |node: crate::harness::program::Running| {
        node.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!(node.wait().code(), 0);
    };
    let fred = site.start(&arguments);
    site.ok(&["request", "/agent/echo", "hello", "--look", "60s", "--timeout", "60s"]);
    stop(fred);
    assert_eq!(site.run(&["audit", "verify", "fred.audit"]).code(), 0);
    let text = fs::read_to_string(site.path("fred.audit")).unwrap();
    let (last_but_one, _) = text.trim_end().rsplit_once('\n').unwrap();
    fs::write(site.path("fred.audit"), format!("{last_but_one}\n")).unwrap();
    let mut fred = site.start(&arguments);
    fred.wait_for(END_MISSING);
    stop(fred);
    let broken = site.run(&["audit", "verify", "fred.audit"]);
    assert_eq!(broken.code(), 6, "{broken:?}");
    assert!(broken.out.contains(END_MISSING), "{}", broken.out);
}
