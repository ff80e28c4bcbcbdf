//! The secure serializer: what it is made of, and sealing.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use zeroize::Zeroizing;

use super::agreement::Agreements;
use super::builder::{BuildError, SecureSerializerBuilder};
use super::cms;
use super::counters::Counters;
use super::credentials::CredentialSet;
use super::crypto::{self, Crypto, Failed, Secret};
use super::envelope::{Header, commitment, may_be_stored, recipients_digest};
use super::peers::PeerCertificates;
use super::replay::ReplayMemory;
use crate::certs::{Certificate, CertificateStore, Credentials, Recipient, Suite, Trust, TrustError};
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, MessageId, Packet, RandomnessError, Role};
use crate::serializer::{
    Audience, Codec, Cost, Inbound, InboundQueue, MessageClass, OpenContext, OpenError, Proof, SealError, SealRequest,
    Sealed, Serializer, Verified,
};

/// What stands before the body in what is encrypted: the salt, then the digest of the header.
pub(super) const PREFIX: usize = 64;
/// Up to this many bytes, it is the signatures and key agreements that take time, and not the bytes.
const SHORT: usize = 16 << 10;
/// How many ids of own messages are kept for answers by slower clocks.
const ASKED: usize = 16_384;

/// Whether a signer may send this kind on this channel.
pub(super) type Authorize = Arc<dyn Fn(&Identity, Kind, InboundQueue) -> bool + Send + Sync>;

/// Packets in the secure envelope: signed by this node, encrypted for their recipients, and opened in the order that the
/// [module](super) documents.
///
/// It can be shared between threads; what it remembers (replays, key agreements) is its own, so use one per process and identity.
///
/// ```
/// use std::sync::Arc;
/// use nanite::certs::{CertificateStore, Credentials, Trust};
/// use nanite::security::{BuildError, SecureSerializer};
///
/// fn serializer(own: Credentials, store: Arc<dyn CertificateStore>, trust: Trust) -> Result<SecureSerializer, BuildError> {
///     SecureSerializer::builder(own, store, trust).build()
/// }
/// ```
pub struct SecureSerializer(pub(super) Inner);

/// What a serializer is made of; steps of sealing and opening are written as methods of it.
pub(super) struct Inner {
    pub identity: Identity,
    pub credentials: RwLock<Arc<CredentialSet>>,
    pub rotation_grace_period: Duration,
    pub peers: PeerCertificates,
    /// The first one writes; all read.
    pub codecs: Vec<Arc<dyn Codec>>,
    pub live: Duration,
    pub stored: Duration,
    pub replay: ReplayMemory,
    pub sent_ids: SentIds,
    pub started_at: Timestamp,
    pub sequence: AtomicU64,
    pub authorize: Option<Authorize>,
    pub accept_signed_only: bool,
    pub seal_signed_only: bool,
    pub agreements: Agreements,
    pub crypto: Crypto,
    pub counters: Counters,
}

impl SecureSerializer {
    /// A serializer that signs with these credentials, finds the certificates of others in `store`, and believes those that
    /// `trust` believes.
    pub fn builder(
        credentials: Credentials,
        store: Arc<dyn CertificateStore>,
        trust: impl Into<Arc<Trust>>,
    ) -> SecureSerializerBuilder {
        SecureSerializerBuilder::new(credentials, store, trust.into())
    }

    pub(super) fn from_inner(inner: Inner) -> Self {
        Self(inner)
    }

    /// How many messages were sealed, opened and refused.
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Takes new credentials of the same identity, as after a renewal, while messages come and go. What carries the certificate along
    /// (registrations and advertises: have the node [announce](crate::agent::Announcer::announce) itself) is signed by them at once,
    /// everything else once others have had the time to learn it ([`SecureSerializerBuilder::rotation_grace_period`]), or at once when the certificate before is not
    /// to be believed any more. What was sealed to the credentials before
    /// is opened until these expire; so is what was sealed to the `older` ones that are given.
    ///
    /// # Errors
    /// [`BuildError::OtherIdentity`] when one is somebody else's; nothing has changed then.
    pub fn replace_credentials(
        &self,
        new: Credentials,
        older: Vec<Credentials>,
        now: Timestamp,
    ) -> Result<(), BuildError> {
        let own = self.0.identity.clone();
        if let Some(other) = older.iter().chain([&new]).find(|other| *other.certificate().identity() != own) {
            return Err(BuildError::OtherIdentity { own, found: other.certificate().identity().clone() });
        }
        let before = self.0.credentials().signing(Kind::Ping, now).certificate().clone();
        // What others refuse, as one that is revoked, is not signed by any longer.
        let rotation_grace_period =
            if self.0.peers.trusts(&before, &[], now).is_ok() { self.0.rotation_grace_period } else { Duration::ZERO };
        self.0.peers.set_own_chain(new.intermediates().to_vec());
        let mut current = self.0.credentials.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(current.followed_by(new, older, now, rotation_grace_period));
        Ok(())
    }

