//! [`SecureSerializer`]: how it is built, its public interface and its counters.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;

use super::agreement::Agreements;
use super::context::{
    Authorize, Context, CredentialSet, IdentityMismatch, PeerCertificates, ROTATION_GRACE_PERIOD, check_identity,
};
use super::crypto::Crypto;
use super::envelope::{MAX_CLOCK_SKEW, is_codec_name};
use super::replay::{ReplayLimits, ReplayMemory, SentIds};
use crate::certs::{Certificate, CertificateStore, Credentials, Suite, Trust, TrustError};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Kind, Packet};
#[cfg(feature = "msgpack")]
use crate::serializer::MsgPack;
use crate::serializer::{
    Codec, Cost, Inbound, InboundQueue, Json, MessageClass, OpenContext, OpenError, OpenErrorKind, Proof, SealError,
    SealRequest, Sealed, Serializer, Verification, Verified, sealed,
};

/// The content type of secure messages.
pub const CONTENT_TYPE: &str = "application/vnd.nanite.secure";

/// Up to this many bytes, the time goes into signatures and key agreements rather than into the bytes.
const MAX_SHORT_BYTES: usize = 16 << 10;
/// The longest that a live message may be valid, by default.
const MAX_LIVE_LIFETIME: Duration = Duration::from_secs(60);
/// The longest that a stored message may be valid, by default.
const MAX_STORED_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// Packets in the secure envelope: signed by this node, encrypted for their recipients, and opened in the steps that the
/// [module](super) documents. See [`SecureSerializer::builder`].
///
/// It can be shared between threads. Its replay memory and its key agreements are its own, so use one per process and identity.
pub struct SecureSerializer {
    pub(super) context: Context,
    pub(super) counters: Counters,
}

impl SecureSerializer {
    /// How many messages were sealed, opened and refused.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Replaces the credentials with new ones of the same identity, as after a renewal, while messages are sent and received.
    ///
    /// Registrations and advertises carry the certificate, so they are signed with the new key at once: make the node
    /// [announce](crate::agent::Announcer::announce) itself. Everything else is signed with the new key after the
    /// [rotation grace period](super::SecureSerializerBuilder::rotation_grace_period), or at once when the previous certificate is no
    /// longer valid. Messages that were encrypted to the previous credentials, or to those in `older`, are opened until these expire.
    ///
    /// # Errors
    /// [`IdentityMismatch`] when they are of another node; nothing is changed then.
    pub fn replace_credentials(
        &self,
        new: Credentials,
        older: Vec<Credentials>,
        now: Timestamp,
    ) -> Result<(), IdentityMismatch> {
        check_identity(&self.context.identity, older.iter().chain([&new]))?;
        let before = self.context.credentials().signing(Kind::Ping, now).certificate().clone();
        // A certificate that others refuse, such as a revoked one, signs nothing more.
        let rotation_grace_period = if self.context.peers.verify(&before, &[], now).is_ok() {
            self.context.rotation_grace_period
        } else {
            Duration::ZERO
        };
        self.context.peers.set_own_chain(new.intermediates().to_vec());
        let mut current = self.context.credentials.write();
        *current = Arc::new(current.followed_by(new, older, now, rotation_grace_period));
        drop(current);
        self.context.agreements.clear();
        Ok(())
    }

    /// The newest certificate of this node.
    pub fn certificate(&self) -> Arc<Certificate> {
        self.context.credentials().newest().clone()
    }

    /// Verifies this node's own certificate: its dates, its chain, and the revocation lists that this node has.
    ///
    /// # Errors
    /// [`TrustError`]: why other nodes refuse messages signed with it.
    pub fn check_own_certificate(&self, now: Timestamp) -> Result<(), TrustError> {
        self.context.peers.verify(self.context.credentials().newest(), &[], now)
    }

    /// How many message ids are in the replay memory.
    pub fn remembered(&self) -> usize {
        self.context.replay.len()
    }
}

impl Serializer for SecureSerializer {
    fn content_type(&self) -> &str {
        CONTENT_TYPE
    }

