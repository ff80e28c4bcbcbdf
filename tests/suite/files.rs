//! File broadcast, with the memory broker.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use nanite::agent::Agent;
use nanite::files::{Broadcast, BroadcastError, FileRoot, ReceivedFile};
use nanite::packet::{Failure, FailureCode, Identity, Tag};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::harness::system::{System, start, wait_until_known};
use crate::harness::{on_every_format, recv, wait_until};

on_every_format!(
    n19_every_subscriber_receives_the_complete_file,
    n19_failed_transfer_leaves_no_files,
    n19_rejects_paths_symlinks_and_directories,
    n19_enforces_size_limit_and_domains,
);

fn domain(name: &str) -> Tag {
    name.parse().unwrap()
}

/// Starts an agent that receives files of the domain `photos`.
async fn receiver(system: &System, name: &str, root: &Path) -> (Agent, mpsc::UnboundedReceiver<ReceivedFile>) {
    let (sender, received) = mpsc::unbounded_channel();
    let files = FileRoot::new(root, [domain("photos")]).unwrap().max_bytes(50 << 20);
    let files = files.on_file(move |file| sender.send(file.clone()).unwrap());
    (start(system.agent(name).files(files)).await, received)
}

/// Bytes that differ between chunks.
fn content(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn n19_every_subscriber_receives_the_complete_file(system: System) {
    let (source, one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let (_a, mut from_a) = receiver(&system, "a", one.path()).await;
    let (_b, mut from_b) = receiver(&system, "b", two.path()).await;
    let _c = start(system.agent("c")).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a", "b", "c"]).await;
    for (name, length) in [("empty", 0), ("small.txt", 1), ("big.bin", 10_000_000)] {
        let path = source.path().join(name);
        fs::write(&path, content(length)).unwrap();
        let mut last = 0;
        let broadcast = Broadcast::new(&path, domain("photos"));
        let answers = mapper.broadcast(broadcast, |progress| last = progress.sent).await.unwrap();
        assert_eq!(answers.results().count(), 2, "{answers:?}");
        assert_eq!(last, length as u64);
        for (root, received) in [(&one, &mut from_a), (&two, &mut from_b)] {
            let file = recv(received).await;
            assert_eq!(file.path, root.path().canonicalize().unwrap().join(name));
            assert_eq!((file.size, file.sender.as_str()), (length as u64, "mapper-m1"));
            assert!(fs::read(&file.path).unwrap() == content(length), "{name} is the same");
        }
    }
    let renamed = Broadcast::new(source.path().join("small.txt"), domain("photos")).dest("big.bin");
    assert_eq!(mapper.broadcast(renamed, |_| ()).await.unwrap().results().count(), 2);
    assert_eq!(fs::read(one.path().join("big.bin")).unwrap(), content(1), "a plain file is replaced");
    assert_eq!(names(one.path()), ["big.bin", "empty", "small.txt"], "no temporary files are left");
}

async fn n19_failed_transfer_leaves_no_files(system: System) {
    let (source, root) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let transport = system.connect();
    let identity = Identity::agent("a").unwrap();
    let files = FileRoot::new(root.path(), [domain("photos")]).unwrap();
    let agent = nanite::agent::Agent::builder(system.serializer(&identity), transport.clone());
    let _agent = start(agent.files(files)).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a"]).await;
    let path = source.path().join("big.bin");
    fs::write(&path, content(20_000_000)).unwrap();
    let mut chunks = 0;
    let disconnect = |_| {
        chunks += 1;
        if chunks == 20 {
            transport.disconnect();
        }
    };
    let answers = mapper.broadcast(Broadcast::new(&path, domain("photos")), disconnect).await.unwrap();
    let failure = answers.outcomes[&identity].clone().unwrap_err();
    assert_eq!(failure.code, FailureCode::Lost, "{failure}");
    // After the reconnect the agent registers again, and the failed transfer leaves nothing.
    transport.reconnect();
    assert!(!root.path().join("big.bin").exists());
    wait_until_known(&mapper, &["a"]).await;
    drop(_agent);
    wait_until("the directory is empty", async || names(root.path()).is_empty()).await;
    fs::write(root.path().join(".nanite-left.part"), "x").unwrap();
    FileRoot::new(root.path(), []).unwrap();
    assert!(names(root.path()).is_empty(), "files that a killed process left are removed at the next start");
}

async fn n19_rejects_paths_symlinks_and_directories(system: System) {
    let (source, root, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let (_agent, _received) = receiver(&system, "a", root.path()).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a"]).await;
    let path = source.path().join("x");
    fs::write(&path, "evil").unwrap();
    for name in ["../x", "/etc/x", "", ".", "..", "a/b", "a\0b", ".ssh"] {
        let refused = mapper.broadcast(Broadcast::new(&path, domain("photos")).dest(name), |_| ()).await;
        assert!(matches!(refused, Err(BroadcastError::Name(_))), "{name:?}");
        // A sender without this check is refused by the receiver.
        let answer = system.start_file("m1", "a", name, Some(4)).await;
        assert_eq!(answer, Err(FailureCode::Denied), "{name:?}");
    }
    let victim = outside.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    symlink(&victim, root.path().join("link")).unwrap();
    fs::create_dir(root.path().join("directory")).unwrap();
    for name in ["link", "directory"] {
        let answers = mapper.broadcast(Broadcast::new(&path, domain("photos")).dest(name), |_| ()).await.unwrap();
        let failure = answers.outcomes.values().next().unwrap().clone().unwrap_err();
        assert_eq!(failure, Failure::failed("the file cannot be written: entity already exists"));
        // At once: the content is not sent for nothing.
        assert_eq!(system.start_file("m1", "a", name, Some(4)).await, Err(FailureCode::Failed), "{name}");
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(names(root.path()), ["directory", "link"]);
}

async fn n19_enforces_size_limit_and_domains(system: System) {
    let (source, root) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (_agent, _received) = receiver(&system, "a", root.path()).await;
    let mapper = system.started_mapper("m1").await;
    wait_until_known(&mapper, &["a"]).await;
    let path = source.path().join("x");
    fs::write(&path, "x").unwrap();
    let error = mapper.broadcast(Broadcast::new(&path, domain("music")), |_| ()).await.unwrap_err();
    assert_eq!(error.to_string(), "no agent receives files of music");
    let missing = mapper.broadcast(Broadcast::new(source.path().join("none"), domain("photos")), |_| ()).await;
    assert!(matches!(missing, Err(BroadcastError::Unreadable { .. })));
    for (size, code) in [(Some(51 << 20), FailureCode::Denied), (None, FailureCode::Denied)] {
        assert_eq!(system.start_file("m1", "a", "x", size).await, Err(code), "{size:?}");
    }
    assert!(names(root.path()).is_empty());
    tokio::time::timeout(Duration::from_secs(20), mapper.broadcast(Broadcast::new(&path, domain("photos")), |_| ()))
        .await
        .unwrap()
        .unwrap();
}
