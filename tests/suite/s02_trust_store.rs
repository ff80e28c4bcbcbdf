//! s02: nodes with only their own certificate and key and the CA certificate learn each other's certificates from messages.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nanite::agent::{Agent, actor};
use nanite::certs::{
    CertificateAuthority, CertificateStore, Credentials, KeyType, StaticCertificateStore, Trust, TrustStore,
};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::Mapper;
use nanite::packet::{Advertise, Failure, Identity, Packet, Payload, Ping, Register, Request, Status};
use nanite::proxy::MapperProxy;
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenErrorKind, SealError, SealRequest, Serializer};
use nanite::transport::{
    Consumer, Destination, MemoryBroker, MemoryTransport, PublishRequest, Queue, Transport, TransportError, topology,
};

use crate::harness::pki::{agent, mapper};
use crate::harness::program::run;
use crate::harness::site::{Site, ready, separate_directories};
use crate::harness::system::{json, wait_until_known};
use crate::harness::wait_until;

const PING_TIME: Duration = Duration::from_millis(50);

/// A CA and a broker. Each node has its own trust store.
struct TestNetwork {
    ca: CertificateAuthority,
    broker: MemoryBroker,
}

/// A node's serializer and the store with the certificates that it has learned.
struct Node {
    identity: Identity,
    serializer: Arc<SecureSerializer>,
    store: Arc<TrustStore>,
}

impl TestNetwork {
    fn new() -> Self {
        let now = SystemClock.now();
        let ca =
            CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now).unwrap();
        Self { ca, broker: MemoryBroker::new() }
    }

    fn credentials(&self, identity: &Identity) -> Credentials {
        self.ca.issue(identity, KeyType::P256, Duration::from_secs(3600), SystemClock.now()).unwrap()
    }

    fn node(&self, identity: Identity) -> Node {
        let credentials = self.credentials(&identity);
        self.node_with(identity, credentials)
    }

    fn node_with(&self, identity: Identity, credentials: Credentials) -> Node {
        let trust = Arc::new(self.ca.trust().unwrap());
        let own = StaticCertificateStore::new([credentials.certificate().clone()]);
        let store = TrustStore::new(trust.clone()).with_store(Arc::new(own));
        let store = Arc::new(store.capacity(NonZeroUsize::new(100).unwrap()));
        let peers: Arc<dyn CertificateStore> = store.clone();
        let serializer = Arc::new(SecureSerializer::builder(credentials, peers, trust).build().unwrap());
        Node { identity, serializer, store }
    }

    async fn agent(&self, node: &Node) -> Agent {
        let connection = Arc::new(self.broker.connect());
        let echo = actor("simple").expose("echo", async |payload: Payload| Ok::<_, Failure>(payload));
        let agent = Agent::builder(node.serializer.clone(), connection).actor(echo);
        agent.ping_time(PING_TIME).status(|| 1.0).start().await.unwrap()
    }

    async fn mapper(&self, node: &Node) -> Mapper {
        let connection = Arc::new(self.broker.connect());
        Mapper::builder(node.serializer.clone(), connection).start().await.unwrap()
    }
}

/// A connection that loses its first advertise to all agents.
#[derive(Debug)]
struct LossyTransport {
    inner: MemoryTransport,
    advertises: AtomicUsize,
}

