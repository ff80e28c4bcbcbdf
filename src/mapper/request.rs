//! Requests of a mapper: how they are made, sent, and answered.

use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::Serialize;
use tokio::time::Instant;

use super::job::{Event, Job};
use super::selector::{Candidate, Selector};
use super::state::{AgentQuery, StateError};
use super::{Mapper, Shared};
use crate::link::{Letter, Ready, SendError};
use crate::packet::{
    Failure, FailureCode, Identity, InvalidService, Packet, Payload, Request, SelectorName, Service, Tag, Token,
};
use crate::serializer::{Audience, SealError};
use crate::transport::{Destination, TransportError, topology};

/// How many times another agent is chosen, when the chosen one turns out to be gone.
const CHOICES: usize = 8;
/// The longest lifetime of a message that asks for work; the work itself may take longer.
const LIFETIME: Duration = Duration::from_secs(60);

/// The answers to a request, by agent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    /// What each agent answered, or why it did not.
    pub outcomes: BTreeMap<Identity, Result<Payload, Failure>>,
}

impl Answers {
    /// The answers that are values.
    pub fn results(&self) -> impl Iterator<Item = (&Identity, &Payload)> {
        self.outcomes.iter().filter_map(|(from, result)| Some((from, result.as_ref().ok()?)))
    }

    /// The failures.
    pub fn failures(&self) -> impl Iterator<Item = (&Identity, &Failure)> {
        self.outcomes.iter().filter_map(|(from, result)| Some((from, result.as_ref().err()?)))
    }
}

/// Why a request could not be dispatched at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The service has no proper name.
    #[error(transparent)]
    Service(#[from] InvalidService),
    /// The payload cannot be expressed.
    #[error("the payload cannot be expressed")]
    Payload(#[source] serde_json::Error),
    /// No living agent offers it, with these tags, or at this target.
    #[error("no agent offers {0}")]
    NoTarget(String),
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// What is known of agents cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
}

impl From<TransportError> for RequestError {
    fn from(error: TransportError) -> Self {
        RequestError::Send(error.into())
    }
}

/// A request or push that is being put together. Awaiting a request gives its [`Answers`].
#[derive(Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct RequestBuilder {
    mapper: Mapper,
    request: Result<Request, RequestError>,
    selector: Option<Arc<dyn Selector>>,
    timeout: Duration,
    patience: Duration,
}

impl RequestBuilder {
    pub(super) fn new(mapper: Mapper, service: &str, payload: impl Serialize) -> Self {
        let request = || {
            let service: Service = service.parse()?;
            Ok(Request::new(service, Payload::new(payload).map_err(RequestError::Payload)?))
        };
        let timeout = mapper.shared.request_timeout;
        Self { mapper, request: request(), selector: None, timeout, patience: Duration::ZERO }
    }

    fn with(mut self, change: impl FnOnce(&mut Request)) -> Self {
        if let Ok(request) = &mut self.request {
            change(request);
        }
        self
    }

    /// How the agent is chosen; the least loaded one by default.
    pub fn selector(self, name: SelectorName) -> Self {
        self.with(|request| request.selector = name)
    }

    /// Chooses by a rule of your own.
    pub fn selector_by(mut self, selector: Arc<dyn Selector>) -> Self {
        self.selector = Some(selector);
        self
    }

    /// Asks this one agent.
    pub fn target(self, agent: Identity) -> Self {
        self.with(|request| request.target = Some(agent))
    }

    /// Asks only agents that carry this tag, beside those given before.
    pub fn tag(self, tag: Tag) -> Self {
        self.with(|request| request.tags.push(tag))
    }

