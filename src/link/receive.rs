//! Receiving: the messages of a queue are opened and handed on in the order of arrival. Messages from a queue that processes share, which
//! this process cannot open and another may, go back to the queue.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use lru::LruCache;
use tokio::sync::Semaphore;

use super::context::{Inner, Link, UnverifiedPeer};
use crate::audit::Record;
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::packet::{Packet, Role};
use crate::serializer::{Cost, Inbound, InboundQueue, OpenContext, OpenError, OpenErrorKind, Provenance};
use crate::transport::{Acker, Consumer, Delivery, Destination, PublishRequest, Queue, TransportError, topology};

/// How long a message is held before it is requeued.
const REQUEUE_DELAY: Duration = Duration::from_millis(50);
/// How long the same message is requeued before it is refused.
const REQUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many messages wait to be requeued at a time.
const MAX_WAITING: usize = 64;
/// How many requeued messages are remembered.
const MAX_REMEMBERED: NonZeroUsize = nonzero(4096);
/// How long a message that is stored again stays at the broker at most. A mapper refuses it once it has expired.
const STORED_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long storing it again may take.
const STORE_TIMEOUT: Duration = Duration::from_secs(20);
/// How many offline messages of unknown signers are held.
const MAX_UNKNOWN_SIGNERS: usize = 64;

impl Link {
    /// Consumes from a queue. At most `prefetch` messages are unacknowledged at a time.
    ///
    /// # Errors
    /// [`TransportError`] when the queue cannot be consumed.
    pub async fn subscribe(
        &self,
        queue: &Queue,
        inbound_queue: InboundQueue,
        prefetch: u16,
    ) -> Result<Subscription, TransportError> {
        let consumer = self.0.transport.consume(queue, prefetch).await?;
        // Presence messages have a strictly growing sequence, which opening checks: one at a time.
        let parallel = match inbound_queue {
            InboundQueue::Presence => 1,
            _ => self.0.workers.available_permits().max(1) * 2,
        };
        Ok(Subscription {
            link: self.clone(),
            consumer,
            inbound_queue,
            parallel,
            opening: FuturesOrdered::new(),
            ended: false,
            requeue: Requeue::default(),
        })
    }

    /// Records that a message from the offline queue has been carried out: a further delivery of it is refused.
    pub fn mark_completed(&self, provenance: &Provenance) {
        if let (Provenance::Verified(verified), Some(verification)) = (provenance, self.0.serializer.verification()) {
            verification.mark_completed(verified, self.now());
        }
    }

    /// Whether a message from the offline queue has been carried out.
    pub fn is_completed(&self, provenance: &Provenance) -> bool {
        match (provenance, self.0.serializer.verification()) {
            (Provenance::Verified(verified), Some(verification)) => verification.is_completed(verified),
            _ => false,
        }
    }

    /// Publishes a message of the offline queue there again, as it is.
    pub(crate) async fn store_again(&self, body: Arc<[u8]>) -> Result<(), TransportError> {
        let request = PublishRequest::new(Destination::queue(topology::OFFLINE), body)
            .content_type(self.0.serializer.content_type())
            .expires_in(STORED_LIFETIME);
        self.0.transport.publish(request, STORE_TIMEOUT).await
    }

    async fn open(self, delivery: Delivery, inbound_queue: InboundQueue, cost: Cost) -> Option<Opened> {
        let Delivery { body, content_type, redelivered, acker } = delivery;
        let opened = if content_type == self.0.serializer.content_type() {
            let bytes = body.clone();
            let open =
                move |inner: &Inner| inner.serializer.open(&bytes, &OpenContext::new(inbound_queue, inner.clock.now()));
            self.work(cost, open).await?
        } else {
            Err(OpenError::new(OpenErrorKind::Unsupported, "another content type"))
        };
        match opened {
            Ok(inbound) => {
                self.note_mapper(&inbound);
                if let Some(audit) = &self.0.audit {
                    audit.record(Record::accepted(self.identity(), self.now(), &inbound, inbound_queue)).await;
                }
                Some(Opened::Good(Box::new(Received { inbound, redelivered, acker, body })))
            }
            Err(error) => {
                let is_answered = self.note_unverified_peer(&error, inbound_queue);
                if error.not_addressed.is_some() && is_answered {
                    self.refuse_for_now(&error, inbound_queue, acker).await;
                    return None;
                }
                self.0.refusals.count(error.kind);
                if may_open_elsewhere(&error, inbound_queue) {
                    return Some(Opened::Requeue { error, body, redelivered, acker });
                }
                self.refuse(&error, inbound_queue, redelivered, acker).await;
                None
            }
        }
    }

    /// Counts, logs and records answers of agents, forwarded by a mapper, that this node refuses.
    pub(crate) async fn record_refused_answers(&self, errors: &[OpenError]) {
        let queue = InboundQueue::for_answers_to(self.identity().role());
        for error in errors {
            self.0.refusals.count(error.kind);
            if let Some(audit) = &self.0.audit {
                audit.record(Record::refused(self.identity(), self.now(), error, queue)).await;
            }
            self.0.refusals.log(self.identity(), error, queue, false, self.now());
        }
    }

