//! From packets to bytes and back, behind one trait.
//!
//! A [`Serializer`] turns a [`Packet`] for an [`Audience`] into bytes, and bytes that came on a [`InboundQueue`] into an
//! [`Inbound`]. The secure one lives in [`crate::security`]; the plain ones here wrap a [`Codec`] and vouch for nothing.

mod channel;
mod codec;
mod error;
mod plain;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::packet::{Identity, MessageId, Packet};

pub use channel::InboundQueue;
#[cfg(feature = "msgpack")]
pub use codec::MsgPack;
#[cfg(feature = "yaml")]
pub use codec::Yaml;
pub use codec::{Codec, CodecError, Json};
pub use error::{OpenError, OpenErrorKind, SealError, SupersededProcess};
pub use plain::PlainSerializer;

/// Turns packets into bytes and bytes into packets.
///
/// Implement it to plug in a format of your own.
///
/// * `seal` and `open` may block and may use the CPU for milliseconds: they are called on worker threads, never on those of the
///   runtime, unless [`cost`](Serializer::cost) says otherwise.
/// * The bytes given to `open` come from anybody. It must not panic, must bound what it allocates, and must return an error for
///   all it does not understand; no other format is tried.
/// * Only [`crate::security::SecureSerializer`] can return a [`Provenance::Verified`].
pub trait Serializer: fmt::Debug + Send + Sync {
    /// The content type that names the format on the message, such as `application/vnd.nanite.json`. Messages with another
    /// one are refused before `open` is called.
    fn content_type(&self) -> &str;

    /// Who this serializer signs for, if it signs. A node with another identity refuses to start with it.
    fn identity(&self) -> Option<&Identity>;

    /// The instance that stands in its signed headers (the process's start in microseconds), if it signs: it is part of the name
    /// of the queue that answers come to.
    fn instance(&self) -> Option<u64>;

    /// Turns a packet into bytes.
    ///
    /// # Errors
    /// [`SealError`] when the audience cannot be reached in this format or the packet cannot be expressed.
    fn seal(&self, packet: &Packet, how: &SealRequest<'_>) -> Result<Sealed, SealError>;

    /// Turns bytes into a packet.
    ///
    /// # Errors
    /// [`OpenError`] when the bytes are refused; its kind says at which step.
    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError>;

    /// Told when a message that came on [`InboundQueue::Offline`] has been carried out. Such a message is held for long, and the broker
    /// gives it again when a connection is lost meanwhile: so its being opened is not what makes it a replay, but this.
    fn mark_completed(&self, _message: &Verified, _now: Timestamp) {}

    /// Whether [`mark_completed`](Serializer::mark_completed) was told of this message: a copy of it that was opened before that is not carried out.
    fn is_completed(&self, _message: &Verified) -> bool {
        false
    }

    /// Verifies what another process kept of a registration or heartbeat (see [`Verified::proof`]): who said it, as `open` would,
    /// but for its age and whether it was seen before. Whoever asks bounds its age. Formats without signatures have no proofs.
    ///
    /// # Errors
    /// [`OpenError`] when it is refused; its kind says at which step.
    fn verify_proof(&self, _proof: &Arc<Proof>, _now: Timestamp) -> Result<Inbound, OpenError> {
        Err(OpenError::new(OpenErrorKind::Unsupported, "this format has no proofs"))
    }

    /// Whether `open` vouches for senders. A node whose serializer does not logs a warning when it starts.
    fn is_secure(&self) -> bool {
        false
    }

    /// Whether it comes to know other nodes by what they send. Nodes then make themselves known to each other when they start, and
    /// from time to time.
    fn learns_peers(&self) -> bool {
        false
    }

    /// What `seal` or `open` will take for a message of about this many bytes at this moment. Asked before each, so it has to be quick.
    fn cost(&self, _bytes: usize, _now: Timestamp) -> Cost {
        Cost::Long
    }
}

/// What one call of a serializer takes; it decides on which thread the call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cost {
    /// Microseconds: the call is made at once, one message after the other.
    Trivial,
    /// As a rule less than 200 microseconds of the CPU, and nothing that blocks: the call is made on the runtime's threads where it has
    /// several, since handing it to another thread and back would take as long again.
    Short,
    /// Longer, or it may block: the call is made on a worker thread.
    Long,
}

/// Whom a message is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Audience {
    /// One node.
    One(Identity),
    /// Several nodes, 1 to 64: they all get the same bytes.
    Many(Vec<Identity>),
    /// Every mapper.
    Mappers,
    /// Every agent; only for what holds no secret ([`Packet::Advertise`]).
    Agents,
}

impl Audience {
    /// How many identities one message can name.
    pub const MAX: usize = 64;
}

impl From<Identity> for Audience {
    fn from(identity: Identity) -> Self {
        Audience::One(identity)
    }
}

