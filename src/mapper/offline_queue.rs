//! The offline queue: requests that no agent could take wait there, sealed for the mappers, until an agent registers. They are stored
//! there by [`dispatch`](super::dispatch).
//!
//! A mapper holds what it has read unacknowledged and in order, so the broker redelivers it to another mapper if this one dies. The
//! serializer's replay memory records a message only once it is completed
//! ([`Link::mark_completed`](crate::link::Link::mark_completed)), so that a message redelivered after a lost connection can be opened
//! again; a copy that was opened before that is recognized before it is dispatched.
//!
//! It holds a bounded number and size of messages. When it is full of messages that cannot be dispatched or opened, it moves them behind
//! the others and continues. It holds no delivery for longer than [`HAND_BACK_INTERVAL`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::places::Places;
use super::proxied_requests::{Dispatched, HOLD_LIMIT, ProxiedRequest, RequestKey, forward_answers};
use super::registry::Shared;
use crate::link::{HeldMessage, Received, SendError, Subscription, acknowledge};
use crate::request::RequestError;
use crate::serializer::{InboundQueue, Provenance, SealError};
use crate::transport::{Acker, TransportError, topology};

/// How many messages one mapper holds. The rest wait at the broker.
pub(super) const OFFLINE_PREFETCH: u16 = 500;
/// How many bytes of messages one mapper holds before it reads no more.
const MAX_HELD_BYTES: usize = 64 * 1024 * 1024;
/// How many requests of the offline queue one mapper works on; each origin has a share.
const MAX_RUNNING: usize = 256;
/// How often everything is returned to the queue. RabbitMQ closes the channel of a delivery that is held for 30 minutes.
const HAND_BACK_INTERVAL: Duration = Duration::from_secs(10 * 60);
/// How long a mapper that still reads messages keeps those that are sealed for others.
const READING_LIMIT: Duration = Duration::from_secs(30);
/// How many messages are moved behind the others at a time.
const MOVES_AT_A_TIME: usize = 64;
/// How long to wait before subscribing to the queue again after a failure.
const RESUBSCRIBE_INTERVAL: Duration = Duration::from_secs(1);

/// The acknowledgements of all messages that are waiting or running, with what the replay memory needs. A redelivered message replaces
/// the acker of its earlier delivery, which is useless after a lost connection.
#[derive(Debug, Default)]
struct Ackers(Mutex<HashMap<RequestKey, (Acker, Provenance)>>);

impl Ackers {
    /// Returns whether there was one already.
    fn insert(&self, key: RequestKey, acker: Acker, provenance: Provenance) -> bool {
        self.0.lock().insert(key, (acker, provenance)).is_some()
    }

    fn clear(&self) {
        self.0.lock().clear();
    }

    fn remove(&self, key: &RequestKey) -> Option<Acker> {
        self.0.lock().remove(key).map(|(acker, _)| acker)
    }

    fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Those that are not waiting: requests that agents are working on.
    fn take_running(&self, waiting: &VecDeque<WaitingMessage>) -> Vec<(RequestKey, Provenance, Acker)> {
        let waiting: HashSet<RequestKey> = waiting.iter().map(|it| it.request.key()).collect();
        let running = |key: &RequestKey| !waiting.contains(key);
        let taken = self.0.lock().extract_if(|key, _| running(key)).collect::<Vec<_>>();
        taken.into_iter().map(|(key, (acker, provenance))| (key, provenance, acker)).collect()
    }
}

/// A message that waits for an agent.
struct WaitingMessage {
    request: ProxiedRequest,
    provenance: Provenance,
    body: Arc<[u8]>,
}

