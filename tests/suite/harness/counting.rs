//! A transport that counts what is published to queues, and refuses it when a test says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use nanite::transport::{Consumer, Destination, PublishRequest, Queue, Transport, TransportError};

/// Counts and refuses messages for queues; those for exchanges pass.
#[derive(Debug)]
pub struct Counting {
    inner: Arc<dyn Transport>,
    published: AtomicUsize,
    refuses: AtomicBool,
}

impl Counting {
    pub fn new(inner: impl Transport + 'static) -> Arc<Self> {
        Arc::new(Self { inner: Arc::new(inner), published: AtomicUsize::new(0), refuses: AtomicBool::new(false) })
    }

    /// How often something was published to a queue, refused or not.
    pub fn published(&self) -> usize {
        self.published.load(Ordering::SeqCst)
    }

    /// From now on, messages for queues are refused, or no longer.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }
}

#[async_trait]
impl Transport for Counting {
    async fn publish(&self, message: PublishRequest, timeout: Duration) -> Result<(), TransportError> {
        if matches!(message.destination, Destination::Queue(_)) {
            self.published.fetch_add(1, Ordering::SeqCst);
            if self.refuses.load(Ordering::SeqCst) {
                return Err(TransportError::Nacked);
            }
        }
        self.inner.publish(message, timeout).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u16) -> Result<Consumer, TransportError> {
        self.inner.consume(queue, prefetch).await
    }

    async fn declare(&self, queue: &Queue) -> Result<(), TransportError> {
        self.inner.declare(queue).await
    }

    async fn depth(&self, queue: &str) -> Result<Option<u64>, TransportError> {
        self.inner.depth(queue).await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}
