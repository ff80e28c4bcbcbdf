//! Which of the agents that fit gets the work.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

use super::state::AgentRecord;
use crate::packet::{Identity, SelectorName, Service};

/// For how many services round robin remembers whose turn it is.
const TURNS: usize = 4096;

/// An agent that fits a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Candidate {
    /// What is known of it.
    pub record: Arc<AgentRecord>,
    /// How many requests of this mapper it works on now.
    pub in_flight: usize,
}

impl Candidate {
    /// An agent with so many requests in flight to it: for tests of a selector of your own.
    pub fn new(record: Arc<AgentRecord>, in_flight: usize) -> Self {
        Self { record, in_flight }
    }
}

/// Chooses among agents. Implement it for a rule of your own.
///
/// It is called on the path of every request: it must not block. What it returns are positions in `candidates`; others and
/// repeated ones are ignored. An empty list means that nobody gets the work.
pub trait Selector: fmt::Debug + Send + Sync {
    /// Chooses some of `candidates`, which is not empty and sorted by identity.
    fn select(&self, service: &Service, candidates: &[Candidate]) -> Vec<usize>;
}

/// The one with the least load: its status plus what this mapper has in flight to it, so that an old status does not send
/// everything to one. Agents without a status come last; among equals one is chosen at random.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Selector for LeastLoaded {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        let load = |candidate: &Candidate| match candidate.record.status.load() {
            Some(load) => load + candidate.in_flight as f64,
            None => f64::MAX,
        };
        // Agents without a status are told apart by what is in flight to them.
        let rank = |candidate: &Candidate| (load(candidate), candidate.in_flight);
        let Some(least) = candidates.iter().map(rank).min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))) else {
            return Vec::new();
        };
        let equals: Vec<usize> =
            candidates.iter().enumerate().filter(|(_, c)| rank(c) == least).map(|(at, _)| at).collect();
        random_index(equals.len()).and_then(|at| equals.get(at).copied()).into_iter().collect()
    }
}

/// Any one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Selector for Random {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        random_index(candidates.len()).into_iter().collect()
    }
}

/// Each in turn, by identity, for every service on its own.
#[derive(Debug)]
pub struct RoundRobin(Mutex<LruCache<Service, Identity>>);

impl Default for RoundRobin {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(NonZeroUsize::new(TURNS).unwrap_or(NonZeroUsize::MIN))))
    }
}

impl RoundRobin {
    /// Goes on after this agent, which had the last turn for the service: for a turn that was kept somewhere else.
    #[must_use]
    pub fn after(self, service: &Service, last: Identity) -> Self {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).put(service.resolved(), last);
        self
    }
}

impl Selector for RoundRobin {
    fn select(&self, service: &Service, candidates: &[Candidate]) -> Vec<usize> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever comes after the last one, so that agents that come and go disturb nobody's turn.
        let last = turns.get(service);
        let next = candidates.iter().position(|c| last.is_none_or(|last| c.record.identity > *last)).unwrap_or(0);
        let Some(chosen) = candidates.get(next) else { return Vec::new() };
        turns.put(service.clone(), chosen.record.identity.clone());
        vec![next]
    }
}

/// All of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct All;

impl Selector for All {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        (0..candidates.len()).collect()
    }
}

/// The selectors that requests can name.
#[derive(Debug, Default)]
pub(super) struct Selectors {
    round_robin: RoundRobin,
}

impl Selectors {
    pub fn named(&self, name: SelectorName) -> &dyn Selector {
        match name {
            SelectorName::LeastLoaded => &LeastLoaded,
            SelectorName::Random => &Random,
            SelectorName::RoundRobin => &self.round_robin,
            SelectorName::All => &All,
        }
    }
}

/// A random number below `len`; none when `len` is 0.
fn random_index(len: usize) -> Option<usize> {
    let mut bytes = [0; 8];
    // Without randomness the first one is as good as any.
    let _ = openssl::rand::rand_bytes(&mut bytes);
    (len > 0).then(|| (u64::from_le_bytes(bytes) % len as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::packet::{Register, Status};

    fn candidates(agents: &[(&str, f64, usize)]) -> Vec<Candidate> {
        let make = |(name, load, in_flight): &(&str, f64, usize)| {
            let register = Register {
                identity: Identity::agent(name).unwrap(),
                services: vec![],
                status: Status::new(*load),
                tags: vec![],
                files: vec![],
                instance: None,
            };
            let record = Arc::new(AgentRecord::new(register, 0, Timestamp::from_secs(0), None));
            Candidate { record, in_flight: *in_flight }
        };
        agents.iter().map(make).collect()
    }

    fn service() -> Service {
        "/a/b".parse().unwrap()
    }

    #[test]
    fn n05_least_loaded_counts_what_is_in_flight() {
        let chosen = |agents: &[_]| LeastLoaded.select(&service(), &candidates(agents));
        assert_eq!(chosen(&[("a", 2.0, 0), ("b", 0.5, 0), ("c", 1.0, 0)]), [1]);
        assert_eq!(chosen(&[("a", 2.0, 0), ("b", 0.5, 3), ("c", 1.0, 0)]), [2]);
    }

    #[test]
    fn n03_a_broken_status_is_chosen_last_and_breaks_nothing() {
        let chosen = |agents: &[_]| LeastLoaded.select(&service(), &candidates(agents));
        assert_eq!(chosen(&[("a", f64::NAN, 0), ("b", 1e300, 5)]), [1]);
        assert_eq!(chosen(&[("a", f64::INFINITY, 1), ("b", f64::NAN, 0)]), [1]);
    }

    #[test]
    fn n05_round_robin_gives_each_its_turn_while_agents_come_and_go() {
        let rr = RoundRobin::default();
        let all = candidates(&[("a", 0.0, 0), ("b", 0.0, 0), ("c", 0.0, 0)]);
        let turns: Vec<usize> = (0..4).flat_map(|_| rr.select(&service(), &all)).collect();
        assert_eq!(turns, [0, 1, 2, 0]);
        let without_a = &all[1..];
        assert_eq!(rr.select(&service(), without_a), [0], "after a comes b");
        assert_eq!(rr.select(&"/other/one".parse().unwrap(), &all), [0], "every service has turns of its own");
        let kept = RoundRobin::default().after(&service(), all[1].record.identity.clone());
        assert_eq!(kept.select(&service(), &all), [2], "a turn kept elsewhere goes on");
    }

    #[test]
    fn n05_random_reaches_everybody_and_all_takes_all() {
        let all = candidates(&[("a", 0.0, 0), ("b", 0.0, 0), ("c", 0.0, 0)]);
        let mut seen = std::collections::BTreeSet::new();
        while seen.len() < 3 {
            seen.extend(Random.select(&service(), &all));
        }
        assert_eq!(All.select(&service(), &all), [0, 1, 2]);
    }
}
