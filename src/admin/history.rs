//! What happened to agents: when they came and went, and how loaded they were. Bounded in agents, in events and in samples.

use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::{Clock, SystemClock, Timestamp};
use crate::mapper::{AgentEvent, AgentRecord};
use crate::packet::Identity;

/// Of how many agents something is remembered; those that left longest ago make room for new ones.
const AGENTS: usize = 10_000;
/// How many loads are remembered of each agent: half an hour of heartbeats every 15 s.
pub(super) const SAMPLES: usize = 120;
/// How many events are remembered of each agent.
const EVENTS: usize = 32;
/// How many events are remembered of all agents.
const RECENT: usize = 64;

/// What happened to agents, as a mapper saw it. It is a handle: cloning it is cheap.
///
/// Build the mapper with its [hook](History::hook), and give it to the [`ControlTower`](super::ControlTower).
#[derive(Clone, Default)]
pub struct History(Arc<Mutex<Known>>);

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("History").field("agents", &self.lock().pasts.len()).finish()
    }
}

#[derive(Default)]
struct Known {
    pasts: HashMap<Identity, Past>,
    /// Those that went, in that order; some have come back since.
    gone: VecDeque<Identity>,
    recent: VecDeque<(Identity, Happened)>,
}

#[derive(Default)]
struct Past {
    loads: VecDeque<Sample>,
    heard: Option<Timestamp>,
    happened: VecDeque<Happened>,
    /// Of the last registration: the instance, and a hash of services and tags. None when it is gone.
    present: Option<(u64, u64)>,
}

/// How loaded an agent was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Seconds since the epoch.
    pub at: u32,
    /// Not a number where the agent did not say.
    pub load: f32,
}

/// Something that happened to an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Happened {
    pub at: Timestamp,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Came,
    Restarted,
    OffersElse,
    Left,
    Silent,
}

impl What {
    /// In words, after the agent's name.
    pub fn as_str(self) -> &'static str {
        match self {
            What::Came => "came",
            What::Restarted => "was restarted",
            What::OffersElse => "offers something else",
            What::Left => "left",
            What::Silent => "has been silent for too long",
        }
    }

    /// Whether somebody may have to look after it.
    pub fn is_bad(self) -> bool {
        self == What::Silent
    }
}

impl History {
    /// What a [`MapperBuilder::on_agent`](crate::mapper::MapperBuilder::on_agent) takes.
    pub fn hook(&self) -> impl Fn(&AgentEvent) + Send + Sync + use<> {
        let history = self.clone();
        move |event| history.note(event, SystemClock.now())
    }

    fn note(&self, event: &AgentEvent, now: Timestamp) {
        let mut known = self.lock();
        match event {
            AgentEvent::Registered(record) => known.registered(record, now),
            AgentEvent::Unregistered(agent) => known.went(agent, What::Left, now),
            AgentEvent::TimedOut(record) => known.went(&record.identity, What::Silent, now),
        }
    }

