//! Two helpers for bounds: non-zero constants, and a limit on how often something is logged.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Timestamp;

/// A non-zero constant. Zero is rounded up to one.
pub(crate) const fn nonzero(value: usize) -> NonZeroUsize {
    match NonZeroUsize::new(value) {
        Some(value) => value,
        None => NonZeroUsize::MIN,
    }
}

/// Limits how many lines are logged per second about something that an attacker can cause.
#[derive(Debug)]
pub(crate) struct LogLimit {
    per_second: u64,
    second: AtomicU64,
    logged: AtomicU64,
}

/// Whether a line is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogDecision {
    /// Log it.
    Log,
    /// The first line over the limit in this second: log that lines are left out.
    Suppressing,
    /// Do not log it.
    Skip,
}

impl LogLimit {
    pub(crate) const fn new(per_second: u64) -> Self {
        Self { per_second, second: AtomicU64::new(0), logged: AtomicU64::new(0) }
    }

    /// Counts a line and says whether to log it.
    pub(crate) fn next(&self, now: Timestamp) -> LogDecision {
        if self.second.swap(now.as_secs(), Ordering::Relaxed) != now.as_secs() {
            self.logged.store(0, Ordering::Relaxed);
        }
        match self.logged.fetch_add(1, Ordering::Relaxed) {
            count if count < self.per_second => LogDecision::Log,
            count if count == self.per_second => LogDecision::Suppressing,
            _ => LogDecision::Skip,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_limit_counts_each_second_anew() {
        let limit = LogLimit::new(2);
        let decisions = |at| [0; 4].map(|_| limit.next(Timestamp::from_secs(at)));
        use LogDecision::{Log, Skip, Suppressing};
        assert_eq!(decisions(1), [Log, Log, Suppressing, Skip]);
        assert_eq!(decisions(2), [Log, Log, Suppressing, Skip]);
    }
}
