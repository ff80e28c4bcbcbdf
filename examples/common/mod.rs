//! What the examples share: nodes with certificates of a CA in memory, and a way to the broker.
//!
//! Nodes on different machines read their certificates from files: see `examples/secure`.

#![allow(dead_code, reason = "not every example needs everything")]

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;

use nanite::agent::{Agent, AgentBuilder};
use nanite::certs::{CertificateAuthority, Credentials, KeyType, StaticCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::{Mapper, MapperBuilder};
use nanite::packet::Identity;
use nanite::security::SecureSerializer;
use nanite::serializer::Serializer;
use nanite::transport::{AmqpOptions, AmqpTransport, MemoryBroker, Transport};

pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Nodes that know each other.
pub struct World {
    ca: CertificateAuthority,
    credentials: HashMap<Identity, Credentials>,
    store: Arc<StaticCertificateStore>,
    memory: MemoryBroker,
}

impl World {
    /// A CA, and certificates for these nodes: `nanite-NAME` or `mapper-NAME`.
    pub fn of(nodes: &[String]) -> Result<Self> {
        let now = SystemClock.now();
        let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
        let mut credentials = HashMap::new();
        for node in nodes {
            let identity: Identity = node.parse()?;
            let own = ca.issue(&identity, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
            credentials.insert(identity, own);
        }
        let known = credentials.values().map(|own| own.certificate().clone());
        let store = Arc::new(StaticCertificateStore::new(known));
        Ok(Self { ca, credentials, store, memory: MemoryBroker::new() })
    }

    /// What this node signs and opens with.
    fn serializer(&self, identity: &Identity) -> Result<Arc<dyn Serializer>> {
        let own = self.credentials.get(identity).ok_or("no such node")?.clone();
        Ok(Arc::new(SecureSerializer::builder(own, self.store.clone(), self.ca.trust()?).build()?))
    }

    /// A connection: to the RabbitMQ that NANITE_BROKER names, or else to a broker in memory.
    async fn connect(&self) -> Result<Arc<dyn Transport>> {
        Ok(match std::env::var("NANITE_BROKER") {
            Ok(url) => Arc::new(AmqpTransport::connect(AmqpOptions::new(&url)?).await?),
            Err(_) => Arc::new(self.memory.connect()),
        })
    }

    /// The agent of this name.
    pub async fn agent(&self, name: &str) -> Result<AgentBuilder> {
        let identity = Identity::agent(name)?;
        let (serializer, transport) = (self.serializer(&identity)?, self.connect().await?);
        Ok(Agent::builder(identity, serializer, transport))
    }

    /// The mapper of this name.
    pub async fn mapper(&self, name: &str) -> Result<MapperBuilder> {
        let identity = Identity::mapper(name)?;
        let (serializer, transport) = (self.serializer(&identity)?, self.connect().await?);
        Ok(Mapper::builder(identity, serializer, transport))
    }
}

/// Waits until a mapper knows this many agents.
pub async fn know(mapper: &Mapper, count: usize) -> Result<()> {
    loop {
        let registered = mapper.agent_registered();
        if mapper.agents().await?.len() >= count {
            return Ok(());
        }
        registered.await;
    }
}
