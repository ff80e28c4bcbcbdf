//! What mappers know about agents: the [`ClusterState`] trait and its types.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock::{Clock, Timestamp};
use crate::packet::{Identity, Register, Service, Status, Tag};
use crate::policy::Policy;
use crate::serializer::Proof;

/// What a mapper knows about one agent.
///
/// ```
/// use nanite::clock::Timestamp;
/// use nanite::mapper::{AgentQuery, AgentRecord};
/// use nanite::packet::{Identity, Register, Status};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let register = Register::new(Identity::agent("fred")?, ["/text/upper".parse()?]).with_status(Status::new(0.5));
/// let record = AgentRecord::new(register, 1, Timestamp::from_secs(10), None);
/// assert!(AgentQuery::new("/text/upper".parse()?, Vec::new()).matches(&record));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AgentRecord {
    /// The agent's identity.
    pub identity: Identity,
    /// The instance of the agent's process; 0 if unknown.
    pub instance: u64,
    /// The sequence number of the registration within its process; 0 if the registration is not signed.
    pub sequence: u64,
    /// The services it offers, sorted.
    pub services: Vec<Service>,
    /// Its tags, sorted.
    pub tags: Vec<Tag>,
    /// The file domains it subscribes to, sorted.
    pub files: Vec<Tag>,
    /// Its load, from its last heartbeat.
    pub status: Status,
    /// When the mapper last received a message from it, by the mapper's clock.
    pub last_seen: Timestamp,
    /// Proof of the registration, which other mappers can verify; `None` if the registration is not signed.
    pub proof: Option<Arc<Proof>>,
}

impl AgentRecord {
    /// The record for a registration received at `now`. Services, tags and file domains are sorted and deduplicated.
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

    /// Sets the sequence number of the registration.
    #[must_use]
    pub fn with_sequence(mut self, sequence: u64) -> Self {
        self.sequence = sequence;
        self
    }

    /// Whether the record belongs to this process or an earlier one of the agent. `None` matches any process.
    pub(super) fn is_of(&self, instance: Option<u64>) -> bool {
        instance.is_none_or(|instance| self.instance <= instance)
    }

    /// Whether the agent offers this service.
    pub fn offers(&self, service: &Service) -> bool {
        self.services.binary_search(service).is_ok()
    }

    /// Whether the agent has all of these tags.
    pub fn carries(&self, tags: &[Tag]) -> bool {
        tags.iter().all(|tag| self.tags.binary_search(tag).is_ok())
    }
}

/// Selects agents by service, tags and, optionally, identity.
///
/// ```
/// use nanite::mapper::AgentQuery;
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let query = AgentQuery::new("/text/upper".parse()?, vec!["eu".parse()?]).with_target(Identity::agent("fred")?);
/// assert_eq!(query.tags.len(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct AgentQuery {
    /// The service that agents must offer.
    pub service: Service,
    /// The tags that agents must have, all of them.
    pub tags: Vec<Tag>,
    /// The only agent to return; any if `None`.
    pub target: Option<Identity>,
}

impl AgentQuery {
    /// All agents that offer `service` and have all of `tags`.
    pub fn new(service: Service, tags: Vec<Tag>) -> Self {
        Self { service, tags, target: None }
    }

    /// Restricts the query to one agent.
    #[must_use]
    pub fn with_target(mut self, agent: Identity) -> Self {
        self.target = Some(agent);
        self
    }

    /// Whether an agent fits the query.
    pub fn matches(&self, record: &AgentRecord) -> bool {
        self.target.as_ref().is_none_or(|target| *target == record.identity)
            && record.offers(&self.service)
            && record.carries(&self.tags)
    }
}

