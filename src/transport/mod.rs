//! How messages travel: exchanges, queues, deliveries. The transport does not know what the bytes mean.
//!
//! A [`Transport`] publishes to a queue or to a fan-out exchange and consumes from queues, with publisher confirms and
//! acknowledgements. [`AmqpTransport`] connects to RabbitMQ; [`MemoryBroker`] is a broker in this process.
//!
//! ```
//! use nanite::transport::{Destination, MemoryBroker, PublishRequest, Queue, Transport, TransportError};
//! use std::time::Duration;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), TransportError> {
//! let transport = MemoryBroker::new().connect();
//! let mut consumer = transport.consume(&Queue::durable("work"), 10).await?;
//!
//! let message = PublishRequest::new(Destination::queue("work"), "hello".as_bytes());
//! transport.publish(message, Duration::from_secs(10)).await?;
//!
//! let delivery = consumer.next().await.ok_or(TransportError::Closed)?;
//! assert_eq!(&*delivery.body, b"hello");
//! delivery.acker.ack().await?;
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "amqp")]
mod amqp;
mod memory;
mod message;
pub mod topology;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
#[doc(no_inline)]
pub use futures_util::Stream;
use futures_util::StreamExt;

#[cfg(feature = "amqp")]
pub use amqp::{AmqpOptions, AmqpTransport, Tls};
#[cfg(all(feature = "amqp", feature = "cli"))]
pub(crate) use amqp::{logs_secrets, percent_encode};
pub use memory::{MemoryBroker, MemoryTransport, PublishedMessage, QueueLimits, QueuedMessage, Tap};
pub use message::{
    Destination, DurableOptions, Exchange, MAX_BODY_BYTES, PublishRequest, Queue, QueueKind, TransportError,
};

/// How long a call without a timeout of its own waits for the broker.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Carries messages between queues. Implement it to use another broker.
///
/// An implementation guarantees:
///
/// * A publish that returns `Ok` is confirmed: the message is in every queue that it was routed to. A message to
///   [`Destination::Queue`] is mandatory: if the queue does not exist, it fails with [`TransportError::Unroutable`]. A message to
///   [`Destination::Exchange`] may reach no queue.
/// * A delivery that is not acknowledged is delivered again, to this consumer or another, marked as redelivered.
/// * Messages from one transport to one queue arrive in the order in which their publish futures were first polled, even if many
///   are in flight at once. Redeliveries may come out of order.
/// * A delivery can be settled while its consumer exists and the connection it came over is up. After that it is delivered again,
///   and settling it fails with [`TransportError::Disconnected`].
/// * Other connections cannot use an exclusive queue, except to publish to it.
/// * A lost connection is restored by the transport: queues are declared and consumed again. In the meantime, publishes wait up to
///   their timeout and other calls up to [`CALL_TIMEOUT`]. Every call returns in the end.
/// * Bodies are at most [`MAX_BODY_BYTES`] long, in both directions.
/// * Dropping a transport closes it.
///
/// A transport that counts what another one publishes:
///
/// ```
/// use async_trait::async_trait;
/// use nanite::transport::{Consumer, PublishRequest, Queue, Transport, TransportError};
/// use std::sync::atomic::{AtomicU64, Ordering};
/// use std::time::Duration;
///
/// #[derive(Debug)]
/// struct Counting<T> {
///     inner: T,
///     published: AtomicU64,
/// }
///
/// #[async_trait]
/// impl<T: Transport> Transport for Counting<T> {
///     async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
///         self.inner.publish(message, timeout).await?;
///         self.published.fetch_add(1, Ordering::Relaxed);
///         Ok(())
///     }
///
///     async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
///         self.inner.consume(queue, prefetch).await
///     }
///
///     async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
///         self.inner.declare(queue).await
///     }
///
///     async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
///         self.inner.depth(queue).await
///     }
///
///     async fn close(&self) {
///         self.inner.close().await;
///     }
/// }
/// ```
#[async_trait]
pub trait Transport: fmt::Debug + Send + Sync {
    /// Publishes a message and waits for the broker's confirm, at most for `timeout`.
    ///
    /// # Errors
    /// [`TransportError`]; [`TransportError::is_retryable`] says whether trying again can help.
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError>;

    /// Declares a queue with its bindings and their exchanges, and consumes from it. At most `prefetch` deliveries are
    /// unacknowledged at a time; zero counts as one.
    ///
    /// # Errors
    /// [`TransportError`] if the queue cannot be declared or consumed.
    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError>;

    /// Declares a queue without consuming from it, so that messages can wait in it. It is declared again after a reconnect, unless
    /// it expires when unused.
    ///
    /// # Errors
    /// [`TransportError`] if the queue cannot be declared.
    async fn declare(&self, queue: &Queue) -> Result<(), TransportError>;

    /// The number of messages that are ready in a queue, without those that are delivered and unacknowledged; `None` if there is no
    /// such queue.
    ///
    /// # Errors
    /// [`TransportError`] if the broker cannot be asked.
    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError>;

