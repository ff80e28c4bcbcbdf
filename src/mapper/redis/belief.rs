//! What is believed of what stands in Redis: an agent's own signature, verified anew, and what this mapper's policy allows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::{Entry, NoEntry, Said};
use super::keys::Version;
use crate::clock::Timestamp;
use crate::mapper::state::{AgentRecord, StateContext};
use crate::packet::{Identity, Packet, Register, Status};
use crate::policy::Caller;
use crate::serializer::{Inbound, OpenError, OpenErrorKind, Serializer, Verified};

/// How many refusals are logged in one second; the others are only counted.
const LOGGED_PER_SECOND: u64 = 20;

/// Why something that stands in Redis is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedisRefusal {
    /// Longer than any registration.
    TooLarge,
    /// Not of the form of what mappers write.
    Malformed,
    /// Nothing proves that the agent said so.
    NotProven,
    /// The agent said so, and this mapper's policy does not allow it.
    Denied,
    /// An agent is listed for a service or tag that it did not register.
    Listing,
    /// A key is of another type than mappers make it.
    WrongType,
}

impl RedisRefusal {
    /// Every reason.
    pub const ALL: [RedisRefusal; 6] =
        [Self::TooLarge, Self::Malformed, Self::NotProven, Self::Denied, Self::Listing, Self::WrongType];
}

/// A registration that is believed.
#[derive(Clone, Debug)]
pub(super) struct Registration {
    /// Last seen when that is believable.
    pub record: AgentRecord,
    /// When its writer says that the agent was last heard.
    pub claimed: Timestamp,
}

/// A heartbeat that is believed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Beat {
    pub version: Version,
    pub status: Status,
    pub last_seen: Timestamp,
}

/// Decides what is believed.
#[derive(Debug)]
pub(super) struct Belief {
    pub serializer: Arc<dyn Serializer>,
    /// Whether what nothing proves is believed, too.
    pub unsigned: bool,
    pub refusals: Refusals,
}

impl Belief {
    /// The registration of an agent.
    pub fn registration(
        &self,
        identity: &Identity,
        value: &[u8],
        context: &StateContext,
        now: Timestamp,
    ) -> Option<Registration> {
        let (entry, inbound) = self.entry(identity, value, now)?;
        let Packet::Register(register) = &inbound.packet else {
            return self.refuse(RedisRefusal::Malformed, identity, "no registration where one has to be");
        };
        let decision = context.policy.authorize_registration(&Caller::new(identity, inbound.signer()), register);
        if !decision.allowed {
            return self.refuse(RedisRefusal::Denied, identity, &decision.why);
        }
        let version = self.version(&inbound, register.instance, entry.heard);
        let proof = inbound.signer().and_then(|signer| signer.proof().cloned());
        let mut record = AgentRecord::new(register.clone(), version.0, believable(&entry, &inbound, now), proof);
        record.sequence = version.1;
        Some(Registration { record, claimed: entry.heard })
    }

    /// The last heartbeat of an agent, or none when it has none since it registered.
    pub fn heartbeat(&self, record: &AgentRecord, value: &[u8], now: Timestamp) -> Option<Beat> {
        let identity = &record.identity;
        let Some((_, value)) = value.split_at_checked(Version::LENGTH) else {
            return self.refuse(RedisRefusal::Malformed, identity, "a heartbeat that is too short");
        };
        let (entry, inbound) = self.entry(identity, value, now)?;
        let Packet::Ping(ping) = &inbound.packet else {
            return self.refuse(RedisRefusal::Malformed, identity, "no heartbeat where one has to be");
        };
        let version = self.version(&inbound, ping.instance, entry.heard);
        let last_seen = believable(&entry, &inbound, now);
        // One of an earlier process, or from before the registration, is honest, and says nothing.
        let counts = version.0 == record.instance && version > Version::of(record);
        counts.then_some(Beat { version, status: ping.status, last_seen })
    }

    fn version(&self, inbound: &Inbound, said: Option<u64>, heard: Timestamp) -> Version {
        match inbound.signer() {
            Some(signer) => Version(signer.instance(), signer.sequence()),
            None => Version(said.unwrap_or(0), heard.as_micros()),
        }
    }

    /// Reads a value, and sees who said it.
    fn entry(&self, identity: &Identity, value: &[u8], now: Timestamp) -> Option<(Entry, Inbound)> {
        let entry = match Entry::decode(value) {
            Ok(entry) => entry,
            Err(NoEntry::TooLarge) => return self.refuse(RedisRefusal::TooLarge, identity, "longer than accepted"),
            Err(NoEntry::Malformed) => return self.refuse(RedisRefusal::Malformed, identity, "not readable"),
        };
        let inbound = match &entry.said {
            Said::Proven(proof) => match self.serializer.verification() {
                Some(verification) => verification.verify_proof(proof, now),
                None => Err(OpenError::new(OpenErrorKind::Unsupported, "this format has no proofs")),
            },
            Said::Unsigned(packet) if self.unsigned && within_limits(packet) => {
                Ok(Inbound::unverified((**packet).clone()))
            }
            Said::Unsigned(_) => {
                return self.refuse(RedisRefusal::NotProven, identity, "not signed, or beyond an agent's limits");
            }
        };
        match inbound {
            Ok(inbound) if inbound.sender() == Some(identity) => Some((entry, inbound)),
            Ok(_) => self.refuse(RedisRefusal::NotProven, identity, "another agent said it"),
            Err(OpenError { kind, why, .. }) => {
                self.refuse(RedisRefusal::NotProven, identity, &format!("{kind}: {why}"))
            }
        }
    }

    fn refuse<T>(&self, refusal: RedisRefusal, identity: &Identity, why: &str) -> Option<T> {
        self.refusals.note(refusal, identity.as_str(), why);
        None
    }
}

fn within_limits(packet: &Packet) -> bool {
    if let Packet::Register(register) = packet { Register::within_limits(register) } else { true }
}

/// When an agent was heard: as the writer says, but not later than now, nor than the message itself was valid. So whoever writes
/// what he likes can keep a dead agent alive for the lifetime of its last message, and no longer.
fn believable(entry: &Entry, inbound: &Inbound, now: Timestamp) -> Timestamp {
    let until = inbound.signer().map_or(now, Verified::expires_at);
    entry.heard.min(until).min(now)
}

/// Counts and logs what is not believed.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    by_kind: [AtomicU64; RedisRefusal::ALL.len()],
    started: std::sync::OnceLock<std::time::Instant>,
    second: AtomicU64,
    in_second: AtomicU64,
}

impl Refusals {
    /// Takes note of something that stands at `place` and is not believed.
    pub fn note(&self, refusal: RedisRefusal, place: &str, why: &str) {
        if let Some(count) = self.by_kind.get(refusal as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let second = self.started.get_or_init(std::time::Instant::now).elapsed().as_secs();
        if self.second.swap(second, Ordering::Relaxed) != second {
            self.in_second.store(0, Ordering::Relaxed);
        }
        match self.in_second.fetch_add(1, Ordering::Relaxed) {
            LOGGED_PER_SECOND => tracing::warn!("more in Redis is refused in this second: counted, not logged"),
            n if n < LOGGED_PER_SECOND => tracing::warn!(?refusal, place, why, "not believed from Redis"),
            _ => {}
        }
    }

    /// How often each was noted.
    pub fn counts(&self) -> Vec<(RedisRefusal, u64)> {
        RedisRefusal::ALL.into_iter().zip(&self.by_kind).map(|(kind, n)| (kind, n.load(Ordering::Relaxed))).collect()
    }
}
