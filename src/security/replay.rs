//! The replay memory: message ids until they expire, and (in [`super::order`]) the order of each sender's heartbeats. Also the ids of the messages that this
//! process sent.
//!
//! It is bounded. An entry that still protects is never dropped to make room: a full memory refuses new messages.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::order::{Orders, Place, Refusal};
use crate::clock::Timestamp;
use crate::packet::{Identity, MessageId};

/// How many ids of sent messages are kept for answers by slower clocks.
const MAX_SENT_IDS: usize = 16_384;

/// How many expired ids a call drops at most: of its sender, and of those that expired first.
const MAX_FORGOTTEN: usize = 64;
/// How many senders a call looks at for the ids that expired first.
const MAX_FORGOTTEN_SENDERS: usize = 16;

/// The size of the replay memory. Only messages of senders with a valid certificate are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayLimits {
    /// How many unexpired messages of one sender. An id takes about 110 bytes.
    pub per_sender: usize,
    /// How many unexpired messages of all senders. One sender may have at most as many as are left for all others, so that a few cannot
    /// fill it: the memory never becomes full of the messages of `n` senders, whose share is `total / (n + 1)` each.
    pub total: usize,
    /// How many senders of heartbeats.
    pub senders: usize,
}

impl Default for ReplayLimits {
    fn default() -> Self {
        Self { per_sender: 500_000, total: 2_000_000, senders: 1_000_000 }
    }
}

/// The replay memory.
pub(super) struct ReplayMemory {
    limits: ReplayLimits,
    skew: Duration,
    ids: Mutex<Ids>,
    orders: Mutex<Orders>,
}

/// The ids of messages. Every call does a bounded amount of work under the lock, also when millions of ids have expired.
#[derive(Default)]
struct Ids {
    senders: HashMap<Identity, SenderIds>,
    total: usize,
    /// The senders that have ids that can be dropped in a second, in their order.
    by_second: BTreeMap<u64, Vec<Identity>>,
    /// Ids up to this second were dropped. It only grows, so that a clock that is set back opens nothing.
    forgotten: u64,
}

/// The ids of one sender.
#[derive(Default)]
struct SenderIds {
    seen: HashSet<MessageId>,
    /// The ids by the second in which they can be dropped.
    by_second: BTreeMap<u64, Vec<MessageId>>,
}

impl ReplayMemory {
    /// An empty memory. Messages are remembered for `skew` after their expiry.
    pub fn new(limits: ReplayLimits, skew: Duration) -> Self {
        Self { limits, skew, ids: Mutex::default(), orders: Mutex::default() }
    }

    /// Records a message; refuses one that is recorded already.
    pub fn admit(&self, from: &Identity, id: MessageId, expires_at: Timestamp, now: Timestamp) -> Result<(), Refusal> {
        let second = self.last_second(expires_at);
        let mut ids = self.ids.lock();
        ids.check(&self.limits, from, id, second, now)?;
        ids.insert(from, id, second);
        Ok(())
    }

    /// Refuses a message that is recorded already, or that could not be recorded. Records nothing.
    pub fn check(&self, from: &Identity, id: MessageId, expires_at: Timestamp, now: Timestamp) -> Result<(), Refusal> {
        self.ids.lock().check(&self.limits, from, id, self.last_second(expires_at), now)
    }

    /// Whether a message is recorded.
    pub fn knows(&self, from: &Identity, id: MessageId) -> bool {
        self.ids.lock().senders.get(from).is_some_and(|sender| sender.seen.contains(&id))
    }

    /// The second until which a message stays recorded.
    fn last_second(&self, expires_at: Timestamp) -> u64 {
        expires_at.saturating_add(self.skew).as_secs().saturating_add(1)
    }

