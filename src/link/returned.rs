//! What a mapper takes from a queue that mappers share, and another of them can open: the work goes on without being lost.
//!
//! A request is sealed to the mappers that its sender knows; one that the sender does not know, or that does not know the sender, may
//! be the one that takes it. It gives the message back after a moment, so that another takes it. What waits in the offline queue is
//! kept instead, since that queue has one reader at a time; it goes back when this reader makes room for another.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use tokio::sync::Semaphore;

use crate::clock::Timestamp;
use crate::serializer::{InboundQueue, OpenError, OpenErrorKind};
use crate::transport::Acker;

/// How long a message is held before it goes back.
const PAUSE: Duration = Duration::from_millis(50);
/// For how long the same message is given back.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many messages are held at a time, to be given back.
const HELD: usize = 64;
/// How many messages are known to have been given back.
const KNOWN: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);
/// How many messages of unknown signers are kept.
const STRANGE: usize = 64;

/// The messages of one queue that this node cannot open, and another may.
#[derive(Debug)]
pub(super) struct Returned {
    permits: Arc<Semaphore>,
    /// When each was taken first.
    since: LruCache<u64, Timestamp>,
    hashes: RandomState,
    kept: Vec<Acker>,
    strange: usize,
}

impl Default for Returned {
    fn default() -> Self {
        let (permits, since, hashes) = (Arc::new(Semaphore::new(HELD)), LruCache::new(KNOWN), RandomState::new());
        Self { permits, since, hashes, kept: Vec::new(), strange: 0 }
    }
}

/// Whether another reader of this queue may be able to open what was refused here.
pub(super) fn is_for_others(error: &OpenError, channel: InboundQueue) -> bool {
    channel.is_shared() && (error.for_others || error.kind == OpenErrorKind::UnknownSigner)
}

impl Returned {
    /// Sees to a message that another may be able to open. Gives the means to settle it back when it is to be refused after all: since
    /// it has been given back for long, or there are too many.
    pub fn take(
        &mut self,
        error: &OpenError,
        channel: InboundQueue,
        body: &[u8],
        acker: Acker,
        now: Timestamp,
    ) -> Result<(), Acker> {
        if channel == InboundQueue::Offline {
            return self.keep(error, acker);
        }
        let Ok(permit) = self.permits.clone().try_acquire_owned() else { return Err(acker) };
        let since = *self.since.get_or_insert(self.hashes.hash_one(body), || now);
        if now.since(since) > PATIENCE {
            return Err(acker);
        }
        tokio::spawn(async move {
            tokio::time::sleep(PAUSE).await;
            if let Err(error) = acker.requeue().await {
                tracing::debug!(%error, "a message could not be given back and will come again");
            }
            drop(permit);
        });
        Ok(())
    }

    fn keep(&mut self, error: &OpenError, acker: Acker) -> Result<(), Acker> {
        if !error.for_others {
            if self.strange >= STRANGE {
                return Err(acker);
            }
            self.strange += 1;
        }
        // No more than the broker hands out.
        self.kept.push(acker);
        Ok(())
    }

    /// How many messages are kept for other mappers.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }
}
