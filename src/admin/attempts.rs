//! How often one address may try to log in: a few tries at once, then one every few seconds.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;

use crate::clock::Timestamp;

/// How many tries there are at once.
const AT_ONCE: u32 = 5;
/// How long until there is one more.
const EVERY: Duration = Duration::from_secs(10);
/// How many addresses are remembered; a forgotten one has its tries at once again.
const ADDRESSES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// The tries of all addresses.
#[derive(Debug)]
pub(super) struct Attempts(Mutex<LruCache<IpAddr, Timestamp>>);

impl Default for Attempts {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(ADDRESSES)))
    }
}

impl Attempts {
    /// Counts a try; how long to wait when there have been too many.
    pub fn try_now(&self, from: IpAddr, now: Timestamp) -> Result<(), Duration> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The moment at which all tries that were made would have been allowed one by one.
        let paid = known.get_or_insert_mut(network(from), || now);
        let next = (*paid).max(now).saturating_add(EVERY);
        let earliest = next.saturating_sub(EVERY * AT_ONCE);
        if earliest > now {
            return Err(earliest.since(now));
        }
        *paid = next;
        Ok(())
    }

    /// Forgets the tries of an address: the last one was good.
    pub fn succeeded(&self, from: IpAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop(&network(from));
    }
}

/// What one user has to itself: an IPv4 address, or 64 bits of an IPv6 one.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_a_few_tries_at_once_then_one_by_one() {
        let attempts = Attempts::default();
        let one: IpAddr = "127.0.0.1".parse().unwrap();
        let mut now = Timestamp::from_secs(1000);
        for _ in 0..AT_ONCE {
            assert_eq!(attempts.try_now(one, now), Ok(()));
        }
        assert_eq!(attempts.try_now(one, now), Err(EVERY));
        assert_eq!(
            attempts.try_now("::ffff:127.0.0.1".parse().unwrap(), now),
            Err(EVERY),
            "the same, written otherwise"
        );
        assert_eq!(attempts.try_now("10.0.0.1".parse().unwrap(), now), Ok(()), "another has its own");
        now = now.saturating_add(Duration::from_secs(4));
        assert_eq!(attempts.try_now(one, now), Err(Duration::from_secs(6)), "a refused try costs nothing");
        now = now.saturating_add(Duration::from_secs(6));
        assert_eq!((attempts.try_now(one, now), attempts.try_now(one, now)), (Ok(()), Err(EVERY)));
        attempts.succeeded(one);
        assert_eq!(attempts.try_now(one, now), Ok(()));
    }

    #[test]
    fn n20_an_ipv6_network_counts_as_one() {
        let attempts = Attempts::default();
        let now = Timestamp::from_secs(1000);
        let tried = |address: &str| attempts.try_now(address.parse().unwrap(), now).is_ok();
        for end in 0..AT_ONCE {
            assert!(tried(&format!("2001:db8::{end}")));
        }
        assert!(!tried("2001:db8::ffff") && tried("2001:db8:0:1::1"));
    }
}
