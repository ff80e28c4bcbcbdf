//! The replay memory: message ids until they expire, and the order of each sender's heartbeats. Also the ids of the messages that this
//! process sent.
//!
//! It is bounded. An entry that still protects is never dropped to make room: a full memory refuses new messages.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::Timestamp;
use crate::packet::{Identity, MessageId};

/// How many ids of sent messages are kept for answers by slower clocks.
const MAX_SENT_IDS: usize = 16_384;

/// The size of the replay memory. Only messages of senders with a valid certificate are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayLimits {
    /// How many unexpired messages of one sender. An id takes about 110 bytes.
    pub per_sender: usize,
    /// How many unexpired messages of all senders.
    pub total: usize,
    /// How many senders of heartbeats.
    pub senders: usize,
}

impl Default for ReplayLimits {
    fn default() -> Self {
        Self { per_sender: 500_000, total: 2_000_000, senders: 1_000_000 }
    }
}

/// Why a message counts as a replay.
pub(super) type Refusal = &'static str;

/// The replay memory.
pub(super) struct ReplayMemory {
    limits: ReplayLimits,
    skew: Duration,
    ids: Mutex<Ids>,
    orders: Mutex<Orders>,
}

#[derive(Default)]
struct Ids {
    seen: HashMap<Identity, HashSet<MessageId>>,
    total: usize,
    /// The ids by the second in which they can be dropped.
    by_second: BTreeMap<u64, Vec<(Identity, MessageId)>>,
    /// Ids up to this second were dropped. It only grows, so that a clock that is set back opens nothing.
    forgotten: u64,
}

#[derive(Default)]
struct Orders {
    latest: HashMap<Identity, Latest>,
    swept_at: Option<u64>,
    /// Messages up to this time may be of senders that were dropped. It only grows, so that a clock that is set back opens nothing.
    forgotten: Option<Timestamp>,
}

struct Latest {
    instance: u64,
    sequence: u64,
    /// From this time on every earlier message of this sender has expired.
    until: Timestamp,
    /// Messages up to this time may be from before this sender was dropped.
    unsure_until: Option<Timestamp>,
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
        ids.total += 1;
        match ids.seen.get_mut(from) {
            Some(seen) => {
                seen.insert(id);
            }
            None => {
                ids.seen.insert(from.clone(), HashSet::from([id]));
            }
        }
        ids.by_second.entry(second).or_default().push((from.clone(), id));
        Ok(())
    }

    /// Refuses a message that is recorded already, or that could not be recorded. Records nothing.
    pub fn check(&self, from: &Identity, id: MessageId, expires_at: Timestamp, now: Timestamp) -> Result<(), Refusal> {
        self.ids.lock().check(&self.limits, from, id, self.last_second(expires_at), now)
    }

    /// Whether a message is recorded.
    pub fn knows(&self, from: &Identity, id: MessageId) -> bool {
        self.ids.lock().seen.get(from).is_some_and(|seen| seen.contains(&id))
    }

    /// The second until which a message stays recorded.
    fn last_second(&self, expires_at: Timestamp) -> u64 {
        expires_at.saturating_add(self.skew).as_secs().saturating_add(1)
    }

    /// Records a sender's instance and sequence number; refuses what is not newer than everything recorded. `lifetime` is the largest
    /// lifetime of this kind of message.
    pub fn advance(
        &self,
        from: &Identity,
        instance: u64,
        sequence: u64,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        // An older message was issued before this one, so at most `skew` in the future.
        let until = now.saturating_add(lifetime).saturating_add(self.skew).saturating_add(self.skew);
        let mut orders = self.orders.lock();
        let unsure = |until: Option<Timestamp>| until.is_some_and(|until| now <= until);
        if let Some(latest) = orders.latest.get_mut(from) {
            if unsure(latest.unsure_until) {
                return Err("a newer message of this sender may have been dropped");
            }
            if (instance, sequence) <= (latest.instance, latest.sequence) {
                return Err("it is not newer than the last message of this sender");
            }
            (latest.instance, latest.sequence) = (instance, sequence);
            latest.until = latest.until.max(until);
            return Ok(());
        }
        if orders.latest.len() >= self.limits.senders {
            orders.sweep(now);
        }
        if orders.latest.len() >= self.limits.senders {
            return Err("the replay memory for senders is full");
        }
        if unsure(orders.forgotten) {
            return Err("its sender may have been dropped");
        }
        let unsure_until = orders.forgotten;
        orders.latest.insert(from.clone(), Latest { instance, sequence, until, unsure_until });
        Ok(())
    }

    /// The newest recorded instance of a sender, if it is newer than this one.
    pub fn later_than(&self, from: &Identity, instance: u64) -> Option<u64> {
        self.orders.lock().latest.get(from).map(|latest| latest.instance).filter(|latest| *latest > instance)
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
        self.forget(now.as_secs());
        if second <= self.forgotten {
            return Err("it is older than the replay memory");
        }
        let of_sender = self.seen.get(from);
        if of_sender.is_some_and(|seen| seen.contains(&id)) {
            return Err("it was opened before");
        }
        if of_sender.map_or(0, HashSet::len) >= limits.per_sender {
            return Err("the replay memory for this sender is full");
        }
        if self.total >= limits.total {
            return Err("the replay memory is full");
        }
        Ok(())
    }

    /// Drops the ids that expired before this second.
    fn forget(&mut self, now: u64) {
        while let Some(bucket) = self.by_second.first_entry() {
            if *bucket.key() >= now {
                return;
            }
            self.forgotten = self.forgotten.max(*bucket.key());
            for (from, id) in bucket.remove() {
                self.total = self.total.saturating_sub(1);
                if let Some(seen) = self.seen.get_mut(&from) {
                    seen.remove(&id);
                    if seen.is_empty() {
                        self.seen.remove(&from);
                    }
                }
            }
        }
    }
}

impl Orders {
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
    const MINUTE: Duration = Duration::from_secs(60);

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
    fn heartbeats_only_grow() {
        let memory = memory(10, 10, 1);
        let fred = agent("fred");
        memory.advance(&fred, 5, 1, MINUTE, at(0)).unwrap();
        for (instance, sequence) in [(5, 1), (5, 0), (4, 9)] {
            assert!(memory.advance(&fred, instance, sequence, MINUTE, at(1)).is_err());
        }
        memory.advance(&fred, 5, 2, MINUTE, at(1)).unwrap();
        memory.advance(&fred, 6, 1, MINUTE, at(2)).unwrap();
        assert!(memory.advance(&fred, 5, 3, MINUTE, at(3)).is_err(), "an older process of the same name");
        assert_eq!((memory.later_than(&fred, 5), memory.later_than(&fred, 6)), (Some(6), None));
        assert_eq!(memory.len(), 0);
    }

    #[test]
    fn a_sender_makes_room_only_when_its_messages_are_expired() {
        let memory = memory(10, 10, 1);
        memory.advance(&agent("fred"), 5, 1, MINUTE, at(0)).unwrap();
        let bob = agent("bob");
        assert_eq!(memory.advance(&bob, 1, 1, MINUTE, at(120)), Err("the replay memory for senders is full"));
        memory.advance(&bob, 1, 1, MINUTE, at(121)).unwrap();
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
