//! What a mapper's handles and tasks share, and agents in memory: the registry with its index by service, and [`LocalState`], the default
//! [`ClusterState`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::RwLock;
use tokio::sync::{Notify, OnceCell, watch};
use tokio::task::AbortHandle;

use super::selector::Selectors;
use super::state::{AgentQuery, AgentRecord, ClusterState, Heartbeat, StateError};
use crate::clock::Timestamp;
use crate::link::{Link, Outbound, SendError};
use crate::packet::{Advertise, DuplicateInstance, Identity, Service, Status};
use crate::policy::Policy;
use crate::request::PendingRequests;
use crate::serializer::Audience;
use crate::transport::{Destination, topology};

/// The most agents that one mapper keeps track of.
const MAX_AGENTS: usize = 1_000_000;

/// Agents by identity, with an index by service.
#[derive(Debug, Default)]
pub(super) struct Registry {
    agents: BTreeMap<Identity, Arc<AgentRecord>>,
    by_service: HashMap<Service, BTreeSet<Identity>>,
}

impl Registry {
    /// Adds an agent, or replaces its record.
    pub fn insert(&mut self, agent: AgentRecord) -> Result<(), StateError> {
        self.remove(&agent.identity);
        if self.agents.len() >= MAX_AGENTS {
            return Err(StateError::Full(MAX_AGENTS));
        }
        for service in &agent.services {
            self.by_service.entry(service.clone()).or_default().insert(agent.identity.clone());
        }
        self.agents.insert(agent.identity.clone(), Arc::new(agent));
        Ok(())
    }

    /// Updates an agent's load and when it was last seen.
    pub fn update(&mut self, identity: &Identity, status: Status, last_seen: Timestamp) {
        if let Some(record) = self.agents.get_mut(identity) {
            let record = Arc::make_mut(record);
            record.status = status;
            record.last_seen = last_seen;
        }
    }

    pub fn remove(&mut self, identity: &Identity) -> Option<Arc<AgentRecord>> {
        let record = self.agents.remove(identity)?;
        for service in &record.services {
            if let Some(offering) = self.by_service.get_mut(service) {
                offering.remove(identity);
                if offering.is_empty() {
                    self.by_service.remove(service);
                }
            }
        }
        Some(record)
    }

    pub fn get(&self, identity: &Identity) -> Option<&Arc<AgentRecord>> {
        self.agents.get(identity)
    }

    /// All agents, ordered by identity.
    pub fn all(&self) -> impl Iterator<Item = &Arc<AgentRecord>> {
        self.agents.values()
    }

    /// The agents that fit the query, ordered by identity.
    pub fn find<'a>(&'a self, query: &'a AgentQuery) -> impl Iterator<Item = &'a Arc<AgentRecord>> {
        let target = query.target.as_ref().and_then(|target| self.agents.get(target));
        let target = target.filter(|record| record.offers(&query.service));
        let offering = if query.target.is_none() { self.by_service.get(&query.service) } else { None };
        let offering = offering.into_iter().flatten().filter_map(|identity| self.agents.get(identity));
        target.into_iter().chain(offering).filter(|record| record.carries(&query.tags))
    }

    /// The agents that were last seen before `silent_since`.
    pub fn silent(&self, silent_since: Timestamp) -> impl Iterator<Item = &Arc<AgentRecord>> {
        self.agents.values().filter(move |record| record.last_seen < silent_since)
    }
}

/// A [`ClusterState`] in this process's memory, for a single mapper. The default.
#[derive(Debug, Default)]
pub struct LocalState(RwLock<Registry>);

impl LocalState {
    /// A state without agents.
    pub fn new() -> Self {
        Self::default()
    }
}

#[async_trait]
impl ClusterState for LocalState {
    async fn register(&self, agent: AgentRecord) -> Result<(), StateError> {
        self.0.write().insert(agent)
    }

    async fn heartbeat(&self, heartbeat: Heartbeat<'_>) -> Result<bool, StateError> {
        let mut registry = self.0.write();
        if registry.get(heartbeat.identity).is_none_or(|record| record.instance != heartbeat.instance) {
            return Ok(false);
        }
        registry.update(heartbeat.identity, heartbeat.status, heartbeat.now);
        Ok(true)
    }

