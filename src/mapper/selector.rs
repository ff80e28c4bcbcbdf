//! Selectors: they decide which of the agents that fit a request get it.

use std::fmt;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::state::AgentRecord;
use crate::limits::nonzero;
use crate::packet::{Identity, SelectorName, Service};

/// The most services that [`RoundRobin`] keeps a position for.
const MAX_ROUND_ROBIN_SERVICES: usize = 4096;

/// An agent that fits a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Candidate {
    /// What the mapper knows about the agent.
    pub record: Arc<AgentRecord>,
    /// How many requests of this mapper the agent is working on.
    pub in_flight: usize,
}

impl Candidate {
    /// A candidate, to test a selector of your own.
    pub fn new(record: impl Into<Arc<AgentRecord>>, in_flight: usize) -> Self {
        Self { record: record.into(), in_flight }
    }
}

/// Selects agents for a request. Implement it for a rule of your own, and pass it to
/// [`custom_selector`](crate::request::RequestBuilder::custom_selector).
///
/// It is called for every request and must not block. It returns positions in `candidates`; repeated positions and positions out of
/// range are ignored. If it returns none, the request fails because no agent was found.
///
/// ```
/// use nanite::mapper::{Candidate, Selector};
/// use nanite::packet::Service;
///
/// /// The agent that has been seen most recently.
/// #[derive(Debug)]
/// struct MostRecent;
///
/// impl Selector for MostRecent {
///     fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
///         let last_seen = |position: &usize| candidates.get(*position).map(|it| it.record.last_seen);
///         (0..candidates.len()).max_by_key(last_seen).into_iter().collect()
///     }
/// }
/// ```
pub trait Selector: fmt::Debug + Send + Sync {
    /// Selects from `candidates`, which are sorted by identity and never empty.
    fn select(&self, service: &Service, candidates: &[Candidate]) -> Vec<usize>;
}

impl<S: Selector + ?Sized> Selector for Arc<S> {
    fn select(&self, service: &Service, candidates: &[Candidate]) -> Vec<usize> {
        (**self).select(service, candidates)
    }
}

/// Selects the agent with the lowest load. The default.
///
/// The load is the agent's status plus the number of requests that it is working on for this mapper, so that an outdated status does
/// not send everything to one agent. Agents without a status come last. Among equal agents, one is selected at random.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Selector for LeastLoaded {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        let load = |candidate: &Candidate| match candidate.record.status.load() {
            Some(load) => load + candidate.in_flight as f64,
            None => f64::MAX,
        };
        // The second value orders agents without a status.
        let rank = |candidate: &Candidate| (load(candidate), candidate.in_flight);
        let Some(lowest) = candidates.iter().map(rank).min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))) else {
            return Vec::new();
        };
        let equal = candidates.iter().enumerate().filter(|(_, candidate)| rank(candidate) == lowest);
        let equal: Vec<usize> = equal.map(|(position, _)| position).collect();
        random_index(equal.len()).and_then(|index| equal.get(index).copied()).into_iter().collect()
    }
}

/// Selects an agent at random.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Selector for Random {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        random_index(candidates.len()).into_iter().collect()
    }
}

/// Selects agents in turn, ordered by identity, for each service separately.
///
/// ```
/// use nanite::clock::Timestamp;
/// use nanite::mapper::{AgentRecord, Candidate, RoundRobin, Selector};
/// use nanite::packet::{Identity, Register, Service};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let service: Service = "/text/upper".parse()?;
/// let candidate = |name| {
///     let register = Register::new(Identity::agent(name)?, [service.clone()]);
///     let record = AgentRecord::new(register, 0, Timestamp::from_secs(0), None);
///     Ok::<_, Box<dyn std::error::Error>>(Candidate::new(record, 0))
/// };
/// let agents = [candidate("anna")?, candidate("bob")?];
///
/// let selector = RoundRobin::default();
/// assert_eq!(selector.select(&service, &agents), [0]);
/// assert_eq!(selector.select(&service, &agents), [1]);
/// assert_eq!(selector.select(&service, &agents), [0]);
///
/// // Continue a sequence that was saved elsewhere.
/// let selector = RoundRobin::default().after(&service, Identity::agent("anna")?);
/// assert_eq!(selector.select(&service, &agents), [1]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RoundRobin(Mutex<LruCache<Service, Identity>>);

impl Default for RoundRobin {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(nonzero(MAX_ROUND_ROBIN_SERVICES))))
    }
}

