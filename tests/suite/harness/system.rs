//! A whole system in one process: a broker in memory, agents and mappers.

use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Agent, AgentBuilder};
use nanite::certs::KeyType;
use nanite::clock::{Clock, SystemClock};
use nanite::link::{Link, Outbound, Subscription};
use nanite::mapper::{Mapper, MapperBuilder};
use nanite::packet::{
    Advertise, Failure, FailureCode, FileChunk, FileEnd, FileStart, Identity, Packet, Payload, Register, Request,
    Status, Token,
};
use nanite::policy::{Caller, Decision, Policy};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, PlainSerializer, Serializer};
use nanite::transport::{Destination, MemoryBroker, MemoryTransport, Queue, QueueKind, QueuedMessage, topology};

use super::pki::Pki;

/// A broker in memory, and nodes that use plain JSON or the secure envelope.
pub struct System {
    pub broker: MemoryBroker,
    format: Format,
    /// Whether the nodes seem to have started a minute ago.
    settled: bool,
}

enum Format {
    Plain,
    Secure(Box<Pki>),
}

impl System {
    pub fn plain() -> Self {
        Self { broker: MemoryBroker::new(), format: Format::Plain, settled: false }
    }

    pub fn secure() -> Self {
        let pki = Pki::starting(KeyType::P256, SystemClock.now());
        Self { broker: MemoryBroker::new(), format: Format::Secure(Box::new(pki)), settled: false }
    }

    /// As [`secure`](Self::secure), with nodes that started a minute ago: they accept messages that do not name their process.
    pub fn settled() -> Self {
        let mut system = Self::secure();
        system.settled = true;
        system
    }

    pub fn is_secure(&self) -> bool {
        matches!(self.format, Format::Secure(_))
    }

    /// The certificates of the nodes.
    pub fn pki(&self) -> &Pki {
        match &self.format {
            Format::Secure(pki) => pki,
            Format::Plain => panic!("a plain format has no certificates"),
        }
    }

    /// Waits until this many messages are in a queue, and returns them.
    pub async fn waiting(&self, queue: &str, count: usize) -> Vec<QueuedMessage> {
        super::wait_until("messages wait in the queue", async || self.broker.queued_messages(queue).len() == count)
            .await;
        self.broker.queued_messages(queue)
    }

    /// A serializer for a new process of this node.
    pub fn serializer(&self, identity: &Identity) -> Arc<dyn Serializer> {
        match &self.format {
            Format::Plain => Arc::new(PlainSerializer::json(identity.clone())),
            Format::Secure(pki) => {
                let credentials = pki.credentials(identity);
                let builder = SecureSerializer::builder(credentials, pki.peers.clone(), pki.ca.trust().unwrap());
                let age = if self.settled { Duration::from_secs(60) } else { Duration::ZERO };
                Arc::new(builder.started_at(SystemClock.now().saturating_sub(age)).build().unwrap())
            }
        }
    }

    pub fn connect(&self) -> Arc<MemoryTransport> {
        Arc::new(self.broker.connect())
    }

    /// An agent with short intervals.
    pub fn agent(&self, name: &str) -> AgentBuilder {
        let identity = Identity::agent(name).unwrap();
        let serializer = self.serializer(&identity);
        Agent::builder(serializer, self.connect()).ping_time(Duration::from_millis(50)).status(|| 1.0)
    }

    /// A mapper with a timeout for requests.
    pub fn mapper(&self, name: &str) -> MapperBuilder {
        let identity = Identity::mapper(name).unwrap();
        let serializer = self.serializer(&identity);
        Mapper::builder(serializer, self.connect()).request_timeout(Duration::from_secs(20))
    }

    /// A started mapper.
    pub async fn started_mapper(&self, name: &str) -> Mapper {
        self.mapper(name).start().await.unwrap()
    }
}

/// A policy that denies everything.
#[derive(Debug)]
pub struct DenyAll;

impl Policy for DenyAll {
    fn authorize_registration(&self, _: &Caller<'_>, _: &Register) -> Decision {
        Decision::denied()
    }

    fn authorize_request(&self, _: &Caller<'_>, _: &Request) -> Decision {
        Decision::denied()
    }
}

/// Starts an agent.
pub async fn start(agent: AgentBuilder) -> Agent {
    agent.start().await.unwrap()
}

/// Waits until a mapper knows exactly the agents with these names.
pub async fn wait_until_known(mapper: &Mapper, names: &[&str]) {
    let known = async {
        loop {
            let registered = mapper.agent_registered();
            let known = mapper.agents().await.unwrap();
            if known.iter().map(|record| record.identity.name()).eq(names.iter().copied()) {
                return;
            }
            // Agents may also unregister: check again soon.
            let _ = tokio::time::timeout(Duration::from_millis(10), registered).await;
        }
    };
    if tokio::time::timeout(super::WAIT_TIMEOUT, known).await.is_err() {
        panic!("the mapper does not know exactly {names:?}: {:?}", mapper.agents().await);
    }
}

