//! How bytes travel: exchanges, queues, deliveries. Nothing here knows what the bytes mean.
//!
//! A [`Transport`] publishes to a queue or to a fan-out exchange and consumes from queues, with acknowledgements. `memory` keeps
//! everything in one process; `amqp` speaks to RabbitMQ.

#[cfg(feature = "amqp")]
mod amqp;
mod error;
mod memory;
pub mod topology;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{Stream, StreamExt};

#[cfg(feature = "amqp")]
pub use amqp::{AmqpOptions, AmqpTransport, Tls};
#[cfg(all(feature = "amqp", feature = "cli"))]
pub(crate) use amqp::{logs_secrets, segment};
pub use error::TransportError;
pub use memory::{Limits, MemoryBroker, MemoryTransport, PublishedMessage, QueuedMessage, Tap};

/// The largest body that is carried, in bytes: what RabbitMQ 4 takes by default.
pub const MAX_BODY: usize = 16 * 1024 * 1024;

/// How long a call that has no timeout of its own waits for the broker.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Carries bytes.
///
/// * A publish that returns `Ok` is confirmed: it is in every queue it had to go to. To [`Destination::Queue`] it is mandatory:
///   no such queue is [`TransportError::Unroutable`]. To [`Destination::Exchange`] nobody listening is fine.
/// * A delivery that is not acknowledged comes again, to this consumer or another, marked as redelivered.
/// * Messages from one transport to one queue arrive in the order in which the futures of their publishes were first polled,
///   redeliveries aside; also when many are under way at once.
/// * A delivery can be settled as long as its consumer lives and the connection it came over does; later it comes again, and
///   settling it is [`TransportError::Disconnected`].
/// * An exclusive queue is closed to other connections, except that they may publish to it.
/// * A lost connection is restored by the transport itself: queues are declared and consumed again. While it is away, publishes
///   wait up to their timeout and other calls up to [`CALL_TIMEOUT`]. Every call ends: none waits for ever.
/// * Bodies are at most [`MAX_BODY`] bytes, in both directions.
/// * Dropping it is as closing it.
#[async_trait]
pub trait Transport: fmt::Debug + Send + Sync {
    /// Publishes one message and waits until it is confirmed, at most `timeout`.
    ///
    /// # Errors
    /// [`TransportError`]; whether trying again can help is [`TransportError::is_retryable`].
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError>;

    /// Declares a queue with its bindings (and the exchanges these name) and consumes from it. At most `prefetch` deliveries are
    /// unacknowledged at a time; zero counts as one.
    ///
    /// # Errors
    /// [`TransportError`] when the queue cannot be declared or consumed.
    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError>;

    /// Declares a queue without consuming from it, so that messages can wait in it. It is declared again when a lost connection
    /// is back, except one that expires when unused.
    ///
    /// # Errors
    /// [`TransportError`] when the queue cannot be declared.
    async fn declare(&self, queue: &Queue) -> Result<(), TransportError>;

    /// How many messages wait in a queue (those delivered and not acknowledged do not count); none when there is no such queue.
    ///
    /// # Errors
    /// [`TransportError`] when the broker cannot be asked.
    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError>;

    /// Closes the connection; consumers end. What was not acknowledged goes back to its queue.
    async fn close(&self);
}

#[async_trait]
impl<T: Transport + ?Sized> Transport for Arc<T> {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        (**self).publish(message, timeout).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        (**self).consume(queue, prefetch).await
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        (**self).declare(queue).await
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        (**self).depth(queue).await
    }

    async fn close(&self) {
        (**self).close().await;
    }
}

/// A message to publish.
#[derive(Clone, Debug)]
pub struct PublishRequest {
    /// Where it goes.
    pub destination: Destination,
    /// The message.
    pub body: Arc<[u8]>,
    /// Names the format of the body.
    pub content_type: String,
    /// Identifies the message in the broker's tools; 1 to 64 bytes. Nothing relies on it.
    pub message_id: String,
    /// How long the broker may keep it undelivered.
    pub expires_in: Option<Duration>,
    /// Whether it outlives a restart of the broker.
    pub persistent: bool,
}

/// Where a message goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// Into this queue, which must exist.
    Queue(String),
    /// To every queue bound to this exchange.
    Exchange(Exchange),
}

/// A durable fan-out exchange.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Exchange(pub String);

