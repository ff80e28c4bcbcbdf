//! The history of agents: registrations, departures and loads. The numbers of agents, events and loads are bounded.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::mapper::{AgentEvent, AgentRecord};
use crate::packet::Identity;

/// The most agents with a history. New agents replace those that left first.
const MAX_AGENTS: usize = 10_000;
/// The most loads of each agent: half an hour of heartbeats every 15 s.
pub(super) const MAX_LOAD_SAMPLES: usize = 120;
/// The most events of each agent.
const MAX_EVENTS_PER_AGENT: usize = 32;
/// The most events in the list of all agents.
const MAX_RECENT_EVENTS: usize = 64;

/// The history of a mapper's agents. A cheap handle to clone.
///
/// Build the mapper with its [hook](History::hook), and pass it to the [`ControlTower`](super::ControlTower).
#[derive(Clone, Default)]
pub struct History(Arc<Mutex<HistoryState>>);

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("History").field("agents", &self.0.lock().agents.len()).finish()
    }
}

#[derive(Default)]
struct HistoryState {
    agents: HashMap<Identity, AgentHistory>,
    /// Agents that left, oldest first. Some may have registered again since.
    departed: VecDeque<Identity>,
    recent_events: VecDeque<(Identity, HistoryEvent)>,
}

#[derive(Default)]
struct AgentHistory {
    loads: VecDeque<LoadSample>,
    last_heartbeat: Option<Timestamp>,
    events: VecDeque<HistoryEvent>,
    /// None after the agent left.
    registration: Option<Registration>,
}

/// What is compared to detect that a registration has changed.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Registration {
    instance: u64,
    services_and_tags_hash: u64,
}

impl Registration {
    fn new(record: &AgentRecord) -> Self {
        let mut hasher = DefaultHasher::new();
        (&record.services, &record.tags).hash(&mut hasher);
        Self { instance: record.instance, services_and_tags_hash: hasher.finish() }
    }
}

/// The load of an agent at one heartbeat.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LoadSample {
    /// Seconds since the epoch.
    pub at: u32,
    /// NaN if the agent did not report a load.
    pub load: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HistoryEvent {
    pub at: Timestamp,
    pub kind: HistoryEventKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HistoryEventKind {
    Registered,
    Restarted,
    Changed,
    Unregistered,
    TimedOut,
}

impl HistoryEventKind {
    /// The text that pages show after the agent's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Restarted => "restarted",
            Self::Changed => "changed its services or tags",
            Self::Unregistered => "unregistered",
            Self::TimedOut => "timed out",
        }
    }

    /// Whether the event points to a problem.
    pub fn is_problem(self) -> bool {
        self == Self::TimedOut
    }
}

impl History {
    /// A hook for [`MapperBuilder::on_agent`](crate::mapper::MapperBuilder::on_agent), which records the mapper's events here.
    pub fn hook(&self) -> impl Fn(&AgentEvent) + Send + Sync + use<> {
        let history = self.clone();
        move |event| history.record(event, SystemClock.now())
    }

    fn record(&self, event: &AgentEvent, now: Timestamp) {
        let mut state = self.0.lock();
        match event {
            AgentEvent::Registered(record) => state.registered(record, now),
            AgentEvent::Unregistered(agent) => state.departed(agent, HistoryEventKind::Unregistered, now),
            AgentEvent::TimedOut(record) => state.departed(&record.identity, HistoryEventKind::TimedOut, now),
        }
    }

    /// Records the loads of the agents that have sent a heartbeat since the last call.
    pub(super) fn record_loads<'a>(&self, records: impl Iterator<Item = &'a AgentRecord>) {
        let mut state = self.0.lock();
        for record in records {
            let Some(agent) = state.agent_mut(&record.identity) else { continue };
            if agent.last_heartbeat.is_none_or(|last| last < record.last_seen) {
                agent.last_heartbeat = Some(record.last_seen);
                let at = u32::try_from(record.last_seen.as_secs()).unwrap_or(u32::MAX);
                let load = record.status.load().map_or(f32::NAN, |load| load as f32);
                push_bounded(&mut agent.loads, LoadSample { at, load }, MAX_LOAD_SAMPLES);
            }
        }
    }

    /// The last loads of an agent, at most `limit`, oldest first.
    pub(super) fn loads(&self, agent: &Identity, limit: usize) -> Vec<LoadSample> {
        let state = self.0.lock();
        let Some(agent) = state.agents.get(agent) else { return Vec::new() };
        agent.loads.iter().skip(agent.loads.len().saturating_sub(limit)).copied().collect()
    }

    /// The events of an agent, newest first. None if the agent is unknown.
    pub(super) fn events(&self, agent: &Identity) -> Option<Vec<HistoryEvent>> {
        self.0.lock().agents.get(agent).map(|agent| agent.events.iter().rev().copied().collect())
    }

    /// The last events of all agents, at most `limit`, newest first.
    pub(super) fn recent_events(&self, limit: usize) -> Vec<(Identity, HistoryEvent)> {
        self.0.lock().recent_events.iter().rev().take(limit).cloned().collect()
    }
}

