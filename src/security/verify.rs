//! Checks that do not open a message: verifying the proof of a registration, a heartbeat or an agent's answer, and inspecting a message
//! without a key.
//!
//! A proof is the signature over the header, and the salt and body of the header's commitment; with it another process can verify the
//! sender. Verifying it needs no private key. The ciphertext is not part of it: the signed header commits to the body.

use std::sync::Arc;

use super::cms::{self, Content, Recipient, SignerInfo};
use super::context::Context;
use super::envelope::{Header, HeaderFault, MAX_CLOCK_SKEW, commitment};
use super::open::{check_instance, check_signature_over, parse, verified};
use crate::certs::{Certificate, KeyId, Suite};
use crate::clock::Timestamp;
use crate::packet::{ForwardedProof, Kind, Packet, Role};
use crate::serializer::{Audience, Forwarded, Inbound, InboundQueue, MessageClass, OpenError, OpenErrorKind, Proof};

impl Context {
    /// Verifies a proof: the steps of opening, except those about its delivery.
    pub fn verify_proof(&self, proof: &Arc<Proof>, now: Timestamp) -> Result<Inbound, OpenError> {
        let too_large = |length: usize, limit: usize| {
            let why = format!("{length} bytes, at most {limit} are accepted");
            Err(OpenError::new(OpenErrorKind::TooLarge, why))
        };
        let certificates: usize = proof.certificates.iter().map(Vec::len).sum();
        let (around, limit) = (certificates + proof.signer_info.len(), Kind::Register.max_bytes());
        if around > limit {
            return too_large(around, limit);
        }
        let (signer_info, header) = self.parse_proof(proof)?;
        let (length, limit) = (around + proof.body.len(), header.kind.max_bytes().max(limit));
        if length > limit {
            return too_large(length, limit);
        }
        let verified = self.verify_parsed(proof, &signer_info, &header, now);
        verified.map_err(|error| error.claimed_by(&header.from))
    }

    fn parse_proof<'a>(&self, proof: &'a Proof) -> Result<(SignerInfo<'a>, Header), OpenError> {
        let malformed = |why: &'static str| OpenError::new(OpenErrorKind::Malformed, why);
        let unsupported = |why: &'static str| OpenError::new(OpenErrorKind::Unsupported, why);
        let mut read = cms::read_signer_info(&proof.signer_info, true);
        if read.is_err() && self.accept_signed_only {
            read = cms::read_signer_info(&proof.signer_info, false);
        }
        let signer_info = read.map_err(|_| malformed("it does not have the structure of a proof"))?;
        if let Some(why) = signer_info.unsupported {
            return Err(unsupported(why));
        }
        let header = Header::from_der(signer_info.header).map_err(|fault| match fault {
            HeaderFault::Malformed(why) => malformed(why),
            HeaderFault::Unsupported(why) => unsupported(why),
        })?;
        let may_carry = match header.kind {
            Kind::Register | Kind::Outcome | Kind::Intermediate => true,
            Kind::Ping => false,
            _ => return Err(unsupported("a kind without proofs")),
        };
        let carried = proof.certificates.len();
        if carried > cms::MAX_CERTIFICATES || (carried > 0 && !may_carry) {
            return Err(malformed("more certificates than this kind carries"));
        }
        Ok((signer_info, header))
    }

    fn verify_parsed(
        &self,
        proof: &Arc<Proof>,
        signer_info: &SignerInfo<'_>,
        header: &Header,
        now: Timestamp,
    ) -> Result<Inbound, OpenError> {
        let is_answer = matches!(header.kind, Kind::Outcome | Kind::Intermediate);
        if is_answer {
            let is_to_mapper = matches!(&header.to, Audience::One(to) if to.role() == Role::Mapper);
            if !is_to_mapper || header.from.role() != Role::Agent {
                return Err(OpenError::new(OpenErrorKind::WrongDestination, "it is not an agent's answer to a mapper"));
            }
        } else if header.to != Audience::Mappers || !header.is_for(&self.identity) {
            return Err(OpenError::new(OpenErrorKind::WrongDestination, "it is not for the mappers"));
        }
        self.check_age(header, now)?;
        let key_id = KeyId::new(signer_info.key_id)
            .ok_or_else(|| OpenError::new(OpenErrorKind::Malformed, "the key id has no length"))?;
        let certificates: Vec<&[u8]> = proof.certificates.iter().map(Vec::as_slice).collect();
        let presented = self
            .peers
            .present(&certificates, &key_id)
            .map_err(|error| OpenError::new(OpenErrorKind::BadCertificate, error.to_string()))?;
        let signer = self.find_signer(header, &key_id, presented.as_ref(), now)?;
        self.check_certificate(&signer, header, presented.as_ref(), now)?;
        if signer_info.suite != Some(signer.suite()) {
            let why = "the suite is not that of the signer's certificate";
            return Err(OpenError::new(OpenErrorKind::BadSignature, why));
        }
        check_signature_over(signer_info.attributes, signer_info.signature, &signer)?;
        self.check_authority(header, if is_answer { InboundQueue::MapperInbox } else { InboundQueue::Presence })?;
        if let Some(presented) = presented.filter(|presented| presented.leaf.fingerprint() == signer.fingerprint()) {
            self.peers.learn(presented, now);
        }
        if commitment(&proof.salt, &proof.body) != header.commitment {
            return Err(OpenError::new(OpenErrorKind::CannotOpen, "the body is not what was signed"));
        }
        let packet = self.decode(header, &proof.body)?;
        Ok(Inbound::verified(packet, verified(&signer, header, Some(proof.clone()))))
    }

    /// Verifies the answers of agents that a mapper forwards.
    pub(super) fn verify_forwarded(
        &self,
        packet: &Packet,
        signer: &Certificate,
        now: Timestamp,
    ) -> Vec<Result<Forwarded, OpenError>> {
        let (kind, proofs) = match packet {
            Packet::Outcome(outcome) => (Kind::Outcome, outcome.proofs.as_slice()),
            Packet::Intermediate(part) => {
                (Kind::Intermediate, part.proof.as_deref().map(std::slice::from_ref).unwrap_or_default())
            }
            _ => return Vec::new(),
        };
        if signer.identity().role() != Role::Mapper {
            return Vec::new();
        }
        let verify = |forwarded: &ForwardedProof| {
            let malformed = |why: &'static str| OpenError::new(OpenErrorKind::Malformed, why);
            let proof = Proof {
                salt: (*forwarded.salt.0).try_into().map_err(|_| malformed("the salt is not 32 bytes long"))?,
                body: forwarded.body.0.clone(),
                signer_info: forwarded.signer_info.0.clone(),
                certificates: forwarded.certificates.iter().map(|certificate| certificate.0.clone()).collect(),
            };
            let proof = Arc::new(proof);
            let inbound = self.verify_proof(&proof, now)?;
            match inbound.sender() {
                Some(from) if inbound.packet.kind() == kind => {
                    Ok(Forwarded { from: from.clone(), packet: inbound.packet, proof })
                }
                _ => Err(malformed("a proof of another kind than the message that it is in")),
            }
        };
        proofs.iter().map(verify).collect()
    }

    /// Freshness of a proof: it may be old, but must have been fresh once. Its expiry is verified, so that the caller can bound its age.
    fn check_age(&self, header: &Header, now: Timestamp) -> Result<(), OpenError> {
        let refuse = |why: &'static str| Err(OpenError::new(OpenErrorKind::NotFresh, why));
        if header.issued_at > now.saturating_add(MAX_CLOCK_SKEW) {
            return refuse("it was issued in the future");
        }
        if header.expires_at < header.issued_at
            || header.expires_at.since(header.issued_at) > self.lifetime(MessageClass::Live)
        {
            return refuse("it was valid for longer than its class may be");
        }
        check_instance(header)
    }
}

