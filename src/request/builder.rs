//! Putting a request together, and following it.

use std::fmt::Debug;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use tokio::time::Instant;

use super::pending::{PendingRequest, PendingRequests};
use super::{Answers, Event, RequestError};
use crate::packet::{Failure, FailureCode, Identity, Payload, Request, SelectorName, Service, Tag, Token};

/// How long answers may take, where nothing else is said.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Whoever can have work done: a mapper, or a proxy that asks one.
#[async_trait]
pub trait Dispatch: Clone + Send + Sync + 'static {
    /// Sends a request, and follows it.
    ///
    /// # Errors
    /// [`RequestError`] when nobody got it.
    async fn request(self, ask: RequestSpec) -> Result<Events, RequestError>;

    /// Sends a push; gives who got it, where that is known.
    ///
    /// # Errors
    /// [`RequestError`] when nobody got it.
    async fn push(self, ask: RequestSpec) -> Result<Vec<Identity>, RequestError>;
}

/// A request as it was put together.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RequestSpec {
    /// What is asked, of whom.
    pub request: Request,
    /// How long the answers may take.
    pub timeout: Duration,
    /// How long to wait for an agent to come when nobody offers the service yet.
    pub patience: Duration,
    /// Whether it may wait for an agent in the offline queue; none: as the mapper is set.
    pub offline: Option<bool>,
}

/// A request or push that is being put together. Awaiting it sends it as a request and gives its [`Answers`].
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct RequestBuilder<D> {
    pub(crate) dispatch: D,
    ask: Result<RequestSpec, RequestError>,
}

impl<D: Dispatch> RequestBuilder<D> {
    pub(crate) fn new(dispatch: D, service: &str, payload: impl Serialize) -> Self {
        let ask = || {
            let service: Service = service.parse()?;
            let request = Request::new(service, Payload::new(payload).map_err(RequestError::Payload)?);
            Ok(RequestSpec { request, timeout: TIMEOUT, patience: Duration::ZERO, offline: None })
        };
        Self { dispatch, ask: ask() }
    }

    fn with(mut self, change: impl FnOnce(&mut RequestSpec)) -> Self {
        if let Ok(ask) = &mut self.ask {
            change(ask);
        }
        self
    }

    /// How the agent is chosen; the least loaded one by default.
    pub fn selector(self, name: SelectorName) -> Self {
        self.with(|ask| ask.request.selector = name)
    }

    /// Asks this one agent.
    pub fn target(self, agent: Identity) -> Self {
        self.with(|ask| ask.request.target = Some(agent))
    }

    /// Asks only agents that carry this tag, beside those given before.
    pub fn tag(self, tag: Tag) -> Self {
        self.with(|ask| ask.request.tags.push(tag))
    }

    /// How long the answers may take, from now; who has not answered then has timed out. 30 s by default.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with(|ask| ask.timeout = timeout)
    }

    /// How long to wait for an agent to come when nobody offers the service yet; not at all by default. A proxy leaves that to
    /// its mapper's offline queue.
    pub fn wait_for_agents(self, patience: Duration) -> Self {
        self.with(|ask| ask.patience = patience)
    }

    /// Whether the message outlives a restart of the broker.
    pub fn persistent(self, persistent: bool) -> Self {
        self.with(|ask| ask.request.persistent = Some(persistent))
    }

    /// Whether it waits in the offline queue when nobody offers the service; as the mapper is set by default.
    pub fn offline_failsafe(self, offline: bool) -> Self {
        self.with(|ask| ask.offline = Some(offline))
    }

    /// Sends the request and gives its events as they come.
    ///
    /// # Errors
    /// [`RequestError`] when it could not be given to anybody.
    pub async fn events(self) -> Result<Events, RequestError> {
        self.dispatch.request(self.ask?).await
    }

    /// Sends it as a push: nobody answers. Gives who got it, where that is known.
    ///
    /// # Errors
    /// [`RequestError`] when it could not be given to anybody.
    pub async fn push(self) -> Result<Vec<Identity>, RequestError> {
        self.dispatch.push(self.ask?).await
    }
}

impl<D: Dispatch> IntoFuture for RequestBuilder<D> {
    type Output = Result<Answers, RequestError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.events().await?.answers().await })
    }
}

/// What happens to a request, as it comes. Dropping it ends the request: what comes later is dropped.
#[derive(Debug)]
pub struct Events {
    job: Arc<PendingRequest>,
    jobs: Arc<PendingRequests>,
    deadline: Instant,
    /// Whoever listens for the answers lives as long as they are waited for.
    _listener: Box<dyn Debug + Send + Sync>,
}

impl Events {
    /// Begins a request; it ends when this is dropped. `listener` is kept until then.
    pub(crate) fn begin(
        jobs: &Arc<PendingRequests>,
        token: Token,
        timeout: Duration,
        listener: impl Debug + Send + Sync + 'static,
    ) -> Self {
        let _listener = Box::new(listener);
        Self { job: jobs.begin(token), jobs: jobs.clone(), deadline: after(timeout), _listener }
    }

    pub(crate) fn job(&self) -> &PendingRequest {
        &self.job
    }

    pub(crate) fn jobs(&self) -> &PendingRequests {
        &self.jobs
    }

    /// The next event; none once every target has its outcome. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            // Asked for before looking, so that what comes in between is not missed.
            let changed = self.job.changed.notified();
            if let Some(event) = self.job.take() {
                return Some(event);
            }
            if !self.job.is_waiting() {
                // What came between the two looks.
                return self.job.take();
            }
            if tokio::time::timeout_at(self.deadline, changed).await.is_err() {
                let failure = Failure::new(FailureCode::TimedOut, "no answer before the deadline");
                if self.job.abandon() {
                    self.job.finish(Err(failure.clone()));
                }
                for identity in self.job.waiting() {
                    self.jobs.settle(&self.job, &identity, Err(failure.clone()));
                }
            }
        }
    }

    /// Waits for every outcome, and leaves the intermediate results aside.
    ///
    /// # Errors
    /// [`RequestError`] when the request failed as a whole.
    pub async fn answers(mut self) -> Result<Answers, RequestError> {
        let mut answers = Answers::default();
        while let Some(event) = self.next().await {
            match event {
                Event::Outcome { from, result } => drop(answers.outcomes.insert(from, result)),
                Event::Failed(failure) => return Err(failure.into()),
                Event::Intermediate { .. } => {}
            }
        }
        Ok(answers)
    }
}

/// The moment `timeout` from now; in about a year at the latest.
pub(crate) fn after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(Duration::from_secs(365 * 24 * 3600))
}

impl Drop for Events {
    fn drop(&mut self) {
        self.jobs.end(&self.job);
    }
}
