//! Pending requests: which targets have not answered yet, and which events have arrived.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::answers::{Answers, Event};
use crate::packet::{Failure, FailureCode, Identity, Intermediate, MessageId, Outcome, Packet, Payload, Role, Token};
use crate::serializer::{Inbound, Verified};

/// How many intermediate results of one request wait for the caller. More are dropped; the caller sees a gap.
const MAX_WAITING_PARTS: usize = 1024;
/// For how many agents outcomes are counted; the least recently active are forgotten.
const MAX_COUNTED_AGENTS: usize = 100_000;

/// The requests that one mapper has given to an agent since the mapper started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgentWorkload {
    /// Requests in flight.
    pub in_flight: usize,
    /// Requests answered with a result.
    pub answered: u64,
    /// Requests that failed, were lost or timed out.
    pub failed: u64,
}

/// A pending request.
#[derive(Debug)]
pub(crate) struct PendingRequest {
    pub token: Token,
    /// Counts the requests of this process.
    number: u64,
    state: Mutex<State>,
    pub changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// The targets without an outcome.
    waiting: BTreeMap<Identity, Target>,
    /// For a proxied request: the message to the mappers. One of them answers it for all targets.
    handed_over: Option<MessageId>,
    events: VecDeque<Event>,
    parts: usize,
}

/// A target without an outcome.
#[derive(Clone, Debug)]
struct Target {
    instance: u64,
    message: MessageId,
    /// The sequence number of the next intermediate result.
    next_part: u64,
}

/// All pending requests.
#[derive(Debug)]
pub(crate) struct PendingRequests {
    by_token: Mutex<HashMap<Token, Arc<PendingRequest>>>,
    begun: AtomicU64,
    /// How many requests are in flight to each agent.
    in_flight: Mutex<HashMap<Identity, usize>>,
    /// How many requests of each agent were answered, and how many failed.
    ended: Mutex<LruCache<Identity, (u64, u64)>>,
}

impl Default for PendingRequests {
    fn default() -> Self {
        // Unbounded here and bounded in `count`: a cache with a capacity allocates it all at once.
        Self {
            by_token: Mutex::default(),
            begun: AtomicU64::new(0),
            in_flight: Mutex::default(),
            ended: Mutex::new(LruCache::unbounded()),
        }
    }
}

impl PendingRequests {
    /// Begins a request.
    pub fn begin(&self, token: Token) -> Arc<PendingRequest> {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let request = Arc::new(PendingRequest { token, number, state: Mutex::default(), changed: Notify::new() });
        self.by_token.lock().insert(token, request.clone());
        request
    }

    /// Ends a request: later events are dropped.
    pub fn end(&self, request: &PendingRequest) {
        self.by_token.lock().remove(&request.token);
        let waiting = std::mem::take(&mut request.lock().waiting);
        waiting.keys().for_each(|identity| self.decrement_in_flight(identity));
    }

    /// Makes the request wait for a mapper that dispatches it.
    pub fn hand_over(&self, request: &PendingRequest, message: MessageId) {
        request.lock().handed_over = Some(message);
    }

    /// Makes the request wait for an agent's outcome.
    pub fn expect(&self, request: &PendingRequest, identity: &Identity, instance: u64, message: MessageId) {
        request.lock().waiting.insert(identity.clone(), Target { instance, message, next_part: 0 });
        *self.in_flight.lock().entry(identity.clone()).or_default() += 1;
    }

    /// Removes a target without an outcome.
    pub fn forget(&self, request: &PendingRequest, identity: &Identity) {
        if request.lock().waiting.remove(identity).is_some() {
            self.decrement_in_flight(identity);
        }
    }

    /// Accepts an outcome or an intermediate result. False for another packet, or when no request waits for it.
    pub fn answered(&self, inbound: Inbound) -> bool {
        let (Some(from), signer) = (inbound.sender().cloned(), inbound.signer().cloned()) else { return false };
        match inbound.packet {
            Packet::Outcome(outcome) => self.outcome(outcome, &from, signer.as_ref()),
            Packet::Intermediate(part) => self.intermediate(part, &from, signer.as_ref()),
            _ => false,
        }
    }

    fn outcome(&self, outcome: Outcome, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(request) = self.find(outcome.token) else { return false };
        if request.take_over(from, signer) {
            request.finish(outcome.into_result());
            return true;
        }
        if !request.lock().waiting.get(from).is_some_and(|target| target.sent_by(signer)) {
            return false;
        }
        self.settle(&request, from, outcome.into_result());
        true
    }

    fn intermediate(&self, part: Intermediate, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(request) = self.find(part.token) else { return false };
        let mut state = request.lock();
        let handed_over = state.handed_over_to(from, signer);
        let State { waiting, events, parts, .. } = &mut *state;
        if handed_over {
            // The mapper has checked the order, and names the agent.
            let Some(origin) = part.origin.filter(|_| *parts < MAX_WAITING_PARTS) else { return false };
            *parts += 1;
            events.push_back(Event::Intermediate { from: origin, key: part.key, value: part.value, missed: 0 });
            drop(state);
            request.changed.notify_one();
            return true;
        }
        let Some(target) = waiting.get_mut(from).filter(|target| target.sent_by(signer)) else { return false };
        let number = part.sequence.unwrap_or(target.next_part);
        if number < target.next_part || *parts >= MAX_WAITING_PARTS {
            return false;
        }
        let missed = number - target.next_part;
        target.next_part = number.saturating_add(1);
        *parts += 1;
        events.push_back(Event::Intermediate { from: from.clone(), key: part.key, value: part.value, missed });
        drop(state);
        request.changed.notify_one();
        true
    }

