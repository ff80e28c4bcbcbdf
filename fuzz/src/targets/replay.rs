//! The replay memory against a simple model: both give the same answers, and, whatever the clock does, no message is accepted twice while it
//! is valid.
//!
//! An input is a list of steps of six bytes: operation, sender, message, expiry, and the movement of the clock (two bytes).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use nanite::clock::Timestamp;
use nanite::packet::{Identity, MessageId};
use nanite::security::{ReplayLimits, fuzzing::Replay};

use super::world::NOW;

const SKEW: Duration = Duration::from_secs(30);
const LIFETIME: Duration = Duration::from_secs(60);
const PER_SENDER: usize = 4;
const TOTAL: usize = 9;
const SENDERS: usize = 3;

/// A simple model of the ids in the memory.
#[derive(Default)]
struct Model {
    /// The second until which each message is remembered.
    seen: HashMap<(usize, u8), u64>,
    /// The latest such second among the messages that were dropped.
    forgotten: u64,
}

impl Model {
    fn admits(&mut self, from: usize, id: u8, expires_at: Timestamp, now: Timestamp) -> bool {
        let gone = self.seen.extract_if(|_, until| *until < now.as_secs()).map(|(_, until)| until).max();
        self.forgotten = self.forgotten.max(gone.unwrap_or(0));
        let of_sender = self.seen.keys().filter(|(sender, _)| *sender == from).count();
        until(expires_at) > self.forgotten
            && !self.seen.contains_key(&(from, id))
            && of_sender < PER_SENDER.min(TOTAL - self.seen.len())
    }
}

fn until(expires_at: Timestamp) -> u64 {
    expires_at.saturating_add(SKEW).as_secs() + 1
}

/// The target.
pub fn run(data: &[u8]) {
    let mut limits = ReplayLimits::default();
    (limits.per_sender, limits.total, limits.senders) = (PER_SENDER, TOTAL, SENDERS);
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
        // Expired messages are refused before the memory is consulted.
        let expires_at = now.saturating_add(Duration::from_millis(u64::from(*expiry) * 235));
        let id = MessageId::from_bytes([*which; 16]);
        match what % 4 {
            0 | 1 => {
                let admits = model.admits(who, *which, expires_at, now);
                assert_eq!(memory.check(from, id, expires_at, now), admits, "check");
                assert_eq!(memory.admit(from, id, expires_at, now), admits, "admit");
                if admits {
                    model.seen.insert((who, *which), until(expires_at));
                    assert!(taken.insert((who, *which, expires_at)), "accepted twice");
                }
            }
            2 => {
                // Accepted messages arrive again, while they are valid.
                let again = taken.iter().filter(|(_, _, expires_at)| *expires_at >= now);
                for (who, which, expires_at) in again {
                    let id = MessageId::from_bytes([*which; 16]);
                    assert!(!memory.admit(&senders[*who], id, *expires_at, now), "a replay was accepted");
                    assert!(!model.admits(*who, *which, *expires_at, now), "the model accepts a replay");
                }
            }
            _ => {
                // Accepted heartbeats arrive again while they can be valid: issued at most `SKEW` after their arrival.
                for ((who, certificate, place), at) in &places {
                    let at: &Timestamp = at;
                    if now <= at.saturating_add(SKEW).saturating_add(LIFETIME) {
                        assert!(
                            !memory.advance(&senders[*who], *certificate, *place, LIFETIME, now),
                            "a heartbeat was accepted twice"
                        );
                    }
                }
                let place = (u64::from(*expiry), u64::from(*which));
                // The certificate: a larger number is a newer one.
                let certificate = Timestamp::from_secs(u64::from(scale >> 2 & 3));
                if memory.advance(from, certificate, place, LIFETIME, now) {
                    places.insert((who, certificate, place), now);
                }
            }
        }
        assert_eq!(memory.remembered(), model.seen.len());
        assert!(memory.remembered() <= TOTAL);
    }
}
