//! Dispatching a request: selects agents, seals the request once for all of them, and sends it. Replaces agents whose queue is gone,
//! and stores the request in the offline queue if there is no agent and the caller wants that.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;

use super::registry::{Shared, Tasks};
use super::selector::{Candidate, Selector};
use super::state::AgentQuery;
use crate::link::{Outbound, SealedMessage, SendError, wait_for_mappers};
use crate::packet::{Failure, FailureCode, Identity, Packet, Request, RequestDigest, RequestOrigin, Tag, Token};
use crate::request::{Dispatch, Events, HandedOver, RequestBuilder, RequestError, RequestSpec, after, sealed};
use crate::serializer::{Audience, MessageClass, SealError};
use crate::transport::{Destination, TransportError, topology};

/// How many times agents are selected before a request fails because the queues of all of them are gone.
const MAX_SELECTIONS: usize = 8;
/// How often a request that waits for an agent looks again without being notified: an agent that was silent for a while and is
/// still stored does not register again, and so causes no notification.
const RECHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long the first message for the offline queue waits for other mappers to advertise themselves: it can only be sealed for known
/// mappers.
const DISCOVERY_TIMEOUT: Duration = Duration::from_millis(500);
/// The longest lifetime of a request or push message. The work may take longer.
const MAX_MESSAGE_LIFETIME: Duration = Duration::from_secs(60);

/// How a [`RequestBuilder`] of a mapper sends its request: the mapper, and the selector to use. See
/// [`Mapper::request`](super::Mapper::request).
#[derive(Clone, Debug)]
pub struct MapperDispatch {
    shared: Arc<Shared>,
    /// Keeps the mapper running until the request has ended.
    tasks: Arc<Tasks>,
    selector: Option<Arc<dyn Selector>>,
}

impl MapperDispatch {
    pub(super) fn new(shared: Arc<Shared>, tasks: Arc<Tasks>) -> Self {
        Self { shared, tasks, selector: None }
    }
}

impl RequestBuilder<MapperDispatch> {
    /// Selects agents with a [`Selector`] of your own.
    pub fn custom_selector(mut self, selector: impl Selector + 'static) -> Self {
        self.dispatch.selector = Some(Arc::new(selector));
        self
    }
}

impl sealed::Sealed for MapperDispatch {}

#[async_trait]
impl Dispatch for MapperDispatch {
    async fn request(self, spec: RequestSpec) -> Result<Events, RequestError> {
        self.shared.request(&spec, self.selector.as_deref(), self.tasks).await
    }

    async fn push(self, spec: RequestSpec) -> Result<Vec<Identity>, RequestError> {
        self.shared.push(&spec, self.selector.as_deref()).await
    }
}

impl Shared {
    /// Sends a request. `keep_alive` is dropped when the request has ended.
    pub(super) async fn request(
        &self,
        spec: &RequestSpec,
        selector: Option<&dyn Selector>,
        keep_alive: impl Debug + Send + Sync + 'static,
    ) -> Result<Events, RequestError> {
        let events = Events::begin(&self.pending, Token::random()?, spec.timeout, keep_alive);
        self.send_or_store(spec, selector, Some(&events)).await?;
        Ok(events)
    }

    /// Sends a push. Returns the agents that it was sent to; none if it was stored in the offline queue.
    pub(super) async fn push(
        &self,
        spec: &RequestSpec,
        selector: Option<&dyn Selector>,
    ) -> Result<Vec<Identity>, RequestError> {
        self.send_or_store(spec, selector, None).await
    }

    async fn send_or_store(
        &self,
        spec: &RequestSpec,
        selector: Option<&dyn Selector>,
        events: Option<&Events>,
    ) -> Result<Vec<Identity>, RequestError> {
        let dispatcher = Dispatcher { shared: self, selector, events, spec };
        match dispatcher.send().await {
            Err(RequestError::NoTarget(_)) if spec.offline.unwrap_or(self.offline_failsafe) => {
                dispatcher.store_offline().await?;
                Ok(Vec::new())
            }
            other => other,
        }
    }
}

/// Dispatches one request.
struct Dispatcher<'a> {
    shared: &'a Shared,
    selector: Option<&'a dyn Selector>,
    /// The events of a request; `None` for a push.
    events: Option<&'a Events>,
    spec: &'a RequestSpec,
}

