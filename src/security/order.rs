//! The order of each sender's registrations and heartbeats: each is newer than the one before. Part of the replay memory
//! (`replay.rs`), in constant memory for each sender.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::packet::Identity;

/// Why a message counts as a replay.
pub(super) type Refusal = &'static str;

/// The order of each sender.
#[derive(Default)]
pub(super) struct Orders {
    latest: HashMap<Identity, Latest>,
    swept_at: Option<u64>,
    /// Messages up to this time may be of senders that were dropped. It only grows, so that a clock that is set back opens nothing.
    forgotten: Option<Timestamp>,
}

/// An instance and a sequence number: the place of a message in the order of its sender.
pub(super) type Place = (u64, u64);

/// The last place of one sender, by certificate: what is signed with an older certificate does not bar a newer one.
///
/// Otherwise whoever had used a stolen key, or a clock that was ahead, could bar the node also after its certificate was replaced. A message
/// of the newest certificate must be later than the last one of this certificate. A message of an older certificate, which may still be
/// valid, must be later than all. So each is accepted once, and nothing old under the old certificate is accepted after something under
/// the new one. Only the first message of a new certificate can be older than one of the old certificate: within the rotation grace
/// period, a node signs with both, and the broker may deliver them in another order, which it can do with any two messages.
///
/// A certificate that was revoked is refused before this. If it was the newest one, older certificates are barred until `until`.
struct Latest {
    /// The start of validity of the newest certificate.
    certificate: Timestamp,
    /// The last place of the newest certificate.
    newest: Place,
    /// The last place of all older certificates.
    older: Place,
    /// From this time on every earlier message of this sender has expired: the order protects nothing more.
    until: Timestamp,
    /// Messages up to this time may be from before this sender was dropped.
    unsure_until: Option<Timestamp>,
}

impl Latest {
    /// The place that a message of this certificate must exceed.
    fn before(&self, certificate: Timestamp) -> Option<Place> {
        match certificate.cmp(&self.certificate) {
            Ordering::Greater => None,
            Ordering::Equal => Some(self.newest),
            Ordering::Less => Some(self.newest.max(self.older)),
        }
    }

    fn record(&mut self, certificate: Timestamp, place: Place) {
        match certificate.cmp(&self.certificate) {
            Ordering::Greater => {
                self.older = self.older.max(self.newest);
                (self.certificate, self.newest) = (certificate, place);
            }
            Ordering::Equal => self.newest = place,
            Ordering::Less => self.older = place,
        }
    }
}

impl Orders {
    /// Records the place of a message, signed with a certificate that is valid from `certificate`; refuses what is not newer than
    /// everything recorded. By `until`, every older message has expired.
    pub fn advance(
        &mut self,
        max_senders: usize,
        from: &Identity,
        certificate: Timestamp,
        place: Place,
        until: Timestamp,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let unsure = |until: Option<Timestamp>| until.is_some_and(|until| now <= until);
        if let Some(latest) = self.latest.get_mut(from) {
            if unsure(latest.unsure_until) {
                return Err("a newer message of this sender may have been dropped");
            }
            if latest.until < now {
                let unsure_until = latest.unsure_until.max(Some(latest.until));
                *latest = Latest { certificate, newest: place, older: (0, 0), until, unsure_until };
                return Ok(());
            }
            if latest.before(certificate).is_some_and(|before| place <= before) {
                return Err("it is not newer than the last message of this sender");
            }
            latest.record(certificate, place);
            latest.until = latest.until.max(until);
            return Ok(());
        }
        if self.latest.len() >= max_senders {
            self.sweep(now);
        }
        if self.latest.len() >= max_senders {
            return Err("the replay memory for senders is full");
        }
        if unsure(self.forgotten) {
            return Err("its sender may have been dropped");
        }
        let unsure_until = self.forgotten;
        self.latest.insert(from.clone(), Latest { certificate, newest: place, older: (0, 0), until, unsure_until });
        Ok(())
    }

    /// The newest recorded instance of a sender that bars this certificate, if it is newer than this one.
    pub fn later_than(&self, from: &Identity, certificate: Timestamp, instance: u64) -> Option<u64> {
        let (latest, _) = self.latest.get(from)?.before(certificate)?;
        Some(latest).filter(|latest| *latest > instance)
    }

