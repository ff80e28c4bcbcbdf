//! A store of a fixed set of certificates.

use std::collections::HashMap;
use std::sync::Arc;

use super::certificate::Certificate;
use super::store::{CertificateStore, Recipient, RecipientQuery, SignerQuery, StoreError};
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};

/// The most keys of one identity that a message is encrypted for: the new and the old one during a rotation.
pub(super) const MAX_KEYS_PER_RECIPIENT: usize = 2;

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
    use crate::certs::{CertificateAuthority, KeyId, KeyType};
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