    /// Closes the connection and ends its consumers. Unacknowledged messages return to their queues.
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

/// A stream of deliveries from one queue. Dropping it stops consuming; unacknowledged messages return to the queue.
///
/// Deliveries can be acknowledged while their consumer exists. To stop gracefully, stop calling [`next`](Self::next), settle the
/// deliveries in progress, then drop the consumer.
pub struct Consumer {
    deliveries: Pin<Box<dyn Stream<Item = Delivery> + Send + Sync>>,
}

impl Consumer {
    /// A consumer that yields these deliveries: for implementations of [`Transport`].
    ///
    /// ```
    /// use nanite::transport::{Consumer, Delivery};
    ///
    /// # #[tokio::main]
    /// # async fn main() {
    /// let mut consumer = Consumer::new(futures_util::stream::empty::<Delivery>());
    /// assert!(consumer.next().await.is_none());
    /// # }
    /// ```
    pub fn new(deliveries: impl Stream<Item = Delivery> + Send + Sync + 'static) -> Self {
        Self { deliveries: Box::pin(deliveries) }
    }

    /// The next delivery; `None` after the transport was closed. Cancel safe.
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
#[non_exhaustive]
pub struct Delivery {
    /// The content.
    pub body: Arc<[u8]>,
    /// The format that the publisher claims: untrusted.
    pub content_type: String,
    /// Whether the message may have been delivered before.
    pub redelivered: bool,
    /// Settles the delivery.
    pub acker: Acker,
}

impl Delivery {
    /// A first delivery without a content type: for implementations of [`Transport`].
    pub fn new(body: impl Into<Arc<[u8]>>, acker: Acker) -> Self {
        Self { body: body.into(), content_type: String::new(), redelivered: false, acker }
    }

    /// The format that the publisher claims.
    #[must_use]
    pub fn content_type(mut self, content_type: impl Into<String>) -> Self {
        self.content_type = content_type.into();
        self
    }

    /// Whether the message may have been delivered before; false by default.
    #[must_use]
    pub fn redelivered(mut self, redelivered: bool) -> Self {
        self.redelivered = redelivered;
        self
    }
}

/// Settles one delivery. If it is dropped instead, the delivery stays unacknowledged until its consumer ends.
#[derive(Debug)]
pub struct Acker(Box<dyn Settle>);

impl Acker {
    /// An acker for this way to settle: for implementations of [`Transport`].
    pub fn new(settle: impl Settle + 'static) -> Self {
        Self(Box::new(settle))
    }

    /// Acknowledges the message: the broker deletes it.
    ///
    /// # Errors
    /// [`TransportError`] if the broker cannot be told: the message will be delivered again.
    pub async fn ack(self) -> Result<(), TransportError> {
        self.0.settle(Settlement::Ack).await
    }

    /// Returns the message to its queue.
    ///
    /// ```
    /// use nanite::transport::{Destination, MemoryBroker, PublishRequest, Queue, Transport, TransportError};
    /// use std::time::Duration;
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), TransportError> {
    /// let transport = MemoryBroker::new().connect();
    /// let mut consumer = transport.consume(&Queue::durable("work"), 1).await?;
    /// let message = PublishRequest::new(Destination::queue("work"), "hello".as_bytes());
    /// transport.publish(message, Duration::from_secs(1)).await?;
    ///
    /// let first = consumer.next().await.ok_or(TransportError::Closed)?;
    /// first.acker.requeue().await?;
    /// let second = consumer.next().await.ok_or(TransportError::Closed)?;
    /// assert!(second.redelivered);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`TransportError`] if the broker cannot be told: the message will be delivered again in any case.
    pub async fn requeue(self) -> Result<(), TransportError> {
        self.0.settle(Settlement::Requeue).await
    }
}

/// What happens to a delivered message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settlement {
    /// Acknowledged: deleted.
    Ack,
    /// Returned to its queue.
    Requeue,
}

/// Settles a delivery with the broker. Implemented by transports, and called by [`Acker`]. A transport that does not support a
/// settlement requeues the message.
///
/// ```
/// use async_trait::async_trait;
/// use nanite::transport::{Acker, Delivery, Settle, Settlement, TransportError};
///
/// #[derive(Debug)]
/// struct Ignore;
///
/// #[async_trait]
/// impl Settle for Ignore {
///     async fn settle(&self, _settlement: Settlement) -> Result<(), TransportError> {
///         Ok(())
///     }
/// }
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), TransportError> {
/// let delivery = Delivery::new("hello".as_bytes(), Acker::new(Ignore)).content_type("text/plain");
/// delivery.acker.ack().await?;
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait Settle: fmt::Debug + Send + Sync {
    /// Settles the delivery. A delivery of a lost connection cannot be settled: that is [`TransportError::Disconnected`].
    ///
    /// # Errors
    /// [`TransportError`] if the broker cannot be told.
    async fn settle(&self, settlement: Settlement) -> Result<(), TransportError>;
}
