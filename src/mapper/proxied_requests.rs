//! Requests of other nodes, from the queue that all mappers share: authorized, dispatched in the caller's name, and answered.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::shared::Shared;
use crate::audit::DecisionSubject;
use crate::link::{Received, Subscription, acknowledge};
use crate::packet::{Failure, FailureCode, Identity, Kind, Packet, Payload, Request, Role, Token};
use crate::policy::Caller;
use crate::request::{Answers, Event, Events, ReplyTo, RequestError, RequestSpec};
use crate::serializer::{Inbound, Verified};

/// The longest timeout of a proxied request.
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Handles requests from the shared queue. The queue's prefetch limits how many run at a time.
pub(super) async fn handle_requests(shared: Arc<Shared>, mut messages: Subscription) {
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            received = messages.next() => {
                let Some(Received { inbound, acker, .. }) = received else { return };
                let shared = shared.clone();
                running.spawn(async move {
                    if let Some(request) = ProxiedRequest::from_inbound(inbound) {
                        request.run(&shared).await;
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
pub(super) struct ProxiedRequest {
    pub request: Request,
    sender: Identity,
    signer: Option<Verified>,
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

    /// Dispatches the request and sends the caller all answers, or the reason for a failure.
    async fn run(self, shared: &Arc<Shared>) {
        match self.dispatch(shared).await {
            Ok(Dispatched::Request(events, reply_to)) => forward_answers(shared, events, reply_to).await,
            Ok(Dispatched::Push) => {}
            Err(error) => self.fail(shared, error).await,
        }
    }

    /// Sends the request to agents, if the policy allows it.
    pub async fn dispatch(&self, shared: &Arc<Shared>) -> Result<Dispatched, RequestError> {
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
        let remaining = request.deadline.map(|deadline| deadline.since(shared.link.now()));
        let spec = RequestSpec {
            timeout: remaining.unwrap_or(shared.request_timeout).min(MAX_TIMEOUT),
            wait_for_agents: Duration::ZERO,
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
    fn on_behalf_of(&self) -> Option<&Identity> {
        self.request.on_behalf_of.as_ref().filter(|_| self.sender.role() == Role::Mapper)
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

/// Forwards intermediate results as they arrive, and at the end all outcomes in one answer.
pub(super) async fn forward_answers(shared: &Shared, mut events: Events, mut reply_to: ReplyTo) {
    let mut answers = Answers::default();
    let result = loop {
        match events.next().await {
            Some(Event::Intermediate { from, key, value, .. }) => {
                reply_to.intermediate(&shared.link, key, value, Some(from)).await;
            }
            Some(Event::Outcome { from, result }) => drop(answers.outcomes.insert(from, result)),
            Some(Event::Failed(failure)) => break Err(failure),
            None => {
                break Payload::new(answers).map_err(|error| Failure::new(FailureCode::BadAnswer, error.to_string()));
            }
        }
    };
    reply_to.answer(&shared.link, result).await;
}

/// The failure that the caller sees. It does not learn about the mapper's own state.
fn failure(error: RequestError) -> Failure {
    match error {
        RequestError::NoTarget(description) => Failure::new(FailureCode::NoTarget, description),
        RequestError::Denied(reason) => Failure::new(FailureCode::Denied, reason),
        _ => Failure::new(FailureCode::Lost, "the mapper could not send it to an agent"),
    }
}
