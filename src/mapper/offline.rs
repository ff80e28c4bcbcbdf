//! The offline queue: requests that nobody could take when they were made wait here, sealed to the mappers, until an agent comes.
//!
//! What is read and cannot be given to an agent yet is held unacknowledged, in its order; the broker gives it to another mapper
//! when this one dies. The serializer's replay memory takes note of a message only when it has been carried out
//! ([`Link::mark_completed`](crate::link::Link::mark_completed)), so that one that comes again after a lost connection is opened again; a copy that was
//! opened before that is recognised when its turn comes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::Shared;
use super::others::{Order, Placed, follow};
use crate::link::{Outbound, Received, SendError, Subscription, acknowledge, wait_for_mappers};
use crate::packet::{Failure, Identity, Packet, Token};
use crate::request::{Events, RequestError, RequestSpec};
use crate::serializer::{Audience, InboundQueue, MessageClass, Provenance, SealError};
use crate::transport::{Acker, Destination, TransportError, topology};

/// How many messages of the offline queue one mapper holds. Those behind them wait at the broker.
pub(super) const HELD: u16 = 500;

/// How long the first message for the offline queue waits for other mappers to make themselves known.
const OTHERS_KNOWN: Duration = Duration::from_millis(500);

/// How long to wait before the queue is read again, when that did not work.
const RETRY: Duration = Duration::from_secs(1);

type Key = (Identity, Option<Token>);

/// What is held or under way, with the means to acknowledge it: that of the last delivery, since one that came before a lost
/// connection is of no use.
#[derive(Debug, Default)]
struct Ackers(Mutex<HashMap<Key, Acker>>);

impl Ackers {
    /// Keeps an acker; whether there was one already.
    fn keep(&self, key: Key, acker: Acker) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, acker).is_some()
    }

    fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn take(&self, key: &Key) -> Option<Acker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key)
    }
}

struct Held {
    order: Order,
    provenance: Provenance,
}

/// Reads the offline queue, and gives what waits to agents: when one registers, and from time to time.
pub(super) async fn redeliver(shared: Arc<Shared>, mut messages: Subscription) {
    let ackers = Arc::new(Ackers::default());
    let mut held: VecDeque<Held> = VecDeque::new();
    let mut under_way = JoinSet::new();
    let mut ticks = interval(shared.offline_redelivery);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // DecisionSubject for before what is held is looked at, and kept meanwhile: so an agent that registers then is not missed.
    let mut came = Box::pin(shared.changed.notified());
    loop {
        let new = tokio::select! {
            received = messages.next() => {
                let Some(received) = received else { return };
                take(&ackers, &mut held, received).await
            }
            () = &mut came => {
                came.set(shared.changed.notified());
                true
            }
            _ = ticks.tick() => {
                // Another mapper may be able to open what this one cannot: its turn, while nothing that was begun here can be begun
                // there as well.
                if messages.held_for_others() > 0 && under_way.is_empty() {
                    messages = match give_way(&shared, messages).await {
                        Some(messages) => messages,
                        None => return,
                    };
                    held.clear();
                    ackers.clear();
                }
                true
            }
            Some(_) = under_way.join_next() => false,
        };
        if new {
            deliver(&shared, &ackers, &mut held, &mut under_way).await;
        }
    }
}