/// Whether a queue or an exchange can have this name: 1 to 255 bytes, and not `amq.`, which is the broker's own.
fn check_name(name: &str) -> Result<(), TransportError> {
    if name.is_empty() || name.len() > 255 || name.starts_with("amq.") {
        return Err(TransportError::Name(name.to_owned()));
    }
    Ok(())
}

fn check_message(message: &PublishRequest) -> Result<(), TransportError> {
    if message.body.len() > MAX_BODY {
        return Err(TransportError::TooLarge { length: message.body.len(), limit: MAX_BODY });
    }
    match &message.destination {
        Destination::Queue(name) | Destination::Exchange(Exchange(name)) => check_name(name),
    }
}

fn check_queue(queue: &Queue) -> Result<(), TransportError> {
    queue.bindings.iter().try_for_each(|exchange| check_name(&exchange.0))?;
    check_name(&queue.name)
}

/// A queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its name, 1 to 255 bytes; never chosen by the broker.
    pub name: String,
    /// How long it lives.
    pub kind: QueueKind,
    /// The exchanges it gets messages from, beside those sent to it by name.
    pub bindings: Vec<Exchange>,
}

/// How long a queue lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// Outlives its consumers and restarts of the broker; is deleted when unused for this long, where given.
    Durable {
        /// How long it may be unused.
        expires: Option<Duration>,
        /// Replicated by the broker's cluster (a quorum queue). In such a queue a message that was given back can come again
        /// behind those that waited.
        quorum: bool,
        /// Only one of its consumers gets messages at a time, and another takes over when it goes: so they keep their order.
        ordered: bool,
    },
    /// Belongs to one connection and goes with it.
    Exclusive,
}

/// A stream of deliveries from one queue. Dropping it ends the consumption; what was not acknowledged goes back.
///
/// Its deliveries can be acknowledged as long as it lives: to stop in an orderly way, stop asking for the next one, settle what is
/// at work, then drop it.
pub struct Consumer {
    deliveries: Pin<Box<dyn Stream<Item = Delivery> + Send + Sync>>,
}

impl Consumer {
    /// A consumer that is fed by `deliveries`: for implementations of [`Transport`].
    pub fn new(deliveries: impl Stream<Item = Delivery> + Send + Sync + 'static) -> Self {
        Self { deliveries: Box::pin(deliveries) }
    }

    /// The next delivery; `None` when the transport was closed. Cancel safe.
    pub async fn next(&mut self) -> Option<Delivery> {
        tokio::task::consume_budget().await;
        self.deliveries.next().await
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").finish_non_exhaustive()
    }
}

/// One delivered message.
#[derive(Debug)]
pub struct Delivery {
    /// The message.
    pub body: Arc<[u8]>,
    /// The format that it claims; from anybody.
    pub content_type: String,
    /// Whether it may have been delivered before.
    pub redelivered: bool,
    /// How to settle it.
    pub acker: Acker,
}

/// Settles a delivery. Dropped without being settled, the delivery stays unacknowledged until its consumer ends.
#[derive(Debug)]
pub struct Acker(Box<dyn Settle>);

impl Acker {
    /// An acker that settles by `settle`: for implementations of [`Transport`].
    pub fn new(settle: impl Settle + 'static) -> Self {
        Self(Box::new(settle))
    }

    /// The message has been dealt with.
    ///
    /// # Errors
    /// [`TransportError`] when the broker cannot be told: the message will come again.
    pub async fn ack(self) -> Result<(), TransportError> {
        self.0.settle(Settlement::Ack).await
    }

    /// The message goes back to its queue.
    ///
    /// # Errors
    /// [`TransportError`] when the broker cannot be told: the message will come again in any case.
    pub async fn requeue(self) -> Result<(), TransportError> {
        self.0.settle(Settlement::Requeue).await
    }
}

/// What becomes of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Dealt with.
    Ack,
    /// Back to the queue.
    Requeue,
}

/// What stands behind an [`Acker`].
#[async_trait]
pub trait Settle: fmt::Debug + Send + Sync {
    /// Tells the broker. A delivery of a connection that is gone cannot be settled any more: that is
    /// [`TransportError::Disconnected`].
    ///
    /// # Errors
    /// [`TransportError`] when the broker cannot be told.
    async fn settle(&self, settlement: Settlement) -> Result<(), TransportError>;
}
