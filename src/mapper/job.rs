//! Requests under way: who still has to answer, and what has come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::selector::InFlight;
use crate::packet::{Failure, FailureCode, Identity, Intermediate, MessageId, Outcome, Payload, Token};
use crate::serializer::Verified;

/// How many intermediate results of one request wait for the caller; more are dropped, which the caller sees as a gap.
const PARTS: usize = 1024;

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A part of an answer.
    Intermediate {
        /// Who said it.
        from: Identity,
        /// What it is about.
        key: String,
        /// The value.
        value: Payload,
        /// How many parts of this agent are missing before this one.
        missed: u64,
    },
    /// The answer of one agent, or why there is none. Exactly one comes for every target.
    Outcome {
        /// Who answered.
        from: Identity,
        /// The answer.
        result: Result<Payload, Failure>,
    },
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Job {
    pub token: Token,
    state: Mutex<State>,
    pub changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: BTreeMap<Identity, Target>,
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
#[derive(Debug, Default)]
pub(super) struct Jobs {
    by_token: Mutex<HashMap<Token, Arc<Job>>>,
    pub in_flight: InFlight,
}

impl Jobs {
    /// Begins a request.
    pub fn begin(&self, token: Token) -> Arc<Job> {
        let job = Arc::new(Job { token, state: Mutex::default(), changed: Notify::new() });
        lock(&self.by_token).insert(token, job.clone());
        job
    }

    /// Ends a request: what still comes for it is dropped.
    pub fn end(&self, job: &Job) {
        lock(&self.by_token).remove(&job.token);
        for identity in std::mem::take(&mut job.lock().waiting).into_keys() {
            self.in_flight.remove(&identity);
        }
    }

    /// Has the request wait for an agent's answer.
    pub fn expect(&self, job: &Job, identity: &Identity, instance: u64, message: MessageId) {
        job.lock().waiting.insert(identity.clone(), Target { instance, message, next_part: 0 });
        self.in_flight.add(identity);
    }

    /// Does not wait for this agent any more, without an outcome.
    pub fn forget(&self, job: &Job, identity: &Identity) {
        if job.lock().waiting.remove(identity).is_some() {
            self.in_flight.remove(identity);
        }
    }

    /// Takes an answer in. False when nobody waits for it.
    pub fn outcome(&self, outcome: Outcome, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(job) = self.find(outcome.token) else { return false };
        if !job.lock().waiting.get(from).is_some_and(|target| target.sent_by(signer)) {
            return false;
        }
        self.settle(&job, from, outcome.into_result());
        true
    }

    /// Takes a part of an answer in. False when nobody waits for it.
    pub fn intermediate(&self, part: Intermediate, from: &Identity, signer: Option<&Verified>) -> bool {
        let Some(job) = self.find(part.token) else { return false };
        let mut state = job.lock();
        let State { waiting, events, parts } = &mut *state;
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
    pub fn settle(&self, job: &Job, identity: &Identity, result: Result<Payload, Failure>) {
        let mut state = job.lock();
        if state.waiting.remove(identity).is_some() {
            state.events.push_back(Event::Outcome { from: identity.clone(), result });
            drop(state);
            self.in_flight.remove(identity);
            job.changed.notify_one();
        }
    }

    /// Gives an outcome for an agent that was never waited for.
    pub fn refuse(&self, job: &Job, identity: &Identity, failure: Failure) {
        job.lock().events.push_back(Event::Outcome { from: identity.clone(), result: Err(failure) });
        job.changed.notify_one();
    }

    /// Ends the waiting for an agent that is gone, in every request; `alive` is the instance that took its place.
    pub fn lost(&self, identity: &Identity, alive: Option<u64>) {
        let jobs: Vec<Arc<Job>> = lock(&self.by_token).values().cloned().collect();
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

    fn find(&self, token: Token) -> Option<Arc<Job>> {
        lock(&self.by_token).get(&token).cloned()
    }
}

impl Job {
    /// The next event that has come.
    pub fn take(&self) -> Option<Event> {
        let mut state = self.lock();
        let event = state.events.pop_front()?;
        if matches!(event, Event::Intermediate { .. }) {
            state.parts -= 1;
        }
        Some(event)
    }

    /// Who still has to answer.
    pub fn waiting(&self) -> Vec<Identity> {
        self.lock().waiting.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
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
