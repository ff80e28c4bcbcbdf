//! Opening: twelve steps in this order; the first failure ends it. Each step is one method.

use std::sync::Arc;

use super::cms::{self, Content, Message};
use super::context::{Context, Presented};
use super::crypto::{self, Failed, Secret};
use super::envelope::{
    Addressee, Header, HeaderFault, MAX_CLOCK_SKEW, PREFIX, commitment, may_carry_certificates, recipients_digest,
};
use crate::certs::{Certificate, Credentials, KeyId};
use crate::clock::Timestamp;
use crate::packet::{Kind, Packet};
use crate::serializer::{
    Inbound, InboundQueue, MessageClass, NotAddressed, OpenContext, OpenError, OpenErrorKind, Proof, SupersededProcess,
    Verified,
};

/// Parses the structure and the header of a message (steps 1 to 3), for any queue.
pub(super) fn parse(bytes: &[u8], limit: usize) -> Result<(Message<'_>, Header), OpenError> {
    if bytes.len() > limit {
        return Err(too_large(bytes.len(), limit));
    }
    let malformed = |why: &'static str| OpenError::new(OpenErrorKind::Malformed, why);
    let unsupported = |why: &'static str| OpenError::new(OpenErrorKind::Unsupported, why);
    let message = cms::read(bytes).map_err(|_| malformed("it does not have the structure of a secure message"))?;
    let header = match (Header::from_der(message.header), message.unsupported) {
        (Ok(header), _) => header,
        (Err(_), Some(why)) if message.header.is_empty() => return Err(unsupported(why)),
        (Err(HeaderFault::Malformed(why)), _) => return Err(malformed(why)),
        (Err(HeaderFault::Unsupported(why)), other) => return Err(unsupported(other.unwrap_or(why))),
    };
    let about = |error: OpenError| error.claimed_by(&header.from);
    if bytes.len() > header.kind.max_bytes() {
        return Err(about(too_large(bytes.len(), header.kind.max_bytes())));
    }
    if !message.certificates.is_empty() && !may_carry_certificates(header.kind, header.class) {
        return Err(about(malformed("certificates in a kind of message that carries none")));
    }
    if let Some(why) = message.unsupported {
        return Err(about(unsupported(why)));
    }
    Ok((message, header))
}

fn too_large(length: usize, limit: usize) -> OpenError {
    OpenError::new(OpenErrorKind::TooLarge, format!("{length} bytes, at most {limit} are accepted"))
}

