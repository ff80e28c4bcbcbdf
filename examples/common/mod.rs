//! Common code of the examples: nodes with certificates of a CA in memory, connected to a broker.
//!
//! Nodes on different machines read their certificates from files: see `examples/secure`.

#![allow(dead_code, reason = "not every example uses everything")]

use std::error::Error;

use nanite::Node;
use nanite::agent::AgentBuilder;
use nanite::certs::{CertificateAuthority, KeyType};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::{Mapper, MapperBuilder};
use nanite::packet::Identity;
use nanite::transport::MemoryBroker;

pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A CA and a broker for all nodes of an example.
pub struct World {
    ca: CertificateAuthority,
    memory: MemoryBroker,
}

impl World {
    /// A new CA, and a broker in memory.
    pub fn new() -> Result<Self> {
        let now = SystemClock.now();
        let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
        Ok(Self { ca, memory: MemoryBroker::new() })
    }

    /// A node, connected to the RabbitMQ that NANITE_BROKER names, or else to the broker in memory.
    async fn node(&self, identity: Identity) -> Result<Node> {
        let lifetime = CertificateAuthority::LEAF_VALID_FOR;
        let credentials = self.ca.issue(&identity, KeyType::P256, lifetime, SystemClock.now())?;
        let node = Node::from_credentials(credentials, self.ca.trust()?);
        Ok(match std::env::var("NANITE_BROKER") {
            Ok(url) => node.connect(&url).await?,
            Err(_) => node.attach(self.memory.connect())?,
        })
    }

    /// The agent of this name.
    pub async fn agent(&self, name: &str) -> Result<AgentBuilder> {
        Ok(self.node(Identity::agent(name)?).await?.agent())
    }

    /// The mapper of this name.
    pub async fn mapper(&self, name: &str) -> Result<MapperBuilder> {
        Ok(self.node(Identity::mapper(name)?).await?.mapper())
    }
}

/// Waits until a mapper knows this many agents.
pub async fn wait_for_agents(mapper: &Mapper, count: usize) -> Result<()> {
    loop {
        let registered = mapper.agent_registered();
        if mapper.agents().await?.len() >= count {
            return Ok(());
        }
        registered.await;
    }
}
