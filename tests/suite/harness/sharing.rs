//! Mappers that share their state in Redis, and registrations without a broker.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nanite::clock::{ManualClock, Timestamp};
use nanite::mapper::{
    AgentRecord, ClusterState, Heartbeat, Mapper, MapperBuilder, RedisOptions, RedisRefusal, RedisState, StateContext,
};
use nanite::packet::{Identity, Packet, Ping, Register, Status};
use nanite::policy::AllowVerified;
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, Proof, SealRequest, Serializer, Verified};
use nanite::transport::{Consumer, MemoryTransport, PublishRequest, Queue, Transport, TransportError};

use super::pki::{Pki, T0, agent, mapper};
use super::redis::RedisServer;
use super::system::System;

/// The agent timeout of tests with a scripted clock.
pub const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// A transport that delivers no registration and no heartbeat.
#[derive(Debug)]
pub struct Deaf(pub Arc<MemoryTransport>);

#[async_trait]
impl Transport for Deaf {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        self.0.publish(message, timeout).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        if queue.name.ends_with(".presence") {
            return Ok(Consumer::new(futures_util::stream::pending()));
        }
        self.0.consume(queue, prefetch).await
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        self.0.declare(queue).await
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        self.0.depth(queue).await
    }

    async fn close(&self) {
        self.0.close().await;
    }
}

/// Options with short intervals.
pub fn options(serializer: Arc<dyn Serializer>) -> RedisOptions {
    RedisOptions::new(serializer).refresh_interval(Duration::from_millis(50)).timeout(Duration::from_secs(10))
}

/// A mapper that receives registrations and heartbeats, and shares its state.
pub async fn sharing(system: &System, redis: &RedisServer, name: &str) -> (MapperBuilder, RedisState) {
    with_transport(system, redis, name, system.connect()).await
}

/// A mapper that knows agents only from Redis.
pub async fn deaf(system: &System, redis: &RedisServer, name: &str) -> (MapperBuilder, RedisState) {
    with_transport(system, redis, name, Arc::new(Deaf(system.connect()))).await
}

async fn with_transport(
    system: &System,
    redis: &RedisServer,
    name: &str,
    transport: Arc<dyn Transport>,
) -> (MapperBuilder, RedisState) {
    let serializer = system.serializer(&mapper(name));
    let mut options = options(serializer.clone());
    if !system.is_secure() {
        options = options.dangerous().accept_unsigned();
    }
    let state = RedisState::connect(&redis.url(), options).await.unwrap();
    let builder = Mapper::builder(serializer, transport).request_timeout(Duration::from_secs(20));
    (builder.state(state.clone()), state)
}

/// The number of refusals of this kind.
pub fn refused(state: &RedisState, refusal: RedisRefusal) -> u64 {
    state.refusals().into_iter().find(|(kind, _)| *kind == refusal).unwrap().1
}

/// Whether nothing was refused.
pub fn nothing_refused(state: &RedisState) -> bool {
    state.refusals().iter().all(|(_, count)| *count == 0)
}

/// Agents and mapper states with a scripted clock, without a broker: the test passes the agents' messages to the states.
pub struct Stage {
    pub pki: Pki,
    pub clock: Arc<ManualClock>,
    pub redis: RedisServer,
}

impl Stage {
    pub fn new() -> Self {
        let pki = Pki::new(nanite::certs::KeyType::P256);
        // Messages are sealed for the mappers that are known then.
        pki.credentials(&mapper("receiver"));
        Self { clock: Arc::new(ManualClock::new(T0)), redis: RedisServer::start(), pki }
    }

    pub fn now(&self) -> Timestamp {
        nanite::clock::Clock::now(&*self.clock)
    }

    /// The state of a mapper that has started.
    pub async fn state(&self, name: &str) -> RedisState {
        self.state_by(self.pki.serializer(&mapper(name))).await
    }

    /// The state of a mapper with this serializer.
    pub async fn state_by(&self, serializer: SecureSerializer) -> RedisState {
        let state = RedisState::connect(&self.redis.url(), options(Arc::new(serializer))).await.unwrap();
        state.start(self.context()).await.unwrap();
        state
    }

    pub fn context(&self) -> StateContext {
        StateContext::new(Arc::new(AllowVerified), self.clock.clone(), AGENT_TIMEOUT)
    }

