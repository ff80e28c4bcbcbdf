//! The replay memory against a plain model: the same answers, and, whatever the clock does, no message is taken twice while it is valid.
//!
//! An input is a list of steps of six bytes: what to do, who, which, when it expires, and how the clock moves.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use nanite::clock::Timestamp;
use nanite::packet::{Identity, MessageId};
use nanite::security::{ReplayLimits, fuzzing::Replay};

use super::world::NOW;

const SKEW: Duration = Duration::from_secs(30);
const LIFETIME: Duration = Duration::from_secs(60);
const EACH: usize = 4;
const TOTAL: usize = 9;
const SENDERS: usize = 3;

/// The plain model of what is remembered by id.
#[derive(Default)]
struct Model {
    /// Until which second each message is remembered.
    seen: HashMap<(usize, u8), u64>,
    /// The last second of what was forgotten.
    forgotten: u64,
}

impl Model {
    fn admits(&mut self, from: usize, id: u8, expires_at: Timestamp, now: Timestamp) -> bool {
        let gone = self.seen.extract_if(|_, until| *until < now.as_secs()).map(|(_, until)| until).max();
        self.forgotten = self.forgotten.max(gone.unwrap_or(0));
        let of_sender = self.seen.keys().filter(|(sender, _)| *sender == from).count();
        until(expires_at) > self.forgotten
            && !self.seen.contains_key(&(from, id))
            && of_sender < EACH
            && self.seen.len() < TOTAL
    }
}

fn until(expires_at: Timestamp) -> u64 {
    expires_at.saturating_add(SKEW).as_secs() + 1
}

/// The target.
pub fn run(data: &[u8]) {
    let mut limits = ReplayLimits::default();
    (limits.per_sender, limits.total, limits.senders) = (EACH, TOTAL, SENDERS);
    let memory = Replay::new(limits, SKEW);
    let senders: Vec<Identity> = (0..8).map(|n| Identity::agent(&format!("a{n}")).unwrap()).collect();
    let (mut model, mut now) = (Model::default(), NOW);
    let (mut taken, mut places) = (HashSet::new(), HashMap::new());
    for step in data.chunks_exact(6).take(400) {
        let [what, who, which, expiry, clock, scale] = step else { return };
        let moved = Duration::from_millis(u64::from(clock & 0x7f) * [1, 100, 1_000, 10_000][usize::from(scale & 3)]);
        now = if clock & 0x80 == 0 { now.saturating_add(moved) } else { now.saturating_sub(moved) };
        let who = usize::from(who % 8);
        let from = &senders[who];
        // What has expired is refused before the memory is asked.
        let expires_at = now.saturating_add(Duration::from_millis(u64::from(*expiry) * 235));
        let id = MessageId::from_bytes([*which; 16]);
        match what % 4 {
            0 | 1 => {
                let admits = model.admits(who, *which, expires_at, now);
                assert_eq!(memory.check(from, id, expires_at, now), admits, "asked");
                assert_eq!(memory.admit(from, id, expires_at, now), admits, "to be taken note of");
                if admits {
                    model.seen.insert((who, *which), until(expires_at));
                    assert!(taken.insert((who, *which, expires_at)), "taken twice");
                }
            }
            2 => {
                // One that was taken comes again, at any moment at which it is valid.
                let again = taken.iter().filter(|(_, _, expires_at)| *expires_at >= now);
                for (who, which, expires_at) in again {
                    let id = MessageId::from_bytes([*which; 16]);
                    assert!(!memory.admit(&senders[*who], id, *expires_at, now), "a replay was taken");
                    assert!(!model.admits(*who, *which, *expires_at, now), "the model has a hole");
                }
            }
            _ => {
                // What was taken comes again while it can be valid: it was issued at most `SKEW` after it came.
                for ((who, place), at) in &places {
                    let at: &Timestamp = at;
                    if now <= at.saturating_add(SKEW).saturating_add(LIFETIME) {
                        assert!(!memory.advance(&senders[*who], *place, LIFETIME, now), "a heartbeat was taken twice");
                    }
                }
                let place = (u64::from(*expiry), u64::from(*which));
                if memory.advance(from, place, LIFETIME, now) {
                    places.insert((who, place), now);
                }
            }
        }
        assert_eq!(memory.remembered(), model.seen.len());
        assert!(memory.remembered() <= TOTAL);
    }
}
