//! Certificate lookup and verification: the certificate store and the trust, with a cache of parsed certificates and chains.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use crate::certs::{
    Certificate, CertificateError, CertificateStore, KeyId, Recipient, RecipientQuery, SignerQuery, StoreError, Trust,
    TrustError,
};
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::packet::{Identity, Role};
use crate::serializer::SealError;

/// How many certificates from messages are cached: parsing one takes longer than verifying a signature.
const MAX_CACHED_CERTIFICATES: NonZeroUsize = nonzero(1_024);

/// The certificates of peers: the store and the trust.
pub(super) struct PeerCertificates {
    store: Arc<dyn CertificateStore>,
    trust: Arc<Trust>,
    /// The certificates between the own certificate and its CA: peers are often issued by the same intermediate CA.
    own_chain: RwLock<Chain>,
    parsed: Mutex<LruCache<[u8; 32], Arc<Certificate>>>,
    /// The intermediate certificates that arrived with a leaf, by its fingerprint: later messages of the same signer omit them.
    chains: Mutex<LruCache<[u8; 32], Chain>>,
    any_chains: AtomicBool,
}

/// The DER of the certificates between a leaf and its CA.
type Chain = Arc<Vec<Vec<u8>>>;

/// The certificates in a message. Nothing is verified.
#[derive(Debug)]
pub(super) struct Presented {
    pub leaf: Arc<Certificate>,
    pub others: Vec<Vec<u8>>,
}

/// Why the certificates in a message cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("the certificate in the message: {0}")]
    Certificate(CertificateError),
    #[error("the signer's certificate is not in the message")]
    Missing,
}

impl PeerCertificates {
    pub fn new(store: Arc<dyn CertificateStore>, trust: Arc<Trust>, own_chain: Vec<Vec<u8>>) -> Self {
        Self {
            store,
            trust,
            own_chain: RwLock::new(Arc::new(own_chain)),
            parsed: Mutex::new(LruCache::new(MAX_CACHED_CERTIFICATES)),
            chains: Mutex::new(LruCache::new(MAX_CACHED_CERTIFICATES)),
            any_chains: AtomicBool::new(false),
        }
    }

    /// Replaces the certificates between the own certificate and its CA.
    pub fn set_own_chain(&self, chain: Vec<Vec<u8>>) {
        *self.own_chain.write() = Arc::new(chain);
    }

    /// The signer's certificate among those in the message: the one with this key id. If there are any, it must be among them.
    pub fn present(&self, certificates: &[&[u8]], key_id: &KeyId) -> Result<Option<Presented>, Unusable> {
        let mut first_error = None;
        for (index, der) in certificates.iter().enumerate() {
            let fingerprint = super::crypto::sha256(&[der]);
            let kept = self.parsed.lock().get(&fingerprint).cloned();
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

    /// The certificate of a signer from the store, not yet verified.
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

    /// Verifies a certificate: chain, validity and revocation.
    pub fn verify(&self, certificate: &Certificate, others: &[Vec<u8>], now: Timestamp) -> Result<(), TrustError> {
        let remembered = if others.is_empty() { self.chain_of(certificate) } else { None };
        let others = remembered.as_ref().map_or(others, |chain| chain.as_slice());
        let own_chain = self.own_chain.read().clone();
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
        self.chains.lock().get(certificate.fingerprint()).cloned()
    }

    /// Caches the certificates of a message whose chain and signature were verified, and passes the leaf to the store.
    ///
    /// The certificates in a message are not signed, and the leaf may have been verified with an earlier chain: the broker can replace the
    /// intermediate certificates. They are cached only if they lead to a CA, so that they never displace ones that do.
    pub fn learn(&self, presented: Presented, now: Timestamp) {
        let fingerprint = *presented.leaf.fingerprint();
        self.parsed.lock().put(fingerprint, presented.leaf.clone());
        let known = || self.chain_of(&presented.leaf).is_some_and(|chain| *chain == presented.others);
        let good = || self.trust.has_valid_chain(&presented.leaf, &presented.others, now);
        if !presented.others.is_empty() && !known() && good() {
            let chain = Arc::new(presented.others);
            self.chains.lock().put(fingerprint, chain);
            self.any_chains.store(true, Ordering::Relaxed);
        }
        self.store.learn(&presented.leaf, now);
    }

    /// Tells the store that a message of this signer was verified.
    pub fn heard(&self, signer: &Arc<Certificate>, now: Timestamp) {
        self.store.record_use(signer, now);
    }

    /// Whether a lookup in the store may block now.
    pub fn may_block(&self, now: Timestamp) -> bool {
        self.store.may_block(now)
    }

    /// Whether the store learns certificates from messages.
    pub fn learns(&self) -> bool {
        self.store.learns_certificates()
    }

    /// The valid certificates to encrypt to; at least one.
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
                && match self.verify(certificate, &[], now) {
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
