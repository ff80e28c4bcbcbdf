//! Pending requests: which targets have not answered yet, and which events have arrived.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::answers::{Answers, Event};
use super::forwarded::{ForwardedAnswers, HandedOver};
use crate::link::Link;
use crate::packet::{Failure, FailureCode, Identity, Intermediate, MessageId, Outcome, Packet, Payload, Token};
use crate::serializer::{Inbound, OpenError, Proof, Provenance, Verified};

/// How many intermediate results of one request wait for the caller. More are dropped; the caller sees a gap.
const MAX_WAITING_PARTS: usize = 1024;
/// How many bytes of events of one request wait for the caller before further intermediate results are dropped.
const MAX_WAITING_PART_BYTES: usize = 64 * 1024 * 1024;
/// How many before further results are replaced by failures.
const MAX_WAITING_BYTES: usize = 256 * 1024 * 1024;
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
    /// For a proxied request: one of the mappers answers it for all targets.
    handed_over: Option<HandedOver>,
    /// With the memory that each takes.
    events: VecDeque<(Event, usize)>,
    parts: usize,
    /// The memory of all events.
    bytes: usize,
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
    pub fn hand_over(&self, request: &PendingRequest, to: HandedOver) {
        request.lock().handed_over = Some(to);
    }

    /// The message to the mappers was sent again as `new`. False if the request no longer waits for an answer to `old`.
    pub fn hand_over_again(&self, token: Token, old: MessageId, new: MessageId) -> bool {
        let Some(request) = self.find(token) else { return false };
        let mut state = request.lock();
        state.handed_over.as_mut().is_some_and(|to| to.sent_again(old, new))
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

    /// Accepts an outcome or an intermediate result. False for another packet, or when no request waits for it. What it refuses is
    /// counted, logged and recorded by `link`.
    pub async fn answered(&self, link: &Link, inbound: Inbound) -> bool {
        let Some(from) = inbound.sender().cloned() else { return false };
        let (mut signer, mut forwarded) = (None, Vec::new());
        if let Provenance::Verified(mut verified) = inbound.provenance {
            forwarded = std::mem::take(&mut verified.forwarded);
            signer = Some(*verified);
        }
        let mut refused = Vec::new();
        let accepted = match inbound.packet {
            Packet::Outcome(outcome) => self.outcome(outcome, &from, signer.as_ref(), forwarded, &mut refused),
            Packet::Intermediate(part) => self.intermediate(part, &from, signer.as_ref(), forwarded, &mut refused),
            _ => false,
        };
        link.record_refused_answers(&refused).await;
        accepted
    }

    fn outcome(
        &self,
        outcome: Outcome,
        from: &Identity,
        signer: Option<&Verified>,
        forwarded: ForwardedAnswers,
        refused: &mut Vec<OpenError>,
    ) -> bool {
        let Some(request) = self.find(outcome.token) else { return false };
        if let Some(handed_over) = request.take_over(from, signer) {
            request.finish(match signer {
                Some(_) => handed_over.outcomes(from, outcome, forwarded, refused),
                None => unproven(outcome.into_result()),
            });
            return true;
        }
        if !request.lock().waiting.get(from).is_some_and(|target| target.sent_by(signer)) {
            return false;
        }
        let proof = signer.and_then(Verified::proof).cloned();
        self.settle_with(&request, from, outcome.into_result(), proof);
        true
    }

    fn intermediate(
        &self,
        part: Intermediate,
        from: &Identity,
        signer: Option<&Verified>,
        forwarded: ForwardedAnswers,
        refused: &mut Vec<OpenError>,
    ) -> bool {
        let Some(request) = self.find(part.token) else { return false };
        let mut state = request.lock();
        if state.parts >= MAX_WAITING_PARTS || state.bytes >= MAX_WAITING_PART_BYTES {
            return false;
        }
        let State { waiting, handed_over, .. } = &mut *state;
        let event = match handed_over.as_mut().filter(|handed_over| handed_over.is_answered_by(from, signer)) {
            Some(handed_over) if signer.is_some() => match handed_over.intermediate(from, forwarded) {
                Ok(event) => event,
                Err(error) => {
                    refused.push(error);
                    None
                }
            },
            // The mapper has checked the order, and names the agent.
            Some(_) => part.origin.map(|from| Event::Intermediate {
                from,
                key: part.key,
                value: part.value,
                missed: 0,
                proof: None,
            }),
            None => {
                let Some(target) = waiting.get_mut(from).filter(|target| target.sent_by(signer)) else { return false };
                let number = part.sequence.unwrap_or(target.next_part);
                let Some(missed) = number.checked_sub(target.next_part) else { return false };
                target.next_part = number.saturating_add(1);
                let proof = signer.and_then(Verified::proof).cloned();
                Some(Event::Intermediate { from: from.clone(), key: part.key, value: part.value, missed, proof })
            }
        };
        let Some(event) = event else { return false };
        state.parts += 1;
        state.push(event);
        drop(state);
        request.changed.notify_one();
        true
    }

    /// Records a result of a target that this node found out itself.
    pub fn settle(&self, request: &PendingRequest, identity: &Identity, result: Result<Payload, Failure>) {
        self.settle_with(request, identity, result, None);
    }

    /// Records the outcome of a target.
    fn settle_with(
        &self,
        request: &PendingRequest,
        identity: &Identity,
        result: Result<Payload, Failure>,
        proof: Option<Arc<Proof>>,
    ) {
        let mut state = request.lock();
        if state.waiting.remove(identity).is_some() {
            self.count(identity, result.is_ok());
            let (result, proof) = match result {
                Ok(_) if state.bytes >= MAX_WAITING_BYTES => (Err(too_many_answers()), None),
                result => (result, proof),
            };
            state.push(Event::Outcome { from: identity.clone(), result, proof });
            drop(state);
            self.decrement_in_flight(identity);
            request.changed.notify_one();
        }
    }

    /// Records a failure of a target that the request never waited for.
    pub fn refuse(&self, request: &PendingRequest, identity: &Identity, failure: Failure) {
        self.count(identity, false);
        let event = Event::Outcome { from: identity.clone(), result: Err(failure), proof: None };
        request.lock().push(event);
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
        let (event, bytes) = state.events.pop_front()?;
        state.bytes -= bytes;
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
    fn take_over(&self, from: &Identity, signer: Option<&Verified>) -> Option<HandedOver> {
        self.lock().handed_over.take_if(|handed_over| handed_over.is_answered_by(from, signer))
    }

    /// Records the outcomes that a mapper collected, or the failure of the whole request.
    pub fn finish(&self, result: Result<Vec<Event>, Failure>) {
        let events = result.unwrap_or_else(|failure| vec![Event::Failed(failure)]);
        let mut state = self.lock();
        events.into_iter().for_each(|event| state.push(event));
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn push(&mut self, event: Event) {
        let bytes = memory(&event);
        self.bytes = self.bytes.saturating_add(bytes);
        self.events.push_back((event, bytes));
    }
}

/// About how much memory an event takes.
fn memory(event: &Event) -> usize {
    let proof = |proof: &Option<Arc<Proof>>| proof.as_ref().map_or(0, |proof| proof.body.len());
    match event {
        Event::Intermediate { key, value, proof: proven, .. } => key.len() + value.memory() + proof(proven),
        Event::Outcome { result, proof: proven, .. } => result.as_ref().map_or(0, Payload::memory) + proof(proven),
        Event::Failed(_) => 0,
    }
}

fn too_many_answers() -> Failure {
    Failure::new(FailureCode::Overloaded, "too many bytes of answers wait for the caller")
}

/// The outcomes in a mapper's answer in a format without signatures: nothing is verified.
fn unproven(answer: Result<Payload, Failure>) -> Result<Vec<Event>, Failure> {
    let unreadable = |_| Failure::new(FailureCode::BadAnswer, "the mapper's answer cannot be read");
    let outcomes = answer?.parse::<Answers>().map_err(unreadable)?.outcomes;
    Ok(outcomes.into_iter().map(|(from, result)| Event::Outcome { from, result, proof: None }).collect())
}

impl Target {
    /// Whether a message is from the process that was asked and answers this request. Plain messages do not say.
    fn sent_by(&self, signer: Option<&Verified>) -> bool {
        signer.is_none_or(|signer| signer.instance() == self.instance && signer.in_reply_to() == Some(self.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: usize = 8 * 1024 * 1024;

    fn token() -> Token {
        Token::random().unwrap()
    }

    fn large() -> Payload {
        Payload::from(serde_json::Value::String("x".repeat(PART)))
    }

    /// The events of a request that are waiting, and their memory.
    fn taken(request: &PendingRequest) -> (usize, usize) {
        let events: Vec<Event> = std::iter::from_fn(|| request.take()).collect();
        (events.len(), events.iter().map(memory).sum())
    }

    #[test]
    fn s18_intermediate_results_that_wait_are_bounded_in_bytes() {
        let (pending, request_token) = (PendingRequests::default(), token());
        let request = pending.begin(request_token);
        let (fred, caller) = (Identity::agent("fred").unwrap(), Identity::mapper("m1").unwrap());
        pending.expect(&request, &fred, 1, MessageId::random().unwrap());
        let send = |number: u64| {
            let mut part = Intermediate::new(request_token, caller.clone(), fred.clone(), "key", large());
            part.sequence = Some(number);
            pending.intermediate(part, &fred, None, Vec::new(), &mut Vec::new())
        };
        let accepted = (0..100).filter(|number| send(*number)).count();
        let (count, bytes) = taken(&request);
        assert_eq!(count, accepted);
        assert!((MAX_WAITING_PART_BYTES..=MAX_WAITING_PART_BYTES + 2 * PART).contains(&bytes), "{bytes}");
        // What was taken makes room, and the gap is reported.
        assert!(send(100));
        let missed = match request.take() {
            Some(Event::Intermediate { missed, .. }) => missed,
            other => panic!("{other:?}"),
        };
        assert_eq!(missed, 100 - accepted as u64);
        assert_eq!(request.lock().bytes, 0);
    }

    #[test]
    fn s18_results_that_wait_are_bounded_in_bytes_and_every_target_has_an_outcome() {
        let pending = PendingRequests::default();
        let request = pending.begin(token());
        let agents: Vec<Identity> = (0..50).map(|n| Identity::agent(&format!("a{n}")).unwrap()).collect();
        for agent in &agents {
            pending.expect(&request, agent, 1, MessageId::random().unwrap());
            pending.settle(&request, agent, Ok(large()));
        }
        assert!(!request.is_waiting());
        assert!(request.lock().bytes <= MAX_WAITING_BYTES + 2 * PART);
        let events: Vec<Event> = std::iter::from_fn(|| request.take()).collect();
        assert_eq!(events.len(), agents.len());
        let failed = |event: &Event| matches!(event, Event::Outcome { result: Err(failure), .. } if failure.code == FailureCode::Overloaded);
        assert_eq!(events.iter().filter(|event| failed(event)).count(), agents.len() - MAX_WAITING_BYTES / PART);
    }
}
