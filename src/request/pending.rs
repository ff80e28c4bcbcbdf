//! Requests under way: who still has to answer, and what has come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use tokio::sync::Notify;

use super::{Answers, Event};
use crate::packet::{Failure, FailureCode, Identity, Intermediate, MessageId, Outcome, Packet, Payload, Role, Token};
use crate::serializer::{Inbound, Verified};

/// How many intermediate results of one request wait for the caller; more are dropped, which the caller sees as a gap.
const PARTS: usize = 1024;
/// For how many agents it is counted how their work ended; those that ended some most recently stay.
const COUNTED: usize = 100_000;

/// What one mapper has had an agent do, since the mapper started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgentWorkload {
    /// Requests that it works on now.
    pub in_flight: usize,
    /// Requests that it answered with a value.
    pub answered: u64,
    /// Requests that ended with a failure: its own, or that it was lost or did not answer in time.
    pub failed: u64,
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct PendingRequest {
    pub token: Token,
    state: Mutex<State>,
    pub changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The agents that have to answer.
    waiting: BTreeMap<Identity, Target>,
    /// The message to the mappers that one of them has to answer, for all the agents that it asks.
    handed_over: Option<MessageId>,
    events: VecDeque<Event>,
    parts: usize,
}

/// An agent that has to answer.
#[derive(Clone, Debug)]
struct Target {
    instance: u64,
    message: MessageId,
    /// The number of the next part.
    next_part: u64,
}

/// All requests under way.
#[derive(Debug)]
pub(crate) struct PendingRequests {
    by_token: Mutex<HashMap<Token, Arc<PendingRequest>>>,
    /// How many requests each agent works on now.
    in_flight: Mutex<HashMap<Identity, usize>>,
    /// How the work of each agent ended: answered, failed.
    ended: Mutex<LruCache<Identity, (u64, u64)>>,
}

impl Default for PendingRequests {
    fn default() -> Self {
        // Grows with the agents that are asked: one with a capacity takes its memory at once.
        Self { by_token: Mutex::default(), in_flight: Mutex::default(), ended: Mutex::new(LruCache::unbounded()) }
    }
}

impl PendingRequests {
    /// Begins a request.
    pub fn begin(&self, token: Token) -> Arc<PendingRequest> {
        let job = Arc::new(PendingRequest { token, state: Mutex::default(), changed: Notify::new() });
        lock(&self.by_token).insert(token, job.clone());
        job
    }

    /// Ends a request: what still comes for it is dropped.
    pub fn end(&self, job: &PendingRequest) {
        lock(&self.by_token).remove(&job.token);
        let waiting = std::mem::take(&mut job.lock().waiting);
        waiting.keys().for_each(|identity| self.one_less(identity));
    }

    /// Has the request wait for one of the mappers, which asks agents in its place.
    pub fn hand_over(&self, job: &PendingRequest, message: MessageId) {
        job.lock().handed_over = Some(message);
    }

    /// Has the request wait for an agent's answer.
    pub fn expect(&self, job: &PendingRequest, identity: &Identity, instance: u64, message: MessageId) {
        job.lock().waiting.insert(identity.clone(), Target { instance, message, next_part: 0 });
        *lock(&self.in_flight).entry(identity.clone()).or_default() += 1;
    }

    /// Does not wait for this agent any more, without an outcome.
    pub fn forget(&self, job: &PendingRequest, identity: &Identity) {
        if job.lock().waiting.remove(identity).is_some() {
            self.one_less(identity);
        }
    }

    /// Takes an answer, or a part of one, in. False when it is none, or nobody waits for it.
    pub fn answered(&self, inbound: Inbound) -> bool {
        let (Some(from), signer) = (inbound.sender().cloned(), inbound.signer().cloned()) else { return false };
        match inbound.packet {
            Packet::Outcome(outcome) => self.outcome(outcome, &from, signer.as_ref()),
            Packet::Intermediate(part) => self.intermediate(part, &from, signer.as_ref()),
            _ => false,
        }
    }

    fn outcome(&self, outcome: Outcome, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(job) = self.find(outcome.token) else { return false };
        if job.take_over(from, signer) {
            job.finish(outcome.into_result());
            return true;
        }
        if !job.lock().waiting.get(from).is_some_and(|target| target.sent_by(signer)) {
            return false;
        }
        self.settle(&job, from, outcome.into_result());
        true
    }

    fn intermediate(&self, part: Intermediate, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(job) = self.find(part.token) else { return false };
        let mut state = job.lock();
        let handed_over = state.handed_over_to(from, signer);
        let State { waiting, events, parts, .. } = &mut *state;
        if handed_over {
            // The mapper has checked the order, and says which agent it is from.
            let Some(origin) = part.origin.filter(|_| *parts < PARTS) else { return false };
            *parts += 1;
            events.push_back(Event::Intermediate { from: origin, key: part.key, value: part.value, missed: 0 });
            drop(state);
            job.changed.notify_one();
            return true;
        }
        let Some(target) = waiting.get_mut(from).filter(|target| target.sent_by(signer)) else { return false };
        let number = part.sequence.unwrap_or(target.next_part);
        if number < target.next_part || *parts >= PARTS {
            return false;
        }
        let missed = number - target.next_part;
        target.next_part = number.saturating_add(1);
        *parts += 1;
        events.push_back(Event::Intermediate { from: from.clone(), key: part.key, value: part.value, missed });
        drop(state);
        job.changed.notify_one();
        true
    }