    /// Records the place of a message, signed with a certificate that is valid from `certificate`; refuses what is not newer than
    /// everything recorded. `lifetime` is the largest lifetime of this kind of message.
    pub fn advance(
        &self,
        from: &Identity,
        certificate: Timestamp,
        place: Place,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        // An older message was issued before this one, so at most `skew` in the future.
        let until = now.saturating_add(lifetime).saturating_add(self.skew).saturating_add(self.skew);
        self.orders.lock().advance(self.limits.senders, from, certificate, place, until, now)
    }

    /// The newest recorded instance of a sender that bars this certificate, if it is newer than this one.
    pub fn later_than(&self, from: &Identity, certificate: Timestamp, instance: u64) -> Option<u64> {
        self.orders.lock().later_than(from, certificate, instance)
    }

    /// How many messages are recorded.
    pub fn len(&self) -> usize {
        self.ids.lock().total
    }
}

impl Ids {
    fn check(
        &mut self,
        limits: &ReplayLimits,
        from: &Identity,
        id: MessageId,
        second: u64,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        self.forget(from, now.as_secs());
        if second <= self.forgotten {
            return Err("it is older than the replay memory");
        }
        let sender = self.senders.get(from);
        if sender.is_some_and(|sender| sender.seen.contains(&id)) {
            return Err("it was opened before");
        }
        let of_sender = sender.map_or(0, |sender| sender.seen.len());
        if of_sender >= limits.per_sender {
            return Err("the replay memory for this sender is full");
        }
        let free = limits.total.saturating_sub(self.total);
        if free == 0 {
            return Err("the replay memory is full");
        }
        // The fuller the memory, the less one sender may have: the room of the others.
        if of_sender >= free {
            return Err("this sender has as much of the replay memory as is left for all others");
        }
        Ok(())
    }

    fn insert(&mut self, from: &Identity, id: MessageId, second: u64) {
        let sender = self.senders.entry(from.clone()).or_default();
        sender.seen.insert(id);
        let ids = sender.by_second.entry(second).or_default();
        if ids.is_empty() {
            self.by_second.entry(second).or_default().push(from.clone());
        }
        ids.push(id);
        self.total += 1;
    }

    /// Drops ids that expired before this second: some of this sender, so that it has room again, and some of those that expired first.
    fn forget(&mut self, from: &Identity, now: u64) {
        self.forget_of(from, now, &mut { MAX_FORGOTTEN });
        let mut left = MAX_FORGOTTEN;
        for _ in 0..MAX_FORGOTTEN_SENDERS {
            let Some(bucket) = self.by_second.first_entry().filter(|bucket| *bucket.key() < now) else { return };
            let sender = bucket.get().last().cloned();
            if let Some(sender) = sender {
                self.forget_of(&sender, now, &mut left);
                if left == 0 {
                    // It may have more.
                    return;
                }
            }
            if let Some(mut bucket) = self.by_second.first_entry() {
                bucket.get_mut().pop();
                if bucket.get().is_empty() {
                    bucket.remove();
                }
            }
        }
    }

    /// Drops the oldest expired ids of one sender, while some are left to drop.
    fn forget_of(&mut self, from: &Identity, now: u64, left: &mut usize) {
        let Some(sender) = self.senders.get_mut(from) else { return };
        while let Some(mut bucket) = sender.by_second.first_entry().filter(|bucket| *bucket.key() < now) {
            if *left == 0 {
                return;
            }
            self.forgotten = self.forgotten.max(*bucket.key());
            match bucket.get_mut().pop() {
                Some(id) => {
                    sender.seen.remove(&id);
                    self.total = self.total.saturating_sub(1);
                    *left -= 1;
                }
                None => drop(bucket.remove()),
            }
        }
        if sender.seen.is_empty() {
            self.senders.remove(from);
        }
    }
}

/// The ids of messages sent since the start, as long as an answer to one could seem older than this process: the clock of its sender may
/// be behind.
pub(super) struct SentIds {
    until: Timestamp,
    over: AtomicBool,
    ids: Mutex<HashSet<MessageId>>,
}

