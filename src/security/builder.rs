//! How a [`SecureSerializer`] is made.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use super::agreement::Agreements;
use super::counters::Counters;
use super::credentials::{CredentialSet, ROTATION_GRACE_PERIOD};
use super::crypto::Crypto;
use super::envelope::is_codec_name;
use super::peers::PeerCertificates;
use super::replay::{ReplayLimits, ReplayMemory};
use super::secure::{Authorize, Inner, SecureSerializer, SentIds};
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
    /// Further credentials are of somebody else.
    #[error("credentials of {found} beside those of {own}")]
    OtherIdentity {
        /// Whose the first are.
        own: Identity,
        /// Whose the others are.
        found: Identity,
    },
    /// The name of a codec is empty, too long, or has a character that is not allowed.
    #[error("{0:?} cannot name a codec: 1 to 32 of a-z, 0-9, '.' and '-'")]
    CodecName(&'static str),
    /// A lifetime is zero.
    #[error("a lifetime of zero")]
    NoLifetime,
    /// OpenSSL lacks a cipher that is needed.
    #[error("the cryptographic library lacks what is needed: {0}")]
    Crypto(#[from] openssl::error::ErrorStack),
}

/// Makes a [`SecureSerializer`]; see [`SecureSerializer::builder`].
pub struct SecureSerializerBuilder {
    credentials: Credentials,
    older: Vec<Credentials>,
    store: Arc<dyn CertificateStore>,
    trust: Arc<Trust>,
    codecs: Vec<Arc<dyn Codec>>,
    live: Duration,
    stored: Duration,
    replay: ReplayLimits,
    started_at: Option<Timestamp>,
    authorize: Option<Authorize>,
    rotation_grace_period: Duration,
    reuse: bool,
    accept_signed_only: bool,
    seal_signed_only: bool,
}

impl SecureSerializerBuilder {
    pub(super) fn new(credentials: Credentials, store: Arc<dyn CertificateStore>, trust: Arc<Trust>) -> Self {
        #[cfg(feature = "msgpack")]
        let codecs: Vec<Arc<dyn Codec>> = vec![Arc::new(MsgPack), Arc::new(Json)];
        #[cfg(not(feature = "msgpack"))]
        let codecs: Vec<Arc<dyn Codec>> = vec![Arc::new(Json)];
        Self {
            credentials,
            older: Vec::new(),
            store,
            trust,
            codecs,
            live: Duration::from_secs(60),
            stored: Duration::from_secs(7 * 24 * 3600),
            replay: ReplayLimits::default(),
            started_at: None,
            authorize: None,
            rotation_grace_period: ROTATION_GRACE_PERIOD,
            reuse: true,
            accept_signed_only: false,
            seal_signed_only: false,
        }
    }

    /// Bodies are written in this codec, and read too. The default is MessagePack where it is compiled in, else JSON.
    #[must_use]
    pub fn codec(mut self, codec: impl Codec + 'static) -> Self {
        self.codecs.retain(|known| known.name() != codec.name());
        self.codecs.insert(0, Arc::new(codec));
        self
    }

    /// Bodies in this codec are read too. JSON and, where it is compiled in, MessagePack always are.
    #[must_use]
    pub fn also_accept(mut self, codec: impl Codec + 'static) -> Self {
        if self.codecs.iter().all(|known| known.name() != codec.name()) {
            self.codecs.push(Arc::new(codec));
        }
        self
    }

    /// What was sealed to this older certificate is still opened: for the time after a renewal.
    #[must_use]
    pub fn additional_credentials(mut self, credentials: Credentials) -> Self {
        self.older.push(credentials);
        self
    }

    /// The longest a message of this class may be valid: 60 seconds for live and 7 days for stored ones by default. Both ends
    /// need the same.
    #[must_use]
    pub fn max_lifetime(mut self, class: MessageClass, lifetime: Duration) -> Self {
        match class {
            MessageClass::Live => self.live = lifetime,
            MessageClass::Stored => self.stored = lifetime,
        }
        self
    }

    /// How long others have to learn a new certificate before everything is signed by it; 15 s by default. See
    /// [`SecureSerializer::replace_credentials`].
    #[must_use]
    pub fn rotation_grace_period(mut self, time: Duration) -> Self {
        self.rotation_grace_period = time;
        self
    }

    /// How much is remembered of what was seen.
    #[must_use]
    pub fn replay_limits(mut self, limits: ReplayLimits) -> Self {
        self.replay = limits;
        self
    }

    /// When this process started; by default the moment of [`build`](SecureSerializerBuilder::build). It names the instance in headers and must
    /// grow from one process to the next; live messages that were made before it are refused.
    #[must_use]
    pub fn started_at(mut self, at: Timestamp) -> Self {
        self.started_at = Some(at);
        self
    }

    /// Asks this, for a message whose signature is good, whether its signer may send this kind on this channel; it is asked before
    /// the message is decrypted, and after the roles were checked. It must not block.
    #[must_use]
    pub fn authorize(mut self, may: impl Fn(&Identity, Kind, InboundQueue) -> bool + Send + Sync + 'static) -> Self {
        self.authorize = Some(Arc::new(may));
        self
    }

    /// What weakens.
    #[must_use]
    pub fn dangerous(self) -> DangerousOptions {
        DangerousOptions(self)
    }

    /// Makes the serializer.
    ///
    /// # Errors
    /// [`BuildError`] says what does not fit together.
    pub fn build(self) -> Result<SecureSerializer, BuildError> {
        let own = self.credentials.certificate().identity().clone();
        if let Some(other) = self.older.iter().find(|other| *other.certificate().identity() != own) {
            return Err(BuildError::OtherIdentity { own, found: other.certificate().identity().clone() });
        }
        if let Some(codec) = self.codecs.iter().find(|codec| !is_codec_name(codec.name())) {
            return Err(BuildError::CodecName(codec.name()));
        }
        if self.live.is_zero() || self.stored.is_zero() {
            return Err(BuildError::NoLifetime);
        }
        let started_at = self.started_at.unwrap_or_else(|| SystemClock.now());
        Ok(SecureSerializer::from_inner(Inner {
            identity: own,
            peers: PeerCertificates::new(self.store, self.trust, self.credentials.intermediates().to_vec()),
            credentials: RwLock::new(Arc::new(CredentialSet::new(self.credentials, self.older))),
            rotation_grace_period: self.rotation_grace_period,
            codecs: self.codecs,
            live: self.live,
            stored: self.stored,
            replay: ReplayMemory::new(self.replay, super::SKEW),
            sent_ids: SentIds::new(started_at.saturating_add(self.live).saturating_add(super::SKEW)),
            started_at,
            sequence: Default::default(),
            authorize: self.authorize,
            accept_signed_only: self.accept_signed_only,
            seal_signed_only: self.seal_signed_only,
            agreements: Agreements::new(self.reuse),
            crypto: Crypto::new()?,
            counters: Counters::default(),
        }))
    }
}

/// Options that weaken what a [`SecureSerializer`] promises, or cost time; see [`SecureSerializerBuilder::dangerous`].
pub struct DangerousOptions(SecureSerializerBuilder);

impl DangerousOptions {
    /// Takes messages that are signed but not encrypted.
    #[must_use]
    pub fn accept_signed_only(mut self) -> SecureSerializerBuilder {
        self.0.accept_signed_only = true;
        self.0
    }

    /// Signs messages without encrypting them: the broker reads them.
    #[must_use]
    pub fn seal_signed_only(mut self) -> SecureSerializerBuilder {
        self.0.seal_signed_only = true;
        self.0
    }

    /// Makes an ephemeral key for every message and remembers no shared secret. It weakens nothing, but takes about twice as long;
    /// it is here to be measured against.
    #[must_use]
    pub fn without_key_reuse(mut self) -> SecureSerializerBuilder {
        self.0.reuse = false;
        self.0
    }
}