    /// Remembers the process of a mapper that has advertised itself, to name it in messages.
    fn note_mapper(&self, inbound: &Inbound) {
        if let (Packet::Advertise(_), Some(signer)) = (&inbound.packet, inbound.signer())
            && signer.signer().role() == Role::Mapper
        {
            self.0.mappers.heard(signer.signer(), signer.instance(), self.now());
        }
    }

    /// Reports the sender of a refused message, if an answer can help it. False if it was not reported.
    fn note_unverified_peer(&self, error: &OpenError, inbound_queue: InboundQueue) -> bool {
        let (Some(unverified_peers), Some(claimed)) = (&self.0.unverified_peers, &error.claimed) else { return false };
        let peer = match error {
            OpenError { kind: OpenErrorKind::UnknownSigner, .. }
                if inbound_queue.answers_unknown_senders() && self.learns_peers() =>
            {
                UnverifiedPeer::Unknown(claimed.clone())
            }
            OpenError { superseded: Some(superseded), .. } => UnverifiedPeer::Superseded(claimed.clone(), *superseded),
            OpenError { not_addressed: Some(message), .. } if inbound_queue.answers_unknown_senders() => {
                UnverifiedPeer::NotAddressed(claimed.clone(), *message)
            }
            _ => return false,
        };
        // When the queue is full, the peer is reported at its next message.
        unverified_peers.try_send(peer).is_ok()
    }

    /// Acknowledges a message that its sender is asked to send again. This is normal after a start.
    async fn refuse_for_now(&self, error: &OpenError, inbound_queue: InboundQueue, acker: Acker) {
        if let Some(audit) = &self.0.audit {
            audit.record(Record::refused(self.identity(), self.now(), error, inbound_queue)).await;
        }
        let claimed = error.claimed.as_ref().map(tracing::field::display);
        tracing::debug!(claimed, ?inbound_queue, "a message does not name this new process; its sender is asked again");
        acknowledge(acker).await;
    }

    /// Logs and acknowledges what was refused.
    async fn refuse(&self, error: &OpenError, inbound_queue: InboundQueue, redelivered: bool, acker: Acker) {
        if let Some(audit) = &self.0.audit {
            audit.record(Record::refused(self.identity(), self.now(), error, inbound_queue)).await;
        }
        self.0.refusals.log(self.identity(), error, inbound_queue, redelivered, self.now());
        if let Err(error) = acker.ack().await {
            tracing::debug!(%error, "failed to acknowledge a refused message; the broker will redeliver it");
        }
    }
}

/// A delivery that was not refused.
enum Opened {
    Good(Box<Received>),
    /// Another mapper may be able to open it.
    Requeue {
        error: OpenError,
        body: Arc<[u8]>,
        redelivered: bool,
        acker: Acker,
    },
}

type Opening = Pin<Box<dyn Future<Output = Option<Opened>> + Send>>;

/// A stream of opened messages from one queue, in the order in which they arrived.
pub struct Subscription {
    link: Link,
    consumer: Consumer,
    inbound_queue: InboundQueue,
    /// How many messages are opened at a time.
    parallel: usize,
    opening: FuturesOrdered<Opening>,
    ended: bool,
    requeue: Requeue,
}

impl Subscription {
    /// The next accepted message; `None` when the transport was closed. Cancel safe.
    pub async fn next(&mut self) -> Option<Received> {
        loop {
            tokio::select! {
                biased;
                Some(opened) = self.opening.next(), if !self.opening.is_empty() => match opened {
                    Some(Opened::Good(received)) => return Some(*received),
                    Some(Opened::Requeue { error, body, redelivered, acker }) => {
                        let (inbound_queue, now) = (self.inbound_queue, self.link.now());
                        if let Err(acker) = self.requeue.take(&error, inbound_queue, &body, acker, now) {
                            // A task: this call is cancel safe.
                            let link = self.link.clone();
                            tokio::spawn(async move { link.refuse(&error, inbound_queue, redelivered, acker).await });
                        }
                    }
                    None => {}
                },
                delivery = self.consumer.next(), if !self.ended && self.opening.len() < self.parallel => match delivery {
                    Some(delivery) => {
                        let cost = self.cost(delivery.body.len());
                        let open = self.link.clone().open(delivery, self.inbound_queue, cost);
                        if self.parallel > 1 && cost != Cost::Trivial {
                            // A task: it continues while the caller handles the previous message.
                            let task = tokio::spawn(open);
                            self.opening.push_back(Box::pin(async move { task.await.ok().flatten() }));
                        } else {
                            self.opening.push_back(Box::pin(open));
                        }
                    }
                    None => self.ended = true,
                },
                else => return None,
            }
        }
    }
}

impl Subscription {
    /// What opening a message of this size costs. Registrations and stored messages carry certificates, whose chains take longer.
    fn cost(&self, bytes: usize) -> Cost {
        match self.link.0.serializer.cost(bytes, self.link.now()) {
            Cost::Short if matches!(self.inbound_queue, InboundQueue::Presence | InboundQueue::Offline) => Cost::Long,
            cost => cost,
        }
    }

