//! Nodes that hold nothing but their own certificate and key and the CA's certificate come to know each other by their messages.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nanite::agent::{Agent, actor};
use nanite::certs::{CertificateAuthority, CertificateStore, Credentials, KeyType, StaticCertificateStore, TrustStore};
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
use crate::harness::site::{Site, apart, ready};
use crate::harness::system::{json, knows};
use crate::harness::wait_until;

/// A CA and a broker; each node has a store of its own.
struct Apart {
    ca: CertificateAuthority,
    broker: MemoryBroker,
}

/// A node: what it speaks by, and whom it has learned.
struct Node {
    identity: Identity,
    serializer: Arc<SecureSerializer>,
    store: Arc<TrustStore>,
}

impl Apart {
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
        let store = TrustStore::new(trust.clone()).with_store(own);
        let store = Arc::new(store.capacity(NonZeroUsize::new(100).unwrap()));
        let asked: Arc<dyn CertificateStore> = store.clone();
        let serializer = Arc::new(SecureSerializer::builder(credentials, asked, trust).build().unwrap());
        Node { identity, serializer, store }
    }

    async fn agent(&self, node: &Node) -> Agent {
        let connection = Arc::new(self.broker.connect());
        let echo = actor("simple").expose("echo", async |payload: Payload| Ok::<_, Failure>(payload));
        let agent = Agent::builder(node.serializer.clone(), connection).actor(echo);
        agent.ping_time(Duration::from_millis(50)).status(|| 1.0).start().await.unwrap()
    }

    async fn mapper(&self, node: &Node) -> Mapper {
        let connection = Arc::new(self.broker.connect());
        Mapper::builder(node.serializer.clone(), connection).start().await.unwrap()
    }
}

/// A connection on which the first advertise to all agents is lost.
#[derive(Debug)]
struct Mute {
    inner: MemoryTransport,
    missed: AtomicUsize,
}

