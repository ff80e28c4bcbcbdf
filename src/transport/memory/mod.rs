//! A whole broker in one process, with the semantics of RabbitMQ: for demonstrations, tests, and systems of one process.
//!
//! [`MemoryBroker`] holds the queues, each [`MemoryTransport`] is one connection to it. Here: the lock around the state, waiting
//! for a connection that is away, and the [`Transport`] of one connection. The rules are in `state.rs`.

mod state;
mod tap;
#[cfg(test)]
mod tests;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::Stream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{
    Acker, CALL_TIMEOUT, Consumer, Delivery, PublishRequest, Queue, Settle, Settlement, Transport, TransportError,
    check_message, check_name, check_queue,
};
use state::{Receipt, State};
pub use tap::{PublishedMessage, Tap};

/// A broker in this process. Clones are handles to the same one.
#[derive(Clone, Debug, Default)]
pub struct MemoryBroker(Arc<Shared>);

/// How much one queue may hold before publishes to it are [`TransportError::Nacked`].
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// QueuedMessage messages.
    pub messages: usize,
    /// Bytes in the bodies of waiting messages.
    pub bytes: usize,
}

impl Default for Limits {
    /// 100,000 messages, 256 MiB.
    fn default() -> Self {
        Self { messages: 100_000, bytes: 256 * 1024 * 1024 }
    }
}

/// A message that waits in a queue.
#[derive(Clone, Debug)]
pub struct QueuedMessage {
    /// The message, byte for byte.
    pub body: Arc<[u8]>,
    /// The format that it claims.
    pub content_type: String,
    /// Whether it was delivered before.
    pub redelivered: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts the changes of connections: who waits for one looks again.
    changes: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Shared {
    fn new(limits: Limits) -> Self {
        Self { state: Mutex::new(State::new(limits)), changes: watch::Sender::new(0) }
    }

    /// The state. The lock is held for plain computation only, never across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl MemoryBroker {
    /// An empty broker with the default limits.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty broker whose queues hold at most so much.
    pub fn with_limits(limits: Limits) -> Self {
        Self(Arc::new(Shared::new(limits)))
    }

    /// A new connection to this broker.
    pub fn connect(&self) -> MemoryTransport {
        let connection = self.0.state().connect();
        MemoryTransport { broker: Arc::clone(&self.0), connection }
    }

    /// Looks at every message published from now on, whether it reaches a queue or not. At most `capacity` are held.
    pub fn tap(&self, capacity: usize) -> Tap {
        self.0.state().taps.add(capacity)
    }

    /// What waits in a queue, first to be delivered first; nothing when there is no such queue.
    pub fn waiting(&self, queue: &str) -> Vec<QueuedMessage> {
        let waiting = self.0.state().waiting(queue, Instant::now());
        let look = |message: state::Stored| QueuedMessage {
            body: message.body,
            content_type: message.content_type.as_ref().to_owned(),
            redelivered: message.redelivered,
        };
        waiting.into_iter().map(look).collect()
    }

    /// Deletes a queue with its messages, as an operator would; whether it was there. Its consumers declare it again.
    pub fn delete_queue(&self, queue: &str) -> bool {
        self.0.state().delete(queue, Instant::now())
    }

    /// Stops and starts: connections are cut and come back, messages that are not persistent are lost, as are exclusive queues.
    pub fn restart(&self) {
        let now = Instant::now();
        let mut state = self.0.state();
        let connections: Vec<u64> =
            state.connections().into_iter().filter(|connection| state.is_up(*connection) == Ok(true)).collect();
        for connection in &connections {
            state.cut(*connection, now);
        }
        state.forget_transient();
        for connection in &connections {
            state.restore(*connection, now);
        }
        drop(state);
        self.0.changed();
    }
}

/// One connection to a [`MemoryBroker`].
#[derive(Debug)]
pub struct MemoryTransport {
    broker: Arc<Shared>,
    connection: u64,
}

impl MemoryTransport {
    /// Cuts the connection, as when its socket breaks: unacknowledged messages go back, exclusive queues go, and it stays away
    /// until [`restore`](Self::restore).
    pub fn cut(&self) {
        self.broker.state().cut(self.connection, Instant::now());
        self.broker.changed();
    }

    /// Brings the connection back: its queues are declared and consumed again.
    pub fn restore(&self) {
        self.broker.state().restore(self.connection, Instant::now());
        self.broker.changed();
    }

    /// Does something on the broker as soon as the connection is up.
    async fn when_up<T>(
        &self,
        timeout: Duration,
        act: impl Fn(&mut State) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        let mut changes = self.broker.changes.subscribe();
        let attempt = async {
            loop {
                changes.mark_unchanged();
                {
                    let mut state = self.broker.state();
                    if state.is_up(self.connection)? {
                        return act(&mut state);
                    }
                }
                changes.changed().await.map_err(|_| TransportError::Closed)?;
            }
        };
        let done = tokio::time::timeout(timeout, attempt).await.unwrap_or(Err(TransportError::TimedOut(timeout)));
        // Nothing of it waits while the connection is up: let others run now and then.
        tokio::task::consume_budget().await;
        done
    }

    fn end(&self) {
        self.broker.state().close(self.connection, Instant::now());
        self.broker.changed();
    }
}

#[async_trait]
impl Transport for MemoryTransport {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        check_message(&message)?;
        self.when_up(timeout, |state| state.publish(&message, Instant::now())).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        check_queue(queue)?;
        let add = |state: &mut State| state.add_consumer(self.connection, queue, prefetch, Instant::now());
        let id = self.when_up(CALL_TIMEOUT, add).await?;
        Ok(Consumer::new(Deliveries { broker: Arc::clone(&self.broker), id }))
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        check_queue(queue)?;
        self.when_up(CALL_TIMEOUT, |state| state.declare_and_keep(self.connection, queue, Instant::now())).await
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

/// What a consumer reads from.
#[derive(Debug)]
struct Deliveries {
    broker: Arc<Shared>,
    id: u64,
}

impl Stream for Deliveries {
    type Item = Delivery;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        let handed = self.broker.state().poll_delivery(self.id, cx);
        handed.map(|handed| {
            handed.map(|handed| Delivery {
                body: handed.message.body,
                content_type: handed.message.content_type.as_ref().to_owned(),
                redelivered: handed.message.redelivered,
                acker: Acker::new(MemorySettle { broker: Arc::clone(&self.broker), receipt: handed.receipt }),
            })
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
    receipt: Receipt,
}

#[async_trait]
impl Settle for MemorySettle {
    async fn settle(&self, settlement: Settlement) -> Result<(), TransportError> {
        self.broker.state().settle(self.receipt, settlement, Instant::now())
    }
}