/// The contents of a message that can be read without a key. **Nothing is verified.**
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// Its length in bytes.
    pub bytes: usize,
    /// Its header.
    pub header: Header,
    /// The key id of the certificate that it names as the signer's.
    pub signer: KeyId,
    /// The suite of its signature.
    pub suite: Suite,
    /// The recipients; empty when it is not encrypted.
    pub recipients: Vec<(KeyId, Suite)>,
    /// The DER of the certificates in it.
    pub certificates: Vec<Vec<u8>>,
}

/// Parses a message without a key, a store or a queue: the first three steps of opening.
///
/// # Errors
/// [`OpenError`] of the kind `TooLarge`, `Malformed` or `Unsupported`.
pub fn inspect(bytes: &[u8]) -> Result<Inspection, OpenError> {
    let limit = Kind::ALL.into_iter().map(Kind::max_bytes).max().unwrap_or(0);
    let (message, header) = parse(bytes, limit)?;
    let malformed = || OpenError::new(OpenErrorKind::Malformed, "it does not have the structure of a secure message");
    let key_id = |bytes: &[u8]| KeyId::new(bytes).ok_or_else(malformed);
    let recipients = match &message.content {
        Some(Content::Encrypted(enveloped)) => enveloped.recipients.as_slice(),
        _ => &[],
    };
    let suite_of = |recipient: &Recipient<'_>| match recipient {
        Recipient::Agreement(_) => Suite::P256,
        Recipient::Transport(_) => Suite::Rsa,
    };
    Ok(Inspection {
        bytes: bytes.len(),
        signer: key_id(message.key_id)?,
        suite: message.suite.ok_or_else(malformed)?,
        recipients: recipients
            .iter()
            .map(|recipient| Ok((key_id(recipient.key_id())?, suite_of(recipient))))
            .collect::<Result<_, OpenError>>()?,
        certificates: message.certificates.iter().map(|der| der.to_vec()).collect(),
        header,
    })
}
