//! Access for the fuzz targets in `fuzz/`, behind the feature `fuzzing`. Not part of the public API.

use std::sync::Arc;
use std::time::Duration;

use super::cms::{self, Content};
use super::envelope::{commitment, recipients_digest};
use super::replay::ReplayMemory;
use super::seal::MessageRandomness;
use super::{Header, ReplayLimits, SecureSerializer};
use crate::certs::Certificate;
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, MessageId};

/// The replay memory.
pub struct Replay(ReplayMemory);

impl Replay {
    /// Empty.
    pub fn new(limits: ReplayLimits, skew: Duration) -> Self {
        Self(ReplayMemory::new(limits, skew))
    }

    /// Records a message; whether it is new.
    pub fn admit(&self, from: &Identity, id: MessageId, expires_at: Timestamp, now: Timestamp) -> bool {
        self.0.admit(from, id, expires_at, now).is_ok()
    }

    /// Whether a message is new.
    pub fn check(&self, from: &Identity, id: MessageId, expires_at: Timestamp, now: Timestamp) -> bool {
        self.0.check(from, id, expires_at, now).is_ok()
    }

    /// Records a place in its sender's order, of a certificate that is valid from this time; whether it is new.
    pub fn advance(
        &self,
        from: &Identity,
        certificate: Timestamp,
        place: (u64, u64),
        lifetime: Duration,
        now: Timestamp,
    ) -> bool {
        self.0.advance(from, certificate, place, lifetime, now).is_ok()
    }

    /// How many messages are remembered.
    pub fn remembered(&self) -> usize {
        self.0.len()
    }
}

/// The structure of a supported message.
#[derive(Debug)]
pub struct Shape {
    /// The signed content.
    pub content: Vec<u8>,
    /// How many recipients there are; none when it is not encrypted.
    pub recipients: Option<usize>,
    /// The certificates.
    pub certificates: Vec<Vec<u8>>,
    /// The key id of the signer.
    pub key_id: Vec<u8>,
    /// The digest in the signed attributes.
    pub digest: Vec<u8>,
    /// The signature.
    pub signature: Vec<u8>,
}

/// Parses the structure of a message.
pub fn shape(bytes: &[u8]) -> Option<Shape> {
    let message = cms::read(bytes).ok().filter(|message| message.unsupported.is_none())?;
    let recipients = match message.content.as_ref()? {
        Content::Encrypted(enveloped) => Some(enveloped.recipients.len()),
        Content::Plain(_) => None,
    };
    Some(Shape {
        content: message.content_octets.to_vec(),
        recipients,
        certificates: message.certificates.iter().map(|der| der.to_vec()).collect(),
        key_id: message.key_id.to_vec(),
        digest: message.digest.to_vec(),
        signature: message.signature.to_vec(),
    })
}

/// Reads a header.
pub fn header(der: &[u8]) -> Option<Header> {
    Header::from_der(der).ok()
}

/// Writes a header.
pub fn header_der(header: &Header) -> Option<Vec<u8>> {
    header.to_der().ok()
}

/// A message that a node with a valid certificate can send: any header and any body, signed by `signer`, and encrypted for these
/// recipients if there are any. With `honest`, the header matches recipients and body.
pub fn seal(
    signer: &SecureSerializer,
    mut header: Header,
    body: &[u8],
    recipients: Option<&[Arc<Certificate>]>,
    honest: bool,
) -> Option<Vec<u8>> {
    let drawn = MessageRandomness::generate().ok()?;
    if honest {
        header.recipients = recipients_digest(recipients.into_iter().flatten().map(|one| one.key_id().as_bytes()));
        header.commitment = commitment(&drawn.salt, body);
    }
    let own = signer.context.credentials();
    signer.context.envelope(own.signing(Kind::Ping, header.issued_at), &header, &drawn, body, recipients).ok()
}
