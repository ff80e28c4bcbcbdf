//! What was refused: counted always, logged within limits, never with its content.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Timestamp;
use crate::packet::Identity;
use crate::serializer::{InboundQueue, OpenError, OpenErrorKind};

/// How many refusals are logged in one second; the others are only counted.
const LOGGED_PER_SECOND: u64 = 20;

/// Counts and logs what was refused.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    by_kind: [AtomicU64; OpenErrorKind::ALL.len()],
    second: AtomicU64,
    in_second: AtomicU64,
}

impl Refusals {
    pub(super) fn count(&self, kind: OpenErrorKind) {
        if let Some(count) = self.by_kind.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn log(
        &self,
        identity: &Identity,
        error: &OpenError,
        channel: InboundQueue,
        redelivered: bool,
        now: Timestamp,
    ) {
        if redelivered && error.kind == OpenErrorKind::Replayed {
            tracing::debug!(%identity, "a redelivered message was already seen");
            return;
        }
        if self.second.swap(now.as_secs(), Ordering::Relaxed) != now.as_secs() {
            self.in_second.store(0, Ordering::Relaxed);
        }
        match self.in_second.fetch_add(1, Ordering::Relaxed) {
            LOGGED_PER_SECOND => tracing::warn!(%identity, "more messages refused in this second: counted, not logged"),
            n if n < LOGGED_PER_SECOND => tracing::warn!(
                %identity,
                kind = %error.kind,
                why = %error.why,
                claimed = error.claimed.as_ref().map(tracing::field::display),
                ?channel,
                "message refused"
            ),
            _ => {}
        }
    }

    pub(super) fn counts(&self) -> Vec<(OpenErrorKind, u64)> {
        OpenErrorKind::ALL.into_iter().zip(&self.by_kind).map(|(kind, n)| (kind, n.load(Ordering::Relaxed))).collect()
    }
}
