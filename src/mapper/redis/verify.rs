//! Registrations and heartbeats as stored in Redis, and their verification: an agent's signature is verified again whenever its message
//! is read, and the mapper's own policy is applied.
//!
//! A stored message is one byte for its format, 8 bytes for the time at which its writer received it (microseconds since the Unix
//! epoch), and, in format 1, the proof: salt (32 bytes), body, SignerInfo, the number of certificates (one byte) and the certificates.
//! The body, the SignerInfo and each certificate are preceded by their length in 4 bytes. In format 2, the packet of an unsigned message
//! follows as JSON. Numbers are big-endian.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::keys::Version;
use crate::clock::Timestamp;
use crate::limits::{LogDecision, LogLimit};
use crate::mapper::state::{AgentRecord, StateContext};
use crate::packet::{Identity, Kind, Packet, Register, Status};
use crate::policy::Caller;
use crate::serializer::{Inbound, OpenError, OpenErrorKind, Proof, Serializer, Verified};

const SIGNED: u8 = 1;
const UNSIGNED: u8 = 2;
/// The longest stored message, in bytes: longer than any registration with its proof.
const MAX_MESSAGE_BYTES: usize = Kind::Register.max_bytes() + 1024;
/// The most certificates in a proof.
const MAX_CERTIFICATES: u8 = 8;
/// The most refusals that are logged per second. The others are only counted.
const MAX_LOGGED_PER_SECOND: u64 = 20;

/// A registration or heartbeat as stored in Redis. Nothing in it is verified.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StoredMessage {
    /// When its writer received it, as the writer claims.
    pub received_at: Timestamp,
    pub content: Content,
}

/// The content of a stored message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Signed(Arc<Proof>),
    Unsigned(Box<Packet>),
}

/// Why stored bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DecodeError {
    TooLarge,
    Malformed,
}

impl StoredMessage {
    /// `None` if it is larger than mappers read.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(1024);
        out.push(match self.content {
            Content::Signed(_) => SIGNED,
            Content::Unsigned(_) => UNSIGNED,
        });
        out.extend_from_slice(&self.received_at.as_micros().to_be_bytes());
        match &self.content {
            Content::Signed(proof) => {
                out.extend_from_slice(&proof.salt);
                write_part(&mut out, &proof.body)?;
                write_part(&mut out, &proof.signer_info)?;
                out.push(u8::try_from(proof.certificates.len()).ok().filter(|count| *count <= MAX_CERTIFICATES)?);
                proof.certificates.iter().try_for_each(|certificate| write_part(&mut out, certificate))?;
            }
            Content::Unsigned(packet) => out.extend(serde_json::to_vec(packet).ok()?),
        }
        (out.len() <= MAX_MESSAGE_BYTES).then_some(out)
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(DecodeError::TooLarge);
        }
        Self::parse(bytes).ok_or(DecodeError::Malformed)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (format, rest) = bytes.split_first()?;
        let (received_at, mut rest) = rest.split_first_chunk::<8>()?;
        let received_at = Timestamp::from_micros(u64::from_be_bytes(*received_at));
        let content = match *format {
            SIGNED => {
                let salt;
                (salt, rest) = rest.split_first_chunk::<32>()?;
                let (body, signer_info) = (read_part(&mut rest)?.to_vec(), read_part(&mut rest)?.to_vec());
                let count;
                (count, rest) = rest.split_first()?;
                if *count > MAX_CERTIFICATES {
                    return None;
                }
                let certificates = (0..*count).map(|_| read_part(&mut rest).map(<[u8]>::to_vec));
                let certificates = certificates.collect::<Option<_>>()?;
                if !rest.is_empty() {
                    return None;
                }
                Content::Signed(Arc::new(Proof::new(*salt, body, signer_info, certificates)))
            }
            UNSIGNED => Content::Unsigned(Box::new(serde_json::from_slice(rest).ok()?)),
            _ => return None,
        };
        Some(Self { received_at, content })
    }
}

fn write_part(out: &mut Vec<u8>, part: &[u8]) -> Option<()> {
    out.extend_from_slice(&u32::try_from(part.len()).ok()?.to_be_bytes());
    out.extend_from_slice(part);
    Some(())
}

fn read_part<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (part, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    *bytes = rest;
    Some(part)
}

/// Why something in Redis was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedisRefusal {
    /// It is larger than any registration.
    TooLarge,
    /// It does not have the format that mappers write.
    Malformed,
    /// It is not signed by the agent, or the signature cannot be verified.
    NotProven,
    /// The agent signed it, but this mapper's policy does not allow it.
    Denied,
    /// An agent is listed for a service or tag that it did not register.
    Listing,
    /// A key holds a value of another type than mappers write.
    WrongType,
}

