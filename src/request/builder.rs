//! Building a request, and following its events.

use std::fmt::Debug;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;
use tokio::time::Instant;

use super::answers::{Answers, Event, RequestError};
use super::pending::{PendingRequest, PendingRequests};
use crate::packet::{Failure, FailureCode, Identity, Payload, Request, SelectorName, Service, Tag, Token};

/// How long targets have to answer, by default.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest timeout: about a year.
const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Dispatches requests: a mapper, or a proxy that asks one. Implemented in this crate only.
#[async_trait]
pub trait Dispatch: sealed::Sealed + Clone + Send + Sync + 'static {
    /// Sends a request and returns its events.
    ///
    /// # Errors
    /// [`RequestError`] when it was not dispatched.
    async fn request(self, spec: RequestSpec) -> Result<Events, RequestError>;

    /// Sends a push; returns the agents that received it, where they are known.
    ///
    /// # Errors
    /// [`RequestError`] when it was not dispatched.
    async fn push(self, spec: RequestSpec) -> Result<Vec<Identity>, RequestError>;
}

/// Keeps [`Dispatch`] from being implemented outside the crate.
pub(crate) mod sealed {
    pub trait Sealed {}
}

/// A request as it was built.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RequestSpec {
    /// The packet.
    pub request: Request,
    /// How long the targets have to answer.
    pub timeout: Duration,
    /// How long to wait for an agent when none offers the service yet.
    pub wait_for_agents: Duration,
    /// Whether it may wait in the offline queue; none: the mapper's default.
    pub offline: Option<bool>,
}

/// A request or push that is being built. Awaiting it sends it as a request and returns the [`Answers`].
///
/// ```no_run
/// # async fn example(mapper: nanite::mapper::Mapper) -> Result<(), Box<dyn std::error::Error>> {
/// use nanite::packet::SelectorName;
/// use std::time::Duration;
///
/// let answers = mapper
///     .request("/text/upper", "hello")
///     .selector(SelectorName::All)
///     .tag("eu".parse()?)
///     .timeout(Duration::from_secs(5))
///     .await?;
/// for (agent, value) in answers.results() {
///     println!("{agent}: {value}");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct RequestBuilder<D> {
    pub(crate) dispatch: D,
    spec: Result<RequestSpec, RequestError>,
}

impl<D: Dispatch> RequestBuilder<D> {
    pub(crate) fn new(dispatch: D, service: &str, payload: impl Serialize) -> Self {
        let spec = || {
            let service: Service = service.parse()?;
            let request = Request::new(service, Payload::new(payload).map_err(RequestError::Payload)?);
            Ok(RequestSpec { request, timeout: REQUEST_TIMEOUT, wait_for_agents: Duration::ZERO, offline: None })
        };
        Self { dispatch, spec: spec() }
    }

    fn with(mut self, change: impl FnOnce(&mut RequestSpec)) -> Self {
        if let Ok(spec) = &mut self.spec {
            change(spec);
        }
        self
    }

    /// How the mapper chooses the agent; least loaded by default.
    pub fn selector(self, name: SelectorName) -> Self {
        self.with(|spec| spec.request.selector = name)
    }

    /// Sends it to this agent only.
    pub fn target(self, agent: Identity) -> Self {
        self.with(|spec| spec.request.target = Some(agent))
    }

    /// Sends it only to agents with this tag. Agents must have all tags that are given.
    pub fn tag(self, tag: Tag) -> Self {
        self.with(|spec| spec.request.tags.push(tag))
    }

