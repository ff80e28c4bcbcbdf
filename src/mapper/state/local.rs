//! What one mapper knows of agents, in its own memory.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use async_trait::async_trait;

use super::roster::Roster;
use super::{AgentQuery, AgentRecord, ClusterState, Heartbeat, StateError};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// What one mapper knows of agents, in its own memory; gone when it stops.
#[derive(Debug, Default)]
pub struct LocalState(RwLock<Roster>);

impl LocalState {
    /// Knows nobody.
    pub fn new() -> Self {
        Self::default()
    }

    // What the lock guards is whole after every statement, so a panic elsewhere leaves nothing half done.
    fn read(&self) -> RwLockReadGuard<'_, Roster> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Roster> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl ClusterState for LocalState {
    async fn register(&self, agent: AgentRecord) -> Result<(), StateError> {
        self.write().insert(agent)
    }

    async fn ping(&self, ping: Heartbeat<'_>) -> Result<bool, StateError> {
        let mut known = self.write();
        if known.get(ping.identity).is_none_or(|record| record.instance != ping.instance) {
            return Ok(false);
        }
        known.heard(ping.identity, ping.status, ping.now);
        Ok(true)
    }

    async fn remove(&self, identity: &Identity, instance: Option<u64>) -> Result<bool, StateError> {
        let mut known = self.write();
        let meant = known.get(identity).is_some_and(|record| record.is_of(instance));
        Ok(meant && known.forget(identity).is_some())
    }

    async fn find(&self, query: &AgentQuery) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        Ok(self.read().find(query).cloned().collect())
    }

    async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        Ok(self.read().all().cloned().collect())
    }

    async fn reap(&self, silent_since: Timestamp) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let silent: Vec<Identity> = self.read().silent(silent_since).map(|record| record.identity.clone()).collect();
        if silent.is_empty() {
            return Ok(Vec::new());
        }
        let mut known = self.write();
        let still = |known: &Roster, identity: &Identity| {
            known.get(identity).is_some_and(|record| record.last_seen < silent_since)
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
        let heard = Heartbeat::new(&bob, 7, Status::new(2.0), Timestamp::from_secs(130));
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
        let fred = Identity::agent("fred").unwrap();
        assert!(!state.remove(&fred, Some(6)).await.unwrap(), "what an older process says does not concern it");
        assert!(state.remove(&fred, Some(7)).await.unwrap());
        assert!(!state.remove(&fred, None).await.unwrap());
        assert!(state.agents().await.unwrap().is_empty());
    }
}
