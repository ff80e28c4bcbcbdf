//! Two processes under one identity at the same time: which of them counts, and who is told.
//!
//! The agent's process that was started later has the place of the earlier one. Both are told of each other by the mappers that hear
//! them; the earlier one ends then. Whether a process is there at all is seen by its control queue, which goes with it: an agent that
//! was restarted has no duplicate. Mappers' processes under one identity work beside each other; both say so in their log.

use std::num::NonZeroUsize;

use lru::LruCache;

use super::Shared;
use crate::clock::Timestamp;
use crate::link::SendError;
use crate::packet::{Advertise, DuplicateInstance, Identity, Role};
use crate::transport::TransportError;

/// How many agents' processes are known; the ones that registered most recently stay.
const KNOWN: usize = 100_000;
/// How many processes of mappers under this one's identity have been spoken of.
const MAPPERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// The latest process of each agent that registered here.
#[derive(Debug)]
pub(super) struct DuplicateInstances {
    latest: LruCache<Identity, u64>,
    mappers: LruCache<u64, ()>,
}

impl Default for DuplicateInstances {
    fn default() -> Self {
        // Grows with the agents: one with a capacity takes its memory at once.
        Self { latest: LruCache::unbounded(), mappers: LruCache::new(MAPPERS) }
    }
}

impl DuplicateInstances {
    /// A process of an agent has registered.
    pub async fn registered(&mut self, shared: &Shared, agent: &Identity, instance: u64) {
        let before = self.latest.put(agent.clone(), instance);
        if self.latest.len() > KNOWN {
            self.latest.pop_lru();
        }
        match before {
            Some(before) if before < instance => replaced(shared, agent, before, instance).await,
            // In a plain format: nobody refused it before.
            Some(before)
                if before > instance
                    && tell(shared, agent, before, DuplicateInstance { instance, replaced: false }).await =>
            {
                self.latest.put(agent.clone(), before);
                replaced(shared, agent, instance, before).await;
            }
            _ => {}
        }
    }

    /// A process of an agent has said that it goes.
    pub fn left(&mut self, agent: &Identity, instance: Option<u64>) {
        if self.latest.peek(agent).is_some_and(|latest| instance.is_none_or(|instance| *latest <= instance)) {
            self.latest.pop(agent);
        }
    }

    /// The process that has the place of one that makes itself known, if it is there. It is told of it.
    pub async fn before(&mut self, shared: &Shared, agent: &Identity, instance: u64) -> Option<DuplicateInstance> {
        let before = self.latest.peek(agent).copied().filter(|before| *before != instance)?;
        // Its own registration, or a heartbeat of it, is what settles it.
        let there = tell(shared, agent, before, DuplicateInstance { instance, replaced: false }).await;
        there.then_some(DuplicateInstance { instance: before, replaced: false })
    }

    /// A mapper has made itself known.
    pub fn mapper(&mut self, shared: &Shared, sender: &Identity, instance: u64, advertise: &Advertise) {
        let link = &shared.link;
        let is_twin =
            sender == link.identity() && instance != link.instance() && advertise.serves && link.serves_requests();
        if is_twin && self.mappers.put(instance, ()).is_none() {
            tracing::warn!(
                "another process takes requests as {sender}, too; it was started {}: both work, and nobody can tell them apart. Give \
                 each a name of its own",
                started(instance)
            );
        }
    }
}

/// A later process of an agent has the place of an earlier one: if that still runs, both are told.
pub(super) async fn replaced(shared: &Shared, agent: &Identity, earlier: u64, later: u64) {
    if tell(shared, agent, earlier, DuplicateInstance { instance: later, replaced: true }).await {
        tracing::warn!(
            "two processes run as {agent}: the one started {} has the place of the one started {}, and both were told",
            started(later),
            started(earlier)
        );
        tell(shared, agent, later, DuplicateInstance { instance: earlier, replaced: true }).await;
    }
}

/// Tells a process of another; whether it is there to be told.
async fn tell(shared: &Shared, agent: &Identity, instance: u64, duplicate: DuplicateInstance) -> bool {
    // Commands that are a mapper for a moment leave it to those that stay.
    if agent.role() != Role::Agent || !shared.link.serves_requests() {
        return false;
    }
    match shared.say(agent, instance, Some(duplicate)).await {
        Ok(()) => true,
        Err(SendError::Transport(TransportError::Unroutable(_))) => false,
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, %agent, "a process could not be told of another");
            false
        }
    }
}

/// When a process was started.
fn started(instance: u64) -> Timestamp {
    Timestamp::from_micros(instance)
}