    /// How long the targets have to answer, from now; targets that have not answered by then time out. 30 s by default.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with(|spec| spec.timeout = timeout)
    }

    /// How long to wait for an agent when none offers the service yet; not at all by default. A proxy leaves that to its mapper's
    /// offline queue.
    pub fn wait_for_agents(self, timeout: Duration) -> Self {
        self.with(|spec| spec.wait_for_agents = timeout)
    }

    /// Whether the message survives a restart of the broker.
    pub fn persistent(self, persistent: bool) -> Self {
        self.with(|spec| spec.request.persistent = Some(persistent))
    }

    /// Whether it waits in the offline queue when no agent offers the service; the mapper's default otherwise.
    pub fn offline_failsafe(self, offline: bool) -> Self {
        self.with(|spec| spec.offline = Some(offline))
    }

    /// Sends the request and returns its events as they arrive.
    ///
    /// ```no_run
    /// # async fn example(mapper: nanite::mapper::Mapper) -> Result<(), Box<dyn std::error::Error>> {
    /// use nanite::request::Event;
    ///
    /// let mut events = mapper.request("/count/to", 3).events().await?;
    /// while let Some(event) = events.next().await {
    ///     if let Event::Intermediate { from, key, value, .. } = event {
    ///         println!("{from} {key}: {value}");
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`RequestError`] when it was not dispatched.
    pub async fn events(self) -> Result<Events, RequestError> {
        self.dispatch.request(self.spec?).await
    }

    /// Sends it as a push, which has no answer. Returns the agents that received it, where they are known.
    ///
    /// # Errors
    /// [`RequestError`] when it was not dispatched.
    pub async fn push(self) -> Result<Vec<Identity>, RequestError> {
        self.dispatch.push(self.spec?).await
    }
}

impl<D: Dispatch> IntoFuture for RequestBuilder<D> {
    type Output = Result<Answers, RequestError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.events().await?.answers().await })
    }
}

/// The events of a request, as they arrive. Dropping it ends the request: later events are dropped.
#[derive(Debug)]
pub struct Events {
    request: Arc<PendingRequest>,
    pending: Arc<PendingRequests>,
    deadline: Instant,
    /// Keeps the consumer of the answers alive.
    _listener: Box<dyn Debug + Send + Sync>,
}

impl Events {
    /// Begins a request, which ends when this is dropped. `listener` is kept until then.
    pub(crate) fn begin(
        pending: &Arc<PendingRequests>,
        token: Token,
        timeout: Duration,
        listener: impl Debug + Send + Sync + 'static,
    ) -> Self {
        let _listener = Box::new(listener);
        Self { request: pending.begin(token), pending: pending.clone(), deadline: after(timeout), _listener }
    }

    pub(crate) fn request(&self) -> &PendingRequest {
        &self.request
    }

    pub(crate) fn pending(&self) -> &PendingRequests {
        &self.pending
    }

    /// The next event; none once every target has an outcome. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            // Before the check, so that an event in between is not missed.
            let changed = self.request.changed.notified();
            if let Some(event) = self.request.take() {
                return Some(event);
            }
            if !self.request.is_waiting() {
                // An event may have arrived between the two checks.
                return self.request.take();
            }
            if tokio::time::timeout_at(self.deadline, changed).await.is_err() {
                let failure = Failure::new(FailureCode::TimedOut, "no answer before the deadline");
                if self.request.abandon() {
                    self.request.finish(Err(failure.clone()));
                }
                for identity in self.request.waiting() {
                    self.pending.settle(&self.request, &identity, Err(failure.clone()));
                }
            }
        }
    }

    /// Waits for every outcome and skips the intermediate results.
    ///
    /// # Errors
    /// [`RequestError`] when the request failed as a whole.
    pub async fn answers(mut self) -> Result<Answers, RequestError> {
        let mut answers = Answers::default();
        while let Some(event) = self.next().await {
            match event {
                Event::Outcome { from, result, .. } => drop(answers.outcomes.insert(from, result)),
                Event::Failed(failure) => return Err(failure.into()),
                Event::Intermediate { .. } => {}
            }
        }
        Ok(answers)
    }
}

/// The time `timeout` from now, at most [`MAX_TIMEOUT`].
pub(crate) fn after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(MAX_TIMEOUT)
}

impl Drop for Events {
    fn drop(&mut self) {
        self.pending.end(&self.request);
    }
}
