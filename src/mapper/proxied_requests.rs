//! Requests of other nodes: authorized, dispatched in the caller's name, and answered. They come from the queue that all mappers share,
//! and from the offline queue, where requests that no agent could take wait, sealed for the mappers, until an agent registers. They are
//! stored there by [`dispatch`](super::dispatch).
//!
//! A mapper holds what it has read from the offline queue unacknowledged and in order, so the broker redelivers it to another mapper if this one dies. The
//! serializer's replay memory records a message only once it is completed
//! ([`Link::mark_completed`](crate::link::Link::mark_completed)), so that a message redelivered after a lost connection can be opened
//! again; a copy that was opened before that is recognized before it is dispatched.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::registry::Shared;
use crate::audit::DecisionSubject;
use crate::link::{Received, SendError, Subscription, acknowledge};
use crate::packet::{Failure, FailureCode, Identity, Kind, Packet, Request, Role, Token};
use crate::policy::Caller;
use crate::request::{Event, Events, ForwardedOutcomes, ReplyTo, RequestError, RequestSpec};
use crate::serializer::{Inbound, InboundQueue, Provenance, SealError, Verified};
use crate::transport::{Acker, TransportError, topology};

/// The longest timeout of a proxied request.
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);
/// How many messages of the offline queue one mapper holds. The rest wait at the broker.
pub(super) const OFFLINE_PREFETCH: u16 = 500;
/// How long a mapper that has just started waits for an agent that can take a request: all agents are about to register.
const DISCOVERY_TIME: Duration = Duration::from_secs(1);
/// How long to wait before subscribing to the queue again after a failure.
const RESUBSCRIBE_INTERVAL: Duration = Duration::from_secs(1);

/// Handles requests from the shared queue. The queue's prefetch limits how many run at a time.
pub(super) async fn handle_requests(shared: Arc<Shared>, mut messages: Subscription) {
    let mut running = JoinSet::new();
    let discovered_at = Instant::now() + DISCOVERY_TIME;
    loop {
        tokio::select! {
            received = messages.next() => {
                let Some(Received { inbound, acker, .. }) = received else { return };
                let shared = shared.clone();
                running.spawn(async move {
                    if let Some(request) = ProxiedRequest::from_inbound(inbound) {
                        request.run(&shared, discovered_at.saturating_duration_since(Instant::now())).await;
                    }
                    acknowledge(acker).await;
                });
            }
            Some(_) = running.join_next() => {}
        }
    }
}

/// A request or push of another node.
#[derive(Debug)]
struct ProxiedRequest {
    request: Request,
    sender: Identity,
    signer: Option<Verified>,
    /// Where answers are sent; `None` for a push.
    reply_to: Option<ReplyTo>,
}

/// Identifies a request: tokens are random, but chosen by the sender.
type RequestKey = (Identity, Option<Token>);

/// A proxied request that was sent to agents.
#[derive(Debug)]
enum Dispatched {
    Request(Events, ReplyTo),
    Push,
}

impl ProxiedRequest {
    /// `None` if the message is not a request or push, or does not say where to send the answer.
    fn from_inbound(inbound: Inbound) -> Option<Self> {
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

    /// Dispatches the request and sends the caller all answers, or the reason for a failure.
    async fn run(self, shared: &Arc<Shared>, wait_for_agents: Duration) {
        match self.dispatch(shared, wait_for_agents).await {
            Ok(Dispatched::Request(events, reply_to)) => forward_answers(shared, events, reply_to).await,
            Ok(Dispatched::Push) => {}
            Err(error) => self.fail(shared, error).await,
        }
    }

    /// Sends the request to agents, if the policy allows it.
    async fn dispatch(&self, shared: &Arc<Shared>, wait_for_agents: Duration) -> Result<Dispatched, RequestError> {
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
    async fn fail(self, shared: &Shared, error: RequestError) {
        tracing::info!(sender = %self.sender, service = %self.request.service, %error, "failed to dispatch a request");
        if let Some(reply_to) = self.reply_to {
            reply_to.answer(&shared.link, Err(failure(error))).await;
        }
    }

    /// The node that a mapper forwards the request for. Only mappers may set it.
    fn on_behalf_of(&self) -> Option<&Identity> {
        self.request.on_behalf_of.as_ref().filter(|_| self.sender.role() == Role::Mapper)
    }

    /// The token that the node at the origin of the request chose.
    fn origin_token(&self) -> Option<Token> {
        if self.on_behalf_of().is_some() { self.request.origin_token } else { self.request.token }
    }

    fn key(&self) -> RequestKey {
        (self.sender.clone(), self.request.token)
    }

    /// Whether the deadline of the request, or the lifetime of its message, has passed.
    fn is_expired(&self, shared: &Shared) -> bool {
        let now = shared.link.now();
        self.request.deadline.is_some_and(|deadline| deadline <= now)
            || self.signer.as_ref().is_some_and(|signer| signer.expires_at() <= now)
    }
}

/// Forwards intermediate results as they arrive, and at the end all outcomes in one answer. Answers of agents are forwarded with their
/// proofs: without it, the caller refuses them.
async fn forward_answers(shared: &Shared, mut events: Events, mut reply_to: ReplyTo) {
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
        _ => Failure::new(FailureCode::Lost, "the mapper could not send it to an agent"),
    }
}

/// The acknowledgements of all messages that are held or running. A redelivered message replaces the acker of its earlier delivery,
/// which is useless after a lost connection.
#[derive(Debug, Default)]
struct Ackers(Mutex<HashMap<RequestKey, Acker>>);

impl Ackers {
    /// Returns whether there was one already.
    fn insert(&self, key: RequestKey, acker: Acker) -> bool {
        self.0.lock().insert(key, acker).is_some()
    }

