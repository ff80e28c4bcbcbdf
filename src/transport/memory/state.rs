//! The state of a memory broker: connections, queues, exchanges and consumers, and how messages move between them, by the rules of
//! RabbitMQ.
//!
//! All of it is plain data behind the lock in `mod.rs`; nothing here waits or reads the clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;

use super::queue::{Message, QueueLimits, QueueState};
use crate::transport::{Destination, PublishRequest, Queue, QueueKind, Settlement, TransportError};

/// At how many queues the expired ones are searched for the first time.
const MIN_SWEEP_QUEUES: usize = 64;

/// Identifies one delivery. It becomes invalid when its consumer is detached, so a late settlement never affects a later delivery.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeliveryTag {
    consumer: u64,
    attachment: u64,
    position: u64,
}

#[derive(Debug)]
struct ConsumerState {
    connection: u64,
    queue: Queue,
    prefetch: usize,
    /// A new number each time that the consumer is attached to its queue; zero while it is not.
    attachment: u64,
    unacknowledged: BTreeMap<u64, Message>,
    /// The positions of those unacknowledged messages that the application has not received yet.
    undelivered: VecDeque<u64>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Connection {
    up: bool,
    /// The queues to declare again after a reconnect.
    declared: Vec<Queue>,
}

/// The state of a memory broker.
#[derive(Debug)]
pub(super) struct State {
    limits: QueueLimits,
    queues: BTreeMap<String, QueueState>,
    /// The queues bound to each exchange.
    exchanges: BTreeMap<String, BTreeSet<String>>,
    consumers: BTreeMap<u64, ConsumerState>,
    connections: BTreeMap<u64, Connection>,
    last_id: u64,
    /// At how many queues the expired ones are searched next.
    sweep_at: usize,
}

impl State {
    pub(super) fn new(limits: QueueLimits) -> Self {
        Self {
            limits,
            queues: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            consumers: BTreeMap::new(),
            connections: BTreeMap::new(),
            last_id: 0,
            sweep_at: MIN_SWEEP_QUEUES,
        }
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn connect(&mut self) -> u64 {
        let id = self.next_id();
        self.connections.insert(id, Connection { up: true, declared: Vec::new() });
        id
    }

    /// Whether the connection is up at the moment.
    ///
    /// # Errors
    /// [`TransportError::Closed`] if it was closed.
    pub(super) fn is_up(&self, connection: u64) -> Result<bool, TransportError> {
        self.connections.get(&connection).map(|connection| connection.up).ok_or(TransportError::Closed)
    }

    /// Takes a connection down, as when its socket breaks: its exclusive queues are deleted, unacknowledged messages requeued.
    pub(super) fn disconnect(&mut self, connection: u64, now: Instant) {
        let Some(state) = self.connections.get_mut(&connection) else { return };
        state.up = false;
        for id in self.consumers_of(connection) {
            self.detach(id, now);
        }
        self.remove_queues(|queue| queue.owner == Some(connection), now);
    }

    /// Brings a connection back: its queues are declared and consumed as before.
    pub(super) fn reconnect(&mut self, connection: u64, now: Instant) {
        let Some(state) = self.connections.get_mut(&connection) else { return };
        state.up = true;
        for queue in state.declared.clone() {
            if let Err(error) = self.declare(connection, &queue, now) {
                tracing::warn!(queue = queue.name, %error, "cannot declare the queue again after a reconnect");
            }
        }
        for id in self.consumers_of(connection) {
            self.attach(id, now);
        }
    }

    /// Closes a connection and ends its consumers.
    pub(super) fn close(&mut self, connection: u64, now: Instant) {
        self.disconnect(connection, now);
        self.connections.remove(&connection);
        for id in self.consumers_of(connection) {
            self.end_consumer(id, now);
        }
    }

    /// Restarts the broker: all connections that are up are interrupted, and only persistent messages in durable queues remain.
    pub(super) fn restart(&mut self, now: Instant) {
        let up: Vec<u64> = self.connections.iter().filter(|(_, state)| state.up).map(|(id, _)| *id).collect();
        for connection in &up {
            self.disconnect(*connection, now);
        }
        self.queues.values_mut().for_each(QueueState::drop_transient);
        for connection in &up {
            self.reconnect(*connection, now);
        }
    }

    fn consumers_of(&self, connection: u64) -> Vec<u64> {
        self.consumers.iter().filter(|(_, c)| c.connection == connection).map(|(id, _)| *id).collect()
    }

    /// Declares a queue, and remembers it for a reconnect unless it expires when unused.
    pub(super) fn declare_and_remember(
        &mut self,
        connection: u64,
        queue: &Queue,
        now: Instant,
    ) -> Result<(), TransportError> {
        self.declare(connection, queue, now)?;
        if queue.kind.expires_after().is_none()
            && let Some(connection) = self.connections.get_mut(&connection)
        {
            connection.declared.retain(|declared| declared.name != queue.name);
            connection.declared.push(queue.clone());
        }
        Ok(())
    }

    fn declare(&mut self, connection: u64, queue: &Queue, now: Instant) -> Result<(), TransportError> {
        self.sweep(now);
        self.remove_if_expired(&queue.name, now);
        if let Some(existing) = self.queues.get(&queue.name) {
            if existing.owner.is_some_and(|owner| owner != connection) {
                return Err(belongs_to_another(&queue.name));
            }
            if existing.kind != queue.kind {
                let reason = "it exists with other properties".to_owned();
                return Err(TransportError::QueueConflict { queue: queue.name.clone(), reason });
            }
        }
        let owner = (queue.kind == QueueKind::Exclusive).then_some(connection);
        let state = self.queues.entry(queue.name.clone()).or_insert_with(|| QueueState::new(queue.kind, owner, now));
        state.last_used = now;
        for exchange in &queue.bindings {
            state.bindings.insert(exchange.name.clone());
            self.exchanges.entry(exchange.name.clone()).or_default().insert(queue.name.clone());
        }
        Ok(())
    }

    /// Deletes a queue with its messages; false if there is none. Its consumers declare it again, as the transport guarantees.
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
        let consumers = self.consumers.iter().filter(|(_, c)| c.queue.name == name);
        let consumers: Vec<u64> = consumers.map(|(id, _)| *id).collect();
        for id in consumers {
            self.attach(id, now);
        }
    }