impl Context {
    /// Opens a message.
    pub fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        self.agreements.expire(context.now);
        let (message, header) = parse(bytes, context.queue.max_bytes())?;
        self.open_parsed(&message, &header, context).map_err(|error| error.claimed_by(&header.from))
    }

    fn open_parsed(&self, message: &Message<'_>, header: &Header, context: &OpenContext) -> Result<Inbound, OpenError> {
        self.check_protection(message, header)?;
        self.check_destination(header, context.queue)?;
        self.check_freshness(header, context.now)?;
        let key_id = KeyId::new(message.key_id)
            .ok_or_else(|| OpenError::new(OpenErrorKind::Malformed, "the key id has no length"))?;
        let presented = self.peers.present(&message.certificates, &key_id);
        let presented = presented.map_err(|error| OpenError::new(OpenErrorKind::BadCertificate, error.to_string()));
        let signer =
            self.find_signer(header, &key_id, presented.as_ref().ok().and_then(Option::as_ref), context.now)?;
        let presented = presented?;
        self.check_certificate(&signer, header, presented.as_ref(), context.now)?;
        check_signature(message, &signer)?;
        self.check_own_key(message, header, context.queue)?;
        self.check_addressee(header, context.queue)?;
        self.check_replay(header, &signer, context)?;
        self.check_authority(header, context.queue)?;
        match presented.filter(|presented| presented.leaf.fingerprint() == signer.fingerprint()) {
            Some(presented) => self.peers.learn(presented, context.now),
            None => self.peers.heard(&signer, context.now),
        }
        let plaintext = self.decrypt(message, header, context.now).map_err(|Failed| {
            OpenError::new(OpenErrorKind::CannotOpen, "it cannot be decrypted, or does not match what was signed")
        })?;
        let Some((salt, body)) = split_plaintext(&plaintext) else {
            return Err(OpenError::new(OpenErrorKind::CannotOpen, "it is too short"));
        };
        let packet = self.decode(header, body)?;
        let proof = has_proof(&packet).then(|| {
            let certificates = match header.kind {
                // The message carries none, and the node that verifies the proof may not know the agent.
                Kind::Outcome | Kind::Intermediate => self.peers.with_chain(&signer),
                _ => leaf_first(&message.certificates, &signer),
            };
            let (body, signer_info) = (body.to_vec(), message.signer_info.to_vec());
            Arc::new(Proof { salt: *salt, body, signer_info, certificates })
        });
        let forwarded = self.verify_forwarded(&packet, &signer, context.now);
        Ok(Inbound::verified(packet, Verified { forwarded, ..verified(&signer, header, proof) }))
    }

    /// End of step 3: an advertise is not encrypted, everything else is, unless this node accepts signed-only messages.
    fn check_protection(&self, message: &Message<'_>, header: &Header) -> Result<(), OpenError> {
        let why = match (&message.content, header.kind) {
            (Some(Content::Plain(_)), Kind::Advertise) => return Ok(()),
            (Some(Content::Encrypted(_)), Kind::Advertise) => "an advertise that is encrypted",
            (Some(Content::Encrypted(_)), _) => return Ok(()),
            (Some(Content::Plain(_)), _) if self.accept_signed_only => return Ok(()),
            (Some(Content::Plain(_)), _) => "it is not encrypted",
            (None, _) => "another kind of content",
        };
        Err(OpenError::new(OpenErrorKind::Unsupported, why))
    }

    /// Step 4.
    fn check_destination(&self, header: &Header, channel: InboundQueue) -> Result<(), OpenError> {
        let refuse = |why: &'static str| Err(OpenError::new(OpenErrorKind::WrongDestination, why));
        if !header.is_for(&self.identity) {
            return refuse("it is for another node");
        }
        if channel.reader() != self.identity.role() || !channel.accepts(header.kind) {
            return refuse("it is in the wrong queue");
        }
        match (channel, header.class) {
            (InboundQueue::Offline, MessageClass::Live) => refuse("only stored messages wait in this queue"),
            // In another queue it would be carried out twice.
            (_, MessageClass::Stored) if channel != InboundQueue::Offline => {
                refuse("a stored message in another queue than the offline queue")
            }
            _ => Ok(()),
        }
    }

    /// Step 5.
    fn check_freshness(&self, header: &Header, now: Timestamp) -> Result<(), OpenError> {
        let refuse = |why: &'static str| Err(OpenError::new(OpenErrorKind::NotFresh, why));
        if header.issued_at > now.saturating_add(MAX_CLOCK_SKEW) {
            return refuse("it was issued in the future");
        }
        if header.expires_at < now {
            return refuse("it has expired");
        }
        if header.expires_at < header.issued_at {
            return refuse("it expires before it was issued");
        }
        if header.expires_at.since(header.issued_at) > self.lifetime(header.class) {
            return refuse("it is valid for longer than its class may be");
        }
        check_instance(header)?;
        if header.class == MessageClass::Live
            && header.issued_at < self.started_at
            && header.addressee(self.started_at.as_micros()) != Addressee::ThisProcess
            && !self.answers_this_process(header)
        {
            return refuse("it was issued before this process started");
        }
        Ok(())
    }

    /// Whether it answers a message of this process.
    fn answers_this_process(&self, header: &Header) -> bool {
        header.in_reply_to.is_some_and(|id| self.sent_ids.knows(id))
    }

    /// After the signature (step 8), and the check of the own key: the message is for this process, and not for an earlier or another one
    /// of this node.
    ///
    /// The replay memory is empty at the start. The sender's clock may be ahead, so a message that an earlier process opened can have been
    /// issued up to the skew after this process started. It is accepted only if it names this process, answers it, or is of a kind that is
    /// harmless when it is repeated once: it leads to a question, or ends what has ended.
    fn check_addressee(&self, header: &Header, queue: InboundQueue) -> Result<(), OpenError> {
        let own = self.started_at.as_micros();
        let addressee = header.addressee(own);
        if header.class == MessageClass::Stored || addressee == Addressee::ThisProcess {
            return Ok(());
        }
        if addressee == Addressee::AnotherProcess {
            // No process can be older and still take it: the newest one wins.
            let newer = header.instances.iter().any(|instance| *instance > own);
            self.check_authority(header, queue)?;
            let error = OpenError::new(OpenErrorKind::WrongDestination, "it is for another process of this node");
            return Err(if newer { error.for_others() } else { error });
        }
        let may_repeat = matches!(header.kind, Kind::Ping | Kind::Unregister | Kind::Advertise);
        let settled = header.issued_at >= self.started_at.saturating_add(MAX_CLOCK_SKEW);
        if may_repeat || settled || self.answers_this_process(header) {
            return Ok(());
        }
        self.check_authority(header, queue)?;
        let not_addressed = NotAddressed { kind: header.kind, instance: header.instance, id: header.id };
        let why = "it does not name this process, and may be from before its start";
        Err(OpenError { not_addressed: Some(not_addressed), ..OpenError::new(OpenErrorKind::NotFresh, why) })
    }

    /// Step 6.
    pub(super) fn find_signer(
        &self,
        header: &Header,
        key_id: &KeyId,
        presented: Option<&Presented>,
        now: Timestamp,
    ) -> Result<Arc<Certificate>, OpenError> {
        match self.peers.signer(&header.from, key_id, presented, now) {
            Ok(Some(certificate)) => Ok(certificate),
            Ok(None) => Err(OpenError::new(
                OpenErrorKind::UnknownSigner,
                format!("no certificate of {} with the key id {key_id}", header.from),
            )),
            Err(error) => {
                Err(OpenError::new(OpenErrorKind::UnknownSigner, format!("the certificate store failed: {error}")))
            }
        }
    }

    /// Step 7. A [`Certificate`] has exactly one identity URI by construction.
    pub(super) fn check_certificate(
        &self,
        signer: &Certificate,
        header: &Header,
        presented: Option<&Presented>,
        now: Timestamp,
    ) -> Result<(), OpenError> {
        let refuse = |why: String| Err(OpenError::new(OpenErrorKind::BadCertificate, why));
        let others = presented.map_or(&[][..], |presented| &presented.others);
        // The certificate in the message is not signed: if the store returned another one, both must be good.
        let other_leaf = presented.map(|presented| &*presented.leaf);
        let other_leaf = other_leaf.filter(|leaf| leaf.fingerprint() != signer.fingerprint());
        for certificate in std::iter::once(signer).chain(other_leaf) {
            if *certificate.identity() != header.from {
                return refuse(format!("it is of {}", certificate.identity()));
            }
            self.peers.verify(certificate, others, now).or_else(|error| refuse(error.to_string()))?;
        }
        Ok(())
    }

    /// Part of step 11, before the message is remembered: a message in a queue that mappers share may be encrypted for other mappers
    /// only. It is then requeued, so its sender must be authorized.
    fn check_own_key(&self, message: &Message<'_>, header: &Header, channel: InboundQueue) -> Result<(), OpenError> {
        let (Some(Content::Encrypted(enveloped)), true) = (&message.content, channel.is_shared()) else {
            return Ok(());
        };
        let own = self.credentials();
        let is_own = |recipient: &cms::Recipient<'_>| {
            own.all().any(|credentials| credentials.certificate().key_id().as_bytes() == recipient.key_id())
        };
        if enveloped.recipients.iter().any(is_own) {
            return Ok(());
        }
        self.check_authority(header, channel)?;
        Err(OpenError::new(OpenErrorKind::CannotOpen, "it is encrypted for other mappers").for_others())
    }

    /// Step 9.
    fn check_replay(&self, header: &Header, signer: &Certificate, context: &OpenContext) -> Result<(), OpenError> {
        let (now, certificate) = (context.now, signer.not_before());
        let admitted = match (header.kind, context.queue) {
            (Kind::Register | Kind::Unregister | Kind::Ping, _) => {
                let place = (header.instance, header.sequence);
                self.replay.advance(&header.from, certificate, place, self.lifetime(header.class), now)
            }
            // Recorded when it has been carried out: until then it may be redelivered.
            (_, InboundQueue::Offline) => self.replay.check(&header.from, header.id, header.expires_at, now),
            _ => self.replay.admit(&header.from, header.id, header.expires_at, now),
        };
        admitted.map_err(|why| {
            let latest = match header.kind {
                Kind::Register | Kind::Ping => self.replay.later_than(&header.from, certificate, header.instance),
                _ => None,
            };
            let superseded = latest.map(|latest| SupersededProcess { instance: header.instance, latest });
            OpenError { superseded, ..OpenError::new(OpenErrorKind::Replayed, why) }
        })
    }

    /// Step 10.
    pub(super) fn check_authority(&self, header: &Header, channel: InboundQueue) -> Result<(), OpenError> {
        let refuse = |why: &'static str| Err(OpenError::new(OpenErrorKind::NotAuthorized, why));
        if !channel.permits(header.from.role(), header.kind) {
            return refuse("the sender's role may not send this");
        }
        if self.authorize.as_ref().is_some_and(|may| !may(&header.from, header.kind, channel)) {
            return refuse("this node does not authorize the sender to send this");
        }
        Ok(())
    }

    /// Step 11. Every failure is the same error.
    fn decrypt(&self, message: &Message<'_>, header: &Header, now: Timestamp) -> Result<Vec<u8>, Failed> {
        let (plaintext, recipients) = match message.content.as_ref().ok_or(Failed)? {
            Content::Plain(plaintext) => (plaintext.to_vec(), recipients_digest([])),
            Content::Encrypted(enveloped) => {
                let opened = self.content_key(enveloped)?;
                let plaintext =
                    self.crypto.decrypt(&opened.key, enveloped.nonce, enveloped.ciphertext, enveloped.tag)?;
                if let Some((point, index, shared)) = opened.agreed {
                    self.agreements.remember(point, &index, shared, now);
                }
                (plaintext, recipients_digest(enveloped.recipients.iter().map(cms::Recipient::key_id)))
            }
        };
        let (prefix, body) = plaintext.split_first_chunk::<PREFIX>().ok_or(Failed)?;
        let (salt, header_digest) = prefix.split_first_chunk::<32>().ok_or(Failed)?;
        let same = recipients == header.recipients
            && *header_digest == crypto::sha256(&[message.header])
            && commitment(salt, body) == header.commitment;
        if same { Ok(plaintext) } else { Err(Failed) }
    }

    /// The content encryption key, with the own key that a recipient names.
    fn content_key<'a>(&self, enveloped: &cms::Enveloped<'a>) -> Result<OpenedKey<'a>, Failed> {
        let own = self.credentials();
        for credentials in own.all() {
            let key_id = credentials.certificate().key_id().as_bytes();
            if let Some(recipient) = enveloped.recipients.iter().find(|recipient| recipient.key_id() == key_id) {
                return self.content_key_by(recipient, credentials);
            }
        }
        Err(Failed)
    }

    fn content_key_by<'a>(
        &self,
        recipient: &cms::Recipient<'a>,
        credentials: &Credentials,
    ) -> Result<OpenedKey<'a>, Failed> {
        let (own, index) = (credentials.key(), credentials.certificate().fingerprint());
        match (recipient, own.suite()) {
            (cms::Recipient::Agreement(agreement), crate::certs::Suite::P256) => {
                let cached = self.agreements.recall(agreement.point, index);
                let new = cached.is_none();
                let shared = match cached {
                    Some(shared) => shared,
                    None => self.agreements.agree(&self.crypto, agreement.point, own)?,
                };
                let kek = crypto::key_encryption_key(&shared, agreement.ukm)?;
                let key = self.crypto.unwrap(&kek, agreement.wrapped)?;
                Ok(OpenedKey { key, agreed: new.then_some((agreement.point, *index, shared)) })
            }
            (cms::Recipient::Transport(transport), crate::certs::Suite::Rsa) => {
                Ok(OpenedKey { key: crypto::receive(own.pkey(), transport.encrypted)?, agreed: None })
            }
            _ => Err(Failed),
        }
    }

    /// Step 12.
    pub(super) fn decode(&self, header: &Header, body: &[u8]) -> Result<Packet, OpenError> {
        let refuse = |why: String| Err(OpenError::new(OpenErrorKind::BadBody, why));
        let Some(codec) = self.codecs.iter().find(|codec| codec.name() == header.codec) else {
            return refuse(format!("the codec {} is not accepted", header.codec));
        };
        let packet = codec.decode(body).or_else(|error| refuse(error.to_string()))?;
        if packet.kind() != header.kind {
            return refuse("the body is of another kind than the header says".to_owned());
        }
        if packet.claimed_sender().is_some_and(|sender| *sender != header.from) {
            return refuse("the body names another sender than the header".to_owned());
        }
        let instance = match &packet {
            Packet::Register(register) => register.instance,
            Packet::Ping(ping) => ping.instance,
            _ => None,
        };
        if instance.is_some_and(|instance| instance != header.instance) {
            return refuse("the body names another instance than the header".to_owned());
        }
        if let Packet::Register(register) = &packet
            && !register.within_limits()
        {
            return refuse("more services or tags than an agent may have".to_owned());
        }
        Ok(packet)
    }
}

