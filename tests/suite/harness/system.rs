//! A whole system in one process: a broker in memory, agents and mappers.

use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Agent, AgentBuilder, AgentHandle};
use nanite::mapper::{Mapper, MapperBuilder};
use nanite::packet::{Identity, Payload};
use nanite::serializer::{Plain, Serializer};
use nanite::transport::{MemoryBroker, MemoryTransport};

/// A broker in memory, and nodes that speak plain JSON or securely.
#[derive(Debug)]
pub struct System {
    pub broker: MemoryBroker,
    format: Format,
}

#[derive(Debug)]
enum Format {
    Plain,
}

impl System {
    pub fn plain() -> Self {
        Self { broker: MemoryBroker::new(), format: Format::Plain }
    }

    pub fn serializer(&self, _identity: &Identity) -> Arc<dyn Serializer> {
        match &self.format {
            Format::Plain => Arc::new(Plain::json()),
        }
    }

    pub fn connect(&self) -> Arc<MemoryTransport> {
        Arc::new(self.broker.connect())
    }

    /// An agent with short times.
    pub fn agent(&self, name: &str) -> AgentBuilder {
        let identity = Identity::agent(name).unwrap();
        let serializer = self.serializer(&identity);
        Agent::builder(identity, serializer, self.connect()).ping_time(Duration::from_millis(50)).status(|| 1.0)
    }

    /// A mapper with short times.
    pub fn mapper(&self, name: &str) -> MapperBuilder {
        let identity = Identity::mapper(name).unwrap();
        let serializer = self.serializer(&identity);
        Mapper::builder(identity, serializer, self.connect()).request_timeout(Duration::from_secs(20))
    }

    /// A started mapper.
    pub async fn started_mapper(&self, name: &str) -> Mapper {
        self.mapper(name).start().await.unwrap()
    }
}

/// Starts an agent.
pub async fn start(agent: AgentBuilder) -> AgentHandle {
    agent.build().unwrap().start().await.unwrap()
}

/// Waits until a mapper knows exactly these agents, by name.
pub async fn knows(mapper: &Mapper, names: &[&str]) {
    let known = async {
        loop {
            let registered = mapper.agent_registered();
            let known = mapper.agents().await.unwrap();
            if known.iter().map(|record| record.identity.name()).eq(names.iter().copied()) {
                return;
            }
            // Agents go without a registration: look again soon.
            let _ = tokio::time::timeout(Duration::from_millis(10), registered).await;
        }
    };
    let patience = Duration::from_secs(30);
    if tokio::time::timeout(patience, known).await.is_err() {
        panic!("the mapper does not come to know {names:?}: {:?}", mapper.agents().await);
    }
}

/// A payload from a JSON text.
pub fn json(text: &str) -> Payload {
    serde_json::from_str(text).unwrap()
}

/// An agent that has no queue and does nothing: it only registered.
#[derive(Debug)]
pub struct Ghost;

impl System {
    pub async fn ghost(&self, name: &str, services: &[&str]) -> Ghost {
        let identity = Identity::agent(name).unwrap();
        let serializer = self.serializer(&identity);
        let clock = Arc::new(nanite::clock::SystemClock);
        let link = nanite::link::Link::new(identity.clone(), serializer, self.connect(), clock).unwrap();
        let register = nanite::packet::Register {
            identity,
            services: services.iter().map(|service| service.parse().unwrap()).collect(),
            status: nanite::packet::Status::new(-1.0),
            tags: Vec::new(),
        };
        let letter = nanite::link::Letter::new(register, nanite::serializer::Audience::Mappers);
        let registration = nanite::transport::Exchange(nanite::transport::topology::REGISTRATION.into());
        link.send(letter, nanite::transport::Destination::Exchange(registration)).await.unwrap();
        Ghost
    }
}
