//! Messages to publish, the queues and exchanges that they go to, and why a transport call fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The largest body of a message, in bytes: the default limit of RabbitMQ 4.
pub const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

/// A message to publish.
///
/// ```
/// use nanite::transport::{Destination, PublishRequest};
/// use std::time::Duration;
///
/// let message = PublishRequest::new(Destination::queue("work"), "hello".as_bytes())
///     .content_type("text/plain")
///     .expires_in(Duration::from_secs(60));
/// assert!(message.persistent);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PublishRequest {
    /// Where it goes.
    pub destination: Destination,
    /// The content.
    pub body: Arc<[u8]>,
    /// The format of the body, at most 255 bytes.
    pub content_type: String,
    /// Identifies the message in the broker's tools, at most 255 bytes. The transport does not use it.
    pub message_id: String,
    /// How long the broker keeps it undelivered; without limit if `None`.
    pub expires_in: Option<Duration>,
    /// Whether it survives a restart of the broker.
    pub persistent: bool,
}

impl PublishRequest {
    /// A persistent message that does not expire, of the content type `application/octet-stream`, without a message id.
    pub fn new(destination: Destination, body: impl Into<Arc<[u8]>>) -> Self {
        Self {
            destination,
            body: body.into(),
            content_type: "application/octet-stream".to_owned(),
            message_id: String::new(),
            expires_in: None,
            persistent: true,
        }
    }

    /// The format of the body.
    #[must_use]
    pub fn content_type(mut self, content_type: impl Into<String>) -> Self {
        self.content_type = content_type.into();
        self
    }

    /// The id that the broker's tools show.
    #[must_use]
    pub fn message_id(mut self, id: impl Into<String>) -> Self {
        self.message_id = id.into();
        self
    }

    /// How long the broker keeps it undelivered.
    #[must_use]
    pub fn expires_in(mut self, lifetime: Duration) -> Self {
        self.expires_in = Some(lifetime);
        self
    }

    /// Whether it survives a restart of the broker; true by default.
    #[must_use]
    pub fn persistent(mut self, persistent: bool) -> Self {
        self.persistent = persistent;
        self
    }

    /// Checks the names and the length.
    pub(super) fn check(&self) -> Result<(), TransportError> {
        if self.body.len() > MAX_BODY_BYTES {
            return Err(TransportError::TooLarge { length: self.body.len(), limit: MAX_BODY_BYTES });
        }
        match &self.destination {
            Destination::Queue(name) => check_name(name),
            Destination::Exchange(exchange) => check_name(&exchange.name),
        }
    }
}

/// Where a message goes.
///
/// ```
/// use nanite::transport::{Destination, Exchange};
///
/// assert_eq!(Destination::queue("work"), Destination::Queue("work".to_owned()));
/// assert_eq!(Destination::exchange("news"), Destination::Exchange(Exchange::new("news")));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// The queue of this name, which must exist.
    Queue(String),
    /// Every queue bound to this exchange.
    Exchange(Exchange),
}

impl Destination {
    /// The queue of this name, which must exist.
    pub fn queue(name: impl Into<String>) -> Self {
        Self::Queue(name.into())
    }

    /// Every queue bound to the fan-out exchange of this name.
    pub fn exchange(name: impl Into<String>) -> Self {
        Self::Exchange(Exchange::new(name))
    }
}

/// A durable fan-out exchange.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Exchange {
    /// Its name, 1 to 255 bytes.
    pub name: String,
}

impl Exchange {
    /// The exchange of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }
}

/// A queue.
///
/// ```
/// use nanite::transport::{DurableOptions, Queue};
/// use std::time::Duration;
///
/// // Deleted when its connection closes; receives what is published to the exchange `news`.
/// let inbox = Queue::exclusive("inbox").bind("news");
/// assert_eq!(inbox.bindings[0].name, "news");
///
/// // Survives a restart of the broker; deleted when it was not used for an hour.
/// let work = Queue::new("work", DurableOptions::new().expires_after(Duration::from_secs(3600)));
/// assert_ne!(work, Queue::durable("work"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Queue {
    /// Its name, 1 to 255 bytes.
    pub name: String,
    /// How long it lives.
    pub kind: QueueKind,
    /// The exchanges that it receives messages from, in addition to those sent to it by name.
    pub bindings: Vec<Exchange>,
}

impl Queue {
    /// A queue of this kind without bindings.
    pub fn new(name: impl Into<String>, kind: impl Into<QueueKind>) -> Self {
        Self { name: name.into(), kind: kind.into(), bindings: Vec::new() }
    }

    /// A durable queue with the default [options](DurableOptions::new).
    pub fn durable(name: impl Into<String>) -> Self {
        Self::new(name, DurableOptions::new())
    }

    /// A queue of one connection.
    pub fn exclusive(name: impl Into<String>) -> Self {
        Self::new(name, QueueKind::Exclusive)
    }

    /// Adds a binding to the fan-out exchange of this name.
    #[must_use]
    pub fn bind(mut self, exchange: impl Into<String>) -> Self {
        self.bindings.push(Exchange::new(exchange));
        self
    }

    /// Checks the names.
    pub(super) fn check(&self) -> Result<(), TransportError> {
        self.bindings.iter().try_for_each(|exchange| check_name(&exchange.name))?;
        check_name(&self.name)
    }
}

/// How long a queue lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueKind {
    /// Survives its consumers and restarts of the broker.
    Durable(DurableOptions),
    /// Belongs to one connection, and is deleted with it.
    Exclusive,
}

