//! A transport that counts what is published to queues and acknowledged, and refuses to publish when a test says so.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use nanite::transport::{
    Acker, Consumer, Delivery, Destination, PublishRequest, Queue, Settle, Settlement, Transport, TransportError,
};

/// Counts and refuses messages for queues; those for exchanges pass.
#[derive(Debug)]
pub struct Counting {
    inner: Arc<dyn Transport>,
    published: AtomicUsize,
    refuses: AtomicBool,
    acknowledged: Arc<AtomicUsize>,
}

impl Counting {
    pub fn new(inner: impl Transport + 'static) -> Arc<Self> {
        let (published, refuses) = (AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Self { inner: Arc::new(inner), published, refuses, acknowledged: Arc::default() })
    }

    /// How often something was published to a queue, refused or not.
    pub fn published(&self) -> usize {
        self.published.load(Ordering::SeqCst)
    }

    /// How many deliveries of an agent's inbox were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.load(Ordering::SeqCst)
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
        let consumer = self.inner.consume(queue, prefetch).await?;
        if queue.name.contains('.') {
            return Ok(consumer);
        }
        let counted =
            futures_util::stream::unfold((consumer, self.acknowledged.clone()), |(mut consumer, count)| async {
                let Delivery { body, content_type, redelivered, acker, .. } = consumer.next().await?;
                let acker = Acker::new(CountingSettle { acker: Mutex::new(Some(acker)), count: count.clone() });
                let delivery = Delivery::new(body, acker).content_type(content_type).redelivered(redelivered);
                Some((delivery, (consumer, count)))
            });
        Ok(Consumer::new(counted))
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

#[derive(Debug)]
struct CountingSettle {
    acker: Mutex<Option<Acker>>,
    count: Arc<AtomicUsize>,
}

#[async_trait]
impl Settle for CountingSettle {
    async fn settle(&self, settlement: Settlement) -> Result<(), TransportError> {
        let acker = self.acker.lock().unwrap().take().unwrap();
        if settlement == Settlement::Requeue {
            return acker.requeue().await;
        }
        self.count.fetch_add(1, Ordering::SeqCst);
        acker.ack().await
    }
}