    /// How long the answers may take, from now; who has not answered then has timed out. 30 s by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long to wait for an agent to come when nobody offers the service yet; not at all by default.
    pub fn wait_for_agents(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Whether the message outlives a restart of the broker.
    pub fn persistent(self, persistent: bool) -> Self {
        self.with(|request| request.persistent = Some(persistent))
    }

    /// Sends the request and gives its events as they come.
    ///
    /// # Errors
    /// [`RequestError`] when it could not be dispatched to anybody.
    pub async fn events(self) -> Result<Events, RequestError> {
        let Self { mapper, request, selector, timeout, patience } = self;
        let request = request?;
        let shared = mapper.shared.clone();
        let token = Token::random().map_err(|error| SendError::Seal(SealError::Random(error)))?;
        let job = shared.jobs.begin(token);
        let events = Events { job, shared, deadline: Instant::now() + timeout, _mapper: mapper };
        let dispatch = Dispatch { shared: &events.shared, selector, timeout, patience };
        dispatch.send(request, Some(&events.job)).await?;
        Ok(events)
    }

    /// Sends it as a push: nobody answers. Returns who got it.
    ///
    /// # Errors
    /// [`RequestError`] when it could not be given to anybody.
    pub async fn push(self) -> Result<Vec<Identity>, RequestError> {
        let Self { mapper, request, selector, timeout, patience } = self;
        Dispatch { shared: &mapper.shared, selector, timeout, patience }.send(request?, None).await
    }
}

impl IntoFuture for RequestBuilder {
    type Output = Result<Answers, RequestError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { Ok(self.events().await?.answers().await) })
    }
}

/// What happens to a request, as it comes. Dropping it ends the request: what comes later is dropped.
#[derive(Debug)]
pub struct Events {
    job: Arc<Job>,
    shared: Arc<Shared>,
    deadline: Instant,
    /// The mapper lives as long as its requests.
    _mapper: Mapper,
}

impl Events {
    /// The next event; none once every target has its outcome. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            // Asked for before looking, so that what comes in between is not missed.
            let changed = self.job.changed.notified();
            if let Some(event) = self.job.take() {
                return Some(event);
            }
            let waiting = self.job.waiting();
            if waiting.is_empty() {
                // An outcome that came between the two looks.
                return self.job.take();
            }
            if tokio::time::timeout_at(self.deadline, changed).await.is_err() {
                for identity in waiting {
                    let failure = Failure::new(FailureCode::TimedOut, "no answer before the deadline");
                    self.shared.jobs.settle(&self.job, &identity, Err(failure));
                }
            }
        }
    }

    /// Waits for every outcome, and leaves the intermediate results aside.
    pub async fn answers(mut self) -> Answers {
        let mut answers = Answers::default();
        while let Some(event) = self.next().await {
            if let Event::Outcome { from, result } = event {
                answers.outcomes.insert(from, result);
            }
        }
        answers
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.shared.jobs.end(&self.job);
    }
}

/// Gives a request to agents.
struct Dispatch<'a> {
    shared: &'a Shared,
    selector: Option<Arc<dyn Selector>>,
    timeout: Duration,
    patience: Duration,
}

