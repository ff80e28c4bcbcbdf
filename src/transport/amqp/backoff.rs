//! How long to wait before trying again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

/// Delays that grow, each drawn at random up to its bound, so that many clients of a broker that restarts do not come all at
/// once.
#[derive(Debug)]
pub(super) struct Backoff {
    bound: Duration,
}

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(10);
const SHORTEST: Duration = Duration::from_millis(50);

impl Backoff {
    pub(super) const fn new() -> Self {
        Self { bound: FIRST }
    }

    pub(super) fn reset(&mut self) {
        self.bound = FIRST;
    }

    pub(super) fn next(&mut self) -> Duration {
        let bound = self.bound;
        self.bound = bound.saturating_mul(2).min(LONGEST);
        // Each `RandomState` has keys of its own: chance enough for spreading load.
        let random = RandomState::new().build_hasher().finish() % 1_000;
        let drawn = bound.saturating_mul(u32::try_from(random).unwrap_or(0)) / 1_000;
        drawn.max(SHORTEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_bound_and_vary() {
        let mut backoff = Backoff::new();
        let delays: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(delays.iter().all(|delay| *delay >= SHORTEST && *delay <= LONGEST));
        assert!(delays[0] <= FIRST);
        assert!(delays[10..].iter().any(|delay| *delay > LONGEST / 4));
        assert!(delays[10..].iter().collect::<std::collections::BTreeSet<_>>().len() > 10);
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
