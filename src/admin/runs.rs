//! Requests that were sent from the pages: those under way and the last ones, with what came of them. All of it is bounded.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use super::router::stopped;
use super::text::{Value, visible};
use crate::clock::Timestamp;
use crate::mapper::Mapper;
use crate::packet::{Identity, Payload, RandomnessError, SelectorName, Service, Tag, Token};
use crate::request::Event;

/// How many requests are under way at a time.
const RUNNING: usize = 16;
/// How many are kept.
const KEPT: usize = 32;
/// How much of one request's answers is kept; parts fill at most the half of it, so that they leave room for outcomes.
const ENTRIES: usize = 2000;
const BYTES: usize = 2 << 20;

/// What is asked, of whom.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub service: Service,
    pub payload: Payload,
    pub selector: SelectorName,
    pub target: Option<Identity>,
    pub tags: Vec<Tag>,
    pub timeout: Duration,
}

/// The requests.
#[derive(Debug)]
pub(super) struct Runs {
    kept: Mutex<VecDeque<Arc<Run>>>,
    slots: Arc<Semaphore>,
}

/// One request.
#[derive(Debug)]
pub(super) struct Run {
    pub id: Token,
    pub asked: Asked,
    pub at: Timestamp,
    state: Mutex<State>,
    /// Counts the changes.
    changes: watch::Sender<u64>,
    stop: Notify,
}

#[derive(Clone, Debug)]
struct State {
    entries: Vec<Arc<Entry>>,
    bytes: usize,
    tally: Tally,
}

/// How far a request is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tally {
    pub phase: Phase,
    pub answered: u64,
    pub failed: u64,
    pub parts: u64,
    /// How much of what came is not kept.
    pub left_out: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Running,
    /// Every target has its outcome.
    Ended,
    /// It failed as a whole.
    Failed(String),
    /// Somebody stopped waiting for it.
    Stopped,
}

/// Something that came.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// How long after the request.
    pub after: Duration,
    pub from: Identity,
    pub what: What,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A part of an answer: its key, and how many are missing before it.
    Part(String, u64),
    Answer,
    /// A failure, with its code.
    Failure(String),
}

/// Why a request is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotSent {
    /// Too many are under way.
    Busy,
    /// There are no random bytes.
    Random,
}

impl From<RandomnessError> for NotSent {
    fn from(_: RandomnessError) -> Self {
        NotSent::Random
    }
}

impl Default for Runs {
    fn default() -> Self {
        Self { kept: Mutex::default(), slots: Arc::new(Semaphore::new(RUNNING)) }
    }
}

