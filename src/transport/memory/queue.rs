//! One queue of the memory broker: its messages in order, their limits, and what expires.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use tokio::time::Instant;

use crate::transport::{PublishRequest, QueueKind, TransportError};

/// How much one queue may hold. Publishes beyond that fail with [`TransportError::Nacked`].
///
/// ```
/// use nanite::transport::{MemoryBroker, QueueLimits};
///
/// let broker = MemoryBroker::with_limits(QueueLimits::new().messages(1000));
/// # drop(broker);
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct QueueLimits {
    /// Ready messages.
    pub messages: usize,
    /// Bytes in the bodies of ready messages.
    pub bytes: usize,
}

impl QueueLimits {
    /// 100,000 messages and 256 MiB.
    pub const fn new() -> Self {
        Self { messages: 100_000, bytes: 256 * 1024 * 1024 }
    }

    /// The number of ready messages.
    #[must_use]
    pub const fn messages(mut self, messages: usize) -> Self {
        self.messages = messages;
        self
    }

    /// The bytes in the bodies of ready messages.
    #[must_use]
    pub const fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self::new()
    }
}

/// A message that is ready in a queue.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QueuedMessage {
    /// The content.
    pub body: Arc<[u8]>,
    /// The format that the publisher claims.
    pub content_type: String,
    /// Whether it was delivered before.
    pub redelivered: bool,
}

/// A message in one queue.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// Its position in the queue, to which it returns when it is requeued.
    pub(super) position: u64,
    pub(super) body: Arc<[u8]>,
    pub(super) content_type: Arc<str>,
    pub(super) redelivered: bool,
    persistent: bool,
    expires_at: Option<Instant>,
}

/// A queue.
#[derive(Debug)]
pub(super) struct QueueState {
    pub(super) kind: QueueKind,
    /// The connection that an exclusive queue belongs to.
    pub(super) owner: Option<u64>,
    pub(super) bindings: BTreeSet<String>,
    /// The ids of its consumers; the front one is next.
    pub(super) consumers: VecDeque<u64>,
    pub(super) last_used: Instant,
    /// In the order of their positions.
    ready: VecDeque<Message>,
    bytes: usize,
}

impl QueueState {
    pub(super) fn new(kind: QueueKind, owner: Option<u64>, now: Instant) -> Self {
        Self {
            kind,
            owner,
            bindings: BTreeSet::new(),
            consumers: VecDeque::new(),
            last_used: now,
            ready: VecDeque::new(),
            bytes: 0,
        }
    }

    /// The ready messages, next one first.
    pub(super) fn ready(&mut self, now: Instant) -> impl ExactSizeIterator<Item = &Message> {
        self.drop_expired(now);
        self.ready.iter()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// Adds a message at the end.
    pub(super) fn push(
        &mut self,
        position: u64,
        message: &PublishRequest,
        limits: QueueLimits,
        now: Instant,
    ) -> Result<(), TransportError> {
        self.drop_expired(now);
        if self.ready.len() >= limits.messages || self.bytes.saturating_add(message.body.len()) > limits.bytes {
            return Err(TransportError::Nacked);
        }
        self.bytes += message.body.len();
        self.ready.push_back(Message {
            position,
            body: Arc::clone(&message.body),
            content_type: message.content_type.as_str().into(),
            redelivered: false,
            persistent: message.persistent,
            expires_at: message.expires_in.and_then(|lifetime| now.checked_add(lifetime)),
        });
        Ok(())
    }

    /// Takes the next message.
    pub(super) fn pop(&mut self) -> Option<Message> {
        let message = self.ready.pop_front()?;
        self.bytes = self.bytes.saturating_sub(message.body.len());
        Some(message)
    }

    /// Returns a delivered message to its position.
    pub(super) fn requeue(&mut self, mut message: Message) {
        message.redelivered = true;
        self.bytes += message.body.len();
        let at = self.ready.partition_point(|other| other.position < message.position);
        self.ready.insert(at, message);
    }

    /// Drops expired messages at the head. Those behind an unexpired one stay, as in RabbitMQ.
    pub(super) fn drop_expired(&mut self, now: Instant) {
        while self.ready.front().and_then(|m| m.expires_at).is_some_and(|at: Instant| at <= now) {
            self.pop();
        }
    }

    /// Drops the messages that do not survive a restart.
    pub(super) fn drop_transient(&mut self) {
        self.ready.retain(|message| message.persistent);
        self.bytes = self.ready.iter().map(|message| message.body.len()).sum();
    }

    /// Whether it has been unused for so long that the broker deletes it.
    pub(super) fn is_expired(&self, now: Instant) -> bool {
        self.kind
            .expires_after()
            .is_some_and(|unused| self.consumers.is_empty() && now.saturating_duration_since(self.last_used) >= unused)
    }
}