impl RedisRefusal {
    /// All reasons.
    pub const ALL: &[RedisRefusal] =
        &[Self::TooLarge, Self::Malformed, Self::NotProven, Self::Denied, Self::Listing, Self::WrongType];
}

/// A registration that was verified.
#[derive(Clone, Debug)]
pub(super) struct VerifiedRegistration {
    /// The record. Its `last_seen` is at most what is verified.
    pub record: AgentRecord,
    /// When the agent was last seen, as the writer claims.
    pub claimed_last_seen: Timestamp,
}

/// A heartbeat that was verified.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct VerifiedHeartbeat {
    pub version: Version,
    pub status: Status,
    pub last_seen: Timestamp,
}

/// Verifies what is read from Redis.
#[derive(Debug)]
pub(super) struct Verifier {
    serializer: Arc<dyn Serializer>,
    accept_unsigned: bool,
    pub refusals: RefusalCounters,
}

impl Verifier {
    pub fn new(serializer: Arc<dyn Serializer>, accept_unsigned: bool) -> Self {
        Self { serializer, accept_unsigned, refusals: RefusalCounters::new() }
    }

    /// Verifies the registration of an agent.
    pub fn registration(
        &self,
        identity: &Identity,
        value: &[u8],
        context: &StateContext,
        now: Timestamp,
    ) -> Option<VerifiedRegistration> {
        let (received_at, inbound) = self.open(identity, value, now)?;
        let Packet::Register(register) = &inbound.packet else {
            return self.refuse(RedisRefusal::Malformed, identity, "not a registration", now);
        };
        let decision = context.policy.authorize_registration(&Caller::new(identity, inbound.signer()), register);
        if !decision.allowed {
            return self.refuse(RedisRefusal::Denied, identity, &decision.reason, now);
        }
        let version = version(&inbound, register.instance, received_at);
        let proof = inbound.signer().and_then(|signer| signer.proof().cloned());
        let last_seen = verified_last_seen(received_at, &inbound, now);
        let record = AgentRecord::new(register.clone(), version.instance, last_seen, proof);
        let record = record.with_sequence(version.sequence);
        Some(VerifiedRegistration { record, claimed_last_seen: received_at })
    }

    /// Verifies the last heartbeat of an agent. `None` also if it is older than the registration.
    pub fn heartbeat(&self, record: &AgentRecord, value: &[u8], now: Timestamp) -> Option<VerifiedHeartbeat> {
        let identity = &record.identity;
        let Some((_, value)) = value.split_at_checked(Version::TEXT_LENGTH) else {
            return self.refuse(RedisRefusal::Malformed, identity, "heartbeat too short", now);
        };
        let (received_at, inbound) = self.open(identity, value, now)?;
        let Packet::Ping(ping) = &inbound.packet else {
            return self.refuse(RedisRefusal::Malformed, identity, "not a heartbeat", now);
        };
        let version = version(&inbound, ping.instance, received_at);
        let last_seen = verified_last_seen(received_at, &inbound, now);
        // An old heartbeat is normal: the agent may have registered again, or restarted.
        let is_current = version.instance == record.instance && version > Version::of(record);
        is_current.then_some(VerifiedHeartbeat { version, status: ping.status, last_seen })
    }

    /// Decodes a stored message and verifies that the agent signed it. Returns when the writer claims to have received it.
    fn open(&self, identity: &Identity, value: &[u8], now: Timestamp) -> Option<(Timestamp, Inbound)> {
        let message = match StoredMessage::decode(value) {
            Ok(message) => message,
            Err(DecodeError::TooLarge) => {
                return self.refuse(RedisRefusal::TooLarge, identity, "message too large", now);
            }
            Err(DecodeError::Malformed) => {
                return self.refuse(RedisRefusal::Malformed, identity, "invalid encoding", now);
            }
        };
        let inbound = match message.content {
            Content::Signed(proof) => match self.serializer.verification() {
                Some(verification) => verification.verify_proof(&proof, now),
                None => Err(OpenError::new(OpenErrorKind::Unsupported, "this format has no proofs")),
            },
            Content::Unsigned(packet) if self.accept_unsigned && within_limits(&packet) => {
                Ok(Inbound::unverified(*packet))
            }
            Content::Unsigned(_) => {
                let why = if self.accept_unsigned { "too many services or tags" } else { "not signed" };
                return self.refuse(RedisRefusal::NotProven, identity, why, now);
            }
        };
        match inbound {
            Ok(inbound) if inbound.sender() == Some(identity) => Some((message.received_at, inbound)),
            Ok(_) => self.refuse(RedisRefusal::NotProven, identity, "signed by another agent", now),
            Err(OpenError { kind, why, .. }) => {
                self.refuse(RedisRefusal::NotProven, identity, &format!("{kind}: {why}"), now)
            }
        }
    }

