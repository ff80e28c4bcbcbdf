//! What mappers know of agents, behind one trait: in this process, or shared.

mod local;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use crate::clock::Timestamp;
use crate::packet::{Identity, Register, Service, Status, Tag};
use crate::serializer::Proof;

pub use local::LocalState;

/// What is known of one agent.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentRecord {
    /// Who it is.
    pub identity: Identity,
    /// The instance of its process; 0 when it did not say.
    pub instance: u64,
    /// What it offers, sorted.
    pub services: Vec<Service>,
    /// The tags it carries, sorted.
    pub tags: Vec<Tag>,
    /// The domains of files it takes, sorted.
    pub files: Vec<Tag>,
    /// How loaded it is, by its last heartbeat.
    pub status: Status,
    /// When it was last heard, by this mapper's clock.
    pub last_seen: Timestamp,
    /// What proves the registration to others; none when it was not signed.
    pub proof: Option<Arc<Proof>>,
}

impl AgentRecord {
    /// The record of an agent that registered now.
    pub fn new(register: Register, instance: u64, now: Timestamp, proof: Option<Arc<Proof>>) -> Self {
        let Register { identity, mut services, status, mut tags, mut files, .. } = register;
        services.sort();
        services.dedup();
        tags.sort();
        tags.dedup();
        files.sort();
        files.dedup();
        Self { identity, instance, services, tags, files, status, last_seen: now, proof }
    }

    /// Whether it offers this service.
    pub fn offers(&self, service: &Service) -> bool {
        self.services.binary_search(service).is_ok()
    }

    /// Whether it carries all of these tags.
    pub fn carries(&self, tags: &[Tag]) -> bool {
        tags.iter().all(|tag| self.tags.binary_search(tag).is_ok())
    }
}

/// Which agents are meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct AgentQuery {
    /// The service they offer.
    pub service: Service,
    /// The tags they carry, all of them.
    pub tags: Vec<Tag>,
    /// The one agent that is meant.
    pub target: Option<Identity>,
}

impl AgentQuery {
    /// The agents that offer `service` and carry all of `tags`.
    pub fn new(service: Service, tags: Vec<Tag>) -> Self {
        Self { service, tags, target: None }
    }
}

/// What mappers know of agents. Implement it to share that among mappers in a place of your own.
///
/// What a shared state returns was written by somebody else: an implementation verifies a record's proof before it returns it. A
/// shared state that is away answers with what it last knew rather than with an error.
#[async_trait]
pub trait ClusterState: fmt::Debug + Send + Sync {
    /// Takes an agent in, or takes its new registration in place of the old one.
    ///
    /// # Errors
    /// [`StateError`] when it cannot be kept.
    async fn register(&self, agent: AgentRecord) -> Result<(), StateError>;

    /// Notes a heartbeat of an agent. False when the agent, or this instance of it, is not known.
    ///
    /// # Errors
    /// [`StateError`] when it cannot be kept.
    async fn ping(&self, ping: Heartbeat<'_>) -> Result<bool, StateError>;

    /// Forgets an agent; says whether it was known.
    ///
    /// # Errors
    /// [`StateError`] when it cannot be done.
    async fn remove(&self, identity: &Identity) -> Result<bool, StateError>;

    /// The agents that fit, in the order of their identities.
    ///
    /// # Errors
    /// [`StateError`] when nothing is known.
    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError>;

    /// Every agent, in the order of their identities.
    ///
    /// # Errors
    /// [`StateError`] when nothing is known.
    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError>;

    /// The agents that were last heard before `silent_since`; they are forgotten. Called about four times in each agent timeout.
    ///
    /// # Errors
    /// [`StateError`] when it cannot be done.
    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError>;
}

/// A heartbeat.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Heartbeat<'a> {
    /// Whose.
    pub identity: &'a Identity,
    /// Of which instance; 0 when it did not say.
    pub instance: u64,
    /// How loaded it is.
    pub status: Status,
    /// When it was heard.
    pub now: Timestamp,
}

/// A state could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The place of a shared state is away.
    #[error("the shared state is away: {0}")]
    Unavailable(String),
    /// There is no room.
    #[error("more than {0} agents")]
    Full(usize),
}
