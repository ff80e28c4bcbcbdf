//! Running a proxied request once, though several mappers send it: a mapper that loses its connection while it holds a request has it sent
//! again by another mapper, under another token. The agent knows it by its origin.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use futures_util::future::join_all;
use lru::LruCache;
use parking_lot::Mutex;

use super::actor::{HandlerResult, IntermediateResult};
use crate::limits::nonzero;
use crate::link::{Link, acknowledge};
use crate::packet::{Failure, FailureCode, Payload, RequestOrigin};
use crate::request::ReplyTo;
use crate::transport::Acker;

/// How many proxied requests that were done are remembered.
const MAX_DONE: NonZeroUsize = nonzero(16_384);
/// How many bytes of their results are kept.
const MAX_RESULT_BYTES: usize = 16 << 20;
/// How many deliveries of one request a job answers. More replace the oldest one.
const MAX_DELIVERIES: usize = 8;

/// One delivery of a request: where it is answered (unless it is a push), and how it is acknowledged.
#[derive(Debug)]
pub(super) struct JobDelivery {
    pub reply_to: Option<ReplyTo>,
    /// None once it is acknowledged.
    pub acker: Option<Acker>,
}

impl JobDelivery {
    /// Sends the answer, and then acknowledges the request.
    pub async fn answer(self, link: &Link, result: HandlerResult<Payload>) {
        if let Some(reply_to) = self.reply_to {
            reply_to.answer(link, result).await;
        }
        if let Some(acker) = self.acker {
            acknowledge(acker).await;
        }
    }
}

/// The deliveries that one job answers.
#[derive(Clone, Debug)]
pub(super) struct Deliveries(Arc<Mutex<Vec<JobDelivery>>>);

impl Deliveries {
    fn new(first: JobDelivery) -> Self {
        Self(Arc::new(Mutex::new(vec![first])))
    }

    fn take(&self) -> Vec<JobDelivery> {
        std::mem::take(&mut *self.0.lock())
    }

    /// Acknowledges them before they are answered.
    pub async fn acknowledge(&self) {
        let held: Vec<Acker> = self.0.lock().iter_mut().filter_map(|delivery| delivery.acker.take()).collect();
        join_all(held.into_iter().map(acknowledge)).await;
    }
}

/// The proxied requests that run or were done.
#[derive(Debug)]
pub(super) struct ProxiedJobs(Mutex<State>);

#[derive(Debug)]
struct State {
    running: HashMap<RequestOrigin, Deliveries>,
    done: LruCache<RequestOrigin, ()>,
    /// The results of some of those that are done.
    results: LruCache<RequestOrigin, HandlerResult<Payload>>,
    /// The size of the results.
    bytes: usize,
}

/// What to do about a delivery.
#[derive(Debug)]
pub(super) enum Claim<'a> {
    /// It is new: run it.
    Run(Job<'a>),
    /// The job that already runs answers it too.
    Attached,
    /// It was done before.
    Done(JobDelivery, HandlerResult<Payload>),
}

impl Default for ProxiedJobs {
    fn default() -> Self {
        // Unbounded here and bounded in `remember`: a cache with a capacity allocates it all at once.
        let (done, results) = (LruCache::unbounded(), LruCache::unbounded());
        Self(Mutex::new(State { running: HashMap::new(), done, results, bytes: 0 }))
    }
}

impl ProxiedJobs {
    /// Decides about a delivery of a request. One that is not proxied has no origin, and is new.
    pub fn claim(&self, origin: Option<RequestOrigin>, delivery: JobDelivery) -> Claim<'_> {
        let Some(origin) = origin else {
            return Claim::Run(Job { jobs: None, deliveries: Deliveries::new(delivery), next_part: 0 });
        };
        let mut state = self.0.lock();
        if let Some(deliveries) = state.running.get(&origin) {
            let mut deliveries = deliveries.0.lock();
            if deliveries.len() >= MAX_DELIVERIES {
                deliveries.remove(0);
            }
            deliveries.push(delivery);
            return Claim::Attached;
        }
        if state.done.get(&origin).is_some() {
            let forgotten = || Err(Failure::new(FailureCode::Lost, "it was done before, and its result is not kept"));
            return Claim::Done(delivery, state.results.get(&origin).cloned().unwrap_or_else(forgotten));
        }
        let deliveries = Deliveries::new(delivery);
        state.running.insert(origin.clone(), deliveries.clone());
        Claim::Run(Job { jobs: Some((self, origin)), deliveries, next_part: 0 })
    }
}