    fn identity(&self) -> &Identity {
        &self.context.identity
    }

    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        let sealed = self.context.seal(packet, request)?;
        self.counters.count_sealed();
        Ok(sealed)
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        let opened = self.context.open(bytes, context);
        match &opened {
            Ok(inbound) => {
                self.counters.count_opened();
                // The message is good, an answer that it forwards is not.
                let refused = inbound.signer().into_iter().flat_map(|signer| &signer.forwarded);
                refused.filter_map(|one| one.as_ref().err()).for_each(|error| self.counters.count_refused(error.kind));
            }
            Err(error) => self.counters.count_refused(error.kind),
        }
        opened
    }

    fn cost(&self, bytes: usize, now: Timestamp) -> Cost {
        let quick = self.context.credentials().newest().suite() == Suite::P256;
        if quick && bytes <= MAX_SHORT_BYTES && !self.context.peers.may_block(now) { Cost::Short } else { Cost::Long }
    }

    fn verification(&self) -> Option<&dyn Verification> {
        Some(self)
    }
}

impl sealed::Sealed for SecureSerializer {}

impl Verification for SecureSerializer {
    fn instance(&self) -> u64 {
        self.context.started_at.as_micros()
    }

    fn mark_completed(&self, message: &Verified, now: Timestamp) {
        let (id, expires_at) = (message.id(), message.expires_at());
        // Opening checked that there is room. An expired message is refused by its expiry and need not be remembered.
        let _ = self.context.replay.admit(message.signer(), id, expires_at, now);
    }

    fn is_completed(&self, message: &Verified) -> bool {
        self.context.replay.knows(message.signer(), message.id())
    }

    fn verify_proof(&self, proof: &Arc<Proof>, now: Timestamp) -> Result<Inbound, OpenError> {
        self.context.verify_proof(proof, now)
    }

    fn learns_peers(&self) -> bool {
        self.context.peers.learns()
    }
}

impl fmt::Debug for SecureSerializer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecureSerializer").field("identity", &self.context.identity).finish_non_exhaustive()
    }
}

/// The counts of a [`SecureSerializer`](super::SecureSerializer).
#[derive(Debug, Default)]
pub struct Counters {
    sealed: AtomicU64,
    opened: AtomicU64,
    refused: [AtomicU64; OpenErrorKind::ALL.len()],
}

impl Counters {
    /// How many messages were sealed.
    pub fn sealed(&self) -> u64 {
        self.sealed.load(Ordering::Relaxed)
    }