/// Reads the queue anew, behind the mappers that wait for their turn; all that was read goes back to its place.
async fn give_way(shared: &Shared, messages: Subscription) -> Option<Subscription> {
    tracing::info!(
        messages = messages.held_for_others(),
        "waiting work is sealed to other mappers: giving way to them"
    );
    drop(messages);
    loop {
        match shared.link.subscribe(&topology::offline(), InboundQueue::Offline, HELD).await {
            Ok(messages) => return Some(messages),
            Err(TransportError::Closed) => return None,
            Err(error) => {
                tracing::warn!(%error, "the offline queue cannot be read yet");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Takes a delivery in; whether it is a new order.
async fn take(ackers: &Ackers, held: &mut VecDeque<Held>, received: Received) -> bool {
    let Received { inbound, acker, .. } = received;
    let provenance = inbound.provenance.clone();
    let Some(mut order) = Order::of(inbound) else {
        acknowledge(acker).await;
        return false;
    };
    // It waits here already.
    order.request.offline = Some(false);
    if ackers.keep(order.key(), acker) {
        return false;
    }
    held.push_back(Held { order, provenance });
    true
}

/// Gives what is held to agents; what nobody can take stays, in its order.
async fn deliver(shared: &Arc<Shared>, ackers: &Arc<Ackers>, held: &mut VecDeque<Held>, under_way: &mut JoinSet<()>) {
    // An agent may register meanwhile: nothing overtakes what its sender asked of the same service before.
    let mut passed_over = HashSet::new();
    for _ in 0..held.len() {
        let Some(Held { order, provenance }) = held.pop_front() else { return };
        let key = order.key();
        if shared.link.is_completed(&provenance) {
            tracing::debug!("a copy of what has been carried out");
            finish(shared, ackers, &key, &provenance).await;
            continue;
        }
        let line = (key.0.clone(), order.request.service.clone());
        if passed_over.contains(&line) {
            held.push_back(Held { order, provenance });
            continue;
        }
        let placed = if order.is_expired(shared) { None } else { Some(order.place(shared).await) };
        match placed {
            None => {
                tracing::info!(service = %order.request.service, "nobody came for it before its deadline");
                finish(shared, ackers, &key, &provenance).await;
            }
            Some(Ok(Placed::Pushed)) => finish(shared, ackers, &key, &provenance).await,
            Some(Ok(Placed::DecisionSubject(events, reply_to))) => {
                let (shared, ackers) = (shared.clone(), ackers.clone());
                under_way.spawn(async move {
                    follow(&shared, events, reply_to).await;
                    finish(&shared, &ackers, &key, &provenance).await;
                });
            }
            Some(Err(error)) if may_pass(&error) => {
                passed_over.insert(line);
                held.push_back(Held { order, provenance });
            }
            Some(Err(error)) => {
                order.fail(shared, error).await;
                finish(shared, ackers, &key, &provenance).await;
            }
        }
    }
}

/// The message has been carried out: it is never taken again.
async fn finish(shared: &Shared, ackers: &Ackers, key: &Key, provenance: &Provenance) {
    shared.link.mark_completed(provenance);
    if let Some(acker) = ackers.take(key) {
        acknowledge(acker).await;
    }
}

/// Whether waiting can help.
fn may_pass(error: &RequestError) -> bool {
    match error {
        RequestError::NoTarget(_) | RequestError::State(_) => true,
        RequestError::Send(SendError::Transport(error)) => error.is_retryable(),
        RequestError::Send(SendError::Seal(error)) => matches!(error, SealError::NoRecipient(_) | SealError::Store(_)),
        _ => false,
    }
}

impl Shared {
    /// Puts a request into the offline queue; one that is answered waits there until its deadline.
    pub(super) async fn store(
        &self,
        ask: &RequestSpec,
        packet: Packet,
        events: Option<&Events>,
    ) -> Result<(), RequestError> {
        let queue = topology::offline();
        self.link.transport().declare(&queue).await?;
        if self.link.learns_peers() {
            // Who reads it later is a mapper that is known now.
            self.settled.get_or_init(|| wait_for_mappers(self.advertised.subscribe(), OTHERS_KNOWN)).await;
        }
        let mut message = Outbound::new(packet, Audience::Mappers);
        message.class = MessageClass::Stored;
        message.lifetime = if events.is_some() { ask.timeout } else { Duration::MAX };
        message.persistent = true;
        let ready = self.link.seal(message).await?;
        if let Some(events) = events {
            events.pending().hand_over(events.request(), ready.id());
        }
        match self.link.publish(&ready, Destination::Queue(queue.name)).await {
            Err(TransportError::Unroutable(queue)) => {
                Err(RequestError::Refused(Failure::failed(format!("the queue {queue} went away"))))
            }
            other => Ok(other.map_err(SendError::from)?),
        }
    }
}