impl Dispatch<'_> {
    /// Sends to the chosen agents; returns who got it. Agents whose queue is gone are forgotten, and others chosen.
    async fn send(&self, mut request: Request, job: Option<&Job>) -> Result<Vec<Identity>, RequestError> {
        let link = &self.shared.link;
        request.service = request.service.resolved();
        request.from = Some(link.identity().clone());
        request.token = Some(match job {
            Some(job) => job.token,
            None => Token::random().map_err(|error| SendError::Seal(SealError::Random(error)))?,
        });
        if job.is_some() {
            request.deadline = Some(link.now().saturating_add(self.timeout));
            if !link.is_secure() {
                let inbox = topology::mapper_inbox_name(link.identity().as_str(), link.instance());
                request.reply_to = Some(inbox);
            }
        }
        let mut gone = BTreeSet::new();
        for _ in 0..CHOICES {
            let chosen = self.choose(&request, &gone).await?;
            let mut sent = Vec::new();
            for group in chosen.chunks(Audience::MAX) {
                for (identity, result) in self.send_to(group, &request, job).await? {
                    match result {
                        Ok(()) => sent.push(identity),
                        Err(SendError::Transport(TransportError::Unroutable(_))) => {
                            tracing::info!(agent = %identity, "its queue is gone: another agent is chosen");
                            let _ = self.shared.state.remove(&identity).await;
                            gone.insert(identity);
                        }
                        // One of several: the others have it already.
                        Err(error) if chosen.len() > 1 => {
                            tracing::warn!(agent = %identity, error = &error as &dyn std::error::Error, "not sent");
                            if let Some(job) = job {
                                let failure = Failure::new(FailureCode::Lost, format!("not sent: {error}"));
                                self.shared.jobs.refuse(job, &identity, failure);
                                sent.push(identity);
                            }
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            if !sent.is_empty() {
                return Ok(sent);
            }
        }
        Err(no_target(&request))
    }

    /// Who gets it; waits for somebody to come as long as patience lasts.
    async fn choose(&self, request: &Request, gone: &BTreeSet<Identity>) -> Result<Vec<Candidate>, RequestError> {
        let mut query = AgentQuery::new(request.service.clone(), request.tags.clone());
        query.target = request.target.clone();
        let until = Instant::now() + self.patience;
        loop {
            let changed = self.shared.changed.notified();
            let mut found = self.shared.state.find(&query).await?;
            let silent_since = self.shared.silent_since();
            found.retain(|record| record.last_seen >= silent_since && !gone.contains(&record.identity));
            let candidates = self.shared.jobs.in_flight.candidates(found);
            if !candidates.is_empty() {
                let selector = match &self.selector {
                    Some(selector) => selector.as_ref(),
                    None => self.shared.selectors.named(request.selector),
                };
                let wanted: BTreeSet<usize> = selector.select(&request.service, &candidates).into_iter().collect();
                let chosen: Vec<Candidate> =
                    candidates.into_iter().enumerate().filter(|(at, _)| wanted.contains(at)).map(|(_, c)| c).collect();
                return if chosen.is_empty() { Err(no_target(request)) } else { Ok(chosen) };
            }
            if tokio::time::timeout_at(until, changed).await.is_err() {
                return Err(no_target(request));
            }
        }
    }

    /// Seals once for a group of agents, and gives it to each.
    async fn send_to(
        &self,
        group: &[Candidate],
        request: &Request,
        job: Option<&Job>,
    ) -> Result<Vec<(Identity, Result<(), SendError>)>, SendError> {
        let all: Vec<Identity> = group.iter().map(|candidate| candidate.record.identity.clone()).collect();
        let audience = match &all[..] {
            [one] => Audience::One(one.clone()),
            _ => Audience::Many(all),
        };
        match self.seal(request, audience, job.is_some()).await {
            Ok(ready) => Ok(join_all(group.iter().map(|candidate| self.publish(candidate, &ready, job))).await),
            // One without a certificate must not keep the others from their work.
            Err(SendError::Seal(SealError::NoRecipient(_))) if group.len() > 1 => {
                let each = group.iter().map(|candidate| async move {
                    let identity = candidate.record.identity.clone();
                    match self.seal(request, Audience::One(identity.clone()), job.is_some()).await {
                        Ok(ready) => self.publish(candidate, &ready, job).await,
                        Err(error) => (identity, Err(error)),
                    }
                });
                Ok(join_all(each).await)
            }
            Err(error) => Err(error),
        }
    }

    async fn seal(&self, request: &Request, audience: Audience, answered: bool) -> Result<Ready, SendError> {
        let packet = if answered { Packet::Request(request.clone()) } else { Packet::Push(request.clone()) };
        let mut letter = Letter::new(packet, audience);
        letter.lifetime = if answered { self.timeout.min(LIFETIME) } else { LIFETIME };
        letter.persistent = request.persistent.unwrap_or(false);
        self.shared.link.seal(letter).await
    }

    async fn publish(
        &self,
        candidate: &Candidate,
        ready: &Ready,
        job: Option<&Job>,
    ) -> (Identity, Result<(), SendError>) {
        let record = &candidate.record;
        // Before it is sent: the answer may be faster than the broker's confirmation.
        if let Some(job) = job {
            self.shared.jobs.expect(job, &record.identity, record.instance, ready.id());
        }
        let queue = topology::agent_inbox_name(record.identity.as_str());
        let result = self.shared.link.publish(ready, Destination::Queue(queue)).await;
        if let (Err(_), Some(job)) = (&result, job) {
            self.shared.jobs.forget(job, &record.identity);
        }
        (record.identity.clone(), result.map_err(SendError::from))
    }
}

fn no_target(request: &Request) -> RequestError {
    let mut what = request.service.to_string();
    if let Some(target) = &request.target {
        what = format!("{what} at {target}");
    }
    if !request.tags.is_empty() {
        let tags: Vec<&str> = request.tags.iter().map(Tag::as_str).collect();
        what = format!("{what} with tags {}", tags.join(", "));
    }
    RequestError::NoTarget(what)
}
