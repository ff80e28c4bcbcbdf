//! File broadcast, over the broker in memory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use nanite::agent::Agent;
use nanite::files::{Broadcast, BroadcastError, FileRoot, ReceivedFile};
use nanite::packet::{Failure, FailureCode, Identity, Tag};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::harness::system::{System, knows, start};
use crate::harness::{on_every_format, wait_until};

on_every_format!(
    n19_a_file_reaches_every_subscriber_whole,
    n19_a_cut_transfer_leaves_nothing,
    n19_names_and_places_that_are_not_plain_are_refused,
    n19_limits_and_domains_are_kept,
);

fn domain(name: &str) -> Tag {
    name.parse().unwrap()
}

/// An agent that takes files of the domain `photos`.
async fn taker(system: &System, name: &str, root: &Path) -> (Agent, mpsc::UnboundedReceiver<ReceivedFile>) {
    let (told, heard) = mpsc::unbounded_channel();
    let files = FileRoot::new(root, [domain("photos")]).unwrap().largest(50 << 20);
    let files = files.on_file(move |file| told.send(file.clone()).unwrap());
    (start(system.agent(name).files(files)).await, heard)
}

/// Bytes that repeat nowhere near a chunk's length.
fn content(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn n19_a_file_reaches_every_subscriber_whole(system: System) {
    let (source, one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let (_a, mut a_heard) = taker(&system, "a", one.path()).await;
    let (_b, mut b_heard) = taker(&system, "b", two.path()).await;
    let _c = start(system.agent("c")).await;
    let mapper = system.started_mapper("m1").await;
    knows(&mapper, &["a", "b", "c"]).await;
    for (name, length) in [("empty", 0), ("small.txt", 1), ("big.bin", 10_000_000)] {
        let path = source.path().join(name);
        fs::write(&path, content(length)).unwrap();
        let mut last = 0;
        let broadcast = Broadcast::new(&path, domain("photos"));
        let answers = mapper.broadcast(broadcast, |progress| last = progress.sent).await.unwrap();
        assert_eq!(answers.results().count(), 2, "{answers:?}");
        assert_eq!(last, length as u64);
        for (root, heard) in [(&one, &mut a_heard), (&two, &mut b_heard)] {
            let file = heard.recv().await.unwrap();
            assert_eq!(file.path, root.path().canonicalize().unwrap().join(name));
            assert_eq!((file.size, file.sender.as_str()), (length as u64, "mapper-m1"));
            assert!(fs::read(&file.path).unwrap() == content(length), "{name} is the same");
        }
    }
    let renamed = Broadcast::new(source.path().join("small.txt"), domain("photos")).dest("big.bin");
    assert_eq!(mapper.broadcast(renamed, |_| ()).await.unwrap().results().count(), 2);
    assert_eq!(fs::read(one.path().join("big.bin")).unwrap(), content(1), "a plain file is replaced");
    assert_eq!(names(one.path()), ["big.bin", "empty", "small.txt"], "nothing else is left");
}

async fn n19_a_cut_transfer_leaves_nothing(system: System) {
    let (source, root) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let transport = system.connect();
    let identity = Identity::agent("a").unwrap();
    let files = FileRoot::new(root.path(), [domain("photos")]).unwrap();
    let agent = nanite::agent::Agent::builder(system.serializer(&identity), transport.clone());
    let _agent = start(agent.files(files)).await;
    let mapper = system.started_mapper("m1").await;
    knows(&mapper, &["a"]).await;
    let path = source.path().join("big.bin");
    fs::write(&path, content(20_000_000)).unwrap();
    let mut chunks = 0;
    let cut = |_| {
        chunks += 1;
        if chunks == 20 {
            transport.cut();
        }
    };
    let answers = mapper.broadcast(Broadcast::new(&path, domain("photos")), cut).await.unwrap();
    let failure = answers.outcomes[&identity].clone().unwrap_err();
    assert_eq!(failure.code, FailureCode::Lost, "{failure}");
    // The connection is back, the mapper tries again, and what broke is forgotten in the end.
    transport.restore();
    assert!(!root.path().join("big.bin").exists());
    knows(&mapper, &["a"]).await;
    drop(_agent);
    wait_until("nothing is left", async || names(root.path()).is_empty()).await;
    fs::write(root.path().join(".nanite-left.part"), "x").unwrap();
    FileRoot::new(root.path(), []).unwrap();
    assert!(names(root.path()).is_empty(), "what a killed process left is removed at the next start");
}

async fn n19_names_and_places_that_are_not_plain_are_refused(system: System) {
    let (source, root, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let (_agent, _heard) = taker(&system, "a", root.path()).await;
    let mapper = system.started_mapper("m1").await;
    knows(&mapper, &["a"]).await;
    let path = source.path().join("x");
    fs::write(&path, "evil").unwrap();
    for name in ["../x", "/etc/x", "", ".", "..", "a/b", "a\0b", ".ssh"] {
        let refused = mapper.broadcast(Broadcast::new(&path, domain("photos")).dest(name), |_| ()).await;
        assert!(matches!(refused, Err(BroadcastError::Name(_))), "{name:?}");
        // A sender that does not look itself gets no further.
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
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(names(root.path()), ["directory", "link"]);
}

async fn n19_limits_and_domains_are_kept(system: System) {
    let (source, root) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (_agent, _heard) = taker(&system, "a", root.path()).await;
    let mapper = system.started_mapper("m1").await;
    knows(&mapper, &["a"]).await;
    let path = source.path().join("x");
    fs::write(&path, "x").unwrap();
    let nobody = mapper.broadcast(Broadcast::new(&path, domain("music")), |_| ()).await.unwrap_err();
    assert_eq!(nobody.to_string(), "no agent takes files of music");
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