/// Storage for what mappers know about agents. Implement it to share that knowledge between mappers in a store of your own.
///
/// Data in a shared store may have been written by an attacker: before an implementation returns a record that it did not get from
/// [`register`](ClusterState::register), it must verify the record's proof and ask the mapper's own policy. If a shared store is
/// unavailable, return what was last known rather than an error.
///
/// ```
/// # use std::sync::Arc;
/// use async_trait::async_trait;
/// # use nanite::clock::Timestamp;
/// use nanite::mapper::{AgentRecord, ClusterState, LocalState, StateError};
/// # use nanite::mapper::{AgentQuery, Heartbeat, Mapper};
/// # use nanite::{packet::Identity, serializer::PlainSerializer, transport::MemoryBroker};
///
/// /// Logs registrations, and stores the agents in memory.
/// #[derive(Debug, Default)]
/// struct LoggingState(LocalState);
///
/// #[async_trait]
/// impl ClusterState for LoggingState {
///     async fn register(&self, agent: AgentRecord) -> Result<(), StateError> {
///         println!("{} offers {:?}", agent.identity, agent.services);
///         self.0.register(agent).await
///     }
///     // The other methods call those of `self.0`.
/// #   async fn heartbeat(&self, heartbeat: Heartbeat<'_>) -> Result<bool, StateError> {
/// #       self.0.heartbeat(heartbeat).await
/// #   }
/// #   async fn remove(&self, agent: &Identity, instance: Option<u64>) -> Result<bool, StateError> {
/// #       self.0.remove(agent, instance).await
/// #   }
/// #   async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError> {
/// #       self.0.find(query).await
/// #   }
/// #   async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
/// #       self.0.agents().await
/// #   }
/// #   async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError> {
/// #       self.0.reap(silent_since).await
/// #   }
/// }
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let serializer = PlainSerializer::json(Identity::mapper("desk")?);
/// # let transport = MemoryBroker::new().connect();
/// let mapper = Mapper::builder(serializer, transport).state(LoggingState::default()).start().await?;
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait ClusterState: fmt::Debug + Send + Sync {
    /// Called once, when the mapper starts, before any other method.
    ///
    /// # Errors
    /// [`StateError`] if the state cannot be used; the mapper then does not start.
    async fn start(&self, _context: StateContext) -> Result<(), StateError> {
        Ok(())
    }

    /// Completes when the state has discovered an agent other than through `register`, for example in a shared store. One
    /// completion may cover several agents. Requests that wait for an agent are then tried again.
    async fn agent_discovered(&self) {
        std::future::pending().await
    }

    /// Adds an agent, or replaces its earlier registration.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be stored.
    async fn register(&self, agent: AgentRecord) -> Result<(), StateError>;

    /// Records a heartbeat. Returns false if the agent, or this instance of it, is not registered.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be stored.
    async fn heartbeat(&self, heartbeat: Heartbeat<'_>) -> Result<bool, StateError>;

    /// Removes an agent; returns whether it was registered. If `instance` is given, a newer process of the agent is left in place.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be removed.
    async fn remove(&self, identity: &Identity, instance: Option<u64>) -> Result<bool, StateError>;

    /// The agents that fit the query, ordered by identity.
    ///
    /// # Errors
    /// [`StateError`] if the state cannot be read.
    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError>;

    /// All agents, ordered by identity.
    ///
    /// # Errors
    /// [`StateError`] if the state cannot be read.
    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError>;

    /// Removes and returns the agents that were last seen before `silent_since`. Called about four times per agent timeout.
    ///
    /// # Errors
    /// [`StateError`] if they cannot be removed.
    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError>;
}

#[async_trait]
impl<S: ClusterState + ?Sized> ClusterState for Arc<S> {
    async fn start(&self, context: StateContext) -> Result<(), StateError> {
        (**self).start(context).await
    }

    async fn agent_discovered(&self) {
        (**self).agent_discovered().await;
    }

    async fn register(&self, agent: AgentRecord) -> Result<(), StateError> {
        (**self).register(agent).await
    }

    async fn heartbeat(&self, heartbeat: Heartbeat<'_>) -> Result<bool, StateError> {
        (**self).heartbeat(heartbeat).await
    }

    async fn remove(&self, identity: &Identity, instance: Option<u64>) -> Result<bool, StateError> {
        (**self).remove(identity, instance).await
    }

    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        (**self).find(query).await
    }

    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        (**self).agents().await
    }

    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        (**self).reap(silent_since).await
    }
}

/// A heartbeat from an agent.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Heartbeat<'a> {
    /// The agent's identity.
    pub identity: &'a Identity,
    /// The instance of the agent's process; 0 if unknown.
    pub instance: u64,
    /// The agent's load.
    pub status: Status,
    /// The sequence number of the heartbeat within its process; 0 if it is not signed.
    pub sequence: u64,
    /// When it was received.
    pub now: Timestamp,
    /// Proof of the heartbeat, which other mappers can verify; `None` if it is not signed.
    pub proof: Option<&'a Arc<Proof>>,
}

impl<'a> Heartbeat<'a> {
    /// An unsigned heartbeat, received at `now`.
    pub fn new(identity: &'a Identity, instance: u64, status: Status, now: Timestamp) -> Self {
        Self { identity, instance, status, sequence: 0, now, proof: None }
    }

    /// Sets the sequence number and the proof of a signed heartbeat.
    #[must_use]
    pub fn with_proof(mut self, sequence: u64, proof: &'a Arc<Proof>) -> Self {
        (self.sequence, self.proof) = (sequence, Some(proof));
        self
    }
}

/// What a mapper passes to its [`ClusterState`] when it starts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StateContext {
    /// The mapper's policy. The mapper applies it to the registrations it receives; a state applies it to those of other mappers.
    pub policy: Arc<dyn Policy>,
    /// The mapper's clock.
    pub clock: Arc<dyn Clock>,
    /// How long an agent may be silent before it is removed.
    pub agent_timeout: Duration,
}

impl StateContext {
    /// The context of a mapper with this policy, clock and agent timeout.
    pub fn new(policy: impl Policy + 'static, clock: impl Clock + 'static, agent_timeout: Duration) -> Self {
        Self { policy: Arc::new(policy), clock: Arc::new(clock), agent_timeout }
    }
}

/// Why a [`ClusterState`] operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The shared store cannot be reached.
    #[error("the shared state is unavailable: {0}")]
    Unavailable(String),
    /// The state is already used by another mapper.
    #[error("this state is already used by another mapper")]
    InUse,
    /// A newer registration of the agent is known.
    #[error("a newer registration of the agent is known")]
    SupersededProcess,
    /// The limit on agents is reached.
    #[error("more than {0} agents")]
    Full(usize),
}