    /// How many messages were opened.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// How many messages were refused at this step.
    pub fn refused(&self, kind: OpenErrorKind) -> u64 {
        self.refused.get(kind as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// How many messages were refused at any step.
    pub fn refused_in_all(&self) -> u64 {
        self.refused.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    pub(super) fn count_sealed(&self) {
        self.sealed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_refused(&self, kind: OpenErrorKind) {
        if let Some(count) = self.refused.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Why a [`SecureSerializer`] could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Older credentials have another identity.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
    /// The name of a codec is empty, too long, or has an invalid character.
    #[error("invalid codec name {0:?}: use 1 to 32 of a-z, 0-9, '.' and '-'")]
    CodecName(&'static str),
    /// The largest lifetime of a message class is zero.
    #[error("the largest lifetime of a message class is zero")]
    ZeroLifetime,
    /// OpenSSL lacks an algorithm.
    #[error("OpenSSL lacks an algorithm")]
    Crypto(#[from] openssl::error::ErrorStack),
}

/// Builds a [`SecureSerializer`]; see [`SecureSerializer::builder`].
#[derive(Debug)]
pub struct SecureSerializerBuilder {
    credentials: Credentials,
    previous_credentials: Vec<Credentials>,
    store: Arc<dyn CertificateStore>,
    trust: Arc<Trust>,
    codecs: Vec<Arc<dyn Codec>>,
    max_live_lifetime: Duration,
    max_stored_lifetime: Duration,
    replay: ReplayLimits,
    started_at: Option<Timestamp>,
    authorize: Option<AuthorizeHook>,
    rotation_grace_period: Duration,
    reuse_keys: bool,
    accept_signed_only: bool,
    seal_signed_only: bool,
}

struct AuthorizeHook(Authorize);

impl fmt::Debug for AuthorizeHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthorizeHook")
    }
}

impl SecureSerializer {
    /// A serializer that signs with these credentials, finds the certificates of other nodes in `store`, and accepts those that `trust`
    /// accepts.
    ///
    /// ```
    /// use nanite::certs::{CertificateAuthority, KeyType, TrustStore};
    /// use nanite::clock::{Clock, SystemClock};
    /// use nanite::packet::Identity;
    /// use nanite::security::SecureSerializer;
    /// use std::sync::Arc;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let now = SystemClock.now();
    /// let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    /// let fred = ca.issue(&Identity::agent("fred")?, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
    /// let trust = Arc::new(ca.trust()?);
    /// let serializer = SecureSerializer::builder(fred, TrustStore::new(trust.clone()), trust).build()?;
    /// # drop(serializer);
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(
        credentials: Credentials,
        store: impl CertificateStore + 'static,
        trust: impl Into<Arc<Trust>>,
    ) -> SecureSerializerBuilder {
        #[cfg(feature = "msgpack")]
        let codecs: Vec<Arc<dyn Codec>> = vec![Arc::new(MsgPack), Arc::new(Json)];
        #[cfg(not(feature = "msgpack"))]
        let codecs: Vec<Arc<dyn Codec>> = vec![Arc::new(Json)];
        SecureSerializerBuilder {
            credentials,
            previous_credentials: Vec::new(),
            store: Arc::new(store),
            trust: trust.into(),
            codecs,
            max_live_lifetime: MAX_LIVE_LIFETIME,
            max_stored_lifetime: MAX_STORED_LIFETIME,
            replay: ReplayLimits::default(),
            started_at: None,
            authorize: None,
            rotation_grace_period: ROTATION_GRACE_PERIOD,
            reuse_keys: true,
            accept_signed_only: false,
            seal_signed_only: false,
        }
    }
}

impl SecureSerializerBuilder {
    /// Encodes bodies in this codec, and decodes it too. The default is MessagePack where it is compiled in, else JSON.
    #[must_use]
    pub fn codec(mut self, codec: impl Codec + 'static) -> Self {
        self.codecs.retain(|known| known.name() != codec.name());
        self.codecs.insert(0, Arc::new(codec));
        self
    }

    /// Also decodes bodies in this codec. JSON and, where it is compiled in, MessagePack are always accepted.
    #[must_use]
    pub fn also_accept(mut self, codec: impl Codec + 'static) -> Self {
        if self.codecs.iter().all(|known| known.name() != codec.name()) {
            self.codecs.push(Arc::new(codec));
        }
        self
    }

    /// Also opens what was encrypted to these older credentials, after a renewal. They must have the same identity.
    #[must_use]
    pub fn previous_credentials(mut self, credentials: Credentials) -> Self {
        self.previous_credentials.push(credentials);
        self
    }

    /// The longest that a message of this class may be valid: 60 seconds for live and 7 days for stored messages by default. Sender
    /// and receiver need the same limit.
    #[must_use]
    pub fn max_lifetime(mut self, class: MessageClass, lifetime: Duration) -> Self {
        match class {
            MessageClass::Live => self.max_live_lifetime = lifetime,
            MessageClass::Stored => self.max_stored_lifetime = lifetime,
        }
        self
    }

    /// How long other nodes have to learn a new certificate before everything is signed with it; 15 s by default. See
    /// [`SecureSerializer::replace_credentials`].
    #[must_use]
    pub fn rotation_grace_period(mut self, period: Duration) -> Self {
        self.rotation_grace_period = period;
        self
    }

    /// How many message ids are remembered against replay.
    #[must_use]
    pub fn replay_limits(mut self, limits: ReplayLimits) -> Self {
        self.replay = limits;
        self
    }

    /// When this process started; by default the time of [`build`](Self::build). It is the instance in signed headers and must grow from
    /// one process to the next; live messages issued before it are refused.
    #[must_use]
    pub fn started_at(mut self, at: Timestamp) -> Self {
        self.started_at = Some(at);
        self
    }

    /// Decides, for a message with a valid signature, whether its signer may send this kind of packet to this kind of queue. Called
    /// after the role check and before decryption. It must not block.
    #[must_use]
    pub fn authorize(
        mut self,
        authorize: impl Fn(&Identity, Kind, InboundQueue) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.authorize = Some(AuthorizeHook(Arc::new(authorize)));
        self
    }

    /// Options that weaken security.
    #[must_use]
    pub fn dangerous(self) -> DangerousOptions {
        DangerousOptions(self)
    }

    /// Builds the serializer.
    ///
    /// # Errors
    /// [`BuildError`] names the option that is wrong.
    pub fn build(self) -> Result<SecureSerializer, BuildError> {
        let own = self.credentials.certificate().identity().clone();
        check_identity(&own, &self.previous_credentials)?;
        if let Some(codec) = self.codecs.iter().find(|codec| !is_codec_name(codec.name())) {
            return Err(BuildError::CodecName(codec.name()));
        }
        if self.max_live_lifetime.is_zero() || self.max_stored_lifetime.is_zero() {
            return Err(BuildError::ZeroLifetime);
        }
        let started_at = self.started_at.unwrap_or_else(|| SystemClock.now());
        let answers_until = started_at.saturating_add(self.max_live_lifetime).saturating_add(MAX_CLOCK_SKEW);
        let context = Context {
            identity: own,
            peers: PeerCertificates::new(self.store, self.trust, self.credentials.intermediates().to_vec()),
            credentials: RwLock::new(Arc::new(CredentialSet::new(self.credentials, self.previous_credentials))),
            rotation_grace_period: self.rotation_grace_period,
            codecs: self.codecs,
            max_live_lifetime: self.max_live_lifetime,
            max_stored_lifetime: self.max_stored_lifetime,
            replay: ReplayMemory::new(self.replay, MAX_CLOCK_SKEW),
            sent_ids: SentIds::new(answers_until),
            started_at,
            sequence: Default::default(),
            authorize: self.authorize.map(|hook| hook.0),
            accept_signed_only: self.accept_signed_only,
            seal_signed_only: self.seal_signed_only,
            agreements: Agreements::new(self.reuse_keys),
            crypto: Crypto::new()?,
        };
        Ok(SecureSerializer { context, counters: Counters::default() })
    }
}

/// Options that weaken what a [`SecureSerializer`] promises, or cost time; see [`SecureSerializerBuilder::dangerous`].
#[derive(Debug)]
pub struct DangerousOptions(SecureSerializerBuilder);

impl DangerousOptions {
    /// Accepts messages that are signed but not encrypted.
    #[must_use]
    pub fn accept_signed_only(mut self) -> SecureSerializerBuilder {
        self.0.accept_signed_only = true;
        self.0
    }

    /// Signs messages without encrypting them: the broker can read them.
    #[must_use]
    pub fn seal_signed_only(mut self) -> SecureSerializerBuilder {
        self.0.seal_signed_only = true;
        self.0
    }

    /// Generates an ephemeral key for every message and caches no shared secret. It weakens nothing and takes about twice as long; it is
    /// here as the baseline for benchmarks.
    #[must_use]
    pub fn without_key_reuse(mut self) -> SecureSerializerBuilder {
        self.0.reuse_keys = false;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, KeyType, StaticCertificateStore};

    #[test]
    fn s07_rotation_clears_agreed_secrets() {
        let now = SystemClock.now();
        let day = std::time::Duration::from_secs(86_400);
        let ca = CertificateAuthority::create("example.org", KeyType::P256, day, now).unwrap();
        let fred = Identity::agent("fred").unwrap();
        let issue = || ca.issue(&fred, KeyType::P256, day / 2, now).unwrap();
        let own = issue();
        let store = StaticCertificateStore::new([own.certificate().clone()]);
        let serializer = SecureSerializer::builder(own, store, ca.trust().unwrap()).build().unwrap();
        let push = crate::packet::Request::new("/a/b".parse().unwrap(), crate::packet::Payload::default());
        let audience = crate::serializer::Audience::One(fred.clone());
        serializer.seal(&Packet::Push(push), &SealRequest::new(&audience, now)).unwrap();
        assert_ne!(serializer.context.agreements.held(), 0);
        serializer.replace_credentials(issue(), Vec::new(), now).unwrap();
        assert_eq!(serializer.context.agreements.held(), 0);
    }

    #[test]
    fn every_kind_has_its_own_count() {
        let counters = Counters::default();
        OpenErrorKind::ALL.into_iter().for_each(|kind| counters.count_refused(kind));
        assert!(OpenErrorKind::ALL.into_iter().all(|kind| counters.refused(kind) == 1));
        assert_eq!(counters.refused_in_all(), 12);
    }
}