impl State {
    fn remember(&mut self, origin: RequestOrigin, result: &HandlerResult<Payload>) {
        self.done.put(origin.clone(), ());
        if self.done.len() > MAX_DONE.get()
            && let Some((oldest, ())) = self.done.pop_lru()
        {
            self.bytes -= self.results.pop(&oldest).map_or(0, |result| bytes(&result));
        }
        if bytes(result) > MAX_RESULT_BYTES / 4 {
            return;
        }
        self.bytes += bytes(result);
        if let Some(replaced) = self.results.put(origin, result.clone()) {
            self.bytes -= bytes(&replaced);
        }
        while self.bytes > MAX_RESULT_BYTES
            && let Some((_, oldest)) = self.results.pop_lru()
        {
            self.bytes -= bytes(&oldest);
        }
    }
}

/// About how much memory a result takes.
fn bytes(result: &HandlerResult<Payload>) -> usize {
    match result {
        Ok(value) => value.approximate_bytes(),
        Err(failure) => failure.message.len(),
    }
}

/// A running job. If it is dropped before it is finished, the request is forgotten.
#[derive(Debug)]
pub(super) struct Job<'a> {
    jobs: Option<(&'a ProxiedJobs, RequestOrigin)>,
    deliveries: Deliveries,
    /// The sequence number of the next intermediate result.
    next_part: u64,
}

impl Job<'_> {
    /// The deliveries that it answers.
    pub fn deliveries(&self) -> Deliveries {
        self.deliveries.clone()
    }

    /// Sends an intermediate result to all that wait for it.
    pub async fn emit(&mut self, link: &Link, result: IntermediateResult) {
        let waiting: Vec<ReplyTo> = self.deliveries.0.lock().iter().filter_map(|one| one.reply_to.clone()).collect();
        for reply_to in waiting {
            reply_to.part(link, self.next_part, result.key.clone(), result.value.clone()).await;
        }
        self.next_part += 1;
    }

    /// Answers and acknowledges every delivery of the request.
    pub async fn finish(mut self, link: &Link, result: HandlerResult<Payload>) {
        let deliveries = match self.jobs.take() {
            None => self.deliveries.take(),
            Some((jobs, origin)) => {
                let mut state = jobs.0.lock();
                state.running.remove(&origin);
                state.remember(origin, &result);
                self.deliveries.take()
            }
        };
        join_all(deliveries.into_iter().map(|delivery| delivery.answer(link, result.clone()))).await;
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        if let Some((jobs, origin)) = &self.jobs {
            jobs.0.lock().running.remove(origin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Identity, RequestDigest, Token};

    fn origin(number: usize) -> RequestOrigin {
        let digest = RequestDigest::of(&"/a/b".parse().unwrap(), &Payload::default());
        let mut token = [0; 16];
        token[..8].copy_from_slice(&number.to_be_bytes());
        RequestOrigin::new(Identity::agent("boss").unwrap(), Token::from_bytes(token), digest)
    }

    #[test]
    fn s18_memory_of_done_requests_is_bounded_and_keeps_ids_longer_than_results() {
        let jobs = ProxiedJobs::default();
        let mut state = jobs.0.lock();
        let large = || Ok(Payload::from("x".repeat(MAX_RESULT_BYTES / 8).as_str()));
        for number in 0..20 {
            state.remember(origin(number), &large());
            assert!(state.bytes <= MAX_RESULT_BYTES);
        }
        assert_eq!((state.done.len(), state.results.len()), (20, 8));
        state.remember(origin(20), &Ok(Payload::from("x".repeat(MAX_RESULT_BYTES).as_str())));
        assert_eq!((state.done.len(), state.results.len()), (21, 8), "too large to be kept");
        for number in 0..2 * MAX_DONE.get() {
            state.remember(origin(number), &Err(Failure::failed("no")));
        }
        assert_eq!((state.done.len(), state.results.len()), (MAX_DONE.get(), MAX_DONE.get()));
        assert_eq!(state.bytes, 2 * MAX_DONE.get());
    }
}
