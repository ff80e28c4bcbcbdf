//! The plug-in point for certificates: who may have signed, and for whom to encrypt.

use std::fmt;
use std::sync::Arc;

use super::{Certificate, KeyId};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// Where certificates come from.
///
/// Implement it to keep certificates in a place of your own: a database, a directory service, a secret store.
///
/// * A certificate that is returned is *known*, not yet trusted: whoever asks checks chain, validity, revocation, usage and
///   that the certificate's identity is the one asked for (see [`Trust`](super::Trust)).
/// * The identities and key ids in a query come from messages that are not verified yet: treat them as text from anybody. They
///   are well formed and short, but there may be any number of different ones; bound what you remember of them.
/// * Both questions may block (they are asked on worker threads unless [`may_block`](CertificateStore::may_block) says otherwise),
///   and are asked for every message: keep what is expensive.
/// * 'Not known' is `Ok(None)` or an empty list; an error means that the store itself failed, and refuses the message.
pub trait CertificateStore: fmt::Debug + Send + Sync {
    /// The certificate that this identity signs with under this key id.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot answer.
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError>;

    /// The certificates to encrypt to: for one identity those it can open with now (one; two during a rotation), for the mappers
    /// those of every mapper.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot answer.
    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError>;

    /// Told of a certificate that came with a message, after the chain, the message's signature and freshness, and the
    /// sender's right to send such a message have been verified. A store
    /// that learns its peers keeps it; others do nothing.
    fn learned(&self, _certificate: &Arc<Certificate>, _now: Timestamp) {}

    /// Told of the signer's certificate of every message that was verified and whose sender may send it: a store that is bounded
    /// keeps what is in use. It is told of often, so it has to be quick.
    fn heard(&self, _certificate: &Arc<Certificate>, _now: Timestamp) {}

    /// Whether it comes to know others by [`learned`](Self::learned). Nodes with such a store make themselves known to each other.
    fn learns(&self) -> bool {
        false
    }

    /// Whether a question that is asked now may take longer than a look into memory. While it does not, messages are opened and
    /// sealed on the runtime's own threads, which is faster. Asked for every message.
    fn may_block(&self, _now: Timestamp) -> bool {
        true
    }

    /// Counts up whenever what the store knows may have changed, so that callers can keep answers until then. A store that
    /// cannot tell returns `None`, and is asked every time.
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

    fn learned(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        (**self).learned(certificate, now);
    }

    fn heard(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        (**self).heard(certificate, now);
    }

    fn learns(&self) -> bool {
        (**self).learns()
    }

    fn may_block(&self, now: Timestamp) -> bool {
        (**self).may_block(now)
    }

    fn generation(&self) -> Option<u64> {
        (**self).generation()
    }
}

/// The question for a signer's certificate.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SignerQuery<'a> {
    /// Who claims to have signed.
    pub identity: &'a Identity,
    /// The key id that the signature names.
    pub key_id: &'a KeyId,
    /// The moment.
    pub now: Timestamp,
    /// The certificate that came with the message, if its kind may carry one. Not verified.
    pub presented: Option<&'a Arc<Certificate>>,
}

impl<'a> SignerQuery<'a> {
    /// The question for the certificate of `identity` with this key id.
    pub fn new(identity: &'a Identity, key_id: &'a KeyId, now: Timestamp) -> Self {
        Self { identity, key_id, now, presented: None }
    }
}

/// The question for the certificates to encrypt to.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RecipientQuery<'a> {
    /// For whom.
    pub recipient: Recipient<'a>,
    /// The moment.
    pub now: Timestamp,
}

impl<'a> RecipientQuery<'a> {
    /// The question for the certificates of this recipient.
    pub fn new(recipient: Recipient<'a>, now: Timestamp) -> Self {
        Self { recipient, now }
    }
}

/// For whom to encrypt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What the store holds is no certificate.
    #[error("{place} holds no usable certificate: {why}")]
    Invalid {
        /// Where.
        place: String,
        /// Why.
        why: String,
    },
    /// Another failure, of a store of the user's own.
    #[error("{0}")]
    Other(String),
}