    fn clear(&self) {
        self.0.lock().clear();
    }

    fn remove(&self, key: &RequestKey) -> Option<Acker> {
        self.0.lock().remove(key)
    }
}

/// A message that waits for an agent.
struct WaitingMessage {
    request: ProxiedRequest,
    provenance: Provenance,
}

/// Reads the offline queue, and dispatches what waits whenever an agent registers and at a regular interval.
pub(super) async fn redeliver(shared: Arc<Shared>, mut messages: Subscription) {
    let ackers = Arc::new(Ackers::default());
    let mut waiting: VecDeque<WaitingMessage> = VecDeque::new();
    let mut running = JoinSet::new();
    let mut ticks = interval(shared.offline_redelivery);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Created before the waiting messages are dispatched, so that an agent that registers meanwhile is not missed.
    let mut agents_changed = Box::pin(shared.agents_changed.notified());
    loop {
        let dispatch = tokio::select! {
            received = messages.next() => {
                let Some(received) = received else { return };
                accept(&ackers, &mut waiting, received).await
            }
            () = &mut agents_changed => {
                agents_changed.set(shared.agents_changed.notified());
                true
            }
            _ = ticks.tick() => {
                // Another mapper may be able to open what this one cannot. Only while nothing runs: a running request must not be
                // redelivered to the other mapper.
                if messages.held_for_others() > 0 && running.is_empty() {
                    messages = match return_to_queue(&shared, messages).await {
                        Some(messages) => messages,
                        None => return,
                    };
                    waiting.clear();
                    ackers.clear();
                }
                true
            }
            Some(_) = running.join_next() => false,
        };
        if dispatch {
            dispatch_waiting(&shared, &ackers, &mut waiting, &mut running).await;
        }
    }
}

/// Returns all messages to the queue, in their order, and subscribes again, behind the mappers that wait for their turn.
async fn return_to_queue(shared: &Shared, messages: Subscription) -> Option<Subscription> {
    tracing::info!(
        messages = messages.held_for_others(),
        "returning offline messages that are sealed for other mappers"
    );
    drop(messages);
    loop {
        match shared.link.subscribe(&topology::offline(), InboundQueue::Offline, OFFLINE_PREFETCH).await {
            Ok(messages) => return Some(messages),
            Err(TransportError::Closed) => return None,
            Err(error) => {
                tracing::warn!(%error, "failed to subscribe to the offline queue; trying again");
                tokio::time::sleep(RESUBSCRIBE_INTERVAL).await;
            }
        }
    }
}

/// Adds a message to those that wait; returns whether it is new.
async fn accept(ackers: &Ackers, waiting: &mut VecDeque<WaitingMessage>, received: Received) -> bool {
    let Received { inbound, acker, .. } = received;
    let provenance = inbound.provenance.clone();
    let Some(mut request) = ProxiedRequest::from_inbound(inbound) else {
        acknowledge(acker).await;
        return false;
    };
    // It already is in the offline queue, and must not be stored there again.
    request.request.offline = Some(false);
    if ackers.insert(request.key(), acker) {
        return false;
    }
    waiting.push_back(WaitingMessage { request, provenance });
    true
}

/// Dispatches the waiting messages. Those that no agent can take yet keep waiting, in their order.
async fn dispatch_waiting(
    shared: &Arc<Shared>,
    ackers: &Arc<Ackers>,
    waiting: &mut VecDeque<WaitingMessage>,
    running: &mut JoinSet<()>,
) {
    // An agent may register in the middle of this pass: a message must not overtake an earlier one of its sender and service.
    let mut blocked = HashSet::new();
    for _ in 0..waiting.len() {
        let Some(WaitingMessage { request, provenance }) = waiting.pop_front() else { return };
        let key = request.key();
        if shared.link.is_completed(&provenance) {
            tracing::debug!("copy of a completed offline message dropped");
            complete(shared, ackers, &key, &provenance).await;
            continue;
        }
        let lane = (key.0.clone(), request.request.service.clone());
        if blocked.contains(&lane) {
            waiting.push_back(WaitingMessage { request, provenance });
            continue;
        }
        if request.is_expired(shared) {
            tracing::info!(service = %request.request.service, "offline message expired: no agent took it in time");
            complete(shared, ackers, &key, &provenance).await;
            continue;
        }
        match request.dispatch(shared, Duration::ZERO).await {
            Ok(Dispatched::Push) => complete(shared, ackers, &key, &provenance).await,
            Ok(Dispatched::Request(events, reply_to)) => {
                let (shared, ackers) = (shared.clone(), ackers.clone());
                running.spawn(async move {
                    forward_answers(&shared, events, reply_to).await;
                    complete(&shared, &ackers, &key, &provenance).await;
                });
            }
            Err(error) if is_temporary(&error) => {
                blocked.insert(lane);
                waiting.push_back(WaitingMessage { request, provenance });
            }
            Err(error) => {
                request.fail(shared, error).await;
                complete(shared, ackers, &key, &provenance).await;
            }
        }
    }
}

/// Records that the message must not be accepted again, and acknowledges it.
async fn complete(shared: &Shared, ackers: &Ackers, key: &RequestKey, provenance: &Provenance) {
    shared.link.mark_completed(provenance);
    if let Some(acker) = ackers.remove(key) {
        acknowledge(acker).await;
    }
}

/// Whether dispatching may succeed later.
fn is_temporary(error: &RequestError) -> bool {
    match error {
        RequestError::NoTarget(_) | RequestError::State(_) => true,
        RequestError::Send(SendError::Transport(error)) => error.is_retryable(),
        RequestError::Send(SendError::Seal(error)) => matches!(error, SealError::NoRecipient(_) | SealError::Store(_)),
        _ => false,
    }
}