    fn remove_queues(&mut self, matches: impl Fn(&QueueState) -> bool, now: Instant) {
        let names = self.queues.iter().filter(|(_, queue)| matches(queue));
        let names: Vec<String> = names.map(|(name, _)| name.clone()).collect();
        for name in names {
            self.remove_queue(&name, now);
        }
    }

    fn remove_if_expired(&mut self, name: &str, now: Instant) {
        if self.queues.get(name).is_some_and(|queue| queue.is_expired(now)) {
            self.remove_queue(name, now);
        }
    }

    /// Removes all expired queues, each time that the number of queues has doubled: queues that are never used again go, too.
    fn sweep(&mut self, now: Instant) {
        if self.queues.len() >= self.sweep_at {
            self.remove_queues(|queue| queue.is_expired(now), now);
            self.sweep_at = self.queues.len().saturating_mul(2).max(MIN_SWEEP_QUEUES);
        }
    }

    /// The number of ready messages; `None` if there is no such queue.
    pub(super) fn depth(&mut self, connection: u64, name: &str, now: Instant) -> Result<Option<u64>, TransportError> {
        self.remove_if_expired(name, now);
        let Some(queue) = self.queues.get_mut(name) else { return Ok(None) };
        if queue.owner.is_some_and(|owner| owner != connection) {
            return Err(belongs_to_another(name));
        }
        Ok(Some(queue.ready(now).len() as u64))
    }

    /// The ready messages of a queue, next one first; empty if there is no such queue.
    pub(super) fn ready(&mut self, name: &str, now: Instant) -> Vec<Message> {
        self.remove_if_expired(name, now);
        self.queues.get_mut(name).map(|queue| queue.ready(now).cloned().collect()).unwrap_or_default()
    }

    /// Puts a message into the queues that it is routed to.
    pub(super) fn publish(&mut self, message: &PublishRequest, now: Instant) -> Result<(), TransportError> {
        match &message.destination {
            Destination::Queue(name) => self.enqueue(name, message, now),
            Destination::Exchange(exchange) => {
                let bound: Vec<String> = self.exchanges.get(&exchange.name).into_iter().flatten().cloned().collect();
                let mut outcome = Ok(());
                for name in bound {
                    match self.enqueue(&name, message, now) {
                        // The queue has just expired.
                        Ok(()) | Err(TransportError::Unroutable(_)) => {}
                        Err(error) => outcome = Err(error),
                    }
                }
                outcome
            }
        }
    }

    fn enqueue(&mut self, name: &str, message: &PublishRequest, now: Instant) -> Result<(), TransportError> {
        self.remove_if_expired(name, now);
        let position = self.next_id();
        let Some(queue) = self.queues.get_mut(name) else { return Err(TransportError::Unroutable(name.to_owned())) };
        queue.push(position, message, self.limits, now)?;
        self.dispatch(name);
        if let Some(queue) = self.queues.get_mut(name) {
            // A message with a lifetime of zero is delivered at once or dropped.
            queue.drop_expired(now);
        }
        Ok(())
    }