    /// Gives an agent's outcome to the request.
    pub fn settle(&self, job: &PendingRequest, identity: &Identity, result: Result<Payload, Failure>) {
        let mut state = job.lock();
        if state.waiting.remove(identity).is_some() {
            self.count(identity, result.is_ok());
            state.events.push_back(Event::Outcome { from: identity.clone(), result });
            drop(state);
            self.one_less(identity);
            job.changed.notify_one();
        }
    }

    /// Gives an outcome for an agent that was never waited for.
    pub fn refuse(&self, job: &PendingRequest, identity: &Identity, failure: Failure) {
        self.count(identity, false);
        job.lock().events.push_back(Event::Outcome { from: identity.clone(), result: Err(failure) });
        job.changed.notify_one();
    }

    /// Ends the waiting for an agent that is gone, in every request; `alive` is the instance that took its place.
    pub fn lost(&self, identity: &Identity, alive: Option<u64>) {
        let jobs: Vec<Arc<PendingRequest>> = lock(&self.by_token).values().cloned().collect();
        for job in jobs {
            let lost = job.lock().waiting.get(identity).is_some_and(|target| Some(target.instance) != alive);
            if lost {
                self.settle(
                    &job,
                    identity,
                    Err(Failure::new(FailureCode::Lost, "the agent went away before it answered")),
                );
            }
        }
    }

    /// How many requests each of these agents works on now.
    pub fn in_flight<'a>(&self, agents: impl Iterator<Item = &'a Identity>) -> Vec<usize> {
        let counts = lock(&self.in_flight);
        agents.map(|identity| counts.get(identity).copied().unwrap_or(0)).collect()
    }

    /// What each of these agents does, and how its work ended.
    pub fn work<'a>(&self, agents: impl Iterator<Item = &'a Identity>) -> Vec<AgentWorkload> {
        let (counts, ended) = (lock(&self.in_flight), lock(&self.ended));
        agents
            .map(|identity| {
                let in_flight = counts.get(identity).copied().unwrap_or(0);
                let (answered, failed) = ended.peek(identity).copied().unwrap_or_default();
                AgentWorkload { in_flight, answered, failed }
            })
            .collect()
    }

    fn count(&self, identity: &Identity, answered: bool) {
        let mut ended = lock(&self.ended);
        let (good, bad) = ended.get_or_insert_mut_ref(identity, Default::default);
        *if answered { good } else { bad } += 1;
        if ended.len() > COUNTED {
            ended.pop_lru();
        }
    }

    fn one_less(&self, identity: &Identity) {
        let mut counts = lock(&self.in_flight);
        if let Some(count) = counts.get_mut(identity) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(identity);
            }
        }
    }

    fn find(&self, token: Token) -> Option<Arc<PendingRequest>> {
        lock(&self.by_token).get(&token).cloned()
    }
}

impl PendingRequest {
    /// The next event that has come.
    pub fn take(&self) -> Option<Event> {
        let mut state = self.lock();
        let event = state.events.pop_front()?;
        if matches!(event, Event::Intermediate { .. }) {
            state.parts -= 1;
        }
        Some(event)
    }

    /// Whether somebody still has to answer.
    pub fn is_waiting(&self) -> bool {
        let state = self.lock();
        !state.waiting.is_empty() || state.handed_over.is_some()
    }

    /// The agents that still have to answer.
    pub fn waiting(&self) -> Vec<Identity> {
        self.lock().waiting.keys().cloned().collect()
    }

    /// Does not wait for a mapper any more; whether it did.
    pub fn abandon(&self) -> bool {
        self.lock().handed_over.take().is_some()
    }

    /// Takes the place of the mapper's answer, if this is it.
    fn take_over(&self, from: &Identity, signer: Option<&Verified>) -> bool {
        let mut state = self.lock();
        let answered = state.handed_over_to(from, signer);
        if answered {
            state.handed_over = None;
        }
        answered
    }

    /// Gives the request the answers that a mapper collected, or its failure as a whole.
    pub fn finish(&self, result: Result<Payload, Failure>) {
        let answers = result.and_then(|written| {
            let unreadable = |_| Failure::new(FailureCode::BadAnswer, "the mapper's answer cannot be read");
            written.parse::<Answers>().map_err(unreadable)
        });
        let mut state = self.lock();
        match answers {
            Ok(answers) => {
                let outcomes = answers.outcomes.into_iter().map(|(from, result)| Event::Outcome { from, result });
                state.events.extend(outcomes);
            }
            Err(failure) => state.events.push_back(Event::Failed(failure)),
        }
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Whether a message comes from a mapper and answers what was handed over.
    fn handed_over_to(&self, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(message) = self.handed_over else { return false };
        from.role() == Role::Mapper && signer.is_none_or(|signer| signer.in_reply_to() == Some(message))
    }
}

impl Target {
    /// Whether a message comes from the process that was asked, and answers what it was asked. A plain message cannot say.
    fn sent_by(&self, signer: Option<&Verified>) -> bool {
        signer.is_none_or(|signer| signer.instance() == self.instance && signer.in_reply_to() == Some(self.message))
    }
}

/// No code panics while it holds one of these locks; should it, what they guard is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
