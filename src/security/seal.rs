//! Sealing: encrypt for the recipients, then sign. The mirror of [`super::open`].

use std::sync::Arc;
use std::sync::atomic::Ordering;

use zeroize::Zeroizing;

use super::cms;
use super::context::Context;
use super::crypto::{self, Failed, Secret};
use super::envelope::{
    Header, PREFIX, commitment, max_instances, may_be_stored, may_carry_certificates, recipients_digest,
};
use crate::certs::{Certificate, Credentials, Recipient, Suite};
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, MessageId, Packet, RandomnessError, Role};
use crate::serializer::{Audience, MessageClass, SealError, SealRequest, Sealed};

/// The random values of one message.
pub(super) struct MessageRandomness {
    id: MessageId,
    nonce: [u8; cms::NONCE],
    ukm: [u8; 32],
    pub salt: [u8; 32],
    key: Secret,
}

impl MessageRandomness {
    pub fn generate() -> Result<Self, SealError> {
        let mut public = [0; 16 + cms::NONCE + 32];
        openssl::rand::rand_bytes(&mut public).map_err(|_| RandomnessError)?;
        let mut secret = Zeroizing::new([0; 64]);
        openssl::rand::rand_priv_bytes(&mut secret[..]).map_err(|_| RandomnessError)?;
        let (public, secret) = (&mut &public[..], &mut &secret[..]);
        Ok(Self {
            id: MessageId::from_bytes(take(public)?),
            nonce: take(public)?,
            ukm: take(public)?,
            salt: take(secret)?,
            key: Zeroizing::new(take(secret)?),
        })
    }
}

/// The next `N` bytes.
fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], RandomnessError> {
    let (first, rest) = bytes.split_first_chunk().ok_or(RandomnessError)?;
    *bytes = rest;
    Ok(*first)
}

impl From<Failed> for SealError {
    fn from(_: Failed) -> Self {
        SealError::Crypto("an operation failed".to_owned())
    }
}

/// The instances as a header has them.
fn instances(to: &Audience, instances: &[u64]) -> Result<Vec<u64>, SealError> {
    let mut instances = instances.to_vec();
    instances.sort_unstable();
    instances.dedup();
    if instances.len() > max_instances(to) {
        return Err(SealError::NotAllowed("for more processes than nodes"));
    }
    Ok(instances)
}

impl Context {
    /// Seals a packet.
    pub fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        self.agreements.expire(request.now);
        let kind = packet.kind();
        let to = self.audience(packet, request)?;
        let instances = instances(&to, request.instances)?;
        let own = self.credentials();
        let signing = own.signing(kind, request.now);
        let certificate = signing.certificate();
        if !certificate.is_valid_at(request.now) {
            let (from, to) = (certificate.not_before(), certificate.not_after());
            return Err(SealError::OwnCertificate(format!("it is valid from {from} to {to}")));
        }
        // An advertise is for nodes that are not known yet, and contains no secret.
        let encrypted = kind != Kind::Advertise && !self.seal_signed_only;
        let recipients = if encrypted { self.recipients(&to, request.now)? } else { Vec::new() };

        let codec = self.codecs.first().ok_or(SealError::NotAllowed("encoded without a codec"))?;
        let body = codec.encode(packet)?;
        let limit = kind.max_bytes();
        if body.len() > limit {
            return Err(SealError::TooLarge(body.len(), limit));
        }

