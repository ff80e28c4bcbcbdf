//! Refused messages: always counted, logged up to a limit, never with their content.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Timestamp;
use crate::limits::{LogDecision, LogLimit};
use crate::packet::Identity;
use crate::serializer::{InboundQueue, OpenError, OpenErrorKind};

/// How many refusals are logged per second; all are counted.
const MAX_LOGGED_PER_SECOND: u64 = 20;

/// Counts and logs refused messages.
#[derive(Debug)]
pub(super) struct Refusals {
    by_kind: [AtomicU64; OpenErrorKind::ALL.len()],
    log_limit: LogLimit,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { by_kind: Default::default(), log_limit: LogLimit::new(MAX_LOGGED_PER_SECOND) }
    }
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
            tracing::debug!(%identity, "refused a redelivered message that was opened before");
            return;
        }
        match self.log_limit.next(now) {
            LogDecision::Suppressing => {
                tracing::warn!(%identity, "more messages refused in this second; they are counted but not logged")
            }
            LogDecision::Log => tracing::warn!(
                %identity,
                kind = %error.kind,
                why = %error.why,
                claimed = error.claimed.as_ref().map(tracing::field::display),
                ?channel,
                "message refused"
            ),
            LogDecision::Skip => {}
        }
    }

    pub(super) fn counts(&self) -> Vec<(OpenErrorKind, u64)> {
        OpenErrorKind::ALL.into_iter().zip(&self.by_kind).map(|(kind, n)| (kind, n.load(Ordering::Relaxed))).collect()
    }
}
