//! The agents that one process knows, and who of them offers what.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::{AgentQuery, AgentRecord, StateError};
use crate::clock::Timestamp;
use crate::packet::{Identity, Service, Status};

/// How many agents are kept.
const MAX_AGENTS: usize = 1_000_000;

/// Agents by their identity, and by the services they offer.
#[derive(Debug, Default)]
pub(in crate::mapper) struct Roster {
    agents: BTreeMap<Identity, Arc<AgentRecord>>,
    /// Who offers what: the services of `agents`, turned round.
    offers: HashMap<Service, BTreeSet<Identity>>,
}

impl Roster {
    /// Takes an agent in, in place of what was known of it.
    pub fn insert(&mut self, agent: AgentRecord) -> Result<(), StateError> {
        self.forget(&agent.identity);
        if self.agents.len() >= MAX_AGENTS {
            return Err(StateError::Full(MAX_AGENTS));
        }
        for service in &agent.services {
            self.offers.entry(service.clone()).or_default().insert(agent.identity.clone());
        }
        self.agents.insert(agent.identity.clone(), Arc::new(agent));
        Ok(())
    }

    /// Notes what a heartbeat of this agent said.
    pub fn heard(&mut self, identity: &Identity, status: Status, last_seen: Timestamp) {
        if let Some(record) = self.agents.get_mut(identity) {
            let record = Arc::make_mut(record);
            record.status = status;
            record.last_seen = last_seen;
        }
    }

    /// Forgets an agent; gives what was known of it.
    pub fn forget(&mut self, identity: &Identity) -> Option<Arc<AgentRecord>> {
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

    /// What is known of an agent.
    pub fn get(&self, identity: &Identity) -> Option<&Arc<AgentRecord>> {
        self.agents.get(identity)
    }

    /// Everybody, in the order of their identities.
    pub fn all(&self) -> impl Iterator<Item = &Arc<AgentRecord>> {
        self.agents.values()
    }

    /// The agents that fit, in the order of their identities.
    pub fn find<'a>(&'a self, query: &'a AgentQuery) -> impl Iterator<Item = &'a Arc<AgentRecord>> {
        let target = query.target.as_ref().and_then(|target| self.agents.get(target));
        let target = target.filter(|record| record.offers(&query.service));
        let offering = if query.target.is_none() { self.offers.get(&query.service) } else { None };
        let offering = offering.into_iter().flatten().filter_map(|identity| self.agents.get(identity));
        target.into_iter().chain(offering).filter(|record| record.carries(&query.tags))
    }

    /// The agents that were last heard before this moment.
    pub fn silent(&self, since: Timestamp) -> impl Iterator<Item = &Arc<AgentRecord>> {
        self.agents.values().filter(move |record| record.last_seen < since)
    }
}
