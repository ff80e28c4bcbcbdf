//! The agents as they are now: looked at once a second, for all who look at pages.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use super::router::Tower;
use crate::clock::Timestamp;
use crate::mapper::AgentRecord;
use crate::packet::Service;
use crate::request::AgentWorkload;

/// How often the agents are looked at.
const EVERY: Duration = Duration::from_secs(1);
/// How many services are offered to choose from.
const SERVICES: usize = 1000;

/// The agents at one moment.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub now: Timestamp,
    pub agents: Vec<Seen>,
    /// Messages that the mapper refused: why, and how many.
    pub refused: Vec<(String, u64)>,
    /// Why the agents cannot be read, when they cannot.
    pub problem: Option<String>,
}

/// One agent.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub record: Arc<AgentRecord>,
    pub work: AgentWorkload,
}

impl Snapshot {
    pub fn nothing(now: Timestamp) -> Self {
        Self { now, agents: Vec::new(), refused: Vec::new(), problem: None }
    }

    /// Looks at the agents.
    pub async fn of(tower: &Tower) -> Self {
        let now = tower.clock.now();
        let (agents, problem) = match tower.mapper.agents().await {
            Ok(agents) => (agents, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        tower.history.sample(agents.iter().map(Arc::as_ref));
        let work = tower.mapper.workloads(agents.iter().map(|record| &record.identity));
        let agents = agents.into_iter().zip(work).map(|(record, work)| Seen { record, work }).collect();
        let refused = tower.mapper.refusals().into_iter().filter(|(_, count)| *count > 0);
        Self { now, agents, refused: refused.map(|(kind, count)| (kind.to_string(), count)).collect(), problem }
    }

    /// The services that are offered, sorted, up to a limit.
    pub fn services(&self) -> Vec<&Service> {
        let mut services: Vec<&Service> = self.agents.iter().flat_map(|seen| &seen.record.services).collect();
        services.sort_unstable();
        services.dedup();
        services.truncate(SERVICES);
        services
    }
}

/// Keeps the tower's snapshot up to date. Never ends.
pub(super) async fn watch(tower: Arc<Tower>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let snapshot = Snapshot::of(&tower).await;
        tower.snapshot.send_replace(Arc::new(snapshot));
    }
}