impl RoundRobin {
    /// Continues after `last`, the agent that was last selected for the service.
    #[must_use]
    pub fn after(self, service: &Service, last: Identity) -> Self {
        self.0.lock().put(service.resolved(), last);
        self
    }
}

impl Selector for RoundRobin {
    fn select(&self, service: &Service, candidates: &[Candidate]) -> Vec<usize> {
        let mut last_selected = self.0.lock();
        // By identity rather than position: agents that come and go do not disturb the order.
        let last = last_selected.get(service);
        let next = candidates.iter().position(|c| last.is_none_or(|last| c.record.identity > *last)).unwrap_or(0);
        let Some(selected) = candidates.get(next) else { return Vec::new() };
        last_selected.put(service.clone(), selected.record.identity.clone());
        vec![next]
    }
}

/// Selects all agents.
#[derive(Clone, Copy, Debug, Default)]
pub struct All;

impl Selector for All {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        (0..candidates.len()).collect()
    }
}

/// The selectors that a request can name.
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

/// A random number below `len`; `None` if `len` is 0.
fn random_index(len: usize) -> Option<usize> {
    let mut bytes = [0; 8];
    // If there is no randomness, the first one is fine.
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
            let record = AgentRecord::new(register, 0, Timestamp::from_secs(0), None);
            Candidate::new(Arc::new(record), *in_flight)
        };
        agents.iter().map(make).collect()
    }

    fn service() -> Service {
        "/a/b".parse().unwrap()
    }

    #[test]
    fn n05_least_loaded_adds_requests_in_flight() {
        let chosen = |agents: &[_]| LeastLoaded.select(&service(), &candidates(agents));
        assert_eq!(chosen(&[("a", 2.0, 0), ("b", 0.5, 0), ("c", 1.0, 0)]), [1]);
        assert_eq!(chosen(&[("a", 2.0, 0), ("b", 0.5, 3), ("c", 1.0, 0)]), [2]);
    }

    #[test]
    fn n05_least_loaded_spreads_ties_over_all_equal_agents() {
        let equal = candidates(&[("a", 2.0, 0), ("b", 0.5, 1), ("c", 1.6, 0), ("d", 0.5, 1), ("e", 0.5, 1)]);
        let without_status = candidates(&[("a", f64::NAN, 2), ("b", f64::NAN, 1), ("c", f64::NAN, 1)]);
        for (agents, chosen) in [(equal, vec![1, 3, 4]), (without_status, vec![1, 2])] {
            let mut times = std::collections::BTreeMap::new();
            for _ in 0..2000 {
                for position in LeastLoaded.select(&service(), &agents) {
                    *times.entry(position).or_insert(0) += 1;
                }
            }
            assert_eq!(times.keys().copied().collect::<Vec<_>>(), chosen);
            assert!(times.values().all(|times| *times > 2000 / chosen.len() / 2), "{times:?}");
        }
    }

    #[test]
    fn n03_invalid_status_is_selected_last() {
        let chosen = |agents: &[_]| LeastLoaded.select(&service(), &candidates(agents));
        assert_eq!(chosen(&[("a", f64::NAN, 0), ("b", 1e300, 5)]), [1]);
        assert_eq!(chosen(&[("a", f64::INFINITY, 1), ("b", f64::NAN, 0)]), [1]);
    }

    #[test]
    fn n05_round_robin_order_survives_agents_that_come_and_go() {
        let rr = RoundRobin::default();
        let all = candidates(&[("a", 0.0, 0), ("b", 0.0, 0), ("c", 0.0, 0)]);
        let turns: Vec<usize> = (0..4).flat_map(|_| rr.select(&service(), &all)).collect();
        assert_eq!(turns, [0, 1, 2, 0]);
        let without_a = &all[1..];
        assert_eq!(rr.select(&service(), without_a), [0], "b follows a");
        assert_eq!(rr.select(&"/other/one".parse().unwrap(), &all), [0], "each service has its own order");
        let saved = RoundRobin::default().after(&service(), all[1].record.identity.clone());
        assert_eq!(saved.select(&service(), &all), [2], "a saved order continues");
    }

    #[test]
    fn n05_random_reaches_every_agent_and_all_selects_all() {
        let all = candidates(&[("a", 0.0, 0), ("b", 0.0, 0), ("c", 0.0, 0)]);
        let seen: std::collections::BTreeSet<usize> = (0..1000).flat_map(|_| Random.select(&service(), &all)).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(All.select(&service(), &all), [0, 1, 2]);
    }
}