/// How long a message may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MessageClass {
    /// For now: seconds; refused by a process that started after it was made.
    #[default]
    Live,
    /// To be kept until somebody can take it: days. Only requests and pushes to the mappers.
    Stored,
}

/// How a packet is to be sealed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SealRequest<'a> {
    /// Whom it is for.
    pub audience: &'a Audience,
    /// The moment it is made.
    pub now: Timestamp,
    /// How long it is valid; cut to the largest lifetime of its class.
    pub lifetime: Duration,
    /// The class.
    pub class: MessageClass,
    /// The message it answers.
    pub in_reply_to: Option<MessageId>,
}

impl<'a> SealRequest<'a> {
    /// A live message for `audience`, made `now`, valid for the default lifetime of 60 s.
    pub fn new(audience: &'a Audience, now: Timestamp) -> Self {
        Self { audience, now, lifetime: Duration::from_secs(60), class: MessageClass::Live, in_reply_to: None }
    }
}

/// A sealed message.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// The id in its header.
    pub id: MessageId,
    /// What goes on the wire.
    pub bytes: Vec<u8>,
    /// When it expires.
    pub expires_at: Timestamp,
}

/// Where and when bytes arrived.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OpenContext {
    /// The kind of queue.
    pub channel: InboundQueue,
    /// The moment.
    pub now: Timestamp,
}

impl OpenContext {
    /// Bytes that arrived on `channel` at `now`.
    pub fn new(channel: InboundQueue, now: Timestamp) -> Self {
        Self { channel, now }
    }
}

/// An opened message.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inbound {
    /// What it says.
    pub packet: Packet,
    /// Who vouches for it.
    pub provenance: Provenance,
}

impl Inbound {
    /// A message that nobody vouches for: what a serializer of your own returns.
    pub fn unverified(packet: Packet) -> Self {
        Self { packet, provenance: Provenance::Unverified }
    }

    /// A message whose signer was verified. Only `security` calls this (a test holds it).
    pub(crate) fn verified(packet: Packet, verified: Verified) -> Self {
        Self { packet, provenance: Provenance::Verified(Box::new(verified)) }
    }

    /// Who sent it: the verified signer; for an unverified message, who it claims to be from.
    pub fn sender(&self) -> Option<&Identity> {
        match &self.provenance {
            Provenance::Verified(verified) => Some(verified.signer()),
            Provenance::Unverified => self.packet.claimed_sender(),
        }
    }

    /// What was verified of the sender.
    pub fn signer(&self) -> Option<&Verified> {
        match &self.provenance {
            Provenance::Verified(verified) => Some(verified),
            Provenance::Unverified => None,
        }
    }
}

/// Who vouches for a message.
#[derive(Clone, Debug)]
pub enum Provenance {
    /// The signature, the certificate and the freshness were checked.
    Verified(Box<Verified>),
    /// Nothing was checked.
    Unverified,
}

/// What was verified of a message's sender: only `security` can make one.
#[derive(Clone, Debug)]
pub struct Verified {
    pub(crate) signer: Identity,
    pub(crate) certificate: [u8; 32],
    pub(crate) instance: u64,
    pub(crate) sequence: u64,
    pub(crate) id: MessageId,
    pub(crate) issued_at: Timestamp,
    pub(crate) expires_at: Timestamp,
    pub(crate) class: MessageClass,
    pub(crate) in_reply_to: Option<MessageId>,
    pub(crate) proof: Option<Arc<Proof>>,
}

impl Verified {
    /// Who signed it, by the certificate.
    pub fn signer(&self) -> &Identity {
        &self.signer
    }

    /// The SHA-256 of the signer's certificate.
    pub fn certificate(&self) -> &[u8; 32] {
        &self.certificate
    }

    /// The instance of the sender's process: its start in microseconds.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    /// Counts up within the instance.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The id of the message.
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// When it was made, by the sender's clock.
    pub fn issued_at(&self) -> Timestamp {
        self.issued_at
    }

    /// When it expires.
    pub fn expires_at(&self) -> Timestamp {
        self.expires_at
    }

    /// Live or stored.
    pub fn class(&self) -> MessageClass {
        self.class
    }

    /// The message it answers.
    pub fn in_reply_to(&self) -> Option<MessageId> {
        self.in_reply_to
    }

    /// What proves to a third party who said it; kept for registrations and heartbeats only.
    pub fn proof(&self) -> Option<&Arc<Proof>> {
        self.proof.as_ref()
    }
}

/// What shows a third party who said a body: it can be checked without a private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The salt of the commitment.
    pub salt: [u8; 32],
    /// The body, in the codec that the header names.
    pub body: Vec<u8>,
    /// The DER of the SignerInfo, whose signed attributes hold the header.
    pub signer_info: Vec<u8>,
    /// The DER of the signer's certificates, where the message carried them: leaf first.
    pub certificates: Vec<Vec<u8>>,
}