    /// How many offline messages are held for other mappers. They go back to the queue when this is dropped.
    pub(crate) fn held_for_others(&self) -> usize {
        self.requeue.held.len()
    }

    /// How many bytes they have.
    pub(crate) fn bytes_held_for_others(&self) -> usize {
        self.requeue.held.iter().map(|message| message.body.len()).sum()
    }

    /// Takes them, to be settled by the caller.
    pub(crate) fn take_held_for_others(&mut self) -> Vec<HeldMessage> {
        self.requeue.unknown_signers = 0;
        std::mem::take(&mut self.requeue.held)
    }
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription").field("queue", &self.inbound_queue).finish_non_exhaustive()
    }
}

/// An opened message, to be acknowledged.
#[derive(Debug)]
#[non_exhaustive]
pub struct Received {
    /// The message.
    pub inbound: Inbound,
    /// Whether the broker may have delivered it before.
    pub redelivered: bool,
    /// Acknowledges it.
    pub acker: Acker,
    /// As it arrived.
    pub(crate) body: Arc<[u8]>,
}

/// An offline message that another mapper may be able to open.
#[derive(Debug)]
pub(crate) struct HeldMessage {
    pub body: Arc<[u8]>,
    pub acker: Acker,
}

impl Received {
    /// Acknowledges the message and returns its content. If acknowledging fails, the broker redelivers the message, and the replay check
    /// recognises it.
    pub async fn accept(self) -> Inbound {
        acknowledge(self.acker).await;
        self.inbound
    }
}

/// Acknowledges. If that fails, the broker redelivers the message, and the replay check recognises it.
pub async fn acknowledge(acker: Acker) {
    if let Err(error) = acker.ack().await {
        tracing::debug!(%error, "failed to acknowledge a message; the broker will redeliver it");
    }
}

/// The messages of one queue that another process may be able to open: they go back, and nothing is lost.
///
/// A request to an agent names the agent's process. An older process that still runs may receive it, until it hears that it was replaced.
///
/// A request is encrypted to the mappers that its sender knows. A mapper that the sender does not know, or that does not know the sender,
/// may receive it; it requeues the message after a moment, so that another mapper receives it. Messages of the offline queue are held
/// instead, since that queue has one consumer at a time; they go back when this consumer ends.
#[derive(Debug)]
struct Requeue {
    permits: Arc<Semaphore>,
    /// When each message arrived first, by the hash of its bytes.
    first_seen: LruCache<u64, Timestamp>,
    hasher: RandomState,
    held: Vec<HeldMessage>,
    unknown_signers: usize,
}

impl Default for Requeue {
    fn default() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(MAX_WAITING)),
            first_seen: LruCache::new(MAX_REMEMBERED),
            hasher: RandomState::new(),
            held: Vec::new(),
            unknown_signers: 0,
        }
    }
}

/// Whether another consumer of this queue may be able to open what was refused here.
fn may_open_elsewhere(error: &OpenError, queue: InboundQueue) -> bool {
    match queue {
        // Two processes of an agent read it until the older one ends.
        InboundQueue::AgentInbox => error.for_others,
        // A message whose sender could not be asked to send it again is tried again too.
        _ => {
            let is_unanswered = error.not_addressed.is_some();
            queue.is_shared() && (error.for_others || error.kind == OpenErrorKind::UnknownSigner || is_unanswered)
        }
    }
}

impl Requeue {
    /// Takes a message that another mapper may be able to open. Returns its acker when the message is to be refused after all: it has
    /// been requeued for too long, or too many messages wait.
    pub fn take(
        &mut self,
        error: &OpenError,
        queue: InboundQueue,
        body: &Arc<[u8]>,
        acker: Acker,
        now: Timestamp,
    ) -> Result<(), Acker> {
        if queue == InboundQueue::Offline {
            return self.hold(error, body, acker);
        }
        let Ok(permit) = self.permits.clone().try_acquire_owned() else { return Err(acker) };
        let first_seen = *self.first_seen.get_or_insert(self.hasher.hash_one(&**body), || now);
        if now.since(first_seen) > REQUEUE_TIMEOUT {
            return Err(acker);
        }
        tokio::spawn(async move {
            tokio::time::sleep(REQUEUE_DELAY).await;
            if let Err(error) = acker.requeue().await {
                tracing::debug!(%error, "failed to requeue a message; the broker will redeliver it");
            }
            drop(permit);
        });
        Ok(())
    }

    fn hold(&mut self, error: &OpenError, body: &Arc<[u8]>, acker: Acker) -> Result<(), Acker> {
        if !error.for_others {
            if self.unknown_signers >= MAX_UNKNOWN_SIGNERS {
                return Err(acker);
            }
            self.unknown_signers += 1;
        }
        // Bounded by the prefetch.
        self.held.push(HeldMessage { body: body.clone(), acker });
        Ok(())
    }
}
