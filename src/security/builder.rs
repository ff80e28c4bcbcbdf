//! How a [`SecureSerializer`] is built.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;

use super::agreement::Agreements;
use super::context::{Authorize, Context, SentIds};
use super::credentials::{CredentialSet, IdentityMismatch, ROTATION_GRACE_PERIOD, check_identity};
use super::crypto::Crypto;
use super::envelope::{MAX_CLOCK_SKEW, is_codec_name};
use super::peers::PeerCertificates;
use super::replay::{ReplayLimits, ReplayMemory};
use super::serializer::{Counters, SecureSerializer};
use crate::certs::{CertificateStore, Credentials, Trust};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Kind};
#[cfg(feature = "msgpack")]
use crate::serializer::MsgPack;
use crate::serializer::{Codec, InboundQueue, Json, MessageClass};

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

/// The longest that a live message may be valid, by default.
const MAX_LIVE_LIFETIME: Duration = Duration::from_secs(60);
/// The longest that a stored message may be valid, by default.
const MAX_STORED_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

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

impl std::fmt::Debug for AuthorizeHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
