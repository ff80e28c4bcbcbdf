//! What mappers know of agents, behind one trait: in this process, or shared.

mod local;
mod roster;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock::{Clock, Timestamp};
use crate::packet::{Identity, Register, Service, Status, Tag};
use crate::policy::Policy;
use crate::serializer::Proof;

pub use local::LocalState;
#[cfg(feature = "redis")]
pub(super) use roster::Roster;

/// What is known of one agent.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentRecord {
    /// Who it is.
    pub identity: Identity,
    /// The instance of its process; 0 when it did not say.
    pub instance: u64,
    /// Where its registration stands in the order of what its process says; 0 when its messages are not signed.
    pub sequence: u64,
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
        Self { identity, instance, sequence: 0, services, tags, files, status, last_seen: now, proof }
    }

    /// Whether it is of this process or an older one of its name; of any, when none is named.
    pub(super) fn is_of(&self, instance: Option<u64>) -> bool {
        instance.is_none_or(|instance| self.instance <= instance)
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
/// What a shared state returns was written by somebody else: an implementation verifies a record's proof before it returns it, and
/// asks the mapper's own policy about it. A shared state that is away answers with what it last knew rather than with an error.
#[async_trait]
pub trait ClusterState: fmt::Debug + Send + Sync {
    /// Told once, when the mapper starts, before anything else.
    ///
    /// # Errors
    /// [`StateError`] when it cannot work; the mapper does not start then.
    async fn start(&self, _context: StateContext) -> Result<(), StateError> {
        Ok(())
    }

    /// Waits until an agent was learnt of from elsewhere than by `register`. One call may stand for several agents.
    async fn learnt(&self) {
        std::future::pending().await
    }

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

    /// Forgets an agent; says whether it was known. With an instance, a later process of that name stays known.
    ///
    /// # Errors
    /// [`StateError`] when it cannot be done.
    async fn remove(&self, identity: &Identity, instance: Option<u64>) -> Result<bool, StateError>;

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
    /// Where it stands in the order of what its process says; 0 when it is not signed.
    pub sequence: u64,
    /// When it was heard.
    pub now: Timestamp,
    /// What proves it to others; none when it was not signed.
    pub proof: Option<&'a Arc<Proof>>,
}

impl<'a> Heartbeat<'a> {
    /// A heartbeat that was heard now, and that nothing proves.
    pub fn new(identity: &'a Identity, instance: u64, status: Status, now: Timestamp) -> Self {
        Self { identity, instance, status, sequence: 0, now, proof: None }
    }
}

/// What a mapper tells its state when it starts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StateContext {
    /// Who may register what. A mapper asks it itself about what it registers; a state asks it about what others wrote.
    pub policy: Arc<dyn Policy>,
    /// The mapper's clock.
    pub clock: Arc<dyn Clock>,
    /// After how long a silent agent counts as gone.
    pub agent_timeout: Duration,
}

impl StateContext {
    /// What a mapper with this policy, clock and timeout tells its state.
    pub fn new(policy: Arc<dyn Policy>, clock: Arc<dyn Clock>, agent_timeout: Duration) -> Self {
        Self { policy, clock, agent_timeout }
    }
}

/// A state could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The place of a shared state is away.
    #[error("the shared state is away: {0}")]
    Unavailable(String),
    /// It serves another mapper already.
    #[error("this state serves another mapper")]
    InUse,
    /// A later registration of the agent is known.
    #[error("a later registration is known")]
    SupersededProcess,
    /// There is no room.
    #[error("more than {0} agents")]
    Full(usize),
}
