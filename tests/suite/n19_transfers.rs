//! What a receiver of files does with the packets of a sender that keeps no rules, and what its policy decides.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nanite::agent::Agent;
use nanite::audit::{AuditLog, AuditOptions};
use nanite::files::{Broadcast, FileRoot};
use nanite::packet::{Failure, FailureCode};
use nanite::policy::{Policy, Rules};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::system::{DenyAll, FileSender, System, start, wait_until_known};
use crate::harness::{WAIT_TIMEOUT, wait_until};

const ALREADY_EXISTS: &str = "the file cannot be written: entity already exists";

/// The agent `a`, which receives files of `photos`.
struct Receiver {
    system: System,
    root: TempDir,
    log: PathBuf,
    _agent: Agent,
    _logs: TempDir,
}

impl Receiver {
    async fn new() -> Self {
        Self::with(None, |root| root).await
    }

    async fn with(policy: Option<&dyn Fn() -> Box<dyn Policy>>, options: impl FnOnce(FileRoot) -> FileRoot) -> Self {
        let (system, root, logs) = (System::secure(), TempDir::new().unwrap(), TempDir::new().unwrap());
        let log = logs.path().join("audit.log");
        let files = FileRoot::new(root.path(), ["photos".parse().unwrap()]).unwrap();
        let audit = AuditLog::open(&log, AuditOptions::default()).unwrap();
        let mut agent = system.agent("a").files(options(files)).audit(audit);
        if let Some(policy) = policy {
            agent = agent.policy(policy());
        }
        let agent = start(agent).await;
        Self { system, root, log, _agent: agent, _logs: logs }
    }

    async fn sender(&self, name: &str) -> FileSender {
        FileSender::new(&self.system, name, "a").await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        names(self.root.path())
    }

    /// Broadcasts a file by the mapper `desk`; returns the agent's outcome.
    async fn broadcast(&self, name: &str, content: &str) -> Result<(), Failure> {
        let source = TempDir::new().unwrap();
        fs::write(source.path().join(name), content).unwrap();
        let mapper = self.system.started_mapper("desk").await;
        wait_until_known(&mapper, &["a"]).await;
        let broadcast = mapper.broadcast(Broadcast::new(source.path().join(name), "photos".parse().unwrap()), |_| ());
        let answers = tokio::time::timeout(WAIT_TIMEOUT, broadcast).await.expect("an outcome").unwrap();
        answers.outcomes.into_values().next().unwrap().map(drop)
    }

    /// The decisions about files in the agent's audit log, when there are this many.
    async fn decisions(&self, count: usize) -> Vec<Value> {
        wait_until("the decisions are recorded", async || decisions(&self.log).len() == count).await;
        decisions(&self.log)
    }
}

