//! Giving a request to agents: choosing, sealing once for all, sending, and choosing others where the chosen ones are gone.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;

use super::selector::{Candidate, Selector};
use super::state::AgentQuery;
use super::{Mapper, Shared};
use crate::link::{Outbound, SealedMessage, SendError};
use crate::packet::{Failure, FailureCode, Identity, Packet, Request, Tag, Token};
use crate::request::{Dispatch, Events, RequestBuilder, RequestError, RequestSpec, after, sealed};
use crate::serializer::{Audience, SealError};
use crate::transport::{Destination, TransportError, topology};

/// How many times another agent is chosen, when the chosen one turns out to be gone.
const CHOICES: usize = 8;
/// How soon an agent is seen that was silent and is heard again: it does not register anew while it is still remembered.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The longest lifetime of a message that asks for work; the work itself may take longer.
const LIFETIME: Duration = Duration::from_secs(60);

/// A mapper that is asked for work, with the selector that was given to it.
#[derive(Clone, Debug)]
pub struct MapperDispatch {
    pub(super) mapper: Mapper,
    pub(super) selector: Option<Arc<dyn Selector>>,
}

impl RequestBuilder<MapperDispatch> {
    /// Chooses by a rule of your own.
    pub fn selector_by(mut self, selector: Arc<dyn Selector>) -> Self {
        self.dispatch.selector = Some(selector);
        self
    }
}

impl sealed::Sealed for MapperDispatch {}

#[async_trait]
impl Dispatch for MapperDispatch {
    async fn request(self, ask: RequestSpec) -> Result<Events, RequestError> {
        self.mapper.shared.request(&ask, self.selector.as_deref(), self.mapper.clone()).await
    }

    async fn push(self, ask: RequestSpec) -> Result<Vec<Identity>, RequestError> {
        self.mapper.shared.push(&ask, self.selector.as_deref()).await
    }
}

impl Shared {
    /// Sends a request; `keep` is kept until the request has ended.
    pub(super) async fn request(
        &self,
        ask: &RequestSpec,
        selector: Option<&dyn Selector>,
        keep: impl Debug + Send + Sync + 'static,
    ) -> Result<Events, RequestError> {
        let events = Events::begin(&self.jobs, Token::random()?, ask.timeout, keep);
        self.send_or_store(ask, selector, Some(&events)).await?;
        Ok(events)
    }

    /// Sends a push; gives who got it: nobody yet, when it waits in the offline queue.
    pub(super) async fn push(
        &self,
        ask: &RequestSpec,
        selector: Option<&dyn Selector>,
    ) -> Result<Vec<Identity>, RequestError> {
        self.send_or_store(ask, selector, None).await
    }

    async fn send_or_store(
        &self,
        ask: &RequestSpec,
        selector: Option<&dyn Selector>,
        events: Option<&Events>,
    ) -> Result<Vec<Identity>, RequestError> {
        let sending = Sending { shared: self, selector, events, ask };
        match sending.send().await {
            Err(RequestError::NoTarget(_)) if ask.offline.unwrap_or(self.offline_failsafe) => {
                self.store(ask, sending.packet()?, events).await?;
                Ok(Vec::new())
            }
            other => other,
        }
    }
}

/// One request on its way to agents.
struct Sending<'a> {
    shared: &'a Shared,
    selector: Option<&'a dyn Selector>,
    /// Where the answers go; none for a push.
    events: Option<&'a Events>,
    ask: &'a RequestSpec,
}