/// A payload from a JSON text.
pub fn json(text: &str) -> Payload {
    serde_json::from_str(text).unwrap()
}

impl System {
    /// Registers an agent that does not run: it has no queue and does nothing.
    pub async fn register_without_agent(&self, name: &str, services: &[&str]) {
        let identity = Identity::agent(name).unwrap();
        let link = Link::builder(self.serializer(&identity), self.connect()).build();
        let registration = || Destination::exchange(topology::REGISTRATION);
        if self.is_secure() {
            // A mapper that has just started accepts only a registration that names it: its advertise tells how.
            let control = topology::agent_control(identity.as_str(), link.instance());
            let mut answers = link.subscribe(&control, InboundQueue::AgentControl, 10).await.unwrap();
            link.send(Outbound::new(Advertise::default(), Audience::Mappers), registration()).await.unwrap();
            answers.next().await.unwrap().accept().await;
        }
        let register = Register::new(identity, services.iter().map(|service| service.parse().unwrap()))
            .with_status(Status::new(-1.0));
        link.send(Outbound::new(register, Audience::Mappers), registration()).await.unwrap();
    }
}

/// A mapper that sends the packets of file transfers without the checks of the library's sender, to an agent that receives files of
/// the domain `photos`.
pub struct FileSender {
    link: Link,
    inbox: Queue,
    answers: Subscription,
    to: Identity,
    instance: u64,
    queue: String,
}

impl FileSender {
    pub async fn new(system: &System, from: &str, to: &str) -> Self {
        let (from, to) = (Identity::mapper(from).unwrap(), Identity::agent(to).unwrap());
        let (serializer, transport) = (system.serializer(&from), system.connect());
        let mapper = Mapper::builder(serializer.clone(), transport.clone()).short_lived().start().await;
        let mapper = mapper.unwrap();
        wait_until_known(&mapper, &[to.name()]).await;
        let instance = mapper.agents().await.unwrap()[0].instance;
        drop(mapper);
        let link = Link::builder(serializer, transport).build();
        let mut inbox = topology::mapper_inbox(from.as_str(), link.instance());
        inbox.kind = QueueKind::Exclusive;
        let answers = link.subscribe(&inbox, InboundQueue::MapperInbox, 10).await.unwrap();
        let queue = topology::process_queue_name(to.as_str(), instance);
        Self { link, inbox, answers, to, instance, queue }
    }

    async fn send(&self, packet: impl Into<Packet>) {
        let message = Outbound::new(packet, self.to.clone()).instances([self.instance]);
        self.link.send(message, Destination::Queue(self.queue.clone())).await.unwrap();
    }

    /// Announces a file.
    pub async fn announce(&self, mut start: FileStart) {
        if !self.link.is_secure() {
            start = start.with_from(self.link.identity().clone()).with_reply_to(self.inbox.name.clone());
        }
        self.send(start.with_domain("photos")).await;
    }

    /// Announces a file with this content; returns the token of the transfer.
    pub async fn start(&self, dest: &str, content: &[u8]) -> Token {
        let token = Token::random().unwrap();
        let sha256 = data_encoding::HEXLOWER.encode(&openssl::sha::sha256(content));
        let start = FileStart::new(token, "x", dest).with_file_size(content.len() as u64).with_sha256(sha256);
        self.announce(start).await;
        token
    }

    pub async fn chunk(&self, token: Token, sequence: Option<u64>, bytes: &[u8]) {
        let mut chunk = FileChunk::new(token, bytes);
        chunk.sequence = sequence;
        self.send(chunk).await;
    }

    pub async fn end(&self, token: Token) {
        self.send(FileEnd::new(token)).await;
    }

    /// The outcome of the next transfer that ends.
    pub async fn outcome(&mut self) -> (Token, Result<Payload, Failure>) {
        let next = async {
            loop {
                match self.answers.next().await.unwrap().accept().await.packet {
                    Packet::Outcome(outcome) => return (outcome.token, outcome.into_result()),
                    Packet::Intermediate(_) => {}
                    other => panic!("{other:?}"),
                }
            }
        };
        tokio::time::timeout(super::WAIT_TIMEOUT, next).await.expect("the receiver answers")
    }
}

impl System {
    /// Announces a file without the checks of the library's sender; returns the receiver's answer.
    pub async fn start_file(
        &self,
        from: &str,
        to: &str,
        dest: &str,
        size: Option<u64>,
    ) -> Result<Payload, FailureCode> {
        let mut sender = FileSender::new(self, from, to).await;
        let mut start = FileStart::new(Token::random().unwrap(), "x", dest).with_sha256("00".repeat(32));
        start.file_size = size;
        sender.announce(start).await;
        sender.outcome().await.1.map_err(|failure| failure.code)
    }
}