    /// Records the outcome of a target.
    pub fn settle(&self, request: &PendingRequest, identity: &Identity, result: Result<Payload, Failure>) {
        let mut state = request.lock();
        if state.waiting.remove(identity).is_some() {
            self.count(identity, result.is_ok());
            state.events.push_back(Event::Outcome { from: identity.clone(), result });
            drop(state);
            self.decrement_in_flight(identity);
            request.changed.notify_one();
        }
    }

    /// Records a failure of a target that the request never waited for.
    pub fn refuse(&self, request: &PendingRequest, identity: &Identity, failure: Failure) {
        self.count(identity, false);
        request.lock().events.push_back(Event::Outcome { from: identity.clone(), result: Err(failure) });
        request.changed.notify_one();
    }

    /// Records an agent as lost in every request; `alive` is the instance that replaced it.
    pub fn lost(&self, identity: &Identity, alive: Option<u64>) {
        let mut requests: Vec<Arc<PendingRequest>> = self.by_token.lock().values().cloned().collect();
        requests.sort_unstable_by_key(|request| request.number);
        for request in requests {
            let lost = request.lock().waiting.get(identity).is_some_and(|target| Some(target.instance) != alive);
            if lost {
                self.settle(
                    &request,
                    identity,
                    Err(Failure::new(FailureCode::Lost, "the agent went away before it answered")),
                );
            }
        }
    }

    /// How many requests are in flight to each of these agents.
    pub fn in_flight<'a>(&self, agents: impl Iterator<Item = &'a Identity>) -> Vec<usize> {
        let counts = self.in_flight.lock();
        agents.map(|identity| counts.get(identity).copied().unwrap_or(0)).collect()
    }

    /// The workload of each of these agents.
    pub fn work<'a>(&self, agents: impl Iterator<Item = &'a Identity>) -> Vec<AgentWorkload> {
        let (counts, ended) = (self.in_flight.lock(), self.ended.lock());
        agents
            .map(|identity| {
                let in_flight = counts.get(identity).copied().unwrap_or(0);
                let (answered, failed) = ended.peek(identity).copied().unwrap_or_default();
                AgentWorkload { in_flight, answered, failed }
            })
            .collect()
    }

    fn count(&self, identity: &Identity, answered: bool) {
        let mut ended = self.ended.lock();
        let (good, bad) = ended.get_or_insert_mut_ref(identity, Default::default);
        *if answered { good } else { bad } += 1;
        if ended.len() > MAX_COUNTED_AGENTS {
            ended.pop_lru();
        }
    }

    fn decrement_in_flight(&self, identity: &Identity) {
        let mut counts = self.in_flight.lock();
        if let Some(count) = counts.get_mut(identity) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(identity);
            }
        }
    }

    fn find(&self, token: Token) -> Option<Arc<PendingRequest>> {
        self.by_token.lock().get(&token).cloned()
    }
}

impl PendingRequest {
    /// The next event that has arrived.
    pub fn take(&self) -> Option<Event> {
        let mut state = self.lock();
        let event = state.events.pop_front()?;
        if matches!(event, Event::Intermediate { .. }) {
            state.parts -= 1;
        }
        Some(event)
    }

    /// Whether an outcome is missing.
    pub fn is_waiting(&self) -> bool {
        let state = self.lock();
        !state.waiting.is_empty() || state.handed_over.is_some()
    }

    /// The targets without an outcome.
    pub fn waiting(&self) -> Vec<Identity> {
        self.lock().waiting.keys().cloned().collect()
    }

    /// Stops waiting for a mapper. False when it did not wait for one.
    pub fn abandon(&self) -> bool {
        self.lock().handed_over.take().is_some()
    }

    /// Stops waiting for a mapper if this is its answer.
    fn take_over(&self, from: &Identity, signer: Option<&Verified>) -> bool {
        let mut state = self.lock();
        let answered = state.handed_over_to(from, signer);
        if answered {
            state.handed_over = None;
        }
        answered
    }

    /// Records the outcomes that a mapper collected, or the failure of the whole request.
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
        self.state.lock()
    }
}

impl State {
    /// Whether a message is the answer of a mapper to the proxied request.
    fn handed_over_to(&self, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(message) = self.handed_over else { return false };
        from.role() == Role::Mapper && signer.is_none_or(|signer| signer.in_reply_to() == Some(message))
    }
}

impl Target {
    /// Whether a message is from the process that was asked and answers this request. Plain messages do not say.
    fn sent_by(&self, signer: Option<&Verified>) -> bool {
        signer.is_none_or(|signer| signer.instance() == self.instance && signer.in_reply_to() == Some(self.message))
    }
}