/// Reads the offline queue, and dispatches what waits whenever an agent registers and at a regular interval.
pub(super) async fn redeliver(shared: Arc<Shared>, mut messages: Subscription) {
    let (ackers, places) = (Arc::new(Ackers::default()), Places::new(MAX_RUNNING));
    let mut waiting: VecDeque<WaitingMessage> = VecDeque::new();
    let mut running = JoinSet::new();
    let mut subscribed_at = Instant::now();
    // How many messages there were at the last tick.
    let mut held_before = 0;
    let mut ticks = interval(shared.offline_redelivery);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Created before the waiting messages are dispatched, so that an agent that registers meanwhile is not missed.
    let mut agents_changed = Box::pin(shared.agents_changed.notified());
    loop {
        let bytes = waiting.iter().map(|it| it.body.len()).sum::<usize>() + messages.bytes_held_for_others();
        let dispatch = tokio::select! {
            biased;
            Some(_) = running.join_next() => false,
            () = &mut agents_changed => {
                agents_changed.set(shared.agents_changed.notified());
                true
            }
            _ = ticks.tick() => {
                dispatch_waiting(&shared, &ackers, &places, &mut waiting, &mut running).await;
                let for_others = messages.held_for_others();
                let held = ackers.len() + for_others;
                let is_full = held >= usize::from(OFFLINE_PREFETCH) || bytes >= MAX_HELD_BYTES;
                let is_reading = held != held_before && !is_full;
                held_before = held;
                if is_full {
                    move_behind(&shared, &ackers, &mut waiting, messages.take_held_for_others()).await;
                }
                // Another mapper may be able to open what this one cannot. A running request must not be redelivered to it.
                // While more are being read, this one continues: otherwise it might never come to the end of what it can hold.
                let is_idle = ackers.len() == waiting.len() && !(is_reading && subscribed_at.elapsed() < READING_LIMIT);
                if for_others > 0 && is_idle || subscribed_at.elapsed() >= HAND_BACK_INTERVAL {
                    for (key, provenance, acker) in ackers.take_running(&waiting) {
                        tracing::debug!(sender = %key.0, "acknowledging an offline request before its answer");
                        shared.link.mark_completed(&provenance);
                        acknowledge(acker).await;
                    }
                    if for_others > 0 {
                        tracing::info!(messages = for_others, "returning offline messages that are sealed for other mappers");
                    }
                    messages = match resubscribe(&shared, messages).await {
                        Some(messages) => messages,
                        None => return,
                    };
                    subscribed_at = Instant::now();
                    held_before = 0;
                    waiting.clear();
                    ackers.clear();
                }
                false
            }
            received = messages.next(), if bytes < MAX_HELD_BYTES => {
                let Some(received) = received else { return };
                accept(&ackers, &mut waiting, received).await
            }
        };
        if dispatch {
            dispatch_waiting(&shared, &ackers, &places, &mut waiting, &mut running).await;
        }
    }
}

/// Returns all messages to the queue, in their order, and subscribes again, behind the mappers that wait for their turn.
async fn resubscribe(shared: &Shared, messages: Subscription) -> Option<Subscription> {
    drop(messages);
    loop {
        match shared.link.subscribe(&topology::offline(), InboundQueue::Offline, OFFLINE_PREFETCH).await {
            Ok(messages) => return Some(messages),
            Err(TransportError::Closed) => return None,
            Err(error) => {
                tracing::warn!(%error, "failed to subscribe to the offline queue; trying again");
                sleep(RESUBSCRIBE_INTERVAL).await;
            }
        }
    }
}