impl Dispatcher<'_> {
    /// Sends to the selected agents and returns them. Agents whose queue is gone are removed; if it is gone for all of them, others
    /// are selected.
    async fn send(&self) -> Result<Vec<Identity>, RequestError> {
        let packet = self.packet()?;
        let mut unreachable = BTreeSet::new();
        for _ in 0..MAX_SELECTIONS {
            let selected = self.select(&unreachable).await?;
            let mut sent = Vec::new();
            for group in selected.chunks(Audience::MAX) {
                for (candidate, result) in self.send_to(group, &packet).await? {
                    let record = &candidate.record;
                    match result {
                        Ok(()) => sent.push(record.identity.clone()),
                        Err(SendError::Transport(TransportError::Unroutable(_))) => {
                            tracing::info!(agent = %record.identity, "agent removed: its queue is gone");
                            let _ = self.shared.state.remove(&record.identity, Some(record.instance)).await;
                            unreachable.insert(record.identity.clone());
                        }
                        // The other agents may already have the request.
                        Err(error) if selected.len() > 1 => {
                            let cause = &error as &dyn std::error::Error;
                            tracing::warn!(agent = %record.identity, error = cause, "failed to send a request");
                            if self.events.is_some() {
                                self.report_lost(&record.identity, format!("not sent: {error}"));
                                sent.push(record.identity.clone());
                            }
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            if !sent.is_empty() {
                // Some agents have the request, so the unreachable ones are not replaced.
                for candidate in selected.iter().filter(|it| unreachable.contains(&it.record.identity)) {
                    self.report_lost(&candidate.record.identity, "the agent's queue is gone");
                }
                return Ok(sent);
            }
        }
        Err(no_target(&self.spec.request))
    }

    /// Gives an agent's outcome as lost, unless the request is a push.
    fn report_lost(&self, agent: &Identity, reason: impl Into<String>) {
        if let Some(events) = self.events {
            events.pending().refuse(events.request(), agent, Failure::new(FailureCode::Lost, reason));
        }
    }

    /// The packet for the agents.
    fn packet(&self) -> Result<Packet, RequestError> {
        let link = &self.shared.link;
        let mut request = self.spec.request.clone();
        request.service = request.service.resolved();
        request.from = Some(link.identity().clone());
        let Some(events) = self.events else {
            request.token = Some(Token::random()?);
            return Ok(Packet::Push(request));
        };
        request.token = Some(events.request().token);
        request.deadline = Some(link.now().saturating_add(self.spec.timeout));
        if !link.is_secure() {
            request.reply_to = Some(topology::process_queue_name(link.identity().as_str(), link.instance()));
        }
        Ok(Packet::Request(request))
    }

    /// Selects agents. If none fits, waits for one as long as the request allows.
    async fn select(&self, unreachable: &BTreeSet<Identity>) -> Result<Vec<Candidate>, RequestError> {
        let request = &self.spec.request;
        let mut query = AgentQuery::new(request.service.resolved(), request.tags.clone());
        query.target = request.target.clone();
        let deadline = after(self.spec.wait_for_agents);
        loop {
            let changed = self.shared.agents_changed.notified();
            let mut agents = self.shared.state.find(&query).await.map_err(|error| RequestError::State(error.into()))?;
            let silent_since = self.shared.silent_since();
            agents.retain(|record| record.last_seen >= silent_since && !unreachable.contains(&record.identity));
            if !agents.is_empty() {
                let in_flight = self.shared.pending.in_flight(agents.iter().map(|record| &record.identity));
                let pairs = agents.into_iter().zip(in_flight);
                let candidates: Vec<Candidate> =
                    pairs.map(|(record, in_flight)| Candidate::new(record, in_flight)).collect();
                let selector = self.selector.unwrap_or_else(|| self.shared.selectors.named(request.selector));
                let positions: BTreeSet<usize> = selector.select(&query.service, &candidates).into_iter().collect();
                let selected = candidates.into_iter().enumerate().filter(|(position, _)| positions.contains(position));
                let selected: Vec<Candidate> = selected.map(|(_, candidate)| candidate).collect();
                return if selected.is_empty() { Err(no_target(request)) } else { Ok(selected) };
            }
            let recheck = deadline.min(after(RECHECK_INTERVAL));
            if tokio::time::timeout_at(recheck, changed).await.is_err() && recheck == deadline {
                return Err(no_target(request));
            }
        }
    }

    /// Seals the packet once for a group of agents, and sends it to each.
    async fn send_to<'c>(
        &self,
        group: &'c [Candidate],
        packet: &Packet,
    ) -> Result<Vec<(&'c Candidate, Result<(), SendError>)>, SendError> {
        let identities: Vec<Identity> = group.iter().map(|candidate| candidate.record.identity.clone()).collect();
        let audience = match &identities[..] {
            [identity] => Audience::One(identity.clone()),
            _ => Audience::Many(identities),
        };
        let instances = group.iter().map(|candidate| candidate.record.instance).collect();
        let results = match self.seal(packet, audience, instances).await {
            Ok(sealed) => join_all(group.iter().map(|candidate| self.publish(candidate, &sealed))).await,
            // One agent has no certificate. Seal for each alone, so that the others get the request.
            Err(SendError::Seal(SealError::NoRecipient(_))) if group.len() > 1 => {
                let each = group.iter().map(|candidate| async move {
                    let audience = Audience::One(candidate.record.identity.clone());
                    let sealed = self.seal(packet, audience, vec![candidate.record.instance]).await?;
                    self.publish(candidate, &sealed).await
                });
                join_all(each).await
            }
            Err(error) => return Err(error),
        };
        Ok(group.iter().zip(results).collect())
    }

    /// Stores the message in the offline queue. A request waits there until its deadline, a push for the lifetime of stored messages.
    async fn store_offline(&self) -> Result<(), RequestError> {
        let (shared, queue) = (self.shared, topology::offline());
        let lifetime = if self.events.is_some() { self.spec.timeout } else { Duration::MAX };
        let message = Outbound::new(self.packet()?, Audience::Mappers);
        let message = message.class(MessageClass::Stored).lifetime(lifetime).persistent(true);
        shared.link.transport().declare(&queue).await?;
        if shared.link.learns_peers() {
            let discovered = || wait_for_mappers(shared.advertisements.subscribe(), DISCOVERY_TIMEOUT);
            shared.mappers_discovered.get_or_init(discovered).await;
        }
        let sealed = shared.link.seal(message).await?;
        let target = self.spec.request.target.clone();
        if let Some(events) = self.events {
            events.pending().hand_over(events.request(), HandedOver::new(sealed.id(), self.origin(events), target));
        }
        match shared.link.publish(&sealed, Destination::Queue(queue.name)).await {
            Err(TransportError::Unroutable(queue)) => {
                Err(RequestError::Refused(Failure::failed(format!("the queue {queue} was deleted"))))
            }
            other => Ok(other.map_err(SendError::from)?),
        }
    }

    /// What agents sign with their answers when another mapper dispatches the request.
    fn origin(&self, events: &Events) -> RequestOrigin {
        let request = &self.spec.request;
        RequestOrigin::of(request).unwrap_or_else(|| {
            let digest = RequestDigest::of(&request.service, &request.payload);
            RequestOrigin::new(self.shared.link.identity().clone(), events.request().token, digest)
        })
    }

    async fn seal(&self, packet: &Packet, audience: Audience, instances: Vec<u64>) -> Result<SealedMessage, SendError> {
        let timeout = if self.events.is_some() { self.spec.timeout } else { Duration::MAX };
        let persistent = self.spec.request.persistent.unwrap_or(self.shared.persistent);
        let message = Outbound::new(packet.clone(), audience).instances(instances);
        self.shared.link.seal(message.lifetime(timeout.min(MAX_MESSAGE_LIFETIME)).persistent(persistent)).await
    }

    async fn publish(&self, candidate: &Candidate, sealed: &SealedMessage) -> Result<(), SendError> {
        let record = &candidate.record;
        // Before it is sent: the answer can arrive before the broker's confirmation.
        if let Some(events) = self.events {
            events.pending().expect(events.request(), &record.identity, record.instance, sealed.id());
        }
        let queue = topology::agent_inbox_name(record.identity.as_str());
        let result = self.shared.link.publish(sealed, Destination::Queue(queue)).await;
        if let (Err(_), Some(events)) = (&result, self.events) {
            events.pending().forget(events.request(), &record.identity);
        }
        result.map_err(SendError::from)
    }
}

fn no_target(request: &Request) -> RequestError {
    let mut description = request.service.to_string();
    if let Some(target) = &request.target {
        description = format!("{description} at {target}");
    }
    if !request.tags.is_empty() {
        let tags: Vec<&str> = request.tags.iter().map(Tag::as_str).collect();
        description = format!("{description} with tags {}", tags.join(", "));
    }
    RequestError::NoTarget(description)
}