    /// Gives ready messages to the consumers whose prefetch allows it, one each in turn.
    fn dispatch(&mut self, name: &str) {
        let Some(queue) = self.queues.get_mut(name) else { return };
        let ordered = queue.kind.is_ordered();
        let mut busy = 0;
        while busy < queue.consumers.len() && !queue.is_empty() {
            let Some(id) = queue.consumers.front().copied() else { return };
            if !ordered {
                queue.consumers.rotate_left(1);
            }
            match self.consumers.get_mut(&id) {
                Some(consumer) if consumer.unacknowledged.len() < consumer.prefetch => {
                    let Some(message) = queue.pop() else { return };
                    consumer.undelivered.push_back(message.position);
                    consumer.unacknowledged.insert(message.position, message);
                    consumer.wake();
                    busy = 0;
                }
                _ if ordered => return,
                _ => busy += 1,
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
        let id = self.next_id();
        let consumer = ConsumerState {
            connection,
            queue: queue.clone(),
            prefetch: usize::from(prefetch.max(1)),
            attachment: 0,
            unacknowledged: BTreeMap::new(),
            undelivered: VecDeque::new(),
            waker: None,
        };
        self.consumers.insert(id, consumer);
        self.attach(id, now);
        Ok(id)
    }

    /// Attaches a consumer to its queue, which is declared if necessary.
    fn attach(&mut self, id: u64, now: Instant) {
        let Some(consumer) = self.consumers.get(&id) else { return };
        let (connection, queue) = (consumer.connection, consumer.queue.clone());
        if !self.is_up(connection).unwrap_or(false) {
            return;
        }
        if let Err(error) = self.declare(connection, &queue, now) {
            tracing::warn!(queue = queue.name, %error, "cannot declare the queue of a consumer again");
            return;
        }
        let attachment = self.next_id();
        if let Some(consumer) = self.consumers.get_mut(&id) {
            consumer.attachment = attachment;
        }
        if let Some(state) = self.queues.get_mut(&queue.name) {
            state.consumers.retain(|other| *other != id);
            state.consumers.push_back(id);
        }
        self.dispatch(&queue.name);
    }

    /// Detaches a consumer from its queue, and requeues its unacknowledged messages.
    fn detach(&mut self, id: u64, now: Instant) {
        let Some(consumer) = self.consumers.get_mut(&id) else { return };
        let name = consumer.queue.name.clone();
        let unacknowledged = consumer.drop_deliveries();
        let Some(queue) = self.queues.get_mut(&name) else { return };
        queue.consumers.retain(|other| *other != id);
        queue.last_used = now;
        for message in unacknowledged.into_values() {
            queue.requeue(message);
        }
        self.dispatch(&name);
    }

    pub(super) fn end_consumer(&mut self, id: u64, now: Instant) {
        self.detach(id, now);
        if let Some(mut consumer) = self.consumers.remove(&id) {
            consumer.wake();
        }
    }

    /// The next delivery of a consumer; `None` if the consumer has ended.
    pub(super) fn poll_delivery(&mut self, id: u64, cx: &Context<'_>) -> Poll<Option<(Message, DeliveryTag)>> {
        let Some(consumer) = self.consumers.get_mut(&id) else { return Poll::Ready(None) };
        while let Some(position) = consumer.undelivered.pop_front() {
            if let Some(message) = consumer.unacknowledged.get(&position) {
                let tag = DeliveryTag { consumer: id, attachment: consumer.attachment, position };
                return Poll::Ready(Some((message.clone(), tag)));
            }
        }
        consumer.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(super) fn settle(
        &mut self,
        tag: DeliveryTag,
        settlement: Settlement,
        now: Instant,
    ) -> Result<(), TransportError> {
        let consumer = self.consumers.get_mut(&tag.consumer).filter(|c| c.attachment == tag.attachment);
        let consumer = consumer.ok_or(TransportError::Disconnected)?;
        let message = consumer.unacknowledged.remove(&tag.position).ok_or(TransportError::Disconnected)?;
        let name = consumer.queue.name.clone();
        if let Some(queue) = self.queues.get_mut(&name) {
            if settlement == Settlement::Requeue {
                queue.requeue(message);
            }
            queue.drop_expired(now);
        }
        self.dispatch(&name);
        Ok(())
    }
}

impl ConsumerState {
    /// Invalidates its deliveries: none of them can be settled any more.
    fn drop_deliveries(&mut self) -> BTreeMap<u64, Message> {
        self.attachment = 0;
        self.undelivered.clear();
        std::mem::take(&mut self.unacknowledged)
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

fn belongs_to_another(queue: &str) -> TransportError {
    let reason = "it belongs to another connection".to_owned();
    TransportError::QueueConflict { queue: queue.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::DurableOptions;
    use std::time::Duration;

    #[test]
    fn expired_queues_are_removed_although_they_are_never_used_again() {
        let (mut state, now) = (State::new(QueueLimits::new()), Instant::now());
        let connection = state.connect();
        let options = DurableOptions::new().expires_after(Duration::ZERO);
        for n in 0..1_000 {
            state.declare_and_remember(connection, &Queue::new(format!("q{n}"), options), now).unwrap();
        }
        assert!(state.queues.len() < 200);
    }
}
