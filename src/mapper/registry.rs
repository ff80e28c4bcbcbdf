//! Agents in memory: the registry with its index by service, and [`LocalState`], the default [`ClusterState`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::RwLock;

use super::state::{AgentQuery, AgentRecord, ClusterState, Heartbeat, StateError};
use crate::clock::Timestamp;
use crate::packet::{Identity, Service, Status};

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
