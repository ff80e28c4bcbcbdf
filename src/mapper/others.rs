//! Requests of other nodes: taken from the queue that all mappers share, dispatched in the asker's name, answered to the asker.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::Shared;
use crate::audit::DecisionSubject;
use crate::link::{Received, Subscription, acknowledge};
use crate::packet::{Failure, FailureCode, Identity, Kind, Packet, Payload, Request, Role};
use crate::policy::Caller;
use crate::request::{Answers, Event, Events, ReplyTo, RequestError, RequestSpec};
use crate::serializer::{Inbound, Verified};

/// The longest time that a request of another node may take.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Takes requests from the queue that all mappers share. As many are under way as may be unacknowledged.
pub(super) async fn requests(shared: Arc<Shared>, mut messages: Subscription) {
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            received = messages.next() => {
                let Some(Received { inbound, acker, .. }) = received else { return };
                let shared = shared.clone();
                under_way.spawn(async move {
                    if let Some(order) = Order::of(inbound) {
                        order.carry_out(&shared).await;
                    }
                    acknowledge(acker).await;
                });
            }
            Some(_) = under_way.join_next() => {}
        }
    }
}

/// What another node wants done.
#[derive(Debug)]
pub(super) struct Order {
    pub request: Request,
    sender: Identity,
    signer: Option<Verified>,
    /// Where the answers go; none for a push.
    reply_to: Option<ReplyTo>,
}

/// An order that was given to agents.
#[derive(Debug)]
pub(super) enum Placed {
    /// Their answers have to be collected.
    DecisionSubject(Events, ReplyTo),
    /// Nobody waits for an answer.
    Pushed,
}

impl Order {
    /// Reads an order; none when the message is none, or does not say where its answer goes.
    pub fn of(inbound: Inbound) -> Option<Self> {
        let (sender, signer) = (inbound.sender().cloned()?, inbound.signer().cloned());
        let (request, reply_to) = match inbound.packet {
            Packet::Request(request) => {
                let reply_to = ReplyTo::of(&request, &sender, signer.as_ref());
                if reply_to.is_none() {
                    tracing::warn!(%sender, "a request that does not say where its answer goes: refused");
                    return None;
                }
                (request, reply_to)
            }
            Packet::Push(request) => (request, None),
            _ => return None,
        };
        Some(Self { request, sender, signer, reply_to })
    }

    /// Has it done, and answers.
    async fn carry_out(self, shared: &Arc<Shared>) {
        match self.place(shared).await {
            Ok(Placed::DecisionSubject(events, reply_to)) => follow(shared, events, reply_to).await,
            Ok(Placed::Pushed) => {}
            Err(error) => self.fail(shared, error).await,
        }
    }

    /// Gives it to agents, if its sender may have it done.
    pub async fn place(&self, shared: &Arc<Shared>) -> Result<Placed, RequestError> {
        let caller = Caller { on_behalf_of: self.origin(), ..Caller::new(&self.sender, self.signer.as_ref()) };
        let decision = shared.policy.authorize_request(&caller, &self.request);
        let asked = DecisionSubject {
            kind: if self.reply_to.is_some() { Kind::Request } else { Kind::Push },
            from: &self.sender,
            id: self.signer.as_ref().map(Verified::id),
            service: Some(&self.request.service),
            on_behalf_of: caller.on_behalf_of,
        };
        shared.link.audit_decision(asked, &decision).await;
        if !decision.allowed {
            return Err(RequestError::Denied(decision.why));
        }
        let mut request = self.request.clone();
        request.on_behalf_of = Some(caller.origin().clone());
        let left = request.deadline.map(|deadline| deadline.since(shared.link.now()));
        let ask = RequestSpec {
            timeout: left.unwrap_or(shared.request_timeout).min(LONGEST),
            wait_for_agents: Duration::ZERO,
            offline: request.offline,
            request,
        };
        match &self.reply_to {
            Some(reply_to) => Ok(Placed::DecisionSubject(shared.request(&ask, None, ()).await?, reply_to.clone())),
            None => shared.push(&ask, None).await.map(|_| Placed::Pushed),
        }
    }

    /// Tells the asker that it cannot be done.
    pub async fn fail(self, shared: &Shared, error: RequestError) {
        tracing::info!(sender = %self.sender, service = %self.request.service, %error, "not dispatched");
        if let Some(reply_to) = self.reply_to {
            reply_to.answer(&shared.link, Err(failure(error))).await;
        }
    }

    /// For whom a mapper asks, when it asks for another node.
    fn origin(&self) -> Option<&Identity> {
        self.request.on_behalf_of.as_ref().filter(|_| self.sender.role() == Role::Mapper)
    }

    /// What names it: the token is random, and chosen by its sender.
    pub fn key(&self) -> (Identity, Option<crate::packet::Token>) {
        (self.sender.clone(), self.request.token)
    }

    /// Whether nobody wants it any more.
    pub fn is_expired(&self, shared: &Shared) -> bool {
        let now = shared.link.now();
        self.request.deadline.is_some_and(|deadline| deadline <= now)
            || self.signer.as_ref().is_some_and(|signer| signer.expires_at() <= now)
    }
}

/// Hands on what agents answer, and in the end all their outcomes in one.
pub(super) async fn follow(shared: &Shared, mut events: Events, mut reply_to: ReplyTo) {
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

/// What the asker is told.
fn failure(error: RequestError) -> Failure {
    match error {
        RequestError::NoTarget(what) => Failure::new(FailureCode::NoTarget, what),
        RequestError::Denied(why) => Failure::new(FailureCode::Denied, why),
        // What goes on inside the mapper is not the asker's.
        _ => Failure::new(FailureCode::Lost, "the mapper could not send it to an agent"),
    }
}
