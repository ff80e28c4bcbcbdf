//! What one mapper knows of agents, in its own memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use async_trait::async_trait;

use super::{AgentQuery, AgentRecord, ClusterState, Heartbeat, StateError};
use crate::clock::Timestamp;
use crate::packet::{Identity, Service};

/// How many agents are kept.
const MAX_AGENTS: usize = 1_000_000;

/// What one mapper knows of agents, in its own memory; gone when it stops.
#[derive(Debug, Default)]
pub struct LocalState(RwLock<Known>);

#[derive(Debug, Default)]
struct Known {
    agents: BTreeMap<Identity, Arc<AgentRecord>>,
    /// Who offers what: the services of `agents`, turned round.
    offers: HashMap<Service, BTreeSet<Identity>>,
}

impl Known {
    fn forget(&mut self, identity: &Identity) -> Option<Arc<AgentRecord>> {
        let record = self.agents.remove(identity)?;
        for service in &record.services {
            if let Some(offering) = self.offers.get_mut(service) {
                offering.remove(identity);
                if offering.is_empty() {
                    self.offers.remove(service);
                }
            }
        }
        Some(record)
    }
}

impl LocalState {
    /// Knows nobody.
    pub fn new() -> Self {
        Self::default()
    }

    // What the lock guards is whole after every statement, so a panic elsewhere leaves nothing half done.
    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl ClusterState for LocalState {
    async fn register(&self, agent: AgentRecord) -> Result<(), StateError> {
        let mut known = self.write();
        known.forget(&agent.identity);
        if known.agents.len() >= MAX_AGENTS {
            return Err(StateError::Full(MAX_AGENTS));
        }
        for service in &agent.services {
            known.offers.entry(service.clone()).or_default().insert(agent.identity.clone());
        }
        known.agents.insert(agent.identity.clone(), Arc::new(agent));
        Ok(())
    }

    async fn ping(&self, ping: Heartbeat<'_>) -> Result<bool, StateError> {
        let mut known = self.write();
        let Some(record) = known.agents.get_mut(ping.identity).filter(|record| record.instance == ping.instance) else {
            return Ok(false);
        };
        let record = Arc::make_mut(record);
        record.status = ping.status;
        record.last_seen = ping.now;
        Ok(true)
    }

    async fn remove(&self, identity: &Identity) -> Result<bool, StateError> {
        Ok(self.write().forget(identity).is_some())
    }

    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let known = self.read();
        let fits = |record: &&Arc<AgentRecord>| record.carries(&query.tags);
        Ok(match &query.target {
            Some(target) => {
                let record = known.agents.get(target).filter(|record| record.offers(&query.service));
                record.filter(fits).cloned().into_iter().collect()
            }
            None => {
                let offering = known.offers.get(&query.service).into_iter().flatten();
                offering.filter_map(|identity| known.agents.get(identity)).filter(fits).cloned().collect()
            }
        })
    }

    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        Ok(self.read().agents.values().cloned().collect())
    }

    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let silent: Vec<Identity> = {
            let known = self.read();
            let silent = known.agents.values().filter(|record| record.last_seen < silent_since);
            silent.map(|record| record.identity.clone()).collect()
        };
        if silent.is_empty() {
            return Ok(Vec::new());
        }
        let mut known = self.write();
        let still = |known: &Known, identity: &Identity| {
            known.agents.get(identity).is_some_and(|record| record.last_seen < silent_since)
        };
        Ok(silent
            .iter()
            .filter_map(|identity| if still(&known, identity) { known.forget(identity) } else { None })
            .collect())
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
    async fn n04_a_silent_agent_is_forgotten_and_a_heard_one_is_kept() {
        let state = LocalState::new();
        state.register(register("fred", &["/a/b"], &[])).await.unwrap();
        state.register(register("bob", &["/a/b"], &[])).await.unwrap();
        let bob = Identity::agent("bob").unwrap();
        let heard = Heartbeat { identity: &bob, instance: 7, status: Status::new(2.0), now: Timestamp::from_secs(130) };
        assert!(state.ping(heard).await.unwrap());
        let gone = state.reap(Timestamp::from_secs(115)).await.unwrap();
        assert_eq!(gone.iter().map(|r| r.identity.name()).collect::<Vec<_>>(), ["fred"]);
        assert_eq!(names(&state, &query("/a/b", &[])).await, ["bob"]);
        let other_instance = Heartbeat { instance: 8, ..heard };
        assert!(!state.ping(other_instance).await.unwrap(), "another process of that name has to register first");
    }

    #[tokio::test]
    async fn n02_a_new_registration_takes_the_place_of_the_old() {
        let state = LocalState::new();
        state.register(register("fred", &["/a/b"], &[])).await.unwrap();
        state.register(register("fred", &["/a/c"], &[])).await.unwrap();
        assert!(names(&state, &query("/a/b", &[])).await.is_empty());
        assert_eq!(names(&state, &query("/a/c", &[])).await, ["fred"]);
        assert!(state.remove(&Identity::agent("fred").unwrap()).await.unwrap());
        assert!(state.agents().await.unwrap().is_empty());
    }
}
