//! From packets to bytes and back, behind one trait.
//!
//! A [`Serializer`] turns a [`Packet`] for an [`Audience`] into bytes, and bytes from an [`InboundQueue`] into an [`Inbound`]. The secure
//! one is in [`crate::security`]; the plain one here wraps a [`Codec`] and verifies nothing.

mod budget;
mod codec;
mod error;
mod inbound_queue;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Timestamp;
use crate::packet::{Identity, MessageId, Packet};

pub use budget::MAX_DECODED_BYTES;
#[cfg(feature = "msgpack")]
pub use codec::MsgPack;
#[cfg(feature = "yaml")]
pub use codec::Yaml;
pub use codec::{Codec, Json, PlainSerializer};
pub use error::{CodecError, NotAddressed, OpenError, OpenErrorKind, SealError, SupersededProcess};
pub use inbound_queue::InboundQueue;

/// Turns packets into bytes and bytes into packets, for one node.
///
/// Implement it to plug in a format of your own.
///
/// * `seal` and `open` may block and may use the CPU for milliseconds: they are called on worker threads, not on the runtime's threads,
///   unless [`cost`](Serializer::cost) says otherwise.
/// * The bytes given to `open` are untrusted. It must not panic, must bound what it allocates, and must return an error for everything
///   it does not understand; no other format is tried.
/// * Only [`SecureSerializer`](crate::security::SecureSerializer) can return a [`Provenance::Verified`].
pub trait Serializer: fmt::Debug + Send + Sync {
    /// The content type that names the format on the message, such as `application/vnd.nanite.json`. Messages with another
    /// content type are refused before `open` is called.
    fn content_type(&self) -> &str;

    /// The identity of the node: the sender of every message it seals.
    fn identity(&self) -> &Identity;

    /// Turns a packet into bytes.
    ///
    /// # Errors
    /// [`SealError`] when the audience cannot be reached in this format or the packet cannot be expressed.
    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError>;

    /// Turns bytes into a packet.
    ///
    /// # Errors
    /// [`OpenError`] when the bytes are refused; its kind names the step.
    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError>;

    /// How expensive `seal` or `open` is for a message of about this many bytes at this moment. Called before each of them, so it must
    /// be quick.
    fn cost(&self, _bytes: usize, _now: Timestamp) -> Cost {
        Cost::Long
    }

    /// What a serializer that verifies senders offers besides; none for formats without signatures. A node whose serializer has none
    /// logs a warning when it starts.
    fn verification(&self) -> Option<&dyn Verification> {
        None
    }
}

/// What a serializer that verifies senders offers besides sealing and opening. Only
/// [`SecureSerializer`](crate::security::SecureSerializer) implements it; a serializer that wraps one returns that one's.
pub trait Verification: sealed::Sealed + fmt::Debug + Send + Sync {
    /// The instance in its signed headers: the start of the process, in microseconds since the epoch. It is part of the name of the
    /// queue that answers arrive in.
    fn instance(&self) -> u64;

    /// Whether it learns the certificates of other nodes from their messages. Nodes then advertise themselves to each other when they
    /// start, and repeat it from time to time.
    fn learns_peers(&self) -> bool;

    /// Verifies what another process kept of a message ([`Verified::proof`]): the signer, as `open` does, without the age of the message and
    /// without the replay check. The caller bounds the age, and checks that the packet is of the kind that it expects.
    ///
    /// # Errors
    /// [`OpenError`] when the proof is refused; its kind names the step.
    fn verify_proof(&self, proof: &Arc<Proof>, now: Timestamp) -> Result<Inbound, OpenError>;

    /// Records that a message from [`InboundQueue::Offline`] has been carried out. Such a message may be held for long, and the broker
    /// delivers it again when a connection is lost meanwhile; so it counts as a replay only from here on, not from its opening.
    fn mark_completed(&self, message: &Verified, now: Timestamp);

    /// Whether [`mark_completed`](Verification::mark_completed) was called for this message: a copy that was opened before that must
    /// not be carried out.
    fn is_completed(&self, message: &Verified) -> bool;
}

/// Keeps [`Verification`] from being implemented outside the crate.
pub(crate) mod sealed {
    pub trait Sealed {}
}

impl<T: Serializer + ?Sized> Serializer for Arc<T> {
    fn content_type(&self) -> &str {
        (**self).content_type()
    }

    fn identity(&self) -> &Identity {
        (**self).identity()
    }

    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        (**self).seal(packet, request)
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        (**self).open(bytes, context)
    }

    fn cost(&self, bytes: usize, now: Timestamp) -> Cost {
        (**self).cost(bytes, now)
    }

    fn verification(&self) -> Option<&dyn Verification> {
        (**self).verification()
    }
}

/// What one call of a serializer costs; it decides on which thread the call runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cost {
    /// Microseconds: the call runs at once, one message after the other.
    Trivial,
    /// Usually less than 200 microseconds of CPU time, without blocking: the call runs on the runtime's threads where there are several,
    /// because handing it to another thread and back would take as long again.
    Short,
    /// Longer, or it may block: the call runs on a worker thread.
    Long,
}