        let random = MessageRandomness::generate()?;
        let expires_at = request.now.saturating_add(request.lifetime.min(self.lifetime(request.class)));
        let header = Header {
            kind,
            from: self.identity.clone(),
            instance: self.started_at.as_micros(),
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed).saturating_add(1),
            to,
            instances,
            id: random.id,
            issued_at: request.now,
            expires_at,
            class: request.class,
            in_reply_to: request.in_reply_to,
            codec: codec.name().to_owned(),
            recipients: recipients_digest(recipients.iter().map(|one| one.key_id().as_bytes())),
            commitment: commitment(&random.salt, &body),
        };
        let bytes = self.envelope(signing, &header, &random, &body, encrypted.then_some(&recipients[..]))?;
        if bytes.len() > limit {
            return Err(SealError::TooLarge(bytes.len(), limit));
        }
        self.sent_ids.note(random.id, request.now);
        Ok(Sealed { id: random.id, bytes, expires_at })
    }

    /// The nodes that the packet is for, if it is allowed.
    fn audience(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Audience, SealError> {
        let kind = packet.kind();
        if packet.claimed_sender().is_some_and(|sender| *sender != self.identity) {
            return Err(SealError::NotAllowed("sent in the name of another node"));
        }
        if request.class == MessageClass::Stored && !may_be_stored(kind, request.audience) {
            return Err(SealError::NotAllowed("stored: only requests and pushes to the mappers can"));
        }
        match request.audience {
            Audience::Agents if kind != Kind::Advertise => Err(SealError::NotAllowed("for all agents")),
            Audience::Many(identities) => {
                let mut different: Vec<Identity> = Vec::with_capacity(identities.len());
                for identity in identities {
                    if different.len() > Audience::MAX {
                        return Err(SealError::TooManyRecipients(identities.len()));
                    }
                    if !different.contains(identity) {
                        different.push(identity.clone());
                    }
                }
                match different.len() {
                    0 => Err(SealError::NoRecipient("an empty audience".to_owned())),
                    1 => {
                        different.pop().map(Audience::One).ok_or(SealError::NoRecipient("an empty audience".to_owned()))
                    }
                    2..=Audience::MAX => Ok(Audience::Many(different)),
                    count => Err(SealError::TooManyRecipients(count)),
                }
            }
            audience => Ok(audience.clone()),
        }
    }

    /// The certificates to encrypt to: each key once.
    fn recipients(&self, to: &Audience, now: Timestamp) -> Result<Vec<Arc<Certificate>>, SealError> {
        let mut found = match to {
            Audience::One(identity) => self.peers.recipients(Recipient::One(identity), now)?,
            Audience::Many(identities) => {
                let mut all = Vec::with_capacity(identities.len());
                for identity in identities {
                    all.extend(self.peers.recipients(Recipient::One(identity), now)?);
                }
                all
            }
            Audience::Mappers => {
                let mut all = self.peers.recipients(Recipient::Mappers, now);
                if self.identity.role() == Role::Mapper {
                    // A mapper is one of the recipients even if its store does not know it.
                    let own = self.credentials().newest().clone();
                    match &mut all {
                        Ok(all) => all.push(own),
                        Err(SealError::NoRecipient(_)) => all = Ok(vec![own]),
                        Err(_) => {}
                    }
                }
                all?
            }
            Audience::Agents => return Err(SealError::NotAllowed("encrypted for all agents")),
        };
        if found.len() > 1 {
            found.sort_unstable_by(|a, b| a.key_id().cmp(b.key_id()));
            found.dedup_by(|a, b| a.key_id() == b.key_id());
        }
        if found.len() > cms::MAX_RECIPIENTS {
            return Err(SealError::TooManyRecipients(found.len()));
        }
        Ok(found)
    }

    /// Encrypts for these recipients, if there are any, signs, and assembles the message.
    pub fn envelope(
        &self,
        signing: &Credentials,
        header: &Header,
        random: &MessageRandomness,
        body: &[u8],
        recipients: Option<&[Arc<Certificate>]>,
    ) -> Result<Vec<u8>, SealError> {
        let malformed = |_| SealError::Crypto("the message cannot be encoded".to_owned());
        let header_der = header.to_der().map_err(malformed)?;
        let header_digest = crypto::sha256(&[&header_der]);
        let parts: [&[u8]; 3] = [&random.salt, &header_digest, body];
        let content = match recipients {
            None => parts.concat(),
            Some(recipients) => {
                let infos = self.recipient_infos(recipients, random, header.issued_at)?;
                cms::enveloped::<Failed>(infos, &random.nonce, PREFIX + body.len(), |out| {
                    self.crypto.encrypt(&random.key, &random.nonce, &parts, out)
                })?
            }
        };
        let encrypted = recipients.is_some();
        let attributes = cms::signed_attributes_for(encrypted, &crypto::sha256(&[&content]), &header_der);
        let attributes = attributes.map_err(malformed)?;
        let signed = crypto::sha256(&[&cms::attributes_header(&attributes).map_err(malformed)?, &attributes]);
        let certificate = signing.certificate();
        let signature = crypto::sign(signing.key().pkey(), certificate.suite(), &signed)?;
        let mut certificates: Vec<&[u8]> = Vec::new();
        if may_carry_certificates(header.kind, header.class) {
            certificates.push(certificate.der());
            certificates.extend(signing.intermediates().iter().map(Vec::as_slice).take(cms::MAX_CERTIFICATES - 1));
        }
        let key_id = certificate.key_id().as_bytes();
        cms::signed_data(encrypted, &content, &certificates, key_id, &attributes, certificate.suite(), &signature)
            .map_err(malformed)
    }

    fn recipient_infos(
        &self,
        recipients: &[Arc<Certificate>],
        random: &MessageRandomness,
        now: Timestamp,
    ) -> Result<Vec<Vec<u8>>, Failed> {
        let mut infos = Vec::with_capacity(recipients.len());
        let mut ephemeral = None;
        for recipient in recipients {
            let key_id = recipient.key_id().as_bytes();
            infos.push(match recipient.suite() {
                Suite::P256 => {
                    if ephemeral.is_none() {
                        ephemeral = Some(self.agreements.ephemeral(&self.crypto, now)?);
                    }
                    let ephemeral = ephemeral.as_ref().ok_or(Failed)?;
                    let shared = ephemeral.shared(&self.crypto, recipient)?;
                    let kek = crypto::key_encryption_key(&shared, Some(&random.ukm))?;
                    cms::agreement(key_id, ephemeral.point(), &random.ukm, &self.crypto.wrap(&kek, &random.key)?)?
                }
                Suite::Rsa => cms::transport(key_id, &crypto::transport(recipient.public_key(), &random.key)?)?,
            });
        }
        Ok(infos)
    }
}