fn decisions(log: &Path) -> Vec<Value> {
    let text = fs::read_to_string(log).unwrap();
    // The last line may be half written.
    let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    lines.filter(|line: &Value| line["file"].is_object()).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn n19_receiver_refuses_content_with_another_digest() {
    let receiver = Receiver::new().await;
    let mut sender = receiver.sender("m1").await;
    let token = sender.start("x", b"right").await;
    sender.chunk(token, Some(0), b"wrong").await;
    sender.end(token).await;
    let failure = sender.outcome().await.1.unwrap_err();
    assert_eq!(failure, Failure::failed("the file cannot be written: invalid data"));
    assert!(receiver.names().is_empty());
}

#[tokio::test]
async fn n19_receiver_ignores_chunks_of_another_sender() {
    let receiver = Receiver::new().await;
    let (mut sender, other) = (receiver.sender("m1").await, receiver.sender("m2").await);
    let token = sender.start("x", b"right").await;
    other.chunk(token, Some(0), b"wrong").await;
    other.end(token).await;
    sender.chunk(token, Some(0), b"right").await;
    other.end(token).await;
    sender.end(token).await;
    let (ended, result) = sender.outcome().await;
    assert_eq!((ended, result.map(drop)), (token, Ok(())));
    assert_eq!(fs::read(receiver.path("x")).unwrap(), b"right");
}

#[tokio::test]
async fn n19_receiver_refuses_missing_repeated_and_unnumbered_chunks() {
    let receiver = Receiver::new().await;
    let mut sender = receiver.sender("m1").await;
    // The bytes are right each time: only the numbers are not.
    for numbers in [[Some(1), Some(2)], [Some(0), Some(0)], [Some(0), Some(2)], [Some(0), None], [None, None]] {
        let token = sender.start("x", b"ab").await;
        sender.chunk(token, numbers[0], b"a").await;
        sender.chunk(token, numbers[1], b"b").await;
        sender.end(token).await;
        let (ended, result) = sender.outcome().await;
        assert_eq!((ended, result), (token, Err(Failure::new(FailureCode::Lost, "a chunk is missing"))), "{numbers:?}");
    }
    assert!(receiver.names().is_empty());
}

#[tokio::test]
async fn n19_receiver_refuses_more_or_fewer_bytes_than_announced() {
    let receiver = Receiver::new().await;
    let mut sender = receiver.sender("m1").await;
    let token = sender.start("x", b"four").await;
    sender.chunk(token, Some(0), b"three").await;
    // At once, not at the end: a sender cannot fill the disk beyond what was allowed.
    let failure = Failure::new(FailureCode::BadPayload, "more bytes than announced");
    assert_eq!(sender.outcome().await, (token, Err(failure)));
    let token = sender.start("x", b"four").await;
    sender.chunk(token, Some(0), b"two").await;
    sender.end(token).await;
    let failure = Failure::new(FailureCode::Lost, "fewer bytes than announced");
    assert_eq!(sender.outcome().await, (token, Err(failure)));
    assert!(receiver.names().is_empty());
}

#[tokio::test]
async fn n19_receiver_limits_transfers_at_a_time() {
    let receiver = Receiver::new().await;
    let mut sender = receiver.sender("m1").await;
    let mut tokens = Vec::new();
    for n in 0..16 {
        tokens.push(sender.start(&format!("x{n}"), b"").await);
    }
    let refused = sender.start("x16", b"").await;
    let busy = Failure::new(FailureCode::Overloaded, "too many file transfers at a time");
    assert_eq!(sender.outcome().await, (refused, Err(busy)));
    assert_eq!(receiver.names().len(), 16);
    // When one has ended, there is room for one more.
    sender.end(tokens[0]).await;
    assert_eq!(sender.outcome().await.0, tokens[0]);
    let token = sender.start("x16", b"").await;
    sender.end(token).await;
    let (ended, result) = sender.outcome().await;
    assert_eq!((ended, result.map(drop)), (token, Ok(())));
}

#[tokio::test]
async fn n19_destination_is_checked_again_before_the_file_gets_its_name() {
    let receiver = Receiver::new().await;
    let mut sender = receiver.sender("m1").await;
    let victim = TempDir::new().unwrap();
    fs::write(victim.path().join("victim"), "precious").unwrap();
    for exists_at_the_start in [true, false] {
        let dest = receiver.path("x");
        if exists_at_the_start {
            fs::write(&dest, "old").unwrap();
        }
        let token = sender.start("x", b"new").await;
        // The confirmation of a chunk would come later: the temporary file shows that the transfer was allowed.
        wait_until("the transfer has started", async || {
            receiver.names().iter().any(|name| name.starts_with(".nanite-"))
        })
        .await;
        let _ = fs::remove_file(&dest);
        symlink(victim.path().join("victim"), &dest).unwrap();
        sender.chunk(token, Some(0), b"new").await;
        sender.end(token).await;
        assert_eq!(sender.outcome().await, (token, Err(Failure::failed(ALREADY_EXISTS))), "{exists_at_the_start}");
        assert!(fs::symlink_metadata(&dest).unwrap().is_symlink(), "{exists_at_the_start}");
        assert_eq!(receiver.names(), ["x"]);
        fs::remove_file(&dest).unwrap();
    }
    assert_eq!(fs::read(victim.path().join("victim")).unwrap(), b"precious");
}

#[tokio::test]
async fn s08_agent_that_denies_everything_keeps_its_files() {
    let receiver = Receiver::with(Some(&|| Box::new(DenyAll)), |root| root).await;
    fs::write(receiver.path("x"), "old").unwrap();
    let denied = Err(Failure::new(FailureCode::Denied, "Denied"));
    assert_eq!(receiver.broadcast("x", "new").await, denied);
    assert_eq!(receiver.broadcast("other", "new").await, denied);
    assert_eq!((receiver.names(), fs::read(receiver.path("x")).unwrap()), (vec!["x".to_owned()], b"old".to_vec()));
    let decisions = receiver.decisions(2).await;
    let [first, second] = decisions.as_slice() else { panic!("{decisions:?}") };
    assert_eq!(first["file"], json!({"domain": "photos", "name": "x", "size": 3, "replaces": true}));
    assert_eq!(second["file"], json!({"domain": "photos", "name": "other", "size": 3, "replaces": false}));
    for line in [first, second] {
        assert_eq!((&line["verdict"], &line["kind"]), (&"denied".into(), &"file-start".into()));
        assert_eq!((&line["from"], &line["verified"]), (&"mapper-desk".into(), &true.into()));
        assert!(line["id"].is_string() && line["why"] == "Denied", "{line}");
    }
}

#[tokio::test]
async fn s08_rules_decide_which_files_are_received_and_replaced() {
    let rules = "[[file]]\nname = \"new\"\nsenders = [\"mapper-desk\"]\ndomains = [\"photos\"]\nnames = [\"*.jpg\"]";
    let receiver = Receiver::with(Some(&|| Box::new(Rules::from_toml(rules).unwrap())), |root| root).await;
    assert_eq!(receiver.broadcast("a.jpg", "one").await, Ok(()));
    let denied = Err(Failure::new(FailureCode::Denied, "Denied"));
    assert_eq!(receiver.broadcast("a.png", "one").await, denied);
    assert_eq!(receiver.broadcast("a.jpg", "two").await, denied);
    assert_eq!(fs::read(receiver.path("a.jpg")).unwrap(), b"one");
    // A symlink is not a file that is replaced, and a sender that is denied does not learn of it.
    symlink(receiver.path("a.jpg"), receiver.path("link")).unwrap();
    assert_eq!(receiver.broadcast("link", "two").await, denied);
    let decisions = receiver.decisions(4).await;
    let rules: Vec<_> =
        decisions.iter().map(|line| (line["verdict"].as_str().unwrap(), line["rule"].as_str())).collect();
    assert_eq!(rules, [("allowed", Some("new")), ("denied", None), ("denied", None), ("denied", None)]);
}

#[tokio::test]
async fn n19_never_replace_keeps_files() {
    let receiver = Receiver::with(None, FileRoot::never_replace).await;
    assert_eq!(receiver.broadcast("x", "one").await, Ok(()));
    let exists = Err(Failure::new(FailureCode::Denied, "a file of this name exists"));
    assert_eq!(receiver.broadcast("x", "two").await, exists);
    assert_eq!(fs::read(receiver.path("x")).unwrap(), b"one");
    let decisions = receiver.decisions(2).await;
    let last = decisions.last().unwrap();
    assert_eq!((&last["verdict"], &last["rule"]), (&"denied".into(), &"files-never-replace".into()));
}

/// Two mappers send files of one name, which is free when both begin; returns their results and what the file contains.
async fn race(receiver: &Receiver) -> ([Result<(), Failure>; 2], Vec<u8>) {
    let (mut one, mut two) = (receiver.sender("m1").await, receiver.sender("m2").await);
    let (from_one, from_two) = (one.start("x", b"one").await, two.start("x", b"two").await);
    one.chunk(from_one, Some(0), b"one").await;
    two.chunk(from_two, Some(0), b"two").await;
    wait_until("both transfers have started", async || receiver.names().len() == 2).await;
    tokio::join!(one.end(from_one), two.end(from_two));
    let results = [one.outcome().await.1.map(drop), two.outcome().await.1.map(drop)];
    assert_eq!(receiver.names(), ["x"]);
    (results, fs::read(receiver.path("x")).unwrap())
}

#[tokio::test]
async fn n19_of_two_transfers_of_one_name_one_gets_it() {
    let rules = "[[file]]\nsenders = [\"*\"]\ndomains = [\"*\"]";
    let by_rules: &dyn Fn() -> Box<dyn Policy> = &|| Box::new(Rules::from_toml(rules).unwrap());
    for (policy, never_replace) in [(Some(by_rules), false), (None, true)] {
        let options = |root: FileRoot| if never_replace { root.never_replace() } else { root };
        let receiver = Receiver::with(policy, options).await;
        let (results, content) = race(&receiver).await;
        let winner = results.iter().position(Result::is_ok).expect("one gets the name");
        assert_eq!(results[1 - winner].clone().unwrap_err().code, FailureCode::Denied, "{results:?}");
        assert_eq!(content, [b"one", b"two"][winner]);
        let decisions = receiver.decisions(3).await;
        let replaces: Vec<_> = decisions.iter().map(|line| (&line["verdict"], &line["file"]["replaces"])).collect();
        let (allowed, denied) = (Value::from("allowed"), Value::from("denied"));
        let (new, replacing) = (Value::from(false), Value::from(true));
        assert_eq!(replaces, [(&allowed, &new), (&allowed, &new), (&denied, &replacing)]);
    }
    // Where files may be replaced, both are received, and the last one stays.
    let receiver = Receiver::new().await;
    let (results, content) = race(&receiver).await;
    assert_eq!(results, [Ok(()), Ok(())]);
    assert!([&b"one"[..], b"two"].contains(&&*content));
}