    fn refuse<T>(&self, refusal: RedisRefusal, identity: &Identity, why: &str, now: Timestamp) -> Option<T> {
        self.refusals.record(refusal, identity.as_str(), why, now);
        None
    }
}

fn within_limits(packet: &Packet) -> bool {
    if let Packet::Register(register) = packet { Register::within_limits(register) } else { true }
}

fn version(inbound: &Inbound, plain_instance: Option<u64>, received_at: Timestamp) -> Version {
    match inbound.signer() {
        Some(signer) => Version::new(signer.instance(), signer.sequence()),
        None => Version::new(plain_instance.unwrap_or(0), received_at.as_micros()),
    }
}

/// When an agent was last seen: as the writer claims, but not later than now, nor than the message expires. So an attacker
/// who can write to Redis can keep a dead agent alive for the lifetime of its last message, but not longer.
fn verified_last_seen(received_at: Timestamp, inbound: &Inbound, now: Timestamp) -> Timestamp {
    let expires_at = inbound.signer().map_or(now, Verified::expires_at);
    received_at.min(expires_at).min(now)
}

/// Counts and logs what is refused.
#[derive(Debug)]
pub(super) struct RefusalCounters {
    by_kind: [AtomicU64; RedisRefusal::ALL.len()],
    log_limit: LogLimit,
}

impl RefusalCounters {
    fn new() -> Self {
        Self { by_kind: Default::default(), log_limit: LogLimit::new(MAX_LOGGED_PER_SECOND) }
    }

    /// Records that something about `subject` (an agent, a service or a key) was refused.
    pub fn record(&self, refusal: RedisRefusal, subject: &str, why: &str, now: Timestamp) {
        if let Some(count) = self.by_kind.get(refusal as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        match self.log_limit.next(now) {
            LogDecision::Log => tracing::warn!(?refusal, subject, why, "refused data from Redis"),
            LogDecision::Suppressing => {
                tracing::warn!("refused more data from Redis in this second; counted, but not logged");
            }
            LogDecision::Skip => {}
        }
    }

    pub fn counts(&self) -> Vec<(RedisRefusal, u64)> {
        let kinds = RedisRefusal::ALL.iter().copied();
        kinds.zip(&self.by_kind).map(|(kind, count)| (kind, count.load(Ordering::Relaxed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Identity, Ping, Status};

    fn signed() -> StoredMessage {
        let certificates = vec![vec![5; 3], vec![]];
        let proof = Proof { salt: [7; 32], body: b"body".to_vec(), signer_info: b"signature".to_vec(), certificates };
        StoredMessage { received_at: Timestamp::from_micros(77), content: Content::Signed(Arc::new(proof)) }
    }

    #[test]
    fn n14_stored_messages_round_trip() {
        let ping = Ping { identity: Identity::agent("fred").unwrap(), status: Status::new(0.5), instance: Some(3) };
        let content = Content::Unsigned(Box::new(ping.into()));
        let unsigned = StoredMessage { received_at: Timestamp::from_micros(1), content };
        for message in [signed(), unsigned] {
            assert_eq!(StoredMessage::decode(&message.encode().unwrap()), Ok(message));
        }
    }

    #[test]
    fn n14_truncated_extended_and_oversized_messages_are_rejected() {
        let bytes = signed().encode().unwrap();
        for length in 0..bytes.len() {
            assert_eq!(StoredMessage::decode(&bytes[..length]), Err(DecodeError::Malformed), "{length}");
        }
        assert_eq!(StoredMessage::decode(&[&bytes[..], &[0]].concat()), Err(DecodeError::Malformed));
        assert_eq!(StoredMessage::decode(&vec![1; MAX_MESSAGE_BYTES + 1]), Err(DecodeError::TooLarge));
        let Content::Signed(proof) = signed().content else { panic!() };
        let larger = Proof { body: vec![0; MAX_MESSAGE_BYTES], ..(*proof).clone() };
        assert_eq!(StoredMessage { content: Content::Signed(Arc::new(larger)), ..signed() }.encode(), None);
    }

    proptest! {
        #[test]
        fn n14_arbitrary_bytes_decode_or_are_rejected(mut bytes in prop::collection::vec(any::<u8>(), 0..200), format in 0u8..4) {
            if let Some(first) = bytes.first_mut() {
                *first = format;
            }
            if let Ok(message) = StoredMessage::decode(&bytes) && matches!(message.content, Content::Signed(_)) {
                prop_assert_eq!(message.encode().unwrap(), bytes);
            }
        }
    }
}