    /// Notes how loaded the agents are, of those that were heard since the last time.
    pub(super) fn sample<'a>(&self, agents: impl Iterator<Item = &'a AgentRecord>) {
        let mut known = self.lock();
        for record in agents {
            let Some(past) = known.past(&record.identity) else { continue };
            if past.heard.is_none_or(|heard| heard < record.last_seen) {
                past.heard = Some(record.last_seen);
                let at = u32::try_from(record.last_seen.as_secs()).unwrap_or(u32::MAX);
                let load = record.status.load().map_or(f32::NAN, |load| load as f32);
                push(&mut past.loads, Sample { at, load }, SAMPLES);
            }
        }
    }

    /// The last loads of an agent, at most this many, oldest first.
    pub(super) fn loads(&self, agent: &Identity, most: usize) -> Vec<Sample> {
        let known = self.lock();
        let loads = known.pasts.get(agent).map(|past| &past.loads);
        loads.map(|loads| loads.iter().skip(loads.len().saturating_sub(most)).copied().collect()).unwrap_or_default()
    }

    /// What happened to an agent, newest first; none when nothing is known of it.
    pub(super) fn happened(&self, agent: &Identity) -> Option<Vec<Happened>> {
        self.lock().pasts.get(agent).map(|past| past.happened.iter().rev().copied().collect())
    }

    /// What happened to all agents, newest first.
    pub(super) fn recent(&self, most: usize) -> Vec<(Identity, Happened)> {
        self.lock().recent.iter().rev().take(most).cloned().collect()
    }

    /// What the lock guards is whole after every statement.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn registered(&mut self, record: &AgentRecord, now: Timestamp) {
        let mut hasher = DefaultHasher::new();
        (&record.services, &record.tags).hash(&mut hasher);
        let offer = (record.instance, hasher.finish());
        let Some(past) = self.past(&record.identity) else { return };
        let what = match past.present.replace(offer) {
            None => What::Came,
            Some((instance, _)) if instance != offer.0 => What::Restarted,
            Some(before) if before != offer => What::OffersElse,
            Some(_) => return,
        };
        self.happen(&record.identity, Happened { at: now, what });
    }

    fn went(&mut self, agent: &Identity, what: What, now: Timestamp) {
        let Some(past) = self.pasts.get_mut(agent) else { return };
        if past.present.take().is_some() {
            push(&mut self.gone, agent.clone(), AGENTS);
            self.happen(agent, Happened { at: now, what });
        }
    }

    fn happen(&mut self, agent: &Identity, happened: Happened) {
        if let Some(past) = self.pasts.get_mut(agent) {
            push(&mut past.happened, happened, EVENTS);
        }
        push(&mut self.recent, (agent.clone(), happened), RECENT);
    }

    /// The past of an agent; none when there is no room for one more.
    fn past(&mut self, agent: &Identity) -> Option<&mut Past> {
        if self.pasts.len() >= AGENTS && !self.pasts.contains_key(agent) {
            while let Some(gone) = self.gone.pop_front() {
                if let Entry::Occupied(past) = self.pasts.entry(gone)
                    && past.get().present.is_none()
                {
                    past.remove();
                    break;
                }
            }
            if self.pasts.len() >= AGENTS {
                return None;
            }
        }
        Some(self.pasts.entry(agent.clone()).or_default())
    }
}

fn push<T>(queue: &mut VecDeque<T>, item: T, most: usize) {
    if queue.len() >= most {
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

    fn came(history: &History, record: AgentRecord) {
        let now = record.last_seen;
        history.note(&AgentEvent::Registered(Arc::new(record)), now);
    }

    #[test]
    fn n20_only_what_changes_is_remembered() {
        let history = History::default();
        let fred = agent("fred");
        came(&history, record("fred", 1, "/a/b", 1));
        came(&history, record("fred", 1, "/a/b", 2));
        came(&history, record("fred", 1, "/a/c", 3));
        came(&history, record("fred", 2, "/a/c", 4));
        history.note(&AgentEvent::TimedOut(Arc::new(record("fred", 2, "/a/c", 4))), Timestamp::from_secs(9));
        history.note(&AgentEvent::Unregistered(fred.clone()), Timestamp::from_secs(10));
        came(&history, record("fred", 2, "/a/c", 11));
        let happened = history.happened(&fred).unwrap();
        let what: Vec<_> = happened.iter().map(|happened| (happened.at.as_secs(), happened.what)).collect();
        let expected =
            [(11, What::Came), (9, What::Silent), (4, What::Restarted), (3, What::OffersElse), (1, What::Came)];
        assert_eq!(what, expected);
        assert_eq!(history.recent(2).len(), 2);
        assert!(history.happened(&agent("bob")).is_none());
    }

    #[test]
    fn n20_loads_are_taken_once_for_each_heartbeat_and_bounded() {
        let history = History::default();
        for second in 0..200 {
            let record = record("fred", 1, "/a/b", second / 2);
            history.sample([&record].into_iter());
        }
        let at = |most| history.loads(&agent("fred"), most).iter().map(|sample| sample.at).collect::<Vec<_>>();
        assert_eq!(at(SAMPLES), (0..100).collect::<Vec<_>>());
        assert_eq!(at(2), [98, 99]);
        for second in 100..400 {
            history.sample([&record("fred", 1, "/a/b", second)].into_iter());
        }
        assert_eq!(at(1000).len(), SAMPLES);
    }

    #[test]
    fn n20_agents_that_are_gone_make_room_for_new_ones() {
        let history = History::default();
        for n in 0..AGENTS {
            came(&history, record(&format!("a{n}"), 1, "/a/b", 1));
        }
        came(&history, record("late", 1, "/a/b", 1));
        assert!(history.happened(&agent("late")).is_none(), "all are there: no room");
        history.note(&AgentEvent::Unregistered(agent("a7")), Timestamp::from_secs(2));
        came(&history, record("late", 1, "/a/b", 3));
        assert!(history.happened(&agent("late")).is_some() && history.happened(&agent("a7")).is_none());
        assert_eq!(history.lock().pasts.len(), AGENTS);
    }
}
