//! What the memory broker holds: queues, exchanges, consumers, and the rules of RabbitMQ by which messages move between them.
//!
//! All of it is plain data behind the one lock in `mod.rs`; nothing here waits or looks at a clock of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;

use super::Limits;
use super::tap::Taps;
use crate::transport::{Destination, PublishRequest, Queue, QueueKind, Settlement, TransportError};

/// A message in one queue.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// Its place in the queue; requeued messages return to it.
    place: u64,
    pub(super) body: Arc<[u8]>,
    pub(super) content_type: Arc<str>,
    pub(super) redelivered: bool,
    persistent: bool,
    expires_at: Option<Instant>,
}

/// A message handed to a consumer, and what names it when it is settled.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) message: Stored,
    pub(super) receipt: Receipt,
}

/// Names one delivery. It dies with the attachment of its consumer, so a late settlement never touches a later delivery.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receipt {
    consumer: u64,
    attachment: u64,
    place: u64,
}

#[derive(Debug)]
struct QueueState {
    kind: QueueKind,
    /// The connection an exclusive queue belongs to.
    owner: Option<u64>,
    bindings: BTreeSet<String>,
    /// In order of their places.
    ready: VecDeque<Stored>,
    bytes: usize,
    /// Whose turn it is, at the front.
    consumers: VecDeque<u64>,
    last_used: Instant,
}

