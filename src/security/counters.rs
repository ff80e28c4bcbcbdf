//! How many messages were sealed, opened and refused, by the step that refused them.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::serializer::OpenErrorKind;

/// The counts of a [`SecureSerializer`](super::SecureSerializer).
#[derive(Debug, Default)]
pub struct Counters {
    sealed: AtomicU64,
    opened: AtomicU64,
    refused: [AtomicU64; OpenErrorKind::ALL.len()],
}

impl Counters {
    /// How many messages were sealed.
    pub fn sealed(&self) -> u64 {
        self.sealed.load(Ordering::Relaxed)
    }

    /// How many messages were opened.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// How many messages were refused at this step.
    pub fn refused(&self, kind: OpenErrorKind) -> u64 {
        self.refused.get(kind as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// How many messages were refused at any step.
    pub fn refused_in_all(&self) -> u64 {
        self.refused.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    pub(super) fn count_sealed(&self) {
        self.sealed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_refused(&self, kind: OpenErrorKind) {
        if let Some(count) = self.refused.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_count() {
        let counters = Counters::default();
        OpenErrorKind::ALL.into_iter().for_each(|kind| counters.count_refused(kind));
        assert!(OpenErrorKind::ALL.into_iter().all(|kind| counters.refused(kind) == 1));
        assert_eq!(counters.refused_in_all(), 12);
    }
}