#[async_trait::async_trait]
impl Transport for Mute {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        if message.destination == Destination::exchange(topology::ADVERTISE)
            && self.missed.fetch_add(1, Ordering::SeqCst) == 0
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

async fn echoes(mapper: &Mapper, name: &str) {
    let answers = mapper.request("/simple/echo", json("[1]")).target(agent(name)).await.unwrap();
    assert_eq!(answers.results().count(), 1, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s02_nodes_that_hold_only_their_own_certificate_work_together_whoever_starts_first() {
    let apart = Apart::new();
    let (early, late, m1) = (apart.node(agent("early")), apart.node(agent("late")), apart.node(mapper("m1")));
    let _early = apart.agent(&early).await;
    let m1 = apart.mapper(&m1).await;
    knows(&m1, &["early"]).await;
    let _late = apart.agent(&late).await;
    knows(&m1, &["early", "late"]).await;
    echoes(&m1, "early").await;
    echoes(&m1, "late").await;
    // One mapper more: it, too, comes to know them, and the first still does.
    let second = apart.node(mapper("m2"));
    let m2 = apart.mapper(&second).await;
    knows(&m2, &["early", "late"]).await;
    echoes(&m2, "late").await;
    echoes(&m1, "early").await;
    // The mappers know each other: what one seals for the mappers, the other can open.
    wait_until("the mappers know each other", async || {
        second.store.learned_certificates().iter().any(|one| *one.identity() == mapper("m1"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s02_a_program_without_a_mapper_learns_the_mappers_before_it_asks() {
    let apart = Apart::new();
    let (fred, m1) = (apart.node(agent("fred")), apart.node(mapper("m1")));
    let m1 = apart.mapper(&m1).await;
    let _fred = apart.agent(&fred).await;
    knows(&m1, &["fred"]).await;
    for identity in [agent("asker"), mapper("asker")] {
        let node = apart.node(identity);
        let connection = Arc::new(apart.broker.connect());
        let proxy = MapperProxy::builder(node.serializer.clone(), connection).start().await.unwrap();
        let answers = proxy.request("/simple/echo", json("[2]")).timeout(Duration::from_secs(20)).await.unwrap();
        assert_eq!(answers.results().count(), 1, "{}: {answers:?}", node.identity);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s02_an_agent_that_missed_a_mappers_start_is_asked_who_it_is() {
    let apart = Apart::new();
    let (m1, m2) = (apart.node(mapper("m1")), apart.node(mapper("m2")));
    let fred = apart.node(agent("fred"));
    let first = apart.mapper(&m1).await;
    let _fred = apart.agent(&fred).await;
    knows(&first, &["fred"]).await;
    // It never hears that the second comes: what it says is for the first only, and the second does not know its certificate.
    let connection = Arc::new(Mute { inner: apart.broker.connect(), missed: AtomicUsize::new(0) });
    let builder = Mapper::builder(m2.serializer.clone(), connection.clone());
    let second = builder.start().await.unwrap();
    knows(&second, &["fred"]).await;
    assert!(connection.missed.load(Ordering::SeqCst) > 0);
    echoes(&second, "fred").await;
}

#[test]
fn s02_nothing_is_learned_from_what_was_not_verified() {
    let apart = Apart::new();
    let (fred, m1) = (apart.node(agent("fred")), apart.node(mapper("m1")));
    let seal = |node: &Node, packet: &Packet, to: &Audience| {
        let request = SealRequest::new(to, SystemClock.now());
        node.serializer.seal(packet, &request).map(|sealed| sealed.bytes)
    };
    let open = |node: &Node, bytes: &[u8], channel| {
        node.serializer.open(bytes, &OpenContext::new(channel, SystemClock.now())).map_err(|error| error.kind)
    };
    // An agent that knows no mapper has nobody to register with.
    let nobody = seal(&fred, &register(&fred.identity), &Audience::Mappers);
    assert!(matches!(nobody, Err(SealError::NoRecipient(_))), "{nobody:?}");
    let advertise = Packet::Advertise(Advertise::default());
    let said = seal(&m1, &advertise, &Audience::Agents).unwrap();
    // With one bit changed, on another queue, or by a mapper of another CA: refused, and nobody is known.
    let mut changed = said.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert_eq!(open(&fred, &changed, InboundQueue::AgentControl).unwrap_err(), OpenErrorKind::BadSignature);
    assert_eq!(open(&fred, &said, InboundQueue::AgentInbox).unwrap_err(), OpenErrorKind::WrongDestination);
    let elsewhere = Apart::new();
    let forger = elsewhere.node(mapper("m1"));
    let forged = seal(&forger, &advertise, &Audience::Agents).unwrap();
    assert_eq!(open(&fred, &forged, InboundQueue::AgentControl).unwrap_err(), OpenErrorKind::BadCertificate);
    // An agent with a good certificate is no mapper.
    let bob = apart.node(agent("bob"));
    let posing = seal(&bob, &advertise, &Audience::Agents).unwrap();
    assert_eq!(open(&fred, &posing, InboundQueue::AgentControl).unwrap_err(), OpenErrorKind::NotAuthorized);
    assert!(fred.store.learned_certificates().is_empty());

    open(&fred, &said, InboundQueue::AgentControl).unwrap();
    assert_eq!(fred.store.learned_certificates().len(), 1);
    // Now it can register, and by that the mapper can speak to it; a heartbeat before that is of nobody.
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

#[test]
fn s02_processes_that_hold_only_their_own_certificate_answer_over_rabbitmq() {
    let site = Site::new(&["agent fred", "agent asker", "mapper m1", "mapper ctl"]);
    apart(&site, &["agent-fred", "agent-asker", "mapper-m1", "mapper-ctl"]);
    site.program("simple/echo", "cat");
    let by = |certs: &str, arguments: &[&str]| {
        let mut command = site.nanite(arguments);
        command.env("NANITE_CERTS", certs);
        command
    };
    let _m1 = ready(&mut by("mapper-m1", &["mapper"]));
    let _fred = ready(&mut by("agent-fred", &["agent", "--actors-dir", "actors"]));
    let patient = ["--look", "60s", "--timeout", "60s"];
    let asked = |certs: &str, way: &[&str]| {
        let all: Vec<&str> = ["request", "/simple/echo", "[1,2]", "--json"].iter().chain(way).copied().collect();
        let ended = run(&mut by(certs, &all));
        assert_eq!(ended.code(), 0, "{certs}: {ended:?}");
        let answers: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
        assert_eq!(answers["results"]["nanite-fred"], serde_json::json!([1, 2]), "{answers}");
    };
    asked("mapper-ctl", &patient);
    asked("mapper-ctl", &["--via-mapper", "--timeout", "60s"]);
    // Pinned, nobody is known.
    let arguments = ["request", "/simple/echo", "1", "--pinned", "--look", "1s", "--timeout", "5s"];
    let pinned = run(&mut by("mapper-ctl", &arguments));
    assert_ne!(pinned.code(), 0, "{pinned:?}");
}
