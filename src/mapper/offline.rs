//! Reads the offline queue, where requests that no agent could take wait, sealed for the mappers, until an agent registers. They are
//! stored there by [`dispatch`](super::dispatch).
//!
//! A mapper holds what it has read unacknowledged and in order, so the broker redelivers it to another mapper if this one dies. The
//! serializer's replay memory records a message only once it is completed
//! ([`Link::mark_completed`](crate::link::Link::mark_completed)), so that a message redelivered after a lost connection can be opened
//! again; a copy that was opened before that is recognized before it is dispatched.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::proxied_requests::{Dispatched, ProxiedRequest, RequestKey, forward_answers};
use super::shared::Shared;
use crate::link::{Received, SendError, Subscription, acknowledge};
use crate::request::RequestError;
use crate::serializer::{InboundQueue, Provenance, SealError};
use crate::transport::{Acker, TransportError, topology};

/// How many messages of the offline queue one mapper holds. The rest wait at the broker.
pub(super) const PREFETCH: u16 = 500;

/// How long to wait before subscribing to the queue again after a failure.
const RESUBSCRIBE_INTERVAL: Duration = Duration::from_secs(1);

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
        match shared.link.subscribe(&topology::offline(), InboundQueue::Offline, PREFETCH).await {
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
        match request.dispatch(shared).await {
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
