//! The plug-in point for certificates: which certificate a signer uses, and which certificates to encrypt for.

use std::fmt;
use std::sync::Arc;

use super::certificate::{Certificate, KeyId};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// A source of certificates.
///
/// Implement it to keep certificates elsewhere: in a database, a directory service or a secret store.
///
/// * A returned certificate is not trusted yet. The caller verifies chain, validity, revocation, usage and that the certificate has the
///   requested identity (see [`Trust`](super::Trust)).
/// * The identities and key ids in queries come from unverified messages: treat them as untrusted input. They are well formed and short,
///   but an attacker can send any number of different ones; bound what you cache by them.
/// * Both queries may block: they run on worker threads unless [`may_block`](CertificateStore::may_block) says otherwise. They are made
///   for every message: cache expensive answers.
/// * An unknown certificate is `Ok(None)` or an empty list. An error means that the store failed, and the message is refused.
///
/// ```
/// use std::sync::Arc;
/// use nanite::certs::{
///     Certificate, CertificateStore, RecipientQuery, SignerQuery, StaticCertificateStore, StoreError,
/// };
///
/// /// Loads the certificates from a database for every query; put a `CachedCertificateStore` in front of it.
/// #[derive(Debug)]
/// struct DatabaseStore;
///
/// impl DatabaseStore {
///     fn load(&self) -> Result<StaticCertificateStore, StoreError> {
///         Ok(StaticCertificateStore::new([]))
///     }
/// }
///
/// impl CertificateStore for DatabaseStore {
///     fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
///         self.load()?.signer(query)
///     }
///
///     fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
///         self.load()?.recipients(query)
///     }
/// }
/// ```
pub trait CertificateStore: fmt::Debug + Send + Sync {
    /// The certificate with this identity and key id.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot answer.
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError>;

    /// The certificates to encrypt for: those that one identity can use now (one; two during a rotation), or those of all mappers.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot answer.
    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError>;

    /// Called with a certificate that came with a message, after its chain, the message's signature and freshness and the sender's
    /// authorization for this kind of message have been verified. A store that learns certificates from messages keeps it. Does nothing
    /// by default.
    fn learn(&self, _certificate: &Arc<Certificate>, _now: Timestamp) {}

    /// Called with the signer's certificate for every message that was verified and whose sender is authorized for this kind of message,
    /// so that a bounded store can keep the certificates in use. Must return quickly. Does nothing by default.
    fn record_use(&self, _certificate: &Arc<Certificate>, _now: Timestamp) {}

    /// Whether the store learns certificates from messages ([`learn`](Self::learn)). Nodes with such a store announce their certificates
    /// to each other.
    fn learns_certificates(&self) -> bool {
        false
    }

    /// Whether a query at `now` may take longer than a lookup in memory. When it does not, messages are opened and sealed on the
    /// runtime's own threads, which is faster. Called for every message.
    fn may_block(&self, _now: Timestamp) -> bool {
        true
    }

    /// A number that increases whenever the answers may have changed, so that callers can cache answers until then. A store that returns
    /// `None` cannot tell.
    fn generation(&self) -> Option<u64> {
        None
    }
}

impl<T: CertificateStore + ?Sized> CertificateStore for Arc<T> {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        (**self).signer(query)
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        (**self).recipients(query)
    }

    fn learn(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        (**self).learn(certificate, now);
    }

    fn record_use(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        (**self).record_use(certificate, now);
    }

    fn learns_certificates(&self) -> bool {
        (**self).learns_certificates()
    }

    fn may_block(&self, now: Timestamp) -> bool {
        (**self).may_block(now)
    }

    fn generation(&self) -> Option<u64> {
        (**self).generation()
    }
}

/// The query for a signer's certificate.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SignerQuery<'a> {
    /// The identity that claims to have signed.
    pub identity: &'a Identity,
    /// The key id in the signature.
    pub key_id: &'a KeyId,
    /// The current time.
    pub now: Timestamp,
    /// The certificate that came with the message, if its kind may carry one. Not verified.
    pub presented: Option<&'a Arc<Certificate>>,
}

impl<'a> SignerQuery<'a> {
    /// The query for the certificate with this identity and key id.
    pub fn new(identity: &'a Identity, key_id: &'a KeyId, now: Timestamp) -> Self {
        Self { identity, key_id, now, presented: None }
    }

    /// Adds the certificate that came with the message.
    #[must_use]
    pub fn with_presented(mut self, certificate: &'a Arc<Certificate>) -> Self {
        self.presented = Some(certificate);
        self
    }
}

/// The query for the certificates to encrypt for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RecipientQuery<'a> {
    /// The recipient of the message.
    pub recipient: Recipient<'a>,
    /// The current time.
    pub now: Timestamp,
}

impl<'a> RecipientQuery<'a> {
    /// The query for the certificates of this recipient.
    pub fn new(recipient: Recipient<'a>, now: Timestamp) -> Self {
        Self { recipient, now }
    }
}

/// The recipient of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Recipient<'a> {
    /// One node.
    One(&'a Identity),
    /// Every mapper.
    Mappers,
}

/// A store could not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file or directory could not be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file or directory.
        path: std::path::PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The store holds something else than a certificate.
    #[error("{location} holds no usable certificate: {why}")]
    Invalid {
        /// Where the store found it: a path, for example.
        location: String,
        /// The reason.
        why: String,
    },
    /// Another failure, for stores outside this crate.
    #[error("{0}")]
    Other(String),
}
