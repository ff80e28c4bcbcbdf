//! A broker in this process, with the semantics of RabbitMQ: for demonstrations, tests, and systems of one process.
//!
//! [`MemoryBroker`] holds the queues; each [`MemoryTransport`] is one connection to it. This file has the lock around the state, the
//! waiting for a connection that is down, and the taps. The rules are in `state.rs` and `queue.rs`.

mod queue;
mod state;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::Stream;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use tokio::time::Instant;

use super::message::check_name;
use super::{
    Acker, CALL_TIMEOUT, Consumer, Delivery, Destination, PublishRequest, Queue, Settle, Settlement, Transport,
    TransportError,
};
pub use queue::{QueueLimits, QueuedMessage};
use state::{DeliveryTag, State};

/// A broker in this process. Clones are handles to the same broker.
///
/// ```
/// use nanite::transport::{Destination, MemoryBroker, PublishRequest, Queue, Transport, TransportError};
/// use std::time::Duration;
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), TransportError> {
/// let broker = MemoryBroker::new();
/// let (sender, receiver) = (broker.connect(), broker.connect());
/// receiver.declare(&Queue::durable("work")).await?;
///
/// let message = PublishRequest::new(Destination::queue("work"), "hello".as_bytes());
/// sender.publish(message, Duration::from_secs(1)).await?;
/// assert_eq!(receiver.depth("work").await?, Some(1));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct MemoryBroker(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    taps: Mutex<Vec<Weak<Mutex<TapBuffer>>>>,
    /// Counts changes of connections, to wake those that wait for one.
    connection_changes: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self::new(QueueLimits::new())
    }
}

impl Shared {
    fn new(limits: QueueLimits) -> Self {
        Self {
            state: Mutex::new(State::new(limits)),
            taps: Mutex::default(),
            connection_changes: watch::Sender::new(0),
        }
    }

    /// The state. The lock is held for plain computation only, never across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn notify_connections(&self) {
        self.connection_changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn record(&self, message: &PublishRequest) {
        for buffer in self.taps.lock().iter().filter_map(Weak::upgrade) {
            buffer.lock().push(message);
        }
    }
}

impl MemoryBroker {
    /// An empty broker with the default limits.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty broker with these limits for each queue.
    pub fn with_limits(limits: QueueLimits) -> Self {
        Self(Arc::new(Shared::new(limits)))
    }

    /// A new connection to this broker.
    pub fn connect(&self) -> MemoryTransport {
        let connection = self.0.state().connect();
        MemoryTransport { broker: Arc::clone(&self.0), connection }
    }

    /// Records every message that is published from now on, whether it reaches a queue or not. The tap holds at most `capacity`
    /// messages, at least one.
    ///
    /// ```
    /// use nanite::transport::{Destination, MemoryBroker, PublishRequest, Transport, TransportError};
    /// use std::time::Duration;
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), TransportError> {
    /// let broker = MemoryBroker::new();
    /// let tap = broker.tap(100);
    /// let message = PublishRequest::new(Destination::exchange("news"), "hello".as_bytes());
    /// broker.connect().publish(message, Duration::from_secs(1)).await?;
    /// assert_eq!(&*tap.take()[0].body, b"hello");
    /// # Ok(())
    /// # }
    /// ```
    pub fn tap(&self, capacity: usize) -> Tap {
        let buffer = TapBuffer { published: VecDeque::new(), capacity: capacity.max(1), dropped: 0 };
        let buffer = Arc::new(Mutex::new(buffer));
        let mut taps = self.0.taps.lock();
        taps.retain(|tap| tap.strong_count() > 0);
        taps.push(Arc::downgrade(&buffer));
        Tap(buffer)
    }

    /// The messages that are ready in a queue, next one first; empty if there is no such queue.
    pub fn queued_messages(&self, queue: &str) -> Vec<QueuedMessage> {
        let ready = self.0.state().ready(queue, Instant::now());
        let queued = ready.into_iter().map(|message| QueuedMessage {
            body: message.body,
            content_type: message.content_type.as_ref().to_owned(),
            redelivered: message.redelivered,
        });
        queued.collect()
    }

    /// Deletes a queue with its messages, as an operator would; false if there is none. Its consumers declare it again.
    pub fn delete_queue(&self, queue: &str) -> bool {
        self.0.state().delete(queue, Instant::now())
    }

    /// Restarts the broker: connections are lost and restored. Transient messages and exclusive queues are lost.
    ///
    /// ```
    /// use nanite::transport::{Destination, MemoryBroker, PublishRequest, Queue, Transport, TransportError};
    /// use std::time::Duration;
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), TransportError> {
    /// let broker = MemoryBroker::new();
    /// let transport = broker.connect();
    /// transport.declare(&Queue::durable("work")).await?;
    /// let message = PublishRequest::new(Destination::queue("work"), "hello".as_bytes());
    /// transport.publish(message.clone().persistent(false), Duration::from_secs(1)).await?;
    /// transport.publish(message, Duration::from_secs(1)).await?;
    /// assert_eq!(broker.queued_messages("work").len(), 2);
    ///
    /// broker.restart();
    /// assert_eq!(broker.queued_messages("work").len(), 1);
    /// # Ok(())
    /// # }
    /// ```
    pub fn restart(&self) {
        self.0.state().restart(Instant::now());
        self.0.notify_connections();
    }
}

