//! What a secure serializer is made of: its settings, the credentials of this node, and the certificates of its peers. Sealing
//! ([`super::seal`]), opening ([`super::open`]) and proofs ([`super::verify`]) are methods of [`Context`].

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use super::agreement::Agreements;
use super::cms::MAX_CERTIFICATES;
use super::crypto::{Crypto, sha256};
use super::envelope::announces_certificate;
use super::replay::{ReplayMemory, SentIds};
use crate::certs::{
    Certificate, CertificateError, CertificateStore, Credentials, KeyId, Recipient, RecipientQuery, SignerQuery,
    StoreError, Trust, TrustError, is_readable,
};
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::packet::{Identity, Kind, Role};
use crate::serializer::{Codec, InboundQueue, MessageClass, SealError};

/// How long other nodes have to learn a new certificate before everything is signed with it, by default.
pub(super) const ROTATION_GRACE_PERIOD: Duration = Duration::from_secs(15);
/// How many older keys a node opens with.
const MAX_OLDER_KEYS: usize = 4;
/// How many certificates from messages are cached: parsing one takes longer than verifying a signature.
const MAX_CACHED_CERTIFICATES: NonZeroUsize = nonzero(1_024);

/// Whether a signer may send this kind of packet to this kind of queue.
pub(super) type Authorize = Arc<dyn Fn(&Identity, Kind, InboundQueue) -> bool + Send + Sync>;

/// The state of a secure serializer.
pub(super) struct Context {
    pub identity: Identity,
    pub credentials: RwLock<Arc<CredentialSet>>,
    pub rotation_grace_period: Duration,
    pub peers: PeerCertificates,
    /// The first one encodes; all decode.
    pub codecs: Vec<Arc<dyn Codec>>,
    pub max_live_lifetime: Duration,
    pub max_stored_lifetime: Duration,
    pub replay: ReplayMemory,
    pub sent_ids: SentIds,
    pub started_at: Timestamp,
    pub sequence: AtomicU64,
    pub authorize: Option<Authorize>,
    pub accept_signed_only: bool,
    pub seal_signed_only: bool,
    pub agreements: Agreements,
    pub crypto: Crypto,
}

impl Context {
    /// The longest that messages of this class may be valid.
    pub fn lifetime(&self, class: MessageClass) -> Duration {
        match class {
            MessageClass::Live => self.max_live_lifetime,
            MessageClass::Stored => self.max_stored_lifetime,
        }
    }

    /// The current credentials.
    pub fn credentials(&self) -> Arc<CredentialSet> {
        self.credentials.read().clone()
    }
}

/// Credentials that belong to another node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the credentials are of {found}, not of {own}")]
#[non_exhaustive]
pub struct IdentityMismatch {
    /// The identity of this node.
    pub own: Identity,
    /// The identity in the credentials.
    pub found: Identity,
}

/// Checks that all of these credentials are of one node.
pub(super) fn check_identity<'a>(
    own: &Identity,
    all: impl IntoIterator<Item = &'a Credentials>,
) -> Result<(), IdentityMismatch> {
    match all.into_iter().map(|credentials| credentials.certificate().identity()).find(|found| *found != own) {
        Some(found) => Err(IdentityMismatch { own: own.clone(), found: found.clone() }),
        None => Ok(()),
    }
}

/// The credentials of a node at one time. Immutable: a rotation replaces the set.
pub(super) struct CredentialSet {
    signing: Credentials,
    /// The successor, and the time from which everything is signed with it.
    next: Option<(Credentials, Timestamp)>,
    older: Vec<Credentials>,
}

impl CredentialSet {
    pub fn new(signing: Credentials, older: Vec<Credentials>) -> Self {
        Self { signing, next: None, older }
    }

    /// The credentials to sign a message of this kind with. Messages that carry the certificate are signed with the successor at once, so
    /// that other nodes learn it; everything else after the grace period.
    pub fn signing(&self, kind: Kind, now: Timestamp) -> &Credentials {
        match &self.next {
            Some((next, from)) if next.certificate().is_valid_at(now) => {
                let grace_period_over = now >= *from || !self.signing.certificate().is_valid_at(now);
                if grace_period_over || announces_certificate(kind) { next } else { &self.signing }
            }
            _ => &self.signing,
        }
    }

    /// The newest certificate.
    pub fn newest(&self) -> &Arc<Certificate> {
        self.next.as_ref().map_or(&self.signing, |(next, _)| next).certificate()
    }

    /// All credentials that messages are opened with.
    pub fn all(&self) -> impl Iterator<Item = &Credentials> {
        self.next.iter().map(|(next, _)| next).chain(std::iter::once(&self.signing)).chain(&self.older)
    }

    /// The set after a rotation to `new`. Messages encrypted to the previous credentials are opened while these are valid.
    pub fn followed_by(
        &self,
        new: Credentials,
        older: Vec<Credentials>,
        now: Timestamp,
        rotation_grace_period: Duration,
    ) -> Self {
        let signing = self.signing(Kind::Ping, now).clone();
        if signing.certificate().fingerprint() == new.certificate().fingerprint() {
            return Self { signing: new, next: None, older: self.opening(older, now, &[]) };
        }
        let all = self.opening(older, now, &[&signing, &new]);
        Self { signing, next: Some((new, now.saturating_add(rotation_grace_period))), older: all }
    }