/// Part of step 5, also for proofs: a process cannot have started after it issued a message. Otherwise one message could claim the largest
/// instance, and every later process of that node would seem older.
pub(super) fn check_instance(header: &Header) -> Result<(), OpenError> {
    if header.instance > header.issued_at.saturating_add(MAX_CLOCK_SKEW).as_micros() {
        return Err(OpenError::new(OpenErrorKind::NotFresh, "its sender started after it was issued"));
    }
    Ok(())
}

/// A content encryption key, and the shared secret behind it if it is to be cached.
struct OpenedKey<'a> {
    key: Secret,
    agreed: Option<(&'a [u8; cms::POINT], [u8; 32], Arc<Secret>)>,
}

/// Step 8: the signature is the signer's, in the suite of its certificate, over these attributes and this content.
fn check_signature(message: &Message<'_>, signer: &Certificate) -> Result<(), OpenError> {
    let refuse = |why: &'static str| OpenError::new(OpenErrorKind::BadSignature, why);
    if message.suite != Some(signer.suite()) {
        return Err(refuse("the suite is not that of the signer's certificate"));
    }
    if message.digest != crypto::sha256(&[message.content_octets]) {
        return Err(refuse("the digest is of another content"));
    }
    check_signature_over(message.attributes, message.signature, signer)
}

