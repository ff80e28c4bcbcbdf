//! Messages from a queue that mappers share, which this mapper cannot open and another may: they go back, and nothing is lost.
//!
//! A request is encrypted to the mappers that its sender knows. A mapper that the sender does not know, or that does not know the sender,
//! may receive it; it requeues the message after a moment, so that another mapper receives it. Messages of the offline queue are held
//! instead, since that queue has one consumer at a time; they go back when this consumer ends.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use tokio::sync::Semaphore;

use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::serializer::{InboundQueue, OpenError, OpenErrorKind};
use crate::transport::Acker;

/// How long a message is held before it is requeued.
const REQUEUE_DELAY: Duration = Duration::from_millis(50);
/// How long the same message is requeued before it is refused.
const REQUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// How many messages wait to be requeued at a time.
const MAX_WAITING: usize = 64;
/// How many requeued messages are remembered.
const MAX_REMEMBERED: NonZeroUsize = nonzero(4096);
/// How many offline messages of unknown signers are held.
const MAX_UNKNOWN_SIGNERS: usize = 64;

/// The messages of one queue that another mapper may be able to open.
#[derive(Debug)]
pub(super) struct Requeue {
    permits: Arc<Semaphore>,
    /// When each message arrived first, by the hash of its bytes.
    first_seen: LruCache<u64, Timestamp>,
    hasher: RandomState,
    held: Vec<Acker>,
    unknown_signers: usize,
}

impl Default for Requeue {
    fn default() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(MAX_WAITING)),
            first_seen: LruCache::new(MAX_REMEMBERED),
            hasher: RandomState::new(),
            held: Vec::new(),
            unknown_signers: 0,
        }
    }
}

/// Whether another consumer of this queue may be able to open what was refused here.
pub(super) fn may_open_elsewhere(error: &OpenError, queue: InboundQueue) -> bool {
    queue.is_shared() && (error.for_others || error.kind == OpenErrorKind::UnknownSigner)
}

impl Requeue {
    /// Takes a message that another mapper may be able to open. Returns its acker when the message is to be refused after all: it has
    /// been requeued for too long, or too many messages wait.
    pub fn take(
        &mut self,
        error: &OpenError,
        queue: InboundQueue,
        body: &[u8],
        acker: Acker,
        now: Timestamp,
    ) -> Result<(), Acker> {
        if queue == InboundQueue::Offline {
            return self.hold(error, acker);
        }
        let Ok(permit) = self.permits.clone().try_acquire_owned() else { return Err(acker) };
        let first_seen = *self.first_seen.get_or_insert(self.hasher.hash_one(body), || now);
        if now.since(first_seen) > REQUEUE_TIMEOUT {
            return Err(acker);
        }
        tokio::spawn(async move {
            tokio::time::sleep(REQUEUE_DELAY).await;
            if let Err(error) = acker.requeue().await {
                tracing::debug!(%error, "failed to requeue a message; the broker will redeliver it");
            }
            drop(permit);
        });
        Ok(())
    }

    fn hold(&mut self, error: &OpenError, acker: Acker) -> Result<(), Acker> {
        if !error.for_others {
            if self.unknown_signers >= MAX_UNKNOWN_SIGNERS {
                return Err(acker);
            }
            self.unknown_signers += 1;
        }
        // Bounded by the prefetch.
        self.held.push(acker);
        Ok(())
    }

    /// How many offline messages are held for other mappers.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}
