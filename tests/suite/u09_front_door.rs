//! u09: `Node`, from a directory of certificates to agents and mappers, over the broker in memory.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{actor, reply};
use nanite::certs::{CertificateAuthority, DirectoryCertificateStore, DirectoryError, KeyType};
use nanite::clock::{Clock, ManualClock, SystemClock};
use nanite::mapper::MapperError;
use nanite::packet::{FailureCode, Identity};
use nanite::policy::{Caller, Decision, Policy};
use nanite::serializer::{Json, PlainSerializer};
use nanite::transport::MemoryBroker;
use nanite::{Node, NodeError};

use crate::harness::program::{nanite, run};
use crate::harness::system::wait_until_known;

/// A directory of certificates that the program made for these nodes.
fn directory(nodes: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let certs = |arguments: &[&str]| {
        let ended = run(nanite(["certs"]).args(arguments).arg("--dir").arg(dir.path()));
        assert_eq!(ended.code(), 0, "{ended:?}");
    };
    certs(&["init", "--domain", "example.org"]);
    for node in nodes {
        let (role, name) = node.split_once(' ').unwrap();
        certs(&["issue", role, name]);
    }
    dir
}

/// What a node of its own machine needs: the CA's certificate, its own certificate and its key.
fn copy_for(node: &str, from: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["ca.pem".to_owned(), format!("{node}.pem"), format!("{node}-key.pem")] {
        std::fs::copy(from.join(&file), dir.path().join(&file)).unwrap();
    }
    dir
}

#[tokio::test]
async fn u09_nodes_with_three_files_each_request_and_answer() {
    let all = directory(&["agent fred", "mapper desk", "mapper web"]);
    let (fred, desk) = (copy_for("agent-fred", all.path()), copy_for("mapper-desk", all.path()));
    let broker = MemoryBroker::new();
    let node = Node::from_dir(fred.path(), "fred").unwrap().attach(broker.connect()).unwrap();
    assert_eq!(node.identity().as_str(), "nanite-fred");
    let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
    let agent = node.agent().actor(text).start().await.unwrap();
    let node = Node::from_dir(desk.path(), "desk").unwrap().attach(broker.connect()).unwrap();
    let mapper = node.mapper().start().await.unwrap();
    let answers = mapper.request("/text/upper", "hello").wait_for_agents(Duration::from_secs(30)).await.unwrap();
    let results: Vec<_> = answers.results().map(|(from, value)| (from.name(), value.to_string())).collect();
    assert_eq!(results, [("fred", "\"HELLO\"".to_owned())]);
    // The same through a proxy.
    let web = copy_for("mapper-web", all.path());
    let proxy =
        Node::from_dir(web.path(), "web").unwrap().attach(broker.connect()).unwrap().proxy().start().await.unwrap();
    let answers = proxy.request("/text/upper", "again").await.unwrap();
    assert_eq!(answers.results().count(), 1);
    agent.stop().await.unwrap();
}

#[test]
fn u09_the_name_finds_the_identity_and_errors_name_the_file() {
    let dir = directory(&["agent fred", "agent both", "mapper both"]);
    let identity = |name: &str| Node::from_dir(dir.path(), name).map(|node| node.identity().to_string());
    assert_eq!(identity("fred").unwrap(), "nanite-fred");
    assert_eq!(identity("nanite-fred").unwrap(), "nanite-fred");
    assert_eq!(identity("nanite-both").unwrap(), "nanite-both");
    assert_eq!(identity("mapper-both").unwrap(), "mapper-both");
    let ambiguous = identity("both").unwrap_err();
    assert!(matches!(ambiguous, NodeError::Ambiguous { .. }), "{ambiguous}");
    assert!(ambiguous.to_string().contains("use \"nanite-both\" or \"mapper-both\""), "{ambiguous}");
    let missing = identity("eve").unwrap_err();
    assert!(matches!(missing, NodeError::Directory(DirectoryError::NoCertificate { .. })), "{missing}");
    assert!(missing.to_string().contains("agent-eve.pem"), "{missing}");
    assert!(matches!(identity("a b").unwrap_err(), NodeError::Name(_)));
    std::fs::remove_file(dir.path().join("agent-fred-key.pem")).unwrap();
    assert!(matches!(identity("fred").unwrap_err(), NodeError::Directory(DirectoryError::NoKey { .. })));
}

#[tokio::test]
async fn u09_a_node_starts_only_what_its_role_allows() {
    let broker = MemoryBroker::new();
    let node = Node::new(PlainSerializer::json(Identity::agent("fred").unwrap()), broker.connect());
    assert!(matches!(node.mapper().start().await, Err(MapperError::Role(identity)) if identity.name() == "fred"));
    let node = Node::new(PlainSerializer::json(Identity::mapper("desk").unwrap()), broker.connect());
    let refused = node.agent().start().await.unwrap_err();
    assert_eq!(refused.to_string(), "mapper-desk is not an agent");
}

/// Denies every request.
#[derive(Debug)]
struct DenyAll;

impl Policy for DenyAll {
    fn authorize_registration(&self, _: &Caller<'_>, _: &nanite::packet::Register) -> Decision {
        Decision::deny("closed")
    }

    fn authorize_request(&self, _: &Caller<'_>, _: &nanite::packet::Request) -> Decision {
        Decision::deny("closed")
    }
}

#[tokio::test]
async fn u09_store_codec_clock_and_policy_are_reachable_from_the_front_door() -> Result<(), Box<dyn Error>> {
    let dir = directory(&["agent fred", "mapper desk", "agent eve"]);
    let now = SystemClock.now();
    let broker = MemoryBroker::new();
    let fred = Node::from_dir(dir.path(), "fred")?
        .codec(Json)
        .clock(Arc::new(ManualClock::new(now)))
        .policy(DenyAll)
        .configure(|serializer| serializer.rotation_grace_period(Duration::from_secs(1)))
        .attach(broker.connect())?;
    let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
    let _agent = fred.agent().actor(text).start().await?;
    let desk = Node::from_dir(dir.path(), "desk")?.attach(broker.connect())?.mapper().start().await?;
    let answers = desk.request("/text/upper", "hello").wait_for_agents(Duration::from_secs(30)).await?;
    assert_eq!(answers.failures().map(|(_, failure)| failure.code.clone()).collect::<Vec<_>>(), [FailureCode::Denied]);

    // With the directory alone as the store, peers must be in it.
    let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    let pinned = Node::with_store(
        ca.issue(&Identity::mapper("m1")?, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?,
        ca.trust()?,
        DirectoryCertificateStore::open(dir.path(), now)?,
    );
    assert!(pinned.attach(broker.connect())?.serializer().verification().is_some_and(|own| !own.learns_peers()));
    wait_until_known(&desk, &["fred"]).await;
    Ok(())
}