/// Whether the signature is the signer's over these attributes.
pub(super) fn check_signature_over(attributes: &[u8], signature: &[u8], signer: &Certificate) -> Result<(), OpenError> {
    let refuse = |why: &'static str| OpenError::new(OpenErrorKind::BadSignature, why);
    let header = cms::attributes_header(attributes).map_err(|_| refuse("the attributes cannot be encoded"))?;
    let digest = crypto::sha256(&[&header, attributes]);
    crypto::verify(signer.public_key(), signer.suite(), &digest, signature)
        .map_err(|Failed| refuse("the signature is not the signer's"))
}

/// Whether a proof of this packet is kept: mappers know agents by those of registrations and heartbeats, and forward those of answers to
/// proxied requests.
fn has_proof(packet: &Packet) -> bool {
    match packet {
        Packet::Register(_) | Packet::Ping(_) => true,
        Packet::Outcome(outcome) => outcome.request_origin.is_some(),
        Packet::Intermediate(part) => part.request_origin.is_some(),
        _ => false,
    }
}

/// The verified sender of a message that passed every check.
pub(super) fn verified(signer: &Certificate, header: &Header, proof: Option<Arc<Proof>>) -> Verified {
    Verified {
        signer: signer.identity().clone(),
        certificate: *signer.fingerprint(),
        instance: header.instance,
        sequence: header.sequence,
        id: header.id,
        issued_at: header.issued_at,
        expires_at: header.expires_at,
        class: header.class,
        in_reply_to: header.in_reply_to,
        proof,
        forwarded: Vec::new(),
    }
}

/// The salt and the body in the plaintext.
fn split_plaintext(plaintext: &[u8]) -> Option<(&[u8; 32], &[u8])> {
    let (prefix, body) = plaintext.split_first_chunk::<PREFIX>()?;
    Some((prefix.first_chunk()?, body))
}

/// The certificates, the signer's first.
fn leaf_first(certificates: &[&[u8]], signer: &Certificate) -> Vec<Vec<u8>> {
    let (mut leaf, others): (Vec<_>, Vec<_>) = certificates.iter().partition(|der| ***der == *signer.der());
    leaf.extend(others);
    leaf.into_iter().map(|der: &[u8]| der.to_vec()).collect()
}