impl QueueKind {
    /// After how long without use the broker deletes a queue of this kind.
    pub(super) fn expires_after(self) -> Option<Duration> {
        match self {
            Self::Durable(options) => options.expires_after,
            Self::Exclusive => None,
        }
    }

    /// Whether one consumer at a time receives the messages.
    pub(super) fn is_ordered(self) -> bool {
        matches!(self, Self::Durable(DurableOptions { ordered: true, .. }))
    }
}

impl From<DurableOptions> for QueueKind {
    fn from(options: DurableOptions) -> Self {
        Self::Durable(options)
    }
}

/// The properties of a durable queue.
///
/// ```
/// use nanite::transport::{DurableOptions, Queue};
///
/// let queue = Queue::new("jobs", DurableOptions::new().quorum(true).ordered(true));
/// # drop(queue);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DurableOptions {
    /// After how long without consumers and declarations the broker deletes it; never if `None`.
    pub expires_after: Option<Duration>,
    /// Replicated by the broker's cluster (a quorum queue). In such a queue a requeued message can be delivered after those that
    /// waited behind it.
    pub quorum: bool,
    /// Only one of its consumers receives messages at a time, so that they keep their order. When it ends, another takes over.
    pub ordered: bool,
}

impl DurableOptions {
    /// Never deleted, not replicated, shared by its consumers.
    pub const fn new() -> Self {
        Self { expires_after: None, quorum: false, ordered: false }
    }

    /// After how long without consumers and declarations the broker deletes it.
    #[must_use]
    pub const fn expires_after(mut self, unused: Duration) -> Self {
        self.expires_after = Some(unused);
        self
    }

    /// Whether it is replicated by the broker's cluster.
    #[must_use]
    pub const fn quorum(mut self, quorum: bool) -> Self {
        self.quorum = quorum;
        self
    }

    /// Whether only one of its consumers receives messages at a time.
    #[must_use]
    pub const fn ordered(mut self, ordered: bool) -> Self {
        self.ordered = ordered;
        self
    }
}

/// Checks the name of a queue or an exchange: 1 to 255 bytes, and not `amq.`, which is reserved for the broker.
pub(super) fn check_name(name: &str) -> Result<(), TransportError> {
    if name.is_empty() || name.len() > 255 || name.starts_with("amq.") {
        return Err(TransportError::Name(name.to_owned()));
    }
    Ok(())
}

/// Why a transport call failed.
///
/// ```
/// use nanite::transport::TransportError;
///
/// assert!(TransportError::Disconnected.is_retryable());
/// assert!(!TransportError::Credentials.is_retryable());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The URL of the broker is invalid.
    #[error("invalid broker URL: {0}")]
    Address(String),
    /// The broker cannot be reached.
    #[error("broker unreachable: {0}")]
    Unreachable(String),
    /// TLS failed: one side refuses the other's certificate.
    #[error("no TLS connection to the broker: {0}")]
    Tls(String),
    /// A certificate or key file for TLS cannot be used.
    #[error("{path}: {reason}")]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// Why it cannot be used.
        reason: String,
    },
    /// A private key for TLS is accessible to other users.
    #[error("the key {path} has mode {mode:04o}: users other than its owner can access it")]
    TlsKeyMode {
        /// The key's file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The broker refused the user name and password.
    #[error("the broker refused the user name or password")]
    Credentials,
    /// The virtual host does not exist, or the user may not use it.
    #[error("the broker refused the virtual host: {0}")]
    VirtualHost(String),
    /// The user lacks a permission.
    #[error("the broker denied permission: {0}")]
    Forbidden(String),
    /// The queue exists with other properties, or belongs to another connection.
    #[error("queue {queue} cannot be declared: {reason}")]
    QueueConflict {
        /// The queue.
        queue: String,
        /// What the broker said.
        reason: String,
    },
    /// The name of a queue or exchange, or another text of the message, is not valid in AMQP.
    #[error("invalid queue name: {0:?}")]
    Name(String),
    /// The message is larger than a transport accepts.
    #[error("a message of {length} bytes is too large; the limit is {limit}")]
    TooLarge {
        /// The length of its body, in bytes.
        length: usize,
        /// The limit, in bytes: [`MAX_BODY_BYTES`].
        limit: usize,
    },
    /// The queue does not exist.
    #[error("no queue {0}")]
    Unroutable(String),
    /// The broker rejected the message, for example because a queue is full.
    #[error("the broker rejected the message")]
    Nacked,
    /// The broker did not confirm or answer in time. The message may have been published or not.
    #[error("not confirmed within {0:?}")]
    TimedOut(Duration),
    /// The connection was lost.
    #[error("connection to the broker lost")]
    Disconnected,
    /// The transport is closed.
    #[error("the transport is closed")]
    Closed,
    /// The broker reported another error.
    #[error("broker: {0}")]
    Broker(String),
}

impl TransportError {
    /// Whether trying the same again can help.
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Nacked | Self::TimedOut(_) | Self::Disconnected | Self::Broker(_) => true,
            Self::Address(_)
            | Self::Tls(_)
            | Self::TlsFile { .. }
            | Self::TlsKeyMode { .. }
            | Self::Credentials
            | Self::VirtualHost(_)
            | Self::Forbidden(_)
            | Self::QueueConflict { .. }
            | Self::Name(_)
            | Self::TooLarge { .. }
            | Self::Unroutable(_)
            | Self::Closed => false,
        }
    }
}