    async fn remove(&self, identity: &Identity, instance: Option<u64>) -> Result<bool, StateError> {
        let mut registry = self.0.write();
        let is_meant = registry.get(identity).is_some_and(|record| record.is_of(instance));
        Ok(is_meant && registry.remove(identity).is_some())
    }

    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        Ok(self.0.read().find(query).cloned().collect())
    }

    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        Ok(self.0.read().all().cloned().collect())
    }

    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        // The scan holds only the read lock: most of the time nothing is removed.
        let silent: Vec<Identity> = self.0.read().silent(silent_since).map(|record| record.identity.clone()).collect();
        if silent.is_empty() {
            return Ok(Vec::new());
        }
        let mut registry = self.0.write();
        let mut removed = Vec::new();
        for identity in &silent {
            if registry.get(identity).is_some_and(|record| record.last_seen < silent_since) {
                removed.extend(registry.remove(identity));
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Register, Status};

    fn register(name: &str, services: &[&str], tags: &[&str]) -> AgentRecord {
        let register = Register {
            identity: Identity::agent(name).unwrap(),
            services: services.iter().map(|s| s.parse().unwrap()).collect(),
            status: Status::new(1.0),
            tags: tags.iter().map(|t| t.parse().unwrap()).collect(),
            files: vec![],
            instance: None,
        };
        AgentRecord::new(register, 7, Timestamp::from_secs(100), None)
    }

    fn query(service: &str, tags: &[&str]) -> AgentQuery {
        AgentQuery::new(service.parse().unwrap(), tags.iter().map(|t| t.parse().unwrap()).collect())
    }

    async fn names(state: &LocalState, query: &AgentQuery) -> Vec<String> {
        state.find(query).await.unwrap().iter().map(|r| r.identity.name().to_owned()).collect()
    }

    #[tokio::test]
    async fn n06_all_given_tags_must_match() {
        let state = LocalState::new();
        state.register(register("fred", &["/a/b"], &["eu", "gpu"])).await.unwrap();
        state.register(register("bob", &["/a/b"], &["eu"])).await.unwrap();
        assert_eq!(names(&state, &query("/a/b", &[])).await, ["bob", "fred"]);
        assert_eq!(names(&state, &query("/a/b", &["eu", "gpu"])).await, ["fred"]);
        assert!(names(&state, &query("/a/b", &["us"])).await.is_empty());
        assert!(names(&state, &query("/a/c", &[])).await.is_empty());
    }

    #[tokio::test]
    async fn n04_reap_removes_only_silent_agents() {
        let state = LocalState::new();
        state.register(register("fred", &["/a/b"], &[])).await.unwrap();
        state.register(register("bob", &["/a/b"], &[])).await.unwrap();
        let bob = Identity::agent("bob").unwrap();
        let heartbeat = Heartbeat::new(&bob, 7, Status::new(2.0), Timestamp::from_secs(130));
        assert!(state.heartbeat(heartbeat).await.unwrap());
        let gone = state.reap(Timestamp::from_secs(115)).await.unwrap();
        assert_eq!(gone.iter().map(|r| r.identity.name()).collect::<Vec<_>>(), ["fred"]);
        assert_eq!(names(&state, &query("/a/b", &[])).await, ["bob"]);
        let other_instance = Heartbeat { instance: 8, ..heartbeat };
        assert!(!state.heartbeat(other_instance).await.unwrap(), "another process must register first");
    }

    #[tokio::test]
    async fn n02_new_registration_replaces_the_old_one() {
        let state = LocalState::new();
        state.register(register("fred", &["/a/b"], &[])).await.unwrap();
        state.register(register("fred", &["/a/c"], &[])).await.unwrap();
        assert!(names(&state, &query("/a/b", &[])).await.is_empty());
        assert_eq!(names(&state, &query("/a/c", &[])).await, ["fred"]);
        let fred = Identity::agent("fred").unwrap();
        assert!(!state.remove(&fred, Some(6)).await.unwrap(), "an earlier process cannot remove it");
        assert!(state.remove(&fred, Some(7)).await.unwrap());
        assert!(!state.remove(&fred, None).await.unwrap());
        assert!(state.agents().await.unwrap().is_empty());
    }
}

