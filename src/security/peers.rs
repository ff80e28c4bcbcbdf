//! Whom this node knows and believes: the certificate store and the trust, asked together, and what of their answers is kept.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use lru::LruCache;

use crate::certs::{
    Certificate, CertificateError, CertificateStore, KeyId, Recipient, RecipientQuery, SignerQuery, StoreError, Trust,
    TrustError,
};
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};
use crate::serializer::SealError;

/// How many certificates that came with messages are kept parsed: parsing one takes longer than checking a signature.
const PARSED: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1_023);

/// The store and the trust.
pub(super) struct PeerCertificates {
    store: Arc<dyn CertificateStore>,
    trust: Arc<Trust>,
    /// The certificates between the own one and its CA: known are often issued by the same.
    own_chain: RwLock<Chain>,
    parsed: Mutex<LruCache<[u8; 32], Arc<Certificate>>>,
    /// The certificates that came along with a leaf, by its fingerprint: later messages of its owner come without them.
    chains: Mutex<LruCache<[u8; 32], Chain>>,
    any_chains: AtomicBool,
}

/// The DER of the certificates between a leaf and its CA.
type Chain = Arc<Vec<Vec<u8>>>;

/// The certificates of a message, of which nothing is verified.
#[derive(Debug)]
pub(super) struct Presented {
    pub leaf: Arc<Certificate>,
    pub others: Vec<Vec<u8>>,
}

/// Why the certificates of a message are of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("what came along: {0}")]
    Certificate(CertificateError),
    #[error("the signer's is not among those that came along")]
    Missing,
}

impl PeerCertificates {
    pub fn new(store: Arc<dyn CertificateStore>, trust: Arc<Trust>, own_chain: Vec<Vec<u8>>) -> Self {
        Self {
            store,
            trust,
            own_chain: RwLock::new(Arc::new(own_chain)),
            parsed: Mutex::new(LruCache::new(PARSED)),
            chains: Mutex::new(LruCache::new(PARSED)),
            any_chains: AtomicBool::new(false),
        }
    }

    /// The certificates between the own one and its CA, from now on.
    pub fn set_own_chain(&self, chain: Vec<Vec<u8>>) {
        *self.own_chain.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(chain);
    }

    /// The certificate of the signer among those that came along, which is the one with this key id. If there are any, it must be
    /// among them.
    pub fn present(&self, certificates: &[&[u8]], key_id: &KeyId) -> Result<Option<Presented>, Unusable> {
        let mut first_error = None;
        for (index, der) in certificates.iter().enumerate() {
            let fingerprint = super::crypto::sha256(&[der]);
            let kept = self.parsed.lock().unwrap_or_else(PoisonError::into_inner).get(&fingerprint).cloned();
            let leaf = match kept.map_or_else(|| Certificate::from_der(der).map(Arc::new), Ok) {
                Ok(leaf) if leaf.key_id() == key_id && leaf.der() == *der => leaf,
                Ok(_) => continue,
                Err(error) => {
                    first_error.get_or_insert(error);
                    continue;
                }
            };
            let others = certificates.iter().enumerate().filter(|(other, _)| *other != index);
            return Ok(Some(Presented { leaf, others: others.map(|(_, der)| der.to_vec()).collect() }));
        }
        match first_error {
            Some(error) => Err(Unusable::Certificate(error)),
            None if certificates.is_empty() => Ok(None),
            None => Err(Unusable::Missing),
        }
    }

    /// The certificate of a signer, known but not yet trusted.
    pub fn signer(
        &self,
        identity: &Identity,
        key_id: &KeyId,
        presented: Option<&Presented>,
        now: Timestamp,
    ) -> Result<Option<Arc<Certificate>>, StoreError> {
        let mut query = SignerQuery::new(identity, key_id, now);
        query.presented = presented.map(|presented| &presented.leaf);
        self.store.signer(&query)
    }

    /// Whether a certificate may be believed now.
    pub fn trusts(&self, certificate: &Certificate, others: &[Vec<u8>], now: Timestamp) -> Result<(), TrustError> {
        let remembered = if others.is_empty() { self.chain_of(certificate) } else { None };
        let others = remembered.as_ref().map_or(others, |chain| chain.as_slice());
        let own_chain = self.own_chain.read().unwrap_or_else(PoisonError::into_inner).clone();
        if others.is_empty() || own_chain.is_empty() {
            let chain = if others.is_empty() { own_chain.as_slice() } else { others };
            return self.trust.verify(certificate, chain, now);
        }
        self.trust.verify(certificate, &[others, own_chain.as_slice()].concat(), now)
    }

    fn chain_of(&self, certificate: &Certificate) -> Option<Chain> {
        if !self.any_chains.load(Ordering::Relaxed) {
            return None;
        }
        self.chains.lock().unwrap_or_else(PoisonError::into_inner).get(certificate.fingerprint()).cloned()
    }

    /// Keeps the certificates of a message whose chain and signature have been verified, and tells the store.
    ///
    /// What comes along is not signed, and the verdict about the leaf may be an earlier one: whoever carries the message can have put
    /// other certificates beside the leaf. They are kept only if they lead to a CA, so that they never take the place of some that do.
    pub fn learn(&self, presented: Presented, now: Timestamp) {
        let fingerprint = *presented.leaf.fingerprint();
        self.parsed.lock().unwrap_or_else(PoisonError::into_inner).put(fingerprint, presented.leaf.clone());
        let known = || self.chain_of(&presented.leaf).is_some_and(|chain| *chain == presented.others);
        let good = || self.trust.has_valid_chain(&presented.leaf, &presented.others, now);
        if !presented.others.is_empty() && !known() && good() {
            let chain = Arc::new(presented.others);
            self.chains.lock().unwrap_or_else(PoisonError::into_inner).put(fingerprint, chain);
            self.any_chains.store(true, Ordering::Relaxed);
        }
        self.store.learn(&presented.leaf, now);
    }

    /// Tells the store whose message was verified.
    pub fn heard(&self, signer: &Arc<Certificate>, now: Timestamp) {
        self.store.record_use(signer, now);
    }

    /// Whether the store may block when it is asked now.
    pub fn may_block(&self, now: Timestamp) -> bool {
        self.store.may_block(now)
    }

    /// Whether the store comes to know others by their messages.
    pub fn learns(&self) -> bool {
        self.store.learns_certificates()
    }

    /// The certificates to encrypt to that may be believed now; at least one.
    pub fn recipients(&self, recipient: Recipient<'_>, now: Timestamp) -> Result<Vec<Arc<Certificate>>, SealError> {
        let found = self.store.recipients(&RecipientQuery::new(recipient, now));
        let mut certificates = found.map_err(|error| SealError::Store(Box::new(error)))?;
        let mut why = None;
        certificates.retain(|certificate| {
            let right_one = match recipient {
                Recipient::One(identity) => certificate.identity() == identity,
                Recipient::Mappers => certificate.identity().role() == Role::Mapper,
            };
            right_one
                && match self.trusts(certificate, &[], now) {
                    Ok(()) => true,
                    Err(error) => {
                        why.get_or_insert(error);
                        false
                    }
                }
        });
        if certificates.is_empty() {
            let whom = match recipient {
                Recipient::One(identity) => identity.to_string(),
                Recipient::Mappers => "any mapper".to_owned(),
            };
            return Err(SealError::NoRecipient(why.map_or(whom.clone(), |why| format!("{whom}: {why}"))));
        }
        Ok(certificates)
    }
}