/// The nodes that a message is for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Audience {
    /// One node.
    One(Identity),
    /// Several nodes, 1 to 64: they all receive the same bytes.
    Many(Vec<Identity>),
    /// Every mapper.
    Mappers,
    /// Every agent; only for packets without a secret ([`Packet::Advertise`]).
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

/// How long a message may be on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MessageClass {
    /// Seconds: refused by a process that started after the message was issued.
    #[default]
    Live,
    /// Days: it waits until it can be delivered. Only requests and pushes to the mappers.
    Stored,
}

/// How to seal a packet.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SealRequest<'a> {
    /// The nodes that it is for.
    pub audience: &'a Audience,
    /// The current time.
    pub now: Timestamp,
    /// How long it is valid, at most the largest lifetime of its class.
    pub lifetime: Duration,
    /// The class.
    pub class: MessageClass,
    /// The message it answers.
    pub in_reply_to: Option<MessageId>,
    /// The instances of the processes that it is for, as far as they are known: at most one for each identity of the audience, up to
    /// [`Audience::MAX`] mappers. Other processes of the same nodes refuse it; a process that has just started refuses a live message that
    /// does not name it.
    pub instances: &'a [u64],
}

impl<'a> SealRequest<'a> {
    /// A live message for `audience`, made `now`, valid for the default lifetime of 60 s.
    pub fn new(audience: &'a Audience, now: Timestamp) -> Self {
        Self {
            audience,
            now,
            lifetime: Duration::from_secs(60),
            class: MessageClass::Live,
            in_reply_to: None,
            instances: &[],
        }
    }
}

/// A sealed message.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// The id in its header.
    pub id: MessageId,
    /// The bytes on the wire.
    pub bytes: Vec<u8>,
    /// When it expires.
    pub expires_at: Timestamp,
}

/// Where and when a message arrived.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OpenContext {
    /// The kind of queue.
    pub queue: InboundQueue,
    /// The current time.
    pub now: Timestamp,
}

impl OpenContext {
    /// Bytes that arrived from `queue` at `now`.
    pub fn new(queue: InboundQueue, now: Timestamp) -> Self {
        Self { queue, now }
    }
}

/// An opened message.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inbound {
    /// The packet.
    pub packet: Packet,
    /// Whether its sender was verified.
    pub provenance: Provenance,
}

impl Inbound {
    /// A message whose sender was not verified: what your own serializer returns.
    pub fn unverified(packet: Packet) -> Self {
        Self { packet, provenance: Provenance::Unverified }
    }

    /// A message whose signer was verified. Only `security` calls this (a test checks it).
    pub(crate) fn verified(packet: Packet, verified: Verified) -> Self {
        Self { packet, provenance: Provenance::Verified(Box::new(verified)) }
    }

    /// The sender: the verified signer; for an unverified message the sender that it claims.
    pub fn sender(&self) -> Option<&Identity> {
        match &self.provenance {
            Provenance::Verified(verified) => Some(verified.signer()),
            Provenance::Unverified => self.packet.claimed_sender(),
        }
    }

    /// The verified signer, if there is one.
    pub fn signer(&self) -> Option<&Verified> {
        match &self.provenance {
            Provenance::Verified(verified) => Some(verified),
            Provenance::Unverified => None,
        }
    }
}

/// Whether the sender of a message was verified.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Provenance {
    /// Signature, certificate and freshness were checked.
    Verified(Box<Verified>),
    /// Nothing was checked.
    Unverified,
}

/// The verified sender of a message. Only `security` can make one.
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
    pub(crate) forwarded: Vec<Result<Forwarded, OpenError>>,
}

impl Verified {
    /// The identity in the signer's certificate.
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

    /// The sequence number of the message, which grows within the instance.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The id of the message.
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// When it was issued, by the sender's clock.
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

    /// A proof of the sender for third parties: of registrations, heartbeats, and the answers of agents to proxied requests.
    pub fn proof(&self) -> Option<&Arc<Proof>> {
        self.proof.as_ref()
    }
}

/// An agent's answer to a proxied request, with the agent's proof, which was verified.
#[derive(Clone, Debug)]
pub(crate) struct Forwarded {
    /// The agent.
    pub from: Identity,
    /// The outcome or intermediate result.
    pub packet: Packet,
    /// The proof, to be forwarded again.
    pub proof: Arc<Proof>,
}

/// Proves to a third party who signed a body. It can be verified without a private key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Proof {
    /// The salt of the commitment.
    pub salt: [u8; 32],
    /// The body, in the codec that the header names.
    pub body: Vec<u8>,
    /// The DER of the SignerInfo, whose signed attributes hold the header.
    pub signer_info: Vec<u8>,
    /// The DER of the signer's certificates, if the message carried them: leaf first.
    pub certificates: Vec<Vec<u8>>,
}

impl Proof {
    /// A proof from its parts, such as those that were read from a database.
    pub fn new(salt: [u8; 32], body: Vec<u8>, signer_info: Vec<u8>, certificates: Vec<Vec<u8>>) -> Self {
        Self { salt, body, signer_info, certificates }
    }
}