/// A change in the agents that a mapper knows. See [`MapperBuilder::on_agent`](super::MapperBuilder::on_agent).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum AgentEvent {
    /// An agent registered, for the first time or again.
    Registered(Arc<AgentRecord>),
    /// An agent unregistered.
    Unregistered(Identity),
    /// An agent was silent for longer than the agent timeout.
    TimedOut(Arc<AgentRecord>),
}

/// A callback for [`AgentEvent`]s.
pub(super) struct AgentHook(pub Box<dyn Fn(&AgentEvent) + Send + Sync>);

impl fmt::Debug for AgentHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentHook")
    }
}

/// The state of a running mapper.
#[derive(Debug)]
pub(super) struct Shared {
    pub link: Link,
    pub state: Arc<dyn ClusterState>,
    pub policy: Arc<dyn Policy>,
    pub pending: Arc<PendingRequests>,
    pub selectors: Selectors,
    pub agent_timeout: Duration,
    pub request_timeout: Duration,
    pub offline_failsafe: bool,
    pub offline_redelivery: Duration,
    pub persistent: bool,
    pub hooks: Vec<AgentHook>,
    /// Notified when an agent registers here or is discovered by the state.
    pub agents_changed: Notify,
    /// Counts the advertisements received from other mappers.
    pub advertisements: watch::Sender<u64>,
    /// Set once other mappers have had time to advertise themselves.
    pub mappers_discovered: OnceCell<()>,
}

/// A mapper's tasks; aborted on drop.
#[derive(Debug, Default)]
pub(super) struct Tasks(Vec<AbortHandle>);

impl Tasks {
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.push(tokio::spawn(task).abort_handle());
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Which agents are asked to register.
#[derive(Clone, Debug)]
pub(super) enum RegistrationRequest {
    All,
    /// Every process of one agent, through the exchange.
    Agent(Identity),
    /// One process, through its own queue, which it reads even while it is busy.
    Process(Identity, u64),
}

impl RegistrationRequest {
    /// A request to the process of an agent, or to the agent if the process is not known.
    pub fn to(agent: Identity, instance: Option<u64>) -> Self {
        match instance {
            Some(instance) => Self::Process(agent, instance),
            None => Self::Agent(agent),
        }
    }
}

impl Shared {
    /// Agents that were last seen before this time have timed out.
    pub fn silent_since(&self) -> Timestamp {
        self.link.now().saturating_sub(self.agent_timeout)
    }

    /// Asks agents to register; a failure is logged.
    pub async fn request_registration(&self, request: RegistrationRequest) {
        if let Err(error) = self.try_request_registration(request).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "failed to ask agents to register");
        }
    }

    /// Asks agents to register.
    pub async fn try_request_registration(&self, request: RegistrationRequest) -> Result<(), SendError> {
        let exchange = || Destination::exchange(topology::ADVERTISE);
        let (audience, instance, destination, target) = match request {
            RegistrationRequest::Process(agent, instance) => {
                let queue = topology::process_queue_name(agent.as_str(), instance);
                (Audience::One(agent.clone()), Some(instance), Destination::Queue(queue), Some(agent))
            }
            RegistrationRequest::Agent(agent) => (Audience::Agents, None, exchange(), Some(agent)),
            RegistrationRequest::All => (Audience::Agents, None, exchange(), None),
        };
        let advertise = Advertise { target, duplicate: None, serves_requests: self.link.serves_requests() };
        self.link.send(Outbound::new(advertise, audience).instances(instance), destination).await?;
        Ok(())
    }

    /// Sends an advertisement to one process, with a duplicate instance of it, if there is one.
    pub async fn advertise_to(
        &self,
        node: &Identity,
        instance: u64,
        duplicate: Option<DuplicateInstance>,
    ) -> Result<(), SendError> {
        let queue = topology::process_queue_name(node.as_str(), instance);
        let advertise =
            Advertise { target: Some(node.clone()), duplicate, serves_requests: self.link.serves_requests() };
        let advertise = Outbound::new(advertise, node.clone()).instances([instance]);
        self.link.send(advertise, Destination::Queue(queue)).await?;
        Ok(())
    }

    /// Calls the hooks.
    pub fn emit(&self, event: &AgentEvent) {
        for hook in &self.hooks {
            if catch_unwind(AssertUnwindSafe(|| hook.0(event))).is_err() {
                tracing::warn!("an agent callback panicked");
            }
        }
    }
}
