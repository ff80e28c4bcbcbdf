//! Requests of other nodes, from the queue that all mappers share: authorized, dispatched in the caller's name, and answered.
//!
//! Each sender has a share of the places for them ([`Places`]); a request over the share is refused at once. The broker's delivery is
//! acknowledged when the request is answered, so that another mapper takes it over if this one dies; but not later than when the message
//! expires, because no mapper would accept it then. So a request with a distant deadline holds no delivery.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::places::Places;
use super::registry::Shared;
use crate::audit::DecisionSubject;
use crate::limits::{LogDecision, LogLimit};
use crate::link::{Received, Subscription, acknowledge};
use crate::packet::{Failure, FailureCode, Identity, Kind, Packet, Request, Role, Token};
use crate::policy::Caller;
use crate::request::{Event, Events, ForwardedOutcomes, ReplyTo, RequestError, RequestSpec};
use crate::serializer::{Inbound, Verified};
use crate::transport::Acker;

/// The longest time that agents have for a proxied request. A later deadline is cut.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// How many messages of the shared queue may be unacknowledged.
pub(super) const REQUESTS_PREFETCH: u16 = 1024;
/// How many proxied requests one mapper works on. Fewer than the prefetch, so that there is always room to refuse more.
const MAX_RUNNING: usize = 512;
/// How many refusals are sent at a time. Further requests over a share are dropped without an answer.
const MAX_REFUSALS: usize = 448;
/// How long to try to send a refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a delivery is held at most: the longest lifetime of a live message.
pub(super) const HOLD_LIMIT: Duration = Duration::from_secs(60);
/// The message of the failure.
const OVER_SHARE: &str = "the mapper works on too many requests of this node; try again later";
/// How many lines about senders over their share are logged per second.
const MAX_LOGGED_PER_SECOND: u64 = 5;
/// How long a mapper that has just started waits for an agent that can take a request: all agents are about to register.
const DISCOVERY_TIME: Duration = Duration::from_secs(1);

/// Handles requests from the shared queue.
pub(super) async fn handle_requests(shared: Arc<Shared>, mut messages: Subscription) {
    let (places, refusals) = (Places::new(MAX_RUNNING), Places::new(MAX_REFUSALS));
    let log_limit = LogLimit::new(MAX_LOGGED_PER_SECOND);
    let mut running = JoinSet::new();
    let discovered_at = Instant::now() + DISCOVERY_TIME;
    loop {
        tokio::select! {
            biased;
            Some(_) = running.join_next() => {}
            received = messages.next() => {
                let Some(Received { inbound, acker, .. }) = received else { return };
                let Some(request) = ProxiedRequest::from_inbound(inbound) else {
                    running.spawn(acknowledge(acker));
                    continue;
                };
                let shared = shared.clone();
                if let Some(place) = places.take(&request.sender) {
                    let wait_for_agents = discovered_at.saturating_duration_since(Instant::now());
                    running.spawn(async move {
                        request.serve(&shared, acker, wait_for_agents).await;
                        drop(place);
                    });
                    continue;
                }
                if log_limit.next(shared.link.now()) == LogDecision::Log {
                    tracing::warn!(sender = %request.sender, "request refused: its sender has its share of this mapper's places");
                }
                let place = refusals.take(&request.sender);
                running.spawn(async move {
                    if place.is_some() {
                        let _ = timeout(REFUSAL_TIMEOUT, request.refuse_overload(&shared)).await;
                    }
                    acknowledge(acker).await;
                });
            }
        }
    }
}

/// A request or push of another node.
#[derive(Debug)]
pub(super) struct ProxiedRequest {
    pub request: Request,
    pub sender: Identity,
    pub signer: Option<Verified>,
    /// Where answers are sent; `None` for a push.
    reply_to: Option<ReplyTo>,
}

/// Identifies a request: tokens are random, but chosen by the sender.
pub(super) type RequestKey = (Identity, Option<Token>);

/// A proxied request that was sent to agents.
#[derive(Debug)]
pub(super) enum Dispatched {
    Request(Events, ReplyTo),
    Push,
}

impl ProxiedRequest {
    /// `None` if the message is not a request or push, or does not say where to send the answer.
    pub fn from_inbound(inbound: Inbound) -> Option<Self> {
        let (sender, signer) = (inbound.sender().cloned()?, inbound.signer().cloned());
        let (request, reply_to) = match inbound.packet {
            Packet::Request(request) => {
                let reply_to = ReplyTo::of(&request, &sender, signer.as_ref());
                if reply_to.is_none() {
                    tracing::warn!(%sender, "request refused: it does not say where to send the answer");
                    return None;
                }
                (request, reply_to)
            }
            Packet::Push(request) => (request, None),
            _ => return None,
        };
        Some(Self { request, sender, signer, reply_to })
    }

    /// Runs the request. Its delivery is acknowledged at the end, but not later than when its message expires.
    async fn serve(self, shared: &Arc<Shared>, acker: Acker, wait_for_agents: Duration) {
        let expires_in = self.signer.as_ref().map_or(HOLD_LIMIT, |it| it.expires_at().since(shared.link.now()));
        let mut run = std::pin::pin!(self.run(shared, wait_for_agents));
        tokio::select! {
            biased;
            () = &mut run => acknowledge(acker).await,
            () = sleep(expires_in.min(HOLD_LIMIT)) => {
                acknowledge(acker).await;
                run.await;
            }
        }
    }