impl SentIds {
    pub fn new(until: Timestamp) -> Self {
        Self { until, over: AtomicBool::new(false), ids: Mutex::default() }
    }

    /// Remembers the id of a sent message.
    pub fn note(&self, id: MessageId, now: Timestamp) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let mut ids = self.ids.lock();
        if now > self.until {
            self.over.store(true, Ordering::Relaxed);
            *ids = HashSet::new();
        } else if ids.len() < MAX_SENT_IDS {
            ids.insert(id);
        }
    }

    /// Whether this process sent the message with this id.
    pub fn knows(&self, id: MessageId) -> bool {
        !self.over.load(Ordering::Relaxed) && self.ids.lock().contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SKEW: Duration = Duration::from_secs(30);

    fn at(second: u64) -> Timestamp {
        Timestamp::from_secs(1_000_000 + second)
    }

    fn memory(per_sender: usize, total: usize, senders: usize) -> ReplayMemory {
        ReplayMemory::new(ReplayLimits { per_sender, total, senders }, SKEW)
    }

    fn id(n: u8) -> MessageId {
        MessageId::from_bytes([n; 16])
    }

    fn agent(name: &str) -> Identity {
        Identity::agent(name).unwrap()
    }

    #[test]
    fn an_id_counts_once_per_sender_until_it_is_expired() {
        let memory = memory(10, 10, 10);
        let (fred, bob) = (agent("fred"), agent("bob"));
        memory.admit(&fred, id(1), at(60), at(0)).unwrap();
        assert_eq!(memory.admit(&fred, id(1), at(60), at(59)), Err("it was opened before"));
        memory.admit(&bob, id(1), at(60), at(59)).unwrap();
        assert_eq!(memory.len(), 2);
        assert_eq!(memory.check(&bob, id(1), at(60), at(59)), Err("it was opened before"));
        memory.check(&bob, id(2), at(60), at(59)).unwrap();
        assert_eq!(memory.len(), 2, "a check records nothing");
        assert!(memory.knows(&bob, id(1)) && !memory.knows(&bob, id(2)));
        memory.admit(&fred, id(2), at(300), at(200)).unwrap();
        assert_eq!(memory.len(), 1, "expired ids are dropped");
    }

    #[test]
    fn a_full_memory_refuses_and_forgets_nothing() {
        let memory = memory(2, 3, 10);
        let (fred, bob) = (agent("fred"), agent("bob"));
        memory.admit(&fred, id(1), at(60), at(0)).unwrap();
        memory.admit(&fred, id(2), at(60), at(0)).unwrap();
        assert_eq!(memory.admit(&fred, id(3), at(60), at(0)), Err("the replay memory for this sender is full"));
        memory.admit(&bob, id(1), at(60), at(0)).unwrap();
        assert_eq!(memory.admit(&agent("eve"), id(9), at(60), at(0)), Err("the replay memory is full"));
        assert_eq!(memory.admit(&fred, id(1), at(60), at(1)), Err("it was opened before"));
        memory.admit(&fred, id(3), at(200), at(150)).unwrap();
    }

    #[test]
    fn a_clock_that_comes_back_opens_nothing() {
        let memory = memory(10, 10, 10);
        let fred = agent("fred");
        memory.admit(&fred, id(1), at(60), at(0)).unwrap();
        memory.admit(&fred, id(2), at(3_660), at(3_600)).unwrap();
        assert_eq!(memory.admit(&fred, id(1), at(60), at(1)), Err("it is older than the replay memory"));
        memory.admit(&fred, id(3), at(62), at(2)).unwrap();
    }

    #[test]
    fn s06_an_id_is_recorded_to_the_last_second_in_which_it_is_valid() {
        let memory = memory(10, 10, 10);
        let (fred, bob) = (agent("fred"), agent("bob"));
        memory.admit(&fred, id(1), at(60), at(0)).unwrap();
        // It is valid up to 60 s, by a clock that may be 30 s behind, and seconds are rounded up.
        memory.check(&bob, id(9), at(200), at(91)).unwrap();
        assert_eq!(memory.len(), 1);
        memory.check(&bob, id(9), at(200), at(92)).unwrap();
        assert_eq!(memory.len(), 0);
        // What may have been dropped with it is refused, and what may not have been is accepted.
        assert_eq!(memory.admit(&bob, id(2), at(60), at(0)), Err("it is older than the replay memory"));
        memory.admit(&bob, id(2), at(61), at(0)).unwrap();
    }

    #[test]
    fn s06_few_senders_cannot_fill_the_replay_memory() {
        let memory = memory(500, 1_000, 10);
        let number = |n: u32| MessageId::from_bytes([n.to_be_bytes(); 4].concat().try_into().unwrap());
        let fill =
            |name: &str| (0..1_000).filter(|n| memory.admit(&agent(name), number(*n), at(60), at(0)).is_ok()).count();
        assert_eq!(fill("a"), 500, "one sender has half");
        assert_eq!([fill("b"), fill("c"), fill("d")], [250, 125, 63]);
        assert_eq!((memory.len(), fill("e")), (938, 31), "an honest sender still has room");
        assert_eq!(
            memory.admit(&agent("d"), number(2_000), at(60), at(0)),
            Err("this sender has as much of the replay memory as is left for all others")
        );
        // With many senders, it can become full.
        for n in 0..1_000 {
            let _ = memory.admit(&agent(&format!("n{n}")), number(n), at(60), at(0));
        }
        assert_eq!(memory.len(), 1_000);
        assert_eq!(memory.admit(&agent("z"), number(1), at(60), at(0)), Err("the replay memory is full"));
    }

    #[test]
    fn s06_expired_ids_are_dropped_in_small_steps() {
        const COUNT: u32 = 20_000;
        let memory = memory(COUNT as usize, 1_000_000, 10);
        let number = |n: u32| MessageId::from_bytes([n.to_be_bytes(); 4].concat().try_into().unwrap());
        for name in ["fred", "bob"] {
            (0..COUNT).for_each(|n| memory.admit(&agent(name), number(n), at(60 + u64::from(n % 7)), at(0)).unwrap());
        }
        let (mut before, mut calls) = (memory.len(), 0);
        while memory.len() > 1 {
            // Also a sender that has reached its limit is accepted: its own expired ids are dropped first.
            memory.admit(&agent("fred"), number(COUNT + calls), at(1_060), at(1_000)).unwrap();
            calls += 1;
            assert!(before - memory.len() <= 2 * MAX_FORGOTTEN, "one call dropped too much");
            before = memory.len();
            if before <= calls as usize {
                break;
            }
        }
        assert_eq!(memory.len(), calls as usize, "all that expired is gone");
        assert!(calls < 2 * COUNT / MAX_FORGOTTEN as u32, "{calls} calls");
        assert_eq!(memory.ids.lock().senders.len(), 1);
        assert_eq!(memory.ids.lock().by_second.len(), 1);
    }

    #[test]
    fn what_was_asked_is_known_for_a_time_and_up_to_a_number() {
        let at = Timestamp::from_secs;
        let sent_ids = SentIds::new(at(100));
        let id = |number: u64| MessageId::from_bytes([number.to_be_bytes(), [0; 8]].concat().try_into().unwrap());
        for number in 0..=MAX_SENT_IDS as u64 {
            sent_ids.note(id(number), at(100));
        }
        assert!(sent_ids.knows(id(0)) && sent_ids.knows(id(MAX_SENT_IDS as u64 - 1)));
        assert!(!sent_ids.knows(id(MAX_SENT_IDS as u64)), "what no longer fits in gets no exemption");
        sent_ids.note(id(0), at(101));
        assert!(!sent_ids.knows(id(0)));
    }
}