    /// The certificate of this node: the newest, when it was renewed.
    pub fn certificate(&self) -> Arc<Certificate> {
        self.0.credentials().newest().clone()
    }

    /// Whether this node's own certificate may be believed now, as far as it can tell itself: its dates, its chain, and the
    /// revocation lists it has.
    ///
    /// # Errors
    /// [`TrustError`]: why others refuse what is signed by it.
    pub fn check_own_certificate(&self, now: Timestamp) -> Result<(), TrustError> {
        self.0.peers.trusts(self.0.credentials().newest(), &[], now)
    }

    /// How many messages are in the replay memory.
    pub fn remembered(&self) -> usize {
        self.0.replay.len()
    }
}

impl Serializer for SecureSerializer {
    fn content_type(&self) -> &str {
        super::CONTENT_TYPE
    }

    fn identity(&self) -> Option<&Identity> {
        Some(&self.0.identity)
    }

    fn instance(&self) -> Option<u64> {
        Some(self.0.started_at.as_micros())
    }

    fn seal(&self, packet: &Packet, how: &SealRequest<'_>) -> Result<Sealed, SealError> {
        let sealed = self.0.seal(packet, how)?;
        self.0.counters.count_sealed();
        Ok(sealed)
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        let opened = self.0.open(bytes, context);
        match &opened {
            Ok(_) => self.0.counters.count_opened(),
            Err(error) => self.0.counters.count_refused(error.kind),
        }
        opened
    }

    fn mark_completed(&self, message: &Verified, now: Timestamp) {
        let (id, expires_at) = (message.id(), message.expires_at());
        // It was checked that there is room when it was opened; what has expired meanwhile is refused without being remembered.
        let _ = self.0.replay.admit(message.signer(), id, expires_at, now);
    }

    fn is_completed(&self, message: &Verified) -> bool {
        self.0.replay.knows(message.signer(), message.id())
    }

    fn verify_proof(&self, proof: &Arc<Proof>, now: Timestamp) -> Result<Inbound, OpenError> {
        self.0.verify_proof(proof, now)
    }

    fn is_secure(&self) -> bool {
        true
    }

    fn learns_peers(&self) -> bool {
        self.0.peers.learns()
    }

    fn cost(&self, bytes: usize, now: Timestamp) -> Cost {
        let quick = self.0.credentials().newest().suite() == Suite::P256;
        if quick && bytes <= SHORT && !self.0.peers.may_block(now) { Cost::Short } else { Cost::Long }
    }
}

impl fmt::Debug for SecureSerializer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecureSerializer").field("identity", &self.0.identity).finish_non_exhaustive()
    }
}

/// What is drawn at random for one message.
pub(super) struct MessageRandomness {
    id: MessageId,
    nonce: [u8; cms::NONCE],
    ukm: [u8; 32],
    pub salt: [u8; 32],
    key: Secret,
}