/// One connection to a [`MemoryBroker`].
#[derive(Debug)]
pub struct MemoryTransport {
    broker: Arc<Shared>,
    connection: u64,
}

impl MemoryTransport {
    /// Loses the connection, as when its socket breaks, until [`reconnect`](Self::reconnect): its exclusive queues are deleted and
    /// unacknowledged messages requeued.
    ///
    /// ```
    /// use nanite::transport::{MemoryBroker, Queue, Transport, TransportError};
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), TransportError> {
    /// let broker = MemoryBroker::new();
    /// let (transport, other) = (broker.connect(), broker.connect());
    /// transport.declare(&Queue::exclusive("inbox")).await?;
    /// transport.disconnect();
    /// assert_eq!(other.depth("inbox").await?, None);
    ///
    /// transport.reconnect();
    /// assert_eq!(transport.depth("inbox").await?, Some(0));
    /// # Ok(())
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.broker.state().disconnect(self.connection, Instant::now());
        self.broker.notify_connections();
    }

    /// Restores the connection: its queues are declared and consumed again.
    pub fn reconnect(&self) {
        self.broker.state().reconnect(self.connection, Instant::now());
        self.broker.notify_connections();
    }

    /// Does something on the broker as soon as the connection is up.
    async fn when_up<T>(
        &self,
        timeout: Duration,
        action: impl Fn(&mut State) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        let mut changes = self.broker.connection_changes.subscribe();
        let attempt = async {
            loop {
                changes.mark_unchanged();
                {
                    let mut state = self.broker.state();
                    if state.is_up(self.connection)? {
                        return action(&mut state);
                    }
                }
                changes.changed().await.map_err(|_| TransportError::Closed)?;
            }
        };
        let result = tokio::time::timeout(timeout, attempt).await.unwrap_or(Err(TransportError::TimedOut(timeout)));
        // While the connection is up nothing above yields: let other tasks run from time to time.
        tokio::task::consume_budget().await;
        result
    }

    fn end(&self) {
        self.broker.state().close(self.connection, Instant::now());
        self.broker.notify_connections();
    }
}

#[async_trait]
impl Transport for MemoryTransport {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        message.check()?;
        let publish = |state: &mut State| {
            self.broker.record(&message);
            state.publish(&message, Instant::now())
        };
        self.when_up(timeout, publish).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        queue.check()?;
        let add = |state: &mut State| state.add_consumer(self.connection, queue, prefetch, Instant::now());
        let id = self.when_up(CALL_TIMEOUT, add).await?;
        Ok(Consumer::new(Deliveries { broker: Arc::clone(&self.broker), id }))
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        queue.check()?;
        self.when_up(CALL_TIMEOUT, |state| state.declare_and_remember(self.connection, queue, Instant::now())).await
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        check_name(queue)?;
        self.when_up(CALL_TIMEOUT, |state| state.depth(self.connection, queue, Instant::now())).await
    }

    async fn close(&self) {
        self.end();
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        self.end();
    }
}

/// The deliveries of one consumer.
#[derive(Debug)]
struct Deliveries {
    broker: Arc<Shared>,
    id: u64,
}

impl Stream for Deliveries {
    type Item = Delivery;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        let next = self.broker.state().poll_delivery(self.id, cx);
        next.map(|next| {
            let (message, tag) = next?;
            let acker = Acker::new(MemorySettle { broker: Arc::clone(&self.broker), tag });
            let delivery = Delivery::new(message.body, acker).redelivered(message.redelivered);
            Some(delivery.content_type(message.content_type.as_ref()))
        })
    }
}

impl Drop for Deliveries {
    fn drop(&mut self) {
        self.broker.state().end_consumer(self.id, Instant::now());
    }
}

#[derive(Debug)]
struct MemorySettle {
    broker: Arc<Shared>,
    tag: DeliveryTag,
}

#[async_trait]
impl Settle for MemorySettle {
    async fn settle(&self, settlement: Settlement) -> Result<(), TransportError> {
        self.broker.state().settle(self.tag, settlement, Instant::now())
    }
}

/// A recorder of the messages published to a [`MemoryBroker`], from [`MemoryBroker::tap`]. It holds a bounded number of messages;
/// the oldest are dropped and counted.
#[derive(Debug)]
pub struct Tap(Arc<Mutex<TapBuffer>>);

/// A message that was published, recorded by a [`Tap`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PublishedMessage {
    /// Where it was sent.
    pub destination: Destination,
    /// The content.
    pub body: Arc<[u8]>,
    /// The format that the publisher claims.
    pub content_type: String,
}

#[derive(Debug)]
struct TapBuffer {
    published: VecDeque<PublishedMessage>,
    capacity: usize,
    dropped: u64,
}

impl Tap {
    /// Takes the recorded messages, oldest first.
    pub fn take(&self) -> Vec<PublishedMessage> {
        self.0.lock().published.drain(..).collect()
    }

    /// How many messages were dropped because they were not taken in time.
    pub fn dropped(&self) -> u64 {
        self.0.lock().dropped
    }
}

impl TapBuffer {
    fn push(&mut self, message: &PublishRequest) {
        if self.published.len() >= self.capacity {
            self.published.pop_front();
            self.dropped += 1;
        }
        self.published.push_back(PublishedMessage {
            destination: message.destination.clone(),
            body: Arc::clone(&message.body),
            content_type: message.content_type.clone(),
        });
    }
}