    /// Tells the caller that it has its share of places.
    async fn refuse_overload(&self, shared: &Shared) {
        if let Some(reply_to) = &self.reply_to {
            reply_to.answer(&shared.link, Err(failure(RequestError::Overloaded(OVER_SHARE.to_owned())))).await;
        }
    }

    /// Dispatches the request and sends the caller all answers, or the reason for a failure.
    async fn run(self, shared: &Arc<Shared>, wait_for_agents: Duration) {
        match self.dispatch(shared, wait_for_agents).await {
            Ok(Dispatched::Request(events, reply_to)) => forward_answers(shared, events, reply_to).await,
            Ok(Dispatched::Push) => {}
            Err(error) => self.fail(shared, error).await,
        }
    }

    /// Sends the request to agents, if the policy allows it.
    pub async fn dispatch(&self, shared: &Arc<Shared>, wait_for_agents: Duration) -> Result<Dispatched, RequestError> {
        let caller = Caller::new(&self.sender, self.signer.as_ref()).on_behalf_of(self.on_behalf_of());
        let decision = shared.policy.authorize_request(&caller, &self.request);
        let kind = if self.reply_to.is_some() { Kind::Request } else { Kind::Push };
        let subject = DecisionSubject::new(kind, &self.sender)
            .id(self.signer.as_ref().map(Verified::id))
            .service(&self.request.service)
            .on_behalf_of(caller.on_behalf_of);
        shared.link.audit_decision(subject, &decision).await;
        if !decision.allowed {
            return Err(RequestError::Denied(decision.reason));
        }
        let mut request = self.request.clone();
        request.on_behalf_of = Some(caller.origin().clone());
        request.origin_token = self.origin_token();
        let remaining = request.deadline.map(|deadline| deadline.since(shared.link.now()));
        let spec = RequestSpec {
            timeout: remaining.unwrap_or(shared.request_timeout).min(MAX_TIMEOUT),
            wait_for_agents,
            offline: request.offline,
            request,
        };
        match &self.reply_to {
            Some(reply_to) => Ok(Dispatched::Request(shared.request(&spec, None, ()).await?, reply_to.clone())),
            None => shared.push(&spec, None).await.map(|_| Dispatched::Push),
        }
    }

    /// Tells the caller that the request failed.
    pub async fn fail(self, shared: &Shared, error: RequestError) {
        tracing::info!(sender = %self.sender, service = %self.request.service, %error, "failed to dispatch a request");
        if let Some(reply_to) = self.reply_to {
            reply_to.answer(&shared.link, Err(failure(error))).await;
        }
    }

    /// The node that a mapper forwards the request for. Only mappers may set it.
    pub fn on_behalf_of(&self) -> Option<&Identity> {
        self.request.on_behalf_of.as_ref().filter(|_| self.sender.role() == Role::Mapper)
    }

    /// The token that the node at the origin of the request chose.
    fn origin_token(&self) -> Option<Token> {
        if self.on_behalf_of().is_some() { self.request.origin_token } else { self.request.token }
    }

    pub fn key(&self) -> RequestKey {
        (self.sender.clone(), self.request.token)
    }

    /// Whether the deadline of the request, or the lifetime of its message, has passed.
    pub fn is_expired(&self, shared: &Shared) -> bool {
        let now = shared.link.now();
        self.request.deadline.is_some_and(|deadline| deadline <= now)
            || self.signer.as_ref().is_some_and(|signer| signer.expires_at() <= now)
    }
}

/// Forwards intermediate results as they arrive, and at the end all outcomes in one answer. Answers of agents are forwarded with their
/// proofs: without it, the caller refuses them.
pub(super) async fn forward_answers(shared: &Shared, mut events: Events, mut reply_to: ReplyTo) {
    let mut outcomes = ForwardedOutcomes::default();
    let (result, proofs) = loop {
        match events.next().await {
            Some(Event::Intermediate { from, proof: Some(proof), .. }) => {
                reply_to.forward(&shared.link, from, &proof).await;
            }
            Some(Event::Intermediate { from, key, value, .. }) => {
                reply_to.intermediate(&shared.link, key, value, Some(from)).await;
            }
            Some(Event::Outcome { from, result, proof }) => outcomes.add(from, result, proof),
            Some(Event::Failed(failure)) => break (Err(failure), Vec::new()),
            None => break outcomes.finish(),
        }
    };
    reply_to.answer_with_proofs(&shared.link, result, proofs).await;
}

/// The failure that the caller sees. It does not learn about the mapper's own state.
fn failure(error: RequestError) -> Failure {
    match error {
        RequestError::NoTarget(description) => Failure::new(FailureCode::NoTarget, description),
        RequestError::Denied(reason) => Failure::new(FailureCode::Denied, reason),
        RequestError::Overloaded(reason) => Failure::new(FailureCode::Overloaded, reason),
        _ => Failure::new(FailureCode::Lost, "the mapper could not send it to an agent"),
    }
}