impl MessageRandomness {
    pub fn draw() -> Result<Self, SealError> {
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

impl Inner {
    /// The longest that messages of this class may be valid.
    pub fn lifetime(&self, class: MessageClass) -> Duration {
        match class {
            MessageClass::Live => self.live,
            MessageClass::Stored => self.stored,
        }
    }

    /// The credentials as they are now.
    pub fn credentials(&self) -> Arc<CredentialSet> {
        self.credentials.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn seal(&self, packet: &Packet, how: &SealRequest<'_>) -> Result<Sealed, SealError> {
        let kind = packet.kind();
        let to = self.audience(packet, how)?;
        let own = self.credentials();
        let signing = own.signing(kind, how.now);
        let certificate = signing.certificate();
        if !certificate.is_valid_at(how.now) {
            let (from, to) = (certificate.not_before(), certificate.not_after());
            return Err(SealError::OwnCertificate(format!("it is valid from {from} to {to}")));
        }
        // An advertise goes to nodes that are not known yet, and holds no secret.
        let encrypted = kind != Kind::Advertise && !self.seal_signed_only;
        let recipients = if encrypted { self.recipients(&to, how.now)? } else { Vec::new() };

        let codec = self.codecs.first().ok_or(SealError::NotAllowed("encoded without a codec"))?;
        let body = codec.encode(packet)?;
        let limit = kind.max_bytes();
        if body.len() > limit {
            return Err(SealError::TooLarge(body.len(), limit));
        }

        let drawn = MessageRandomness::draw()?;
        let expires_at = how.now.saturating_add(how.lifetime.min(self.lifetime(how.class)));
        let header = Header {
            kind,
            from: self.identity.clone(),
            instance: self.started_at.as_micros(),
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed).saturating_add(1),
            to,
            id: drawn.id,
            issued_at: how.now,
            expires_at,
            class: how.class,
            in_reply_to: how.in_reply_to,
            codec: codec.name().to_owned(),
            recipients: recipients_digest(recipients.iter().map(|one| one.key_id().as_bytes())),
            commitment: commitment(&drawn.salt, &body),
        };
        let bytes = self.envelope(signing, &header, &drawn, &body, encrypted.then_some(&recipients[..]))?;
        if bytes.len() > limit {
            return Err(SealError::TooLarge(bytes.len(), limit));
        }
        self.sent_ids.note(drawn.id, how.now);
        Ok(Sealed { id: drawn.id, bytes, expires_at })
    }

    /// Whom the packet is for, if it may be.
    fn audience(&self, packet: &Packet, how: &SealRequest<'_>) -> Result<Audience, SealError> {
        let kind = packet.kind();
        if packet.claimed_sender().is_some_and(|sender| *sender != self.identity) {
            return Err(SealError::NotAllowed("sent in the name of another"));
        }
        if how.class == MessageClass::Stored && !may_be_stored(kind, how.audience) {
            return Err(SealError::NotAllowed("stored: only requests and pushes to the mappers can"));
        }
        match how.audience {
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
                    0 => Err(SealError::NoRecipient("nobody".to_owned())),
                    1 => different.pop().map(Audience::One).ok_or(SealError::NoRecipient("nobody".to_owned())),
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
                    // A mapper is one of them, whether or not its store says so.
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

    /// Encrypts (for these recipients, if any), signs, and puts it together.
    pub fn envelope(
        &self,
        signing: &Credentials,
        header: &Header,
        drawn: &MessageRandomness,
        body: &[u8],
        recipients: Option<&[Arc<Certificate>]>,
    ) -> Result<Vec<u8>, SealError> {
        let malformed = |_| SealError::Crypto("the message cannot be encoded".to_owned());
        let header_der = header.to_der().map_err(malformed)?;
        let header_digest = crypto::sha256(&[&header_der]);
        let parts: [&[u8]; 3] = [&drawn.salt, &header_digest, body];
        let content = match recipients {
            None => parts.concat(),
            Some(recipients) => {
                let infos = self.recipient_infos(recipients, drawn, header.issued_at)?;
                cms::enveloped::<Failed>(infos, &drawn.nonce, PREFIX + body.len(), |out| {
                    self.crypto.encrypt(&drawn.key, &drawn.nonce, &parts, out)
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
        drawn: &MessageRandomness,
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
                    let kek = crypto::key_encryption_key(&shared, Some(&drawn.ukm))?;
                    cms::agreement(key_id, ephemeral.point(), &drawn.ukm, &self.crypto.wrap(&kek, &drawn.key)?)?
                }
                Suite::Rsa => cms::transport(key_id, &crypto::transport(recipient.public_key(), &drawn.key)?)?,
            });
        }
        Ok(infos)
    }
}

/// In which messages certificates may come along: those from which known learn them, and those that are opened when nobody may know
/// their sender any more.
pub(super) fn may_carry_certificates(kind: Kind, class: MessageClass) -> bool {
    announces_certificate(kind) || class == MessageClass::Stored
}

/// By which messages a node makes its certificate known.
pub(super) fn announces_certificate(kind: Kind) -> bool {
    matches!(kind, Kind::Advertise | Kind::Register)
}

/// The ids of own messages since the start, as long as an answer to one could seem to be older than this process: a sender's clock
/// may be behind, and its answer still answers what this process asked.
pub(super) struct SentIds {
    until: Timestamp,
    over: AtomicBool,
    ids: Mutex<HashSet<MessageId>>,
}

impl SentIds {
    pub fn new(until: Timestamp) -> Self {
        Self { until, over: AtomicBool::new(false), ids: Mutex::default() }
    }

    fn note(&self, id: MessageId, now: Timestamp) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        if now > self.until {
            self.over.store(true, Ordering::Relaxed);
            *ids = HashSet::new();
        } else if ids.len() < ASKED {
            ids.insert(id);
        }
    }

    /// Whether this process asked for it.
    pub fn knows(&self, id: MessageId) -> bool {
        !self.over.load(Ordering::Relaxed) && self.ids.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_is_known_for_a_time_and_up_to_a_number() {
        let at = Timestamp::from_secs;
        let sent_ids = SentIds::new(at(100));
        let id = |number: u64| MessageId::from_bytes([number.to_be_bytes(), [0; 8]].concat().try_into().unwrap());
        for number in 0..=ASKED as u64 {
            sent_ids.note(id(number), at(100));
        }
        assert!(sent_ids.knows(id(0)) && sent_ids.knows(id(ASKED as u64 - 1)));
        assert!(!sent_ids.knows(id(ASKED as u64)), "what no longer fits in gets no exemption");
        sent_ids.note(id(0), at(101));
        assert!(!sent_ids.knows(id(0)));
    }
}