#[async_trait::async_trait]
impl Transport for LossyTransport {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        if message.destination == Destination::exchange(topology::ADVERTISE)
            && self.advertises.fetch_add(1, Ordering::SeqCst) == 0
        {
            return Ok(());
        }
        self.inner.publish(message, timeout).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        self.inner.consume(queue, prefetch).await
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        self.inner.declare(queue).await
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        self.inner.depth(queue).await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

fn register(identity: &Identity) -> Packet {
    Packet::Register(Register::new(identity.clone(), []).with_status(Status::new(1.0)))
}

async fn assert_echo(mapper: &Mapper, name: &str) {
    let answers = mapper.request("/simple/echo", json("[1]")).target(agent(name)).await.unwrap();
    assert_eq!(answers.results().count(), 1, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s02_nodes_with_only_their_own_certificate_cooperate_in_any_start_order() {
    let network = TestNetwork::new();
    let (early, late, m1) = (network.node(agent("early")), network.node(agent("late")), network.node(mapper("m1")));
    let _early = network.agent(&early).await;
    let m1 = network.mapper(&m1).await;
    wait_until_known(&m1, &["early"]).await;
    let _late = network.agent(&late).await;
    wait_until_known(&m1, &["early", "late"]).await;
    assert_echo(&m1, "early").await;
    assert_echo(&m1, "late").await;
    // A second mapper learns them as well, and the first still knows them.
    let second = network.node(mapper("m2"));
    let m2 = network.mapper(&second).await;
    wait_until_known(&m2, &["early", "late"]).await;
    assert_echo(&m2, "late").await;
    assert_echo(&m1, "early").await;
    // The mappers know each other, so that each can open messages for all mappers.
    wait_until("the mappers know each other", async || {
        second.store.learned_certificates().iter().any(|learned| *learned.identity() == mapper("m1"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s02_proxy_learns_mapper_certificates_before_its_request() {
    let network = TestNetwork::new();
    let (fred, m1) = (network.node(agent("fred")), network.node(mapper("m1")));
    let m1 = network.mapper(&m1).await;
    let _fred = network.agent(&fred).await;
    wait_until_known(&m1, &["fred"]).await;
    for identity in [agent("asker"), mapper("asker")] {
        let node = network.node(identity);
        let connection = Arc::new(network.broker.connect());
        let proxy = MapperProxy::builder(node.serializer.clone(), connection).start().await.unwrap();
        let answers = proxy.request("/simple/echo", json("[2]")).timeout(Duration::from_secs(20)).await.unwrap();
        assert_eq!(answers.results().count(), 1, "{}: {answers:?}", node.identity);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s02_mapper_asks_an_unknown_agent_for_its_certificate() {
    let network = TestNetwork::new();
    let (m1, m2) = (network.node(mapper("m1")), network.node(mapper("m2")));
    let fred = network.node(agent("fred"));
    let first = network.mapper(&m1).await;
    let _fred = network.agent(&fred).await;
    wait_until_known(&first, &["fred"]).await;
    // A registration that only the first mapper can decrypt would already carry the agent's certificate to the second one.
    let last_seen = async || first.agents().await.unwrap()[0].last_seen;
    let registered = last_seen().await;
    let heartbeats = async || last_seen().await.since(registered) >= 2 * PING_TIME;
    wait_until("only heartbeats follow", heartbeats).await;
    // The agent does not notice the second mapper: its heartbeats are encrypted for the first only, and the second lacks its certificate.
    let connection = Arc::new(LossyTransport { inner: network.broker.connect(), advertises: AtomicUsize::new(0) });
    let builder = Mapper::builder(m2.serializer.clone(), connection.clone());
    let second = builder.start().await.unwrap();
    wait_until_known(&second, &["fred"]).await;
    assert!(connection.advertises.load(Ordering::SeqCst) > 0);
    assert_echo(&second, "fred").await;
}

#[test]
fn s02_nothing_is_learned_from_unverified_messages() {
    let network = TestNetwork::new();
    let (fred, m1) = (network.node(agent("fred")), network.node(mapper("m1")));
    // A while after all of them have started: messages that name no process may otherwise be from before.
    let now = || SystemClock.now().saturating_add(Duration::from_secs(60));
    let seal = |node: &Node, packet: &Packet, to: &Audience| {
        let request = SealRequest::new(to, now());
        node.serializer.seal(packet, &request).map(|sealed| sealed.bytes)
    };
    let open = |node: &Node, bytes: &[u8], channel| {
        node.serializer.open(bytes, &OpenContext::new(channel, now())).map_err(|error| error.kind)
    };
    // An agent that knows no mapper cannot register.
    let unregistered = seal(&fred, &register(&fred.identity), &Audience::Mappers);
    assert!(matches!(unregistered, Err(SealError::NoRecipient(_))), "{unregistered:?}");
    let advertise = Packet::Advertise(Advertise::default());
    let sealed = seal(&m1, &advertise, &Audience::Agents).unwrap();
    // Refused: a changed bit, another queue, a mapper of another CA.
    let mut changed = sealed.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert_eq!(open(&fred, &changed, InboundQueue::AgentControl).unwrap_err(), OpenErrorKind::BadSignature);
    assert_eq!(open(&fred, &sealed, InboundQueue::AgentInbox).unwrap_err(), OpenErrorKind::WrongDestination);
    let other_network = TestNetwork::new();
    let forger = other_network.node(mapper("m1"));
    let forged = seal(&forger, &advertise, &Audience::Agents).unwrap();
    assert_eq!(open(&fred, &forged, InboundQueue::AgentControl).unwrap_err(), OpenErrorKind::BadCertificate);
    // An agent with a valid certificate may not advertise as a mapper.
    let bob = network.node(agent("bob"));
    let from_agent = seal(&bob, &advertise, &Audience::Agents).unwrap();
    assert_eq!(open(&fred, &from_agent, InboundQueue::AgentControl).unwrap_err(), OpenErrorKind::NotAuthorized);
    assert!(fred.store.learned_certificates().is_empty());

    open(&fred, &sealed, InboundQueue::AgentControl).unwrap();
    assert_eq!(fred.store.learned_certificates().len(), 1);
    // Now it can register, and then the mapper can send to it. A heartbeat before that has an unknown signer.
    let ping = Packet::Ping(Ping::new(fred.identity.clone(), Status::new(1.0)));
    let early = seal(&fred, &ping, &Audience::Mappers).unwrap();
    assert_eq!(open(&m1, &early, InboundQueue::Presence).unwrap_err(), OpenErrorKind::UnknownSigner);
    let registration = seal(&fred, &register(&fred.identity), &Audience::Mappers).unwrap();
    open(&m1, &registration, InboundQueue::Presence).unwrap();
    let to_fred = Audience::One(fred.identity.clone());
    let packet = Packet::Push(Request::new("/simple/echo".parse().unwrap(), Payload::from("work")));
    let pushed = seal(&m1, &packet, &to_fred).unwrap();
    open(&fred, &pushed, InboundQueue::AgentInbox).unwrap();
    let heartbeat = seal(&fred, &ping, &Audience::Mappers).unwrap();
    open(&m1, &heartbeat, InboundQueue::Presence).unwrap();
}

/// Pinned trust believes what the store returns, and a learning store returns what the sender presents.
#[test]
fn s02_pinned_trust_accepts_no_certificate_from_a_message() {
    let (network, other_network) = (TestNetwork::new(), TestNetwork::new());
    let bob = network.node(agent("bob"));
    let credentials = network.credentials(&mapper("m1"));
    let own = StaticCertificateStore::new([credentials.certificate().clone(), bob.serializer.certificate()]);
    let ca_trust = network.ca.trust().unwrap();
    for store in [TrustStore::new(Trust::pinned()), TrustStore::new(ca_trust)] {
        let store = Arc::new(store.with_store(own.clone()));
        let pinned = SecureSerializer::builder(credentials.clone(), store.clone(), Trust::pinned()).build().unwrap();
        let open = |sender: &Node| {
            let (packet, now) = (Packet::Advertise(Advertise::default()), SystemClock.now());
            let message = sender.serializer.seal(&packet, &SealRequest::new(&Audience::Mappers, now)).unwrap();
            pinned.open(&message.bytes, &OpenContext::new(InboundQueue::Presence, SystemClock.now()))
        };
        // A stranger of another CA, and even a node of this CA, are not in the store.
        let stranger = open(&other_network.node(agent("eve"))).unwrap_err();
        assert_eq!(stranger.kind, OpenErrorKind::UnknownSigner);
        assert_eq!(open(&network.node(agent("fred"))).unwrap_err().kind, OpenErrorKind::UnknownSigner);
        // The node in the store is accepted, and nothing is learned from it.
        open(&bob).unwrap();
        assert!(store.learned_certificates().is_empty());
        assert!(pinned.verification().is_some_and(|verification| !verification.learns_peers()));
    }
}

/// `--pinned` in real processes: bob has a certificate of the same CA and brings it along, but it is not in the mapper's directory.
#[tokio::test(flavor = "multi_thread")]
async fn s02_pinned_process_refuses_a_node_of_the_same_ca_that_is_not_in_its_directory() {
    let site = Site::new(&["agent fred", "agent bob", "mapper m1"]);
    separate_directories(&site, &["agent-fred", "agent-bob", "mapper-m1"]);
    site.program("simple/echo", "cat");
    let copy = |file: &str, to: &str| std::fs::copy(site.path(file), site.path(to)).unwrap();
    for agent in ["agent-fred", "agent-bob"] {
        // So that each can register without an answer of the mapper.
        copy("mapper-m1/mapper-m1.pem", &format!("{agent}/mapper-m1.pem"));
    }
    copy("agent-fred/agent-fred.pem", "mapper-m1/agent-fred.pem");
    let start = |certs: &str, arguments: &[&str]| ready(site.nanite(arguments).env("NANITE_CERTS", certs));
    let mut m1 = start("mapper-m1", &["mapper", "--pinned"]);
    let agent = ["agent", "--actors-dir", "actors", "--ping-time", "200ms"];
    let _fred = start("agent-fred", &agent);
    m1.wait_for("nanite-fred registered");
    let _bob = start("agent-bob", &agent);
    m1.wait_for("no certificate of nanite-bob with the key id");
    // Fred's messages are still accepted after bob's are refused.
    let refusals = || m1.output().1.matches("no certificate of nanite-bob").count();
    let before = refusals();
    wait_until("more messages of bob are refused", async || refusals() > before + 3).await;
    let said = m1.output().1;
    assert!(!said.contains("nanite-bob registered") && !said.contains("no certificate of nanite-fred"), "{said}");
    // It is the directory that decides: with bob's certificate in it, bob is accepted.
    copy("agent-bob/agent-bob.pem", "mapper-m1/agent-bob.pem");
    m1.wait_for("nanite-bob registered");
}

#[test]
fn s02_processes_with_only_their_own_certificate_cooperate_over_rabbitmq() {
    let site = Site::new(&["agent fred", "agent asker", "mapper m1", "mapper ctl"]);
    separate_directories(&site, &["agent-fred", "agent-asker", "mapper-m1", "mapper-ctl"]);
    site.program("simple/echo", "cat");
    let command_with = |certs: &str, arguments: &[&str]| {
        let mut command = site.nanite(arguments);
        command.env("NANITE_CERTS", certs);
        command
    };
    let _m1 = ready(&mut command_with("mapper-m1", &["mapper"]));
    let _fred = ready(&mut command_with("agent-fred", &["agent", "--actors-dir", "actors"]));
    let long_timeouts = ["--look", "60s", "--timeout", "60s"];
    let request = |certs: &str, options: &[&str]| {
        let all: Vec<&str> = ["request", "/simple/echo", "[1,2]", "--json"].iter().chain(options).copied().collect();
        let ended = run(&mut command_with(certs, &all));
        assert_eq!(ended.code(), 0, "{certs}: {ended:?}");
        let answers: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
        assert_eq!(answers["results"]["nanite-fred"], serde_json::json!([1, 2]), "{answers}");
    };
    request("mapper-ctl", &long_timeouts);
    request("mapper-ctl", &["--via-mapper", "--timeout", "60s"]);
    // With `--pinned`, no certificate is learned.
    let arguments = ["request", "/simple/echo", "1", "--pinned", "--look", "1s", "--timeout", "5s"];
    let pinned = run(&mut command_with("mapper-ctl", &arguments));
    assert_eq!(pinned.code(), 3, "{pinned:?}");
}