/// Moves everything that waits behind the other messages of the queue, in its order: publishes each again, then acknowledges it.
async fn move_behind(
    shared: &Shared,
    ackers: &Ackers,
    waiting: &mut VecDeque<WaitingMessage>,
    held_for_others: Vec<HeldMessage>,
) {
    tracing::info!(
        waiting = waiting.len(),
        for_others = held_for_others.len(),
        "moving offline messages that cannot be delivered yet behind the others"
    );
    let mut held_for_others = VecDeque::from(held_for_others);
    while !held_for_others.is_empty() {
        let group: Vec<HeldMessage> = held_for_others.drain(..held_for_others.len().min(MOVES_AT_A_TIME)).collect();
        let moved = join_all(group.iter().map(|held| shared.link.store_again(held.body.clone()))).await;
        for (HeldMessage { acker, .. }, moved) in group.into_iter().zip(moved) {
            let settled = if moved.is_ok() { acker.ack().await } else { acker.requeue().await };
            if let Err(error) = settled {
                tracing::debug!(%error, "failed to settle a message; the broker will redeliver it");
            }
        }
    }
    let mut kept = VecDeque::new();
    while !waiting.is_empty() {
        let group: Vec<WaitingMessage> = waiting.drain(..waiting.len().min(MOVES_AT_A_TIME)).collect();
        let moved = join_all(group.iter().map(|it| shared.link.store_again(it.body.clone()))).await;
        for (message, moved) in group.into_iter().zip(moved) {
            match moved {
                Ok(()) => {
                    if let Some(acker) = ackers.remove(&message.request.key()) {
                        acknowledge(acker).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to move an offline message");
                    kept.push_back(message);
                }
            }
        }
    }
    *waiting = kept;
}

/// Adds a message to those that wait; returns whether it is new.
async fn accept(ackers: &Ackers, waiting: &mut VecDeque<WaitingMessage>, received: Received) -> bool {
    let Received { inbound, acker, body, .. } = received;
    let provenance = inbound.provenance.clone();
    let Some(mut request) = ProxiedRequest::from_inbound(inbound) else {
        acknowledge(acker).await;
        return false;
    };
    // It already is in the offline queue, and must not be stored there again.
    request.request.offline = Some(false);
    if ackers.insert(request.key(), acker, provenance.clone()) {
        return false;
    }
    waiting.push_back(WaitingMessage { request, provenance, body });
    true
}

/// Dispatches the waiting messages. Those that no agent can take yet keep waiting, in their order.
async fn dispatch_waiting(
    shared: &Arc<Shared>,
    ackers: &Arc<Ackers>,
    places: &Places,
    waiting: &mut VecDeque<WaitingMessage>,
    running: &mut JoinSet<()>,
) {
    // An agent may register in the middle of this pass: a message must not overtake an earlier one of its sender and service.
    let mut blocked = HashSet::new();
    for _ in 0..waiting.len() {
        let Some(message) = waiting.pop_front() else { return };
        let (request, provenance) = (&message.request, message.provenance.clone());
        let key = request.key();
        if shared.link.is_completed(&provenance) {
            tracing::debug!("copy of a completed offline message dropped");
            complete(shared, ackers, &key, &provenance).await;
            continue;
        }
        let lane = (key.0.clone(), request.request.service.clone());
        if blocked.contains(&lane) {
            waiting.push_back(message);
            continue;
        }
        if request.is_expired(shared) {
            tracing::info!(service = %request.request.service, "offline message expired: no agent took it in time");
            complete(shared, ackers, &key, &provenance).await;
            continue;
        }
        // The share of the node that the message was stored for.
        let Some(place) = places.take(request.on_behalf_of().unwrap_or(&request.sender)) else {
            blocked.insert(lane);
            waiting.push_back(message);
            continue;
        };
        match request.dispatch(shared, Duration::ZERO).await {
            Ok(Dispatched::Push) => complete(shared, ackers, &key, &provenance).await,
            Ok(Dispatched::Request(events, reply_to)) => {
                let (shared, ackers) = (shared.clone(), ackers.clone());
                running.spawn(async move {
                    {
                        let mut answered = std::pin::pin!(forward_answers(&shared, events, reply_to));
                        tokio::select! {
                            biased;
                            () = &mut answered => {}
                            () = sleep(HOLD_LIMIT) => {
                                complete(&shared, &ackers, &key, &provenance).await;
                                answered.await;
                            }
                        }
                    }
                    complete(&shared, &ackers, &key, &provenance).await;
                    drop(place);
                });
            }
            Err(error) if is_temporary(&error) => {
                blocked.insert(lane);
                waiting.push_back(message);
            }
            Err(error) => {
                message.request.fail(shared, error).await;
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