impl Runs {
    /// Sends a request, and follows it until `stopping` says that all stops.
    pub fn start(
        &self,
        asked: Asked,
        mapper: Mapper,
        now: Timestamp,
        stopping: watch::Receiver<bool>,
    ) -> Result<Arc<Run>, NotSent> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| NotSent::Busy)?;
        let tally = Tally { phase: Phase::Running, answered: 0, failed: 0, parts: 0, left_out: 0 };
        let run = Arc::new(Run {
            id: Token::random()?,
            asked,
            at: now,
            state: Mutex::new(State { entries: Vec::new(), bytes: 0, tally }),
            changes: watch::Sender::new(0),
            stop: Notify::new(),
        });
        let mut kept = self.lock();
        if kept.len() >= KEPT {
            // Those under way are fewer than are kept, so there is one that has ended.
            let ended = kept.iter().position(|run| run.tally().phase != Phase::Running);
            kept.remove(ended.unwrap_or(0));
        }
        kept.push_back(run.clone());
        tokio::spawn(follow(run.clone(), mapper, stopping, slot));
        Ok(run)
    }

    /// The request of this id.
    pub fn find(&self, id: &str) -> Option<Arc<Run>> {
        let id: Token = id.parse().ok()?;
        self.lock().iter().find(|run| run.id == id).cloned()
    }

    /// All that are kept, newest first.
    pub fn all(&self) -> Vec<Arc<Run>> {
        self.lock().iter().rev().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Run>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn follow(run: Arc<Run>, mapper: Mapper, mut stopping: watch::Receiver<bool>, _slot: OwnedSemaphorePermit) {
    let began = Instant::now();
    let phase = tokio::select! {
        phase = run.send(&mapper, began) => phase,
        () = run.stop.notified() => Phase::Stopped,
        () = stopped(&mut stopping) => Phase::Stopped,
    };
    run.change(|state| state.tally.phase = phase);
}

impl Run {
    async fn send(&self, mapper: &Mapper, began: Instant) -> Phase {
        let Asked { service, payload, selector, target, tags, timeout } = self.asked.clone();
        let mut request = mapper.request(service.as_str(), payload).selector(selector).timeout(timeout);
        if let Some(target) = target {
            request = request.target(target);
        }
        request = tags.into_iter().fold(request, |request, tag| request.tag(tag));
        let mut events = match request.events().await {
            Ok(events) => events,
            Err(error) => return Phase::Failed(chain(&error)),
        };
        while let Some(event) = events.next().await {
            let after = began.elapsed();
            let (from, what, value) = match event {
                Event::Intermediate { from, key, value, missed } => {
                    (from, What::Part(visible(&key).into_owned(), missed), Value::of(&value))
                }
                Event::Outcome { from, result: Ok(value) } => (from, What::Answer, Value::of(&value)),
                Event::Outcome { from, result: Err(failure) } => {
                    let code = visible(failure.code.as_str()).into_owned();
                    (from, What::Failure(code), Value::of(&failure.message.as_str().into()))
                }
                Event::Failed(failure) => return Phase::Failed(visible(&failure.to_string()).into_owned()),
            };
            self.change(|state| state.add(Entry { after, from, what, value }));
        }
        Phase::Ended
    }

    /// How far it is.
    pub fn tally(&self) -> Tally {
        self.lock().tally.clone()
    }

    /// What came, from the entry with this number on.
    pub fn entries(&self, from: usize) -> Vec<Arc<Entry>> {
        self.lock().entries.get(from..).unwrap_or_default().to_vec()
    }

    /// Is told of every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Waits for no more answers.
    pub fn stop(&self) {
        self.stop.notify_one();
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changes.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, entry: Entry) {
        let count = match entry.what {
            What::Part(..) => &mut self.tally.parts,
            What::Answer => &mut self.tally.answered,
            What::Failure(_) => &mut self.tally.failed,
        };
        *count += 1;
        let share = if matches!(entry.what, What::Part(..)) { 2 } else { 1 };
        let bytes = self.bytes + entry.value.text.len();
        if self.entries.len() >= ENTRIES / share || bytes > BYTES / share {
            self.tally.left_out += 1;
        } else {
            self.bytes = bytes;
            self.entries.push(Arc::new(entry));
        }
    }
}

/// The message of an error and of what caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(what: What, bytes: usize) -> Entry {
        let value = Value { text: "x".repeat(bytes), is_text: true, cut: 0 };
        let from = Identity::agent("fred").unwrap();
        Entry { after: Duration::ZERO, from, what, value }
    }

    #[test]
    fn n20_what_is_kept_of_a_request_is_bounded_and_what_is_not_is_counted() {
        let tally = Tally { phase: Phase::Running, answered: 0, failed: 0, parts: 0, left_out: 0 };
        let mut state = State { entries: Vec::new(), bytes: 0, tally };
        let part = |bytes| entry(What::Part("k".into(), 0), bytes);
        (0..ENTRIES).for_each(|_| state.add(part(1)));
        assert_eq!((state.tally.parts, state.tally.left_out), (ENTRIES as u64, ENTRIES as u64 / 2));
        state.add(entry(What::Answer, 64 * 1024));
        assert_eq!(state.entries.last().unwrap().what, What::Answer, "there is room for outcomes");
        (0..100).for_each(|_| state.add(entry(What::Failure("failed".into()), 64 * 1024)));
        assert!(state.bytes <= BYTES && state.tally.left_out > ENTRIES as u64 / 2);
        assert_eq!((state.tally.answered, state.tally.failed), (1, 100));
    }
}