    /// Drops senders whose messages have all expired; at most once a second, because it checks all.
    fn sweep(&mut self, now: Timestamp) {
        if self.swept_at == Some(now.as_secs()) {
            return;
        }
        self.swept_at = Some(now.as_secs());
        for gone in self.latest.extract_if(|_, latest| latest.until < now) {
            self.forgotten = self.forgotten.max(Some(gone.1.until));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::time::Duration;

    use super::*;

    const SKEW: Duration = Duration::from_secs(30);
    /// The start of validity of a certificate.
    const CERTIFICATE: Timestamp = Timestamp::from_secs(1_000);
    const MINUTE: Duration = Duration::from_secs(60);

    fn at(second: u64) -> Timestamp {
        Timestamp::from_secs(1_000_000 + second)
    }

    /// The orders of a replay memory for this many senders.
    struct Memory(RefCell<Orders>, usize);

    impl Memory {
        fn advance(
            &self,
            from: &Identity,
            certificate: Timestamp,
            place: Place,
            lifetime: Duration,
            now: Timestamp,
        ) -> Result<(), Refusal> {
            let until = now.saturating_add(lifetime).saturating_add(2 * SKEW);
            self.0.borrow_mut().advance(self.1, from, certificate, place, until, now)
        }

        fn later_than(&self, from: &Identity, certificate: Timestamp, instance: u64) -> Option<u64> {
            self.0.borrow().later_than(from, certificate, instance)
        }
    }

    fn memory(senders: usize) -> Memory {
        Memory(RefCell::default(), senders)
    }

    fn agent(name: &str) -> Identity {
        Identity::agent(name).unwrap()
    }

    #[test]
    fn heartbeats_only_grow() {
        let memory = memory(1);
        let fred = agent("fred");
        memory.advance(&fred, CERTIFICATE, (5, 1), MINUTE, at(0)).unwrap();
        for (instance, sequence) in [(5, 1), (5, 0), (4, 9)] {
            assert!(memory.advance(&fred, CERTIFICATE, (instance, sequence), MINUTE, at(1)).is_err());
        }
        memory.advance(&fred, CERTIFICATE, (5, 2), MINUTE, at(1)).unwrap();
        memory.advance(&fred, CERTIFICATE, (6, 1), MINUTE, at(2)).unwrap();
        assert!(
            memory.advance(&fred, CERTIFICATE, (5, 3), MINUTE, at(3)).is_err(),
            "an older process of the same name"
        );
        assert_eq!(
            (memory.later_than(&fred, CERTIFICATE, 5), memory.later_than(&fred, CERTIFICATE, 6)),
            (Some(6), None)
        );
    }

    #[test]
    fn a_sender_makes_room_only_when_its_messages_are_expired() {
        let memory = memory(1);
        memory.advance(&agent("fred"), CERTIFICATE, (5, 1), MINUTE, at(0)).unwrap();
        let bob = agent("bob");
        assert_eq!(
            memory.advance(&bob, CERTIFICATE, (1, 1), MINUTE, at(120)),
            Err("the replay memory for senders is full")
        );
        memory.advance(&bob, CERTIFICATE, (1, 1), MINUTE, at(121)).unwrap();
    }

    #[test]
    fn s06_new_certificate_is_not_barred_by_an_older_one() {
        let memory = memory(10);
        let fred = agent("fred");
        let (old, new) = (CERTIFICATE, CERTIFICATE.saturating_add(MINUTE));
        let newest = CERTIFICATE.saturating_add(2 * MINUTE);
        let advance = |certificate, place| memory.advance(&fred, certificate, place, MINUTE, at(0)).is_ok();
        assert!(advance(old, (u64::MAX, u64::MAX)));
        assert!(!advance(old, (9, 9)));
        assert_eq!(memory.later_than(&fred, old, 9), Some(u64::MAX));
        assert_eq!(memory.later_than(&fred, new, 9), None);
        assert!(advance(new, (5, 10)));
        assert!(!advance(new, (5, 10)) && !advance(new, (5, 9)), "a replay under the new certificate");
        assert!(!advance(old, (u64::MAX, u64::MAX)), "a replay under the old certificate");
        assert!(advance(newest, (5, 11)));
        assert!(!advance(new, (u64::MAX, u64::MAX)), "older certificates share one order");
        // In the rotation grace period, both certificates are used.
        let memory = self::memory(10);
        let advance = |certificate, place| memory.advance(&fred, certificate, place, MINUTE, at(0)).is_ok();
        assert!(advance(old, (5, 1)) && advance(new, (5, 2)) && advance(old, (5, 3)) && advance(new, (5, 4)));
        for (certificate, place) in [(old, (5, 3)), (old, (5, 4)), (new, (5, 4)), (old, (5, 1)), (new, (5, 2))] {
            assert!(!advance(certificate, place), "{place:?}");
        }
        assert!(advance(old, (5, 5)) && advance(new, (5, 5)));
    }

    #[test]
    fn s06_order_of_a_silent_sender_ends_when_its_messages_have_expired() {
        let memory = memory(10);
        let fred = agent("fred");
        let advance = |place, second| memory.advance(&fred, CERTIFICATE, place, MINUTE, at(second));
        advance((u64::MAX, 1), 0).unwrap();
        assert!(advance((5, 1), 120).is_err());
        advance((5, 1), 121).unwrap();
        // The clock comes back: messages from before are still valid, and the order of them is gone.
        assert_eq!(advance((5, 2), 120), Err("a newer message of this sender may have been dropped"));
        advance((5, 2), 121).unwrap();
        assert!(advance((5, 2), 122).is_err());
    }

    #[test]
    fn s06_clock_that_comes_back_opens_no_heartbeat_of_a_dropped_sender() {
        let memory = memory(1);
        let (fred, bob) = (agent("fred"), agent("bob"));
        let advance = |from, place, second| memory.advance(from, CERTIFICATE, place, MINUTE, at(second));
        advance(&fred, (5, 1), 0).unwrap();
        assert!(advance(&bob, (1, 1), 120).is_err(), "it looks for expired ones once a second");
        advance(&bob, (1, 1), 121).unwrap();
        assert_eq!(advance(&bob, (1, 2), 120), Err("a newer message of this sender may have been dropped"));
        assert_eq!(advance(&fred, (5, 1), 120), Err("the replay memory for senders is full"));
        advance(&fred, (5, 2), 300).unwrap();
        assert_eq!(advance(&bob, (1, 1), 120), Err("the replay memory for senders is full"));
    }
}