    /// Seals a packet of an agent's process, and opens it as a mapper.
    fn receive(&self, speaker: &SecureSerializer, packet: &Packet) -> Verified {
        let sealed = speaker.seal(packet, &SealRequest::new(&Audience::Mappers, self.now())).unwrap();
        // A new receiver for each, so that a test can deliver messages in any order.
        let receiver = self.pki.serializer(&mapper("receiver"));
        let opened = receiver.open(&sealed.bytes, &OpenContext::new(InboundQueue::Presence, self.now())).unwrap();
        opened.signer().unwrap().clone()
    }

    /// A registration as a mapper receives it now.
    pub fn registration(&self, speaker: &SecureSerializer, services: &[&str], tags: &[&str]) -> AgentRecord {
        let register =
            Register::new(speaker.identity().clone(), services.iter().map(|service| service.parse().unwrap()))
                .with_status(Status::new(1.0))
                .with_tags(tags.iter().map(|tag| tag.parse().unwrap()));
        let signer = self.receive(speaker, &register.clone().into());
        let mut record = AgentRecord::new(register, signer.instance(), self.now(), signer.proof().cloned());
        record.sequence = signer.sequence();
        record
    }

    /// A heartbeat as a mapper receives it now.
    pub fn heartbeat(&self, speaker: &SecureSerializer, load: f64) -> ReceivedHeartbeat {
        let identity = speaker.identity().clone();
        let status = Status::new(load);
        let signer = self.receive(speaker, &Ping::new(identity.clone(), status).into());
        ReceivedHeartbeat { identity, status, signer, at: self.now() }
    }

    /// Passes a heartbeat to a state now; returns whether the agent was known.
    pub async fn ping(&self, state: &RedisState, speaker: &SecureSerializer, load: f64) -> bool {
        self.heartbeat(speaker, load).give(state).await
    }

    /// A process of an agent that started this many seconds after [`T0`].
    pub fn speaker(&self, name: &str, started: u64) -> SecureSerializer {
        let started = super::pki::at(started);
        self.pki.builder_for(self.pki.credentials(&agent(name))).started_at(started).build().unwrap()
    }
}

/// A heartbeat as a mapper received it.
pub struct ReceivedHeartbeat {
    pub identity: Identity,
    pub status: Status,
    pub signer: Verified,
    at: Timestamp,
}

impl ReceivedHeartbeat {
    /// Passes it to a mapper's state; returns whether the agent was known.
    pub async fn give(&self, state: &RedisState) -> bool {
        let mut heartbeat = Heartbeat::new(&self.identity, self.signer.instance(), self.status, self.at);
        heartbeat.sequence = self.signer.sequence();
        heartbeat.proof = self.signer.proof();
        state.heartbeat(heartbeat).await.unwrap()
    }

    /// Its version as it is stored in Redis.
    pub fn version(&self) -> String {
        format!("{:016x}{:016x}", self.signer.instance(), self.signer.sequence())
    }

    /// Its value as it is stored in Redis, received at this time.
    pub fn value(&self, received: Timestamp) -> Vec<u8> {
        [self.version().into_bytes(), value(self.signer.proof().unwrap(), received)].concat()
    }
}

/// The names of the agents that a state knows.
pub async fn names(state: &RedisState) -> Vec<String> {
    state.agents().await.unwrap().iter().map(|record| record.identity.name().to_owned()).collect()
}

/// A value as it is stored in Redis: a proof, and the time when it was received.
pub fn value(proof: &Proof, received: Timestamp) -> Vec<u8> {
    let mut out = vec![1];
    out.extend(received.as_micros().to_be_bytes());
    out.extend(proof.salt);
    let part = |out: &mut Vec<u8>, part: &[u8]| {
        out.extend(u32::try_from(part.len()).unwrap().to_be_bytes());
        out.extend(part);
    };
    part(&mut out, &proof.body);
    part(&mut out, &proof.signer_info);
    out.push(proof.certificates.len().try_into().unwrap());
    proof.certificates.iter().for_each(|certificate| part(&mut out, certificate));
    out
}

/// The version of a registration as it is stored in Redis.
pub fn version(record: &AgentRecord) -> String {
    format!("{:016x}{:016x}", record.instance, record.sequence)
}

/// The identity of an agent, as a field of a hash.
pub fn field(name: &str) -> String {
    Identity::agent(name).unwrap().to_string()
}
