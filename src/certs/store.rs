//! The plug-in point for certificates: which certificate a signer uses, and which certificates to encrypt for. Also the simplest store:
//! of a fixed set of certificates.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::certificate::{Certificate, KeyId};
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};

/// The most keys of one identity that a message is encrypted for: the new and the old one during a rotation.
pub(super) const MAX_KEYS_PER_RECIPIENT: usize = 2;

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

/// A certificate store of a fixed set of certificates.
///
/// Custom stores can delegate to it: load the certificates, create a store of them, and forward the queries to it.
///
/// ```
/// use nanite::certs::{
///     CertificateAuthority, CertificateStore, KeyType, Recipient, RecipientQuery, StaticCertificateStore,
/// };
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let now = SystemClock.now();
/// let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// let fred = Identity::agent("fred")?;
/// let issued = ca.issue(&fred, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
///
/// let store = StaticCertificateStore::new([issued.certificate().clone()]);
/// let found = store.recipients(&RecipientQuery::new(Recipient::One(&fred), now))?;
/// assert_eq!(found.len(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct StaticCertificateStore {
    signers: CertificateSet,
    recipients: CertificateSet,
}

impl StaticCertificateStore {
    /// A store of nodes that are both signers and recipients.
    pub fn new(certificates: impl IntoIterator<Item = Arc<Certificate>>) -> Self {
        let certificates = CertificateSet::new(certificates);
        Self { signers: certificates.clone(), recipients: certificates }
    }

    /// A store with different signers and recipients: for nodes that receive messages from the former and send messages to the latter.
    pub fn separate(
        signers: impl IntoIterator<Item = Arc<Certificate>>,
        recipients: impl IntoIterator<Item = Arc<Certificate>>,
    ) -> Self {
        Self { signers: CertificateSet::new(signers), recipients: CertificateSet::new(recipients) }
    }
}

impl CertificateStore for StaticCertificateStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        Ok(self.signers.signer(query))
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        Ok(self.recipients.recipients(query))
    }

    fn may_block(&self, _now: Timestamp) -> bool {
        false
    }

    fn generation(&self) -> Option<u64> {
        Some(0)
    }
}

/// Certificates by identity, and the answers to a store's two queries.
#[derive(Clone, Debug, Default)]
pub(super) struct CertificateSet {
    by_identity: HashMap<Identity, Vec<Entry>>,
}

/// A certificate of the set.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) certificate: Arc<Certificate>,
    /// When the entry ends, for a certificate that another one has replaced.
    pub(super) until: Option<Timestamp>,
}

impl Entry {
    fn is_known_at(&self, now: Timestamp) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

impl CertificateSet {
    pub(super) fn new(certificates: impl IntoIterator<Item = Arc<Certificate>>) -> Self {
        let mut set = Self::default();
        for certificate in certificates {
            set.insert(Entry { certificate, until: None });
        }
        set
    }

    /// Adds a certificate, unless it is in the set.
    pub(super) fn insert(&mut self, entry: Entry) {
        let entries = self.by_identity.entry(entry.certificate.identity().clone()).or_default();
        if !entries.iter().any(|other| other.certificate.fingerprint() == entry.certificate.fingerprint()) {
            entries.push(entry);
            // The newest first.
            entries.sort_by_key(|entry| std::cmp::Reverse(entry.certificate.not_before()));
        }
    }

    pub(super) fn of(&self, identity: &Identity) -> &[Entry] {
        self.by_identity.get(identity).map_or(&[], Vec::as_slice)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Entry> {
        self.by_identity.values().flatten()
    }

    pub(super) fn signer(&self, query: &SignerQuery<'_>) -> Option<Arc<Certificate>> {
        let entries = self.of(query.identity).iter();
        let mut known =
            entries.filter(|entry| entry.certificate.key_id() == query.key_id && entry.is_known_at(query.now));
        // One that is not valid is better than none: verifying it tells why messages are refused.
        let valid = known.clone().find(|entry| entry.certificate.is_valid_at(query.now));
        valid.or_else(|| known.next()).map(|entry| entry.certificate.clone())
    }

    pub(super) fn recipients(&self, query: &RecipientQuery<'_>) -> Vec<Arc<Certificate>> {
        match query.recipient {
            Recipient::One(identity) => usable(self.of(identity), query.now),
            Recipient::Mappers => {
                let mappers = self.by_identity.iter().filter(|(identity, _)| identity.role() == Role::Mapper);
                mappers.flat_map(|(_, entries)| usable(entries, query.now)).collect()
            }
        }
    }
}

/// The certificates of an identity to encrypt for: valid, the newest of each key, at most [`MAX_KEYS_PER_RECIPIENT`].
fn usable(entries: &[Entry], now: Timestamp) -> Vec<Arc<Certificate>> {
    let mut found: Vec<Arc<Certificate>> = Vec::with_capacity(1);
    for entry in entries.iter().filter(|entry| entry.is_known_at(now) && entry.certificate.is_valid_at(now)) {
        if found.len() < MAX_KEYS_PER_RECIPIENT
            && !found.iter().any(|other| other.key_id() == entry.certificate.key_id())
        {
            found.push(entry.certificate.clone());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, KeyType};
    use crate::clock::{Clock, SystemClock};
    use std::time::Duration;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn s02_static_store_finds_signers_by_key_id_and_valid_recipients() {
        let now = SystemClock.now();
        let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 100, now).unwrap();
        let issue = |name: &str, at| {
            ca.issue(&Identity::mapper(name).unwrap(), KeyType::P256, DAY, at).unwrap().certificate().clone()
        };
        let (old, new) = (issue("m", now), issue("m", now.saturating_add(DAY / 2)));
        let (third, other) = (issue("m", now.saturating_add(DAY * 3 / 4)), issue("n", now));
        let store = StaticCertificateStore::new([&old, &new, &other, &third].map(Clone::clone));
        let signer = |identity: &Identity, key: &KeyId, at| {
            store.signer(&SignerQuery::new(identity, key, at)).unwrap().map(|c| *c.fingerprint())
        };
        assert_eq!(signer(old.identity(), old.key_id(), now), Some(*old.fingerprint()));
        assert_eq!(signer(old.identity(), new.key_id(), now), Some(*new.fingerprint()));
        assert_eq!(signer(other.identity(), old.key_id(), now), None, "the key of another identity");
        // An expired certificate is still found, so that verifying it reports the expiry.
        assert_eq!(signer(old.identity(), old.key_id(), now.saturating_add(DAY * 2)), Some(*old.fingerprint()));

        let to = |recipient, at| {
            let found = store.recipients(&RecipientQuery::new(recipient, at)).unwrap();
            found.iter().map(|c| *c.fingerprint()).collect::<std::collections::HashSet<_>>()
        };
        let set = |all: &[&Arc<Certificate>]| all.iter().map(|c| *c.fingerprint()).collect();
        let m = Identity::mapper("m").unwrap();
        assert_eq!(to(Recipient::One(&m), now), set(&[&old]));
        assert_eq!(to(Recipient::One(&m), now.saturating_add(DAY / 2)), set(&[&old, &new]));
        assert_eq!(to(Recipient::One(&m), now.saturating_add(DAY * 4 / 5)), set(&[&new, &third]), "the newest two");
        assert_eq!(to(Recipient::Mappers, now), set(&[&old, &other]));
        assert_eq!(to(Recipient::One(&m), now.saturating_add(DAY * 9)), set(&[]));
        assert_eq!(to(Recipient::One(&Identity::agent("m").unwrap()), now), set(&[]));
    }
}