impl Sending<'_> {
    /// Sends to the chosen agents; returns who got it. Agents whose queue is gone are forgotten, and others chosen.
    async fn send(&self) -> Result<Vec<Identity>, RequestError> {
        let packet = self.packet()?;
        let mut gone = BTreeSet::new();
        for _ in 0..CHOICES {
            let chosen = self.choose(&gone).await?;
            let mut sent = Vec::new();
            for group in chosen.chunks(Audience::MAX) {
                for (identity, result) in self.send_to(group, &packet).await? {
                    match result {
                        Ok(()) => sent.push(identity),
                        Err(SendError::Transport(TransportError::Unroutable(_))) => {
                            tracing::info!(agent = %identity, "its queue is gone: another agent is chosen");
                            let meant = group.iter().find(|candidate| candidate.record.identity == identity);
                            let instance = meant.map(|candidate| candidate.record.instance);
                            let _ = self.shared.state.remove(&identity, instance).await;
                            gone.insert(identity);
                        }
                        // One of several: the others have it already.
                        Err(error) if chosen.len() > 1 => {
                            tracing::warn!(agent = %identity, error = &error as &dyn std::error::Error, "not sent");
                            if let Some(events) = self.events {
                                let failure = Failure::new(FailureCode::Lost, format!("not sent: {error}"));
                                events.pending().refuse(events.request(), &identity, failure);
                                sent.push(identity);
                            }
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            if !sent.is_empty() {
                // The others have it: nobody else is chosen in the place of those that are gone.
                let lost = chosen.iter().map(|candidate| &candidate.record.identity).filter(|one| gone.contains(*one));
                for identity in lost {
                    if let Some(events) = self.events {
                        let failure = Failure::new(FailureCode::Lost, "the agent's queue is gone");
                        events.pending().refuse(events.request(), identity, failure);
                    }
                }
                return Ok(sent);
            }
        }
        Err(no_target(&self.ask.request))
    }

    /// What the agents get.
    fn packet(&self) -> Result<Packet, RequestError> {
        let link = &self.shared.link;
        let mut request = self.ask.request.clone();
        request.service = request.service.resolved();
        request.from = Some(link.identity().clone());
        let Some(events) = self.events else {
            request.token = Some(Token::random()?);
            return Ok(Packet::Push(request));
        };
        request.token = Some(events.request().token);
        request.deadline = Some(link.now().saturating_add(self.ask.timeout));
        if !link.is_secure() {
            request.reply_to = Some(topology::process_queue_name(link.identity().as_str(), link.instance()));
        }
        Ok(Packet::Request(request))
    }

    /// Who gets it; waits for somebody to come as long as patience lasts.
    async fn choose(&self, gone: &BTreeSet<Identity>) -> Result<Vec<Candidate>, RequestError> {
        let request = &self.ask.request;
        let mut query = AgentQuery::new(request.service.resolved(), request.tags.clone());
        query.target = request.target.clone();
        let until = after(self.ask.wait_for_agents);
        loop {
            let changed = self.shared.changed.notified();
            let mut found = self.shared.state.find(&query).await.map_err(|error| RequestError::State(error.into()))?;
            let silent_since = self.shared.silent_since();
            found.retain(|record| record.last_seen >= silent_since && !gone.contains(&record.identity));
            if !found.is_empty() {
                let in_flight = self.shared.jobs.in_flight(found.iter().map(|record| &record.identity));
                let with = |(record, in_flight)| Candidate { record, in_flight };
                let candidates: Vec<Candidate> = found.into_iter().zip(in_flight).map(with).collect();
                let selector = self.selector.unwrap_or_else(|| self.shared.selectors.named(request.selector));
                let wanted: BTreeSet<usize> = selector.select(&query.service, &candidates).into_iter().collect();
                let chosen: Vec<Candidate> =
                    candidates.into_iter().enumerate().filter(|(at, _)| wanted.contains(at)).map(|(_, c)| c).collect();
                return if chosen.is_empty() { Err(no_target(request)) } else { Ok(chosen) };
            }
            let again = until.min(after(LOOK_AGAIN));
            if tokio::time::timeout_at(again, changed).await.is_err() && again == until {
                return Err(no_target(request));
            }
        }
    }

    /// Seals once for a group of agents, and gives it to each.
    async fn send_to(
        &self,
        group: &[Candidate],
        packet: &Packet,
    ) -> Result<Vec<(Identity, Result<(), SendError>)>, SendError> {
        let all: Vec<Identity> = group.iter().map(|candidate| candidate.record.identity.clone()).collect();
        let audience = match &all[..] {
            [one] => Audience::One(one.clone()),
            _ => Audience::Many(all),
        };
        match self.seal(packet, audience).await {
            Ok(ready) => Ok(join_all(group.iter().map(|candidate| self.publish(candidate, &ready))).await),
            // One without a certificate must not keep the others from their work.
            Err(SendError::Seal(SealError::NoRecipient(_))) if group.len() > 1 => {
                let each = group.iter().map(|candidate| async move {
                    let identity = candidate.record.identity.clone();
                    match self.seal(packet, Audience::One(identity.clone())).await {
                        Ok(ready) => self.publish(candidate, &ready).await,
                        Err(error) => (identity, Err(error)),
                    }
                });
                Ok(join_all(each).await)
            }
            Err(error) => Err(error),
        }
    }

    async fn seal(&self, packet: &Packet, audience: Audience) -> Result<SealedMessage, SendError> {
        let mut message = Outbound::new(packet.clone(), audience);
        message.lifetime = if self.events.is_some() { self.ask.timeout.min(LIFETIME) } else { LIFETIME };
        message.persistent = self.ask.request.persistent.unwrap_or(self.shared.persistent);
        self.shared.link.seal(message).await
    }

    async fn publish(&self, candidate: &Candidate, ready: &SealedMessage) -> (Identity, Result<(), SendError>) {
        let record = &candidate.record;
        // Before it is sent: the answer may be faster than the broker's confirmation.
        if let Some(events) = self.events {
            events.pending().expect(events.request(), &record.identity, record.instance, ready.id());
        }
        let queue = topology::agent_inbox_name(record.identity.as_str());
        let result = self.shared.link.publish(ready, Destination::Queue(queue)).await;
        if let (Err(_), Some(events)) = (&result, self.events) {
            events.pending().forget(events.request(), &record.identity);
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