impl HistoryState {
    fn registered(&mut self, record: &AgentRecord, now: Timestamp) {
        let registration = Registration::new(record);
        let Some(agent) = self.agent_mut(&record.identity) else { return };
        let kind = match agent.registration.replace(registration) {
            None => HistoryEventKind::Registered,
            Some(previous) if previous.instance != registration.instance => HistoryEventKind::Restarted,
            Some(previous) if previous != registration => HistoryEventKind::Changed,
            Some(_) => return,
        };
        self.push_event(&record.identity, HistoryEvent { at: now, kind });
    }

    fn departed(&mut self, identity: &Identity, kind: HistoryEventKind, now: Timestamp) {
        let Some(agent) = self.agents.get_mut(identity) else { return };
        if agent.registration.take().is_some() {
            push_bounded(&mut self.departed, identity.clone(), MAX_AGENTS);
            self.push_event(identity, HistoryEvent { at: now, kind });
        }
    }

    fn push_event(&mut self, identity: &Identity, event: HistoryEvent) {
        if let Some(agent) = self.agents.get_mut(identity) {
            push_bounded(&mut agent.events, event, MAX_EVENTS_PER_AGENT);
        }
        push_bounded(&mut self.recent_events, (identity.clone(), event), MAX_RECENT_EVENTS);
    }

    /// The history of an agent, created if needed. None if there is no room for another agent.
    fn agent_mut(&mut self, identity: &Identity) -> Option<&mut AgentHistory> {
        if self.agents.len() >= MAX_AGENTS && !self.agents.contains_key(identity) {
            while let Some(departed) = self.departed.pop_front() {
                if let Entry::Occupied(agent) = self.agents.entry(departed)
                    && agent.get().registration.is_none()
                {
                    agent.remove();
                    break;
                }
            }
            if self.agents.len() >= MAX_AGENTS {
                return None;
            }
        }
        Some(self.agents.entry(identity.clone()).or_default())
    }
}

/// Adds an item; drops the oldest if there are `limit` already.
fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, limit: usize) {
    if queue.len() >= limit {
        queue.pop_front();
    }
    queue.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Register, Status};

    fn agent(name: &str) -> Identity {
        Identity::agent(name).unwrap()
    }

    fn record(name: &str, instance: u64, service: &str, at: u64) -> AgentRecord {
        let register = Register {
            identity: agent(name),
            services: vec![service.parse().unwrap()],
            status: Status::new(0.5),
            tags: Vec::new(),
            files: Vec::new(),
            instance: None,
        };
        AgentRecord::new(register, instance, Timestamp::from_secs(at), None)
    }

    fn register(history: &History, record: AgentRecord) {
        let now = record.last_seen;
        history.record(&AgentEvent::Registered(Arc::new(record)), now);
    }

    #[test]
    fn n20_history_records_only_changes() {
        let history = History::default();
        let fred = agent("fred");
        register(&history, record("fred", 1, "/a/b", 1));
        register(&history, record("fred", 1, "/a/b", 2));
        register(&history, record("fred", 1, "/a/c", 3));
        register(&history, record("fred", 2, "/a/c", 4));
        history.record(&AgentEvent::TimedOut(Arc::new(record("fred", 2, "/a/c", 4))), Timestamp::from_secs(9));
        history.record(&AgentEvent::Unregistered(fred.clone()), Timestamp::from_secs(10));
        register(&history, record("fred", 2, "/a/c", 11));
        let events = history.events(&fred).unwrap();
        let events: Vec<_> = events.iter().map(|event| (event.at.as_secs(), event.kind)).collect();
        use HistoryEventKind::{Changed, Registered, Restarted, TimedOut};
        assert_eq!(events, [(11, Registered), (9, TimedOut), (4, Restarted), (3, Changed), (1, Registered)]);
        assert_eq!(history.recent_events(2).len(), 2);
        assert!(history.events(&agent("bob")).is_none());
    }

    #[test]
    fn n20_records_one_load_per_heartbeat_up_to_limit() {
        let history = History::default();
        for second in 0..200 {
            let record = record("fred", 1, "/a/b", second / 2);
            history.record_loads([&record].into_iter());
        }
        let times = |limit| history.loads(&agent("fred"), limit).iter().map(|sample| sample.at).collect::<Vec<_>>();
        assert_eq!(times(MAX_LOAD_SAMPLES), (0..100).collect::<Vec<_>>());
        assert_eq!(times(2), [98, 99]);
        for second in 100..400 {
            history.record_loads([&record("fred", 1, "/a/b", second)].into_iter());
        }
        assert_eq!(times(1000).len(), MAX_LOAD_SAMPLES);
    }

    #[test]
    fn n20_history_evicts_departed_agents_first() {
        let history = History::default();
        for n in 0..MAX_AGENTS {
            register(&history, record(&format!("a{n}"), 1, "/a/b", 1));
        }
        register(&history, record("late", 1, "/a/b", 1));
        assert!(history.events(&agent("late")).is_none(), "no agent has left: there is no room");
        history.record(&AgentEvent::Unregistered(agent("a7")), Timestamp::from_secs(2));
        register(&history, record("late", 1, "/a/b", 3));
        assert!(history.events(&agent("late")).is_some() && history.events(&agent("a7")).is_none());
        assert_eq!(history.0.lock().agents.len(), MAX_AGENTS);
    }
}