#[derive(Debug)]
struct ConsumerState {
    connection: u64,
    queue: Queue,
    prefetch: usize,
    /// Grows each time the consumer is attached to its queue anew.
    attachment: u64,
    unacknowledged: BTreeMap<u64, Stored>,
    /// The unacknowledged messages that the program has not taken yet.
    untaken: VecDeque<u64>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Connection {
    up: bool,
    /// What it declared without consuming and must find again after a cut.
    declared: Vec<Queue>,
}

/// Everything a memory broker holds.
#[derive(Debug)]
pub(super) struct State {
    limits: Limits,
    queues: HashMap<String, QueueState>,
    exchanges: HashMap<String, BTreeSet<String>>,
    consumers: BTreeMap<u64, ConsumerState>,
    connections: HashMap<u64, Connection>,
    pub(super) taps: Taps,
    counter: u64,
    sweep_at: usize,
}

impl State {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            queues: HashMap::new(),
            exchanges: HashMap::new(),
            consumers: BTreeMap::new(),
            connections: HashMap::new(),
            taps: Taps::default(),
            counter: 0,
            sweep_at: 64,
        }
    }

    #[cfg(test)]
    pub(super) fn queues(&self) -> usize {
        self.queues.len()
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub(super) fn connect(&mut self) -> u64 {
        let id = self.next();
        self.connections.insert(id, Connection { up: true, declared: Vec::new() });
        id
    }

    pub(super) fn connections(&self) -> Vec<u64> {
        self.connections.keys().copied().collect()
    }

    /// Whether the connection is up at the moment.
    ///
    /// # Errors
    /// [`TransportError::Closed`] when it was closed.
    pub(super) fn is_up(&self, connection: u64) -> Result<bool, TransportError> {
        self.connections.get(&connection).map(|connection| connection.up).ok_or(TransportError::Closed)
    }

    /// The connection goes away, as when its socket closes: exclusive queues go with it, unacknowledged messages go back.
    pub(super) fn cut(&mut self, connection: u64, now: Instant) {
        let Some(state) = self.connections.get_mut(&connection) else { return };
        state.up = false;
        for id in self.consumers_of(connection) {
            self.detach(id, now);
        }
        let owned = self.queues.iter().filter(|(_, queue)| queue.owner == Some(connection));
        let owned: Vec<String> = owned.map(|(name, _)| name.clone()).collect();
        for name in owned {
            self.remove_queue(&name, now);
        }
    }

    /// The connection is there again: its queues are declared and consumed as before.
    pub(super) fn restore(&mut self, connection: u64, now: Instant) {
        let Some(state) = self.connections.get_mut(&connection) else { return };
        state.up = true;
        for queue in state.declared.clone() {
            if let Err(error) = self.declare(connection, &queue, now) {
                tracing::warn!(queue = queue.name, %error, "queue lost with its connection");
            }
        }
        for id in self.consumers_of(connection) {
            self.attach(id, now);
        }
    }

    /// The connection is over; its consumers end.
    pub(super) fn close(&mut self, connection: u64, now: Instant) {
        self.cut(connection, now);
        self.connections.remove(&connection);
        for id in self.consumers_of(connection) {
            self.end_consumer(id, now);
        }
    }

    /// The broker starts anew: only persistent messages in durable queues are left.
    pub(super) fn forget_transient(&mut self) {
        for queue in self.queues.values_mut() {
            queue.ready.retain(|message| message.persistent);
            queue.bytes = queue.ready.iter().map(|message| message.body.len()).sum();
        }
    }

    fn consumers_of(&self, connection: u64) -> Vec<u64> {
        self.consumers.iter().filter(|(_, c)| c.connection == connection).map(|(id, _)| *id).collect()
    }

    /// Declares, and remembers the queue for the time after a cut. A queue that expires when unused is not remembered: what
    /// nobody consumes may go.
    pub(super) fn declare_and_keep(
        &mut self,
        connection: u64,
        queue: &Queue,
        now: Instant,
    ) -> Result<(), TransportError> {
        self.declare(connection, queue, now)?;
        if matches!(queue.kind, QueueKind::Durable { expires: Some(_), .. }) {
            return Ok(());
        }
        if let Some(connection) = self.connections.get_mut(&connection) {
            connection.declared.retain(|known| known.name != queue.name);
            connection.declared.push(queue.clone());
        }
        Ok(())
    }

    pub(super) fn declare(&mut self, connection: u64, queue: &Queue, now: Instant) -> Result<(), TransportError> {
        self.sweep(now);
        self.expire(&queue.name, now);
        let conflict = |why: &str| TransportError::QueueConflict { queue: queue.name.clone(), why: why.to_owned() };
        if let Some(there) = self.queues.get(&queue.name) {
            if there.owner.is_some_and(|owner| owner != connection) {
                return Err(conflict("it belongs to another connection"));
            }
            if there.kind != queue.kind {
                return Err(conflict("it exists with other properties"));
            }
        }
        let owner = matches!(queue.kind, QueueKind::Exclusive).then_some(connection);
        let state = self.queues.entry(queue.name.clone()).or_insert_with(|| QueueState {
            kind: queue.kind,
            owner,
            bindings: BTreeSet::new(),
            ready: VecDeque::new(),
            bytes: 0,
            consumers: VecDeque::new(),
            last_used: now,
        });
        state.last_used = now;
        for exchange in &queue.bindings {
            state.bindings.insert(exchange.0.clone());
            self.exchanges.entry(exchange.0.clone()).or_default().insert(queue.name.clone());
        }
        Ok(())
    }

    /// Deletes a queue and what is in it. Consumers that live declare it again, as the transport promises.
    pub(super) fn delete(&mut self, name: &str, now: Instant) -> bool {
        if !self.queues.contains_key(name) {
            return false;
        }
        for consumer in self.consumers.values_mut().filter(|consumer| consumer.queue.name == name) {
            consumer.drop_deliveries();
        }
        self.remove_queue(name, now);
        true
    }

    fn remove_queue(&mut self, name: &str, now: Instant) {
        let Some(queue) = self.queues.remove(name) else { return };
        for exchange in &queue.bindings {
            if let Some(bound) = self.exchanges.get_mut(exchange) {
                bound.remove(name);
                if bound.is_empty() {
                    self.exchanges.remove(exchange);
                }
            }
        }
        let waiting: Vec<u64> =
            self.consumers.iter().filter(|(_, c)| c.queue.name == name).map(|(id, _)| *id).collect();
        for id in waiting {
            self.attach(id, now);
        }
    }

    /// How many messages wait.
    pub(super) fn depth(&mut self, connection: u64, name: &str, now: Instant) -> Result<Option<u64>, TransportError> {
        self.expire(name, now);
        let Some(queue) = self.queues.get_mut(name) else { return Ok(None) };
        if queue.owner.is_some_and(|owner| owner != connection) {
            let why = "it belongs to another connection".to_owned();
            return Err(TransportError::QueueConflict { queue: name.to_owned(), why });
        }
        queue.drop_expired(now);
        Ok(Some(queue.ready.len() as u64))
    }

    /// What waits in a queue, first to be delivered first.
    pub(super) fn waiting(&mut self, name: &str, now: Instant) -> Vec<Stored> {
        self.expire(name, now);
        let Some(queue) = self.queues.get_mut(name) else { return Vec::new() };
        queue.drop_expired(now);
        queue.ready.iter().cloned().collect()
    }

    /// Puts a message where it has to go.
    pub(super) fn publish(&mut self, message: &PublishRequest, now: Instant) -> Result<(), TransportError> {
        self.taps.record(message);
        match &message.destination {
            Destination::Queue(name) => {
                self.expire(name, now);
                self.enqueue(name, message, now)
            }
            Destination::Exchange(exchange) => {
                let bound: Vec<String> = self.exchanges.get(&exchange.0).into_iter().flatten().cloned().collect();
                let mut outcome = Ok(());
                for name in bound {
                    self.expire(&name, now);
                    match self.enqueue(&name, message, now) {
                        // It expired just now: one listener less.
                        Ok(()) | Err(TransportError::Unroutable(_)) => {}
                        Err(error) => outcome = Err(error),
                    }
                }
                outcome
            }
        }
    }

    fn enqueue(&mut self, name: &str, message: &PublishRequest, now: Instant) -> Result<(), TransportError> {
        let place = self.next();
        let limits = self.limits;
        let Some(queue) = self.queues.get_mut(name) else { return Err(TransportError::Unroutable(name.to_owned())) };
        queue.drop_expired(now);
        if queue.ready.len() >= limits.messages || queue.bytes.saturating_add(message.body.len()) > limits.bytes {
            return Err(TransportError::Nacked);
        }
        queue.bytes += message.body.len();
        queue.ready.push_back(Stored {
            place,
            body: Arc::clone(&message.body),
            content_type: message.content_type.as_str().into(),
            redelivered: false,
            persistent: message.persistent,
            expires_at: message.expires_in.and_then(|after| now.checked_add(after)),
        });
        self.hand_out(name);
        if let Some(queue) = self.queues.get_mut(name) {
            // What may not wait at all has now been delivered or is dropped.
            queue.drop_expired(now);
        }
        Ok(())
    }

    /// Hands waiting messages to the consumers that may have more, one each in turn.
    fn hand_out(&mut self, name: &str) {
        let Some(queue) = self.queues.get_mut(name) else { return };
        let mut refused = 0;
        while refused < queue.consumers.len() && !queue.ready.is_empty() {
            let Some(id) = queue.consumers.front().copied() else { return };
            let ordered = matches!(queue.kind, QueueKind::Durable { ordered: true, .. });
            if !ordered {
                queue.consumers.rotate_left(1);
            }
            match self.consumers.get_mut(&id) {
                Some(consumer) if consumer.unacknowledged.len() < consumer.prefetch => {
                    let Some(message) = queue.ready.pop_front() else { return };
                    queue.bytes = queue.bytes.saturating_sub(message.body.len());
                    consumer.untaken.push_back(message.place);
                    consumer.unacknowledged.insert(message.place, message);
                    consumer.wake();
                    refused = 0;
                }
                _ if ordered => return,
                _ => refused += 1,
            }
        }
    }

    pub(super) fn add_consumer(
        &mut self,
        connection: u64,
        queue: &Queue,
        prefetch: u16,
        now: Instant,
    ) -> Result<u64, TransportError> {
        self.declare(connection, queue, now)?;
        let id = self.next();
        let consumer = ConsumerState {
            connection,
            queue: queue.clone(),
            prefetch: usize::from(prefetch.max(1)),
            attachment: 0,
            unacknowledged: BTreeMap::new(),
            untaken: VecDeque::new(),
            waker: None,
        };
        self.consumers.insert(id, consumer);
        self.attach(id, now);
        Ok(id)
    }

    /// Makes a consumer take from its queue, which is declared if need be.
    fn attach(&mut self, id: u64, now: Instant) {
        let Some(consumer) = self.consumers.get(&id) else { return };
        let (connection, queue) = (consumer.connection, consumer.queue.clone());
        if !self.is_up(connection).unwrap_or(false) {
            return;
        }
        if let Err(error) = self.declare(connection, &queue, now) {
            tracing::warn!(queue = queue.name, %error, "consumer waits for its queue");
            return;
        }
        let attachment = self.next();
        if let Some(consumer) = self.consumers.get_mut(&id) {
            consumer.attachment = attachment;
        }
        if let Some(state) = self.queues.get_mut(&queue.name) {
            state.consumers.retain(|other| *other != id);
            state.consumers.push_back(id);
        }
        self.hand_out(&queue.name);
    }

    /// Makes a consumer take no more; what it had goes back.
    fn detach(&mut self, id: u64, now: Instant) {
        let Some(consumer) = self.consumers.get_mut(&id) else { return };
        let name = consumer.queue.name.clone();
        let back = consumer.drop_deliveries();
        let Some(queue) = self.queues.get_mut(&name) else { return };
        queue.consumers.retain(|other| *other != id);
        queue.last_used = now;
        for message in back.into_values() {
            queue.put_back(message);
        }
        self.hand_out(&name);
    }

    pub(super) fn end_consumer(&mut self, id: u64, now: Instant) {
        self.detach(id, now);
        if let Some(mut consumer) = self.consumers.remove(&id) {
            consumer.wake();
        }
    }

    /// The next delivery of a consumer; none when the consumer has ended.
    pub(super) fn poll_delivery(&mut self, id: u64, cx: &Context<'_>) -> Poll<Option<Handed>> {
        let Some(consumer) = self.consumers.get_mut(&id) else { return Poll::Ready(None) };
        while let Some(place) = consumer.untaken.pop_front() {
            if let Some(message) = consumer.unacknowledged.get(&place) {
                let receipt = Receipt { consumer: id, attachment: consumer.attachment, place };
                return Poll::Ready(Some(Handed { message: message.clone(), receipt }));
            }
        }
        consumer.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(super) fn settle(
        &mut self,
        receipt: Receipt,
        settlement: Settlement,
        now: Instant,
    ) -> Result<(), TransportError> {
        let consumer = self.consumers.get_mut(&receipt.consumer).filter(|c| c.attachment == receipt.attachment);
        let consumer = consumer.ok_or(TransportError::Disconnected)?;
        let message = consumer.unacknowledged.remove(&receipt.place).ok_or(TransportError::Disconnected)?;
        let name = consumer.queue.name.clone();
        if let Some(queue) = self.queues.get_mut(&name) {
            if settlement == Settlement::Requeue {
                queue.put_back(message);
            }
            queue.drop_expired(now);
        }
        self.hand_out(&name);
        Ok(())
    }

    /// Deletes the queue if it has been unused for too long.
    fn expire(&mut self, name: &str, now: Instant) {
        if self.queues.get(name).is_some_and(|queue| queue.is_overdue(now)) {
            self.remove_queue(name, now);
        }
    }

    /// Looks through all queues for overdue ones, each time their number has doubled: so those that nobody asks for go, too.
    fn sweep(&mut self, now: Instant) {
        if self.queues.len() < self.sweep_at {
            return;
        }
        let overdue = self.queues.iter().filter(|(_, queue)| queue.is_overdue(now));
        let overdue: Vec<String> = overdue.map(|(name, _)| name.clone()).collect();
        for name in overdue {
            self.remove_queue(&name, now);
        }
        self.sweep_at = self.queues.len().saturating_mul(2).max(64);
    }
}

impl QueueState {
    fn is_overdue(&self, now: Instant) -> bool {
        match self.kind {
            QueueKind::Durable { expires: Some(after), .. } => {
                self.consumers.is_empty() && now.saturating_duration_since(self.last_used) >= after
            }
            QueueKind::Durable { expires: None, .. } | QueueKind::Exclusive => false,
        }
    }

    /// Expired messages go when they come to the head, as in RabbitMQ.
    fn drop_expired(&mut self, now: Instant) {
        while self.ready.front().and_then(|m| m.expires_at).is_some_and(|at: Instant| at <= now) {
            if let Some(message) = self.ready.pop_front() {
                self.bytes = self.bytes.saturating_sub(message.body.len());
            }
        }
    }

    fn put_back(&mut self, mut message: Stored) {
        message.redelivered = true;
        self.bytes += message.body.len();
        let at = self.ready.partition_point(|other| other.place < message.place);
        self.ready.insert(at, message);
    }
}

impl ConsumerState {
    /// Forgets its deliveries: none of them can be settled any more.
    fn drop_deliveries(&mut self) -> BTreeMap<u64, Stored> {
        self.attachment = 0;
        self.untaken.clear();
        std::mem::take(&mut self.unacknowledged)
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}