    fn opening(&self, more: Vec<Credentials>, now: Timestamp, but: &[&Credentials]) -> Vec<Credentials> {
        let same = |a: &Credentials, b: &Credentials| a.certificate().fingerprint() == b.certificate().fingerprint();
        let mut all: Vec<Credentials> = Vec::new();
        for one in self.all().cloned().chain(more) {
            let is_known = all.iter().chain(but.iter().copied()).any(|other| same(other, &one));
            if !is_known && one.certificate().is_valid_at(now) && all.len() < MAX_OLDER_KEYS {
                all.push(one);
            }
        }
        all
    }
}

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
    #[error("another certificate in the message cannot be read")]
    Other,
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

    /// The signer's certificate among those in the message: the one with this key id. If there are any, it must be among them, and all
    /// must be readable, also those that are not needed because the signer's was verified before.
    pub fn present(&self, certificates: &[&[u8]], key_id: &KeyId) -> Result<Option<Presented>, Unusable> {
        let mut first_error = None;
        for (index, der) in certificates.iter().enumerate() {
            let fingerprint = sha256(&[der]);
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
            let others: Vec<Vec<u8>> = others.map(|(_, der)| der.to_vec()).collect();
            let is_known = || self.chain_of(&leaf).is_some_and(|chain| *chain == others);
            if !others.is_empty() && !is_known() && !others.iter().all(|der| is_readable(der)) {
                return Err(Unusable::Other);
            }
            return Ok(Some(Presented { leaf, others }));
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
        // Pinned trust accepts what the store returns, so the store must not return what the sender presents.
        query.presented = presented.filter(|_| !self.trust.is_pinned()).map(|presented| &presented.leaf);
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
        if self.trust.is_pinned() {
            return self.store.record_use(&presented.leaf, now);
        }
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

    /// The DER of a certificate that was verified, and of those between it and its CA.
    pub fn with_chain(&self, leaf: &Certificate) -> Vec<Vec<u8>> {
        let chain = self.chain_of(leaf).unwrap_or_else(|| self.own_chain.read().clone());
        let others = chain.iter().take(MAX_CERTIFICATES - 1).cloned();
        std::iter::once(leaf.der().to_vec()).chain(others).collect()
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
        self.store.learns_certificates() && !self.trust.is_pinned()
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
            let name = match recipient {
                Recipient::One(identity) => identity.to_string(),
                Recipient::Mappers => "any mapper".to_owned(),
            };
            return Err(SealError::NoRecipient(why.map_or(name.clone(), |why| format!("{name}: {why}"))));
        }
        Ok(certificates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, KeyType};
    use crate::clock::{Clock, SystemClock};

    #[test]
    fn s07_new_certificate_signs_everything_after_the_rotation_grace_period() {
        let now = SystemClock.now();
        let day = Duration::from_secs(86_400);
        let ca = CertificateAuthority::create("example.org", KeyType::P256, day * 30, now).unwrap();
        let fred = Identity::agent("fred").unwrap();
        let issue = |days: u32| ca.issue(&fred, KeyType::P256, day * days, now).unwrap();
        let (old, new, newer) = (issue(1), issue(2), issue(3));
        let is = |own: &CredentialSet, kind, at, expected: &Credentials| {
            let signing = own.signing(kind, at).certificate().fingerprint();
            assert_eq!(signing, expected.certificate().fingerprint());
        };
        let own = CredentialSet::new(old.clone(), Vec::new()).followed_by(
            new.clone(),
            Vec::new(),
            now,
            ROTATION_GRACE_PERIOD,
        );
        is(&own, Kind::Register, now, &new);
        is(&own, Kind::Advertise, now, &new);
        is(&own, Kind::Outcome, now, &old);
        let settled = now.saturating_add(ROTATION_GRACE_PERIOD);
        is(&own, Kind::Outcome, settled, &new);
        assert_eq!(own.all().count(), 2);
        // Another rotation, within and after the grace period.
        let early = own.followed_by(newer.clone(), Vec::new(), now, ROTATION_GRACE_PERIOD);
        is(&early, Kind::Outcome, now, &old);
        is(&early, Kind::Register, now, &newer);
        assert_eq!(early.all().count(), 3, "all three open");
        let late = own.followed_by(newer.clone(), Vec::new(), settled, ROTATION_GRACE_PERIOD);
        is(&late, Kind::Outcome, settled, &new);
        // The previous certificate has expired: it signs nothing, and the next rotation drops it.
        let expired = now.saturating_add(day);
        let next = CredentialSet::new(old.clone(), Vec::new()).followed_by(newer.clone(), Vec::new(), expired, day * 9);
        is(&next, Kind::Outcome, expired, &newer);
        let again = next.followed_by(new.clone(), Vec::new(), expired, ROTATION_GRACE_PERIOD);
        assert_eq!(again.all().count(), 2);
        // The same credentials again change nothing.
        let same = CredentialSet::new(old.clone(), Vec::new()).followed_by(
            old.clone(),
            vec![old.clone()],
            now,
            ROTATION_GRACE_PERIOD,
        );
        is(&same, Kind::Register, now, &old);
        assert!(same.all().count() <= 2);
    }
}
