//! A store whose certificates are given when it is made.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Certificate, CertificateStore, Recipient, RecipientQuery, SignerQuery, StoreError};
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};

/// To how many keys of one identity a message is encrypted: during a rotation to the new and the old one.
const KEYS: usize = 2;

/// A certificate store with the certificates that it was made with.
///
/// It is also the part from which stores of your own can be built: load certificates from wherever they are, put them into one
/// of these, and let it answer.
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
    signers: Peers,
    recipients: Peers,
}

impl StaticCertificateStore {
    /// A store of nodes that sign and receive.
    pub fn new(certificates: impl IntoIterator<Item = Arc<Certificate>>) -> Self {
        let peers = Peers::new(certificates);
        Self { signers: peers.clone(), recipients: peers }
    }

    /// A store that knows these as signers, and those as recipients: for nodes that only ever listen to the one and speak to the
    /// other.
    pub fn separate(
        signers: impl IntoIterator<Item = Arc<Certificate>>,
        recipients: impl IntoIterator<Item = Arc<Certificate>>,
    ) -> Self {
        Self { signers: Peers::new(signers), recipients: Peers::new(recipients) }
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

/// Certificates by identity, and the answers to a store's two questions.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers {
    by_identity: HashMap<Identity, Vec<Peer>>,
}

/// One certificate.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) certificate: Arc<Certificate>,
    /// It has been replaced, and is known until this moment only.
    pub(super) until: Option<Timestamp>,
}

impl Peer {
    fn is_known_at(&self, now: Timestamp) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

impl Peers {
    pub(super) fn new(certificates: impl IntoIterator<Item = Arc<Certificate>>) -> Self {
        let mut peers = Self::default();
        for certificate in certificates {
            peers.insert(Peer { certificate, until: None });
        }
        peers
    }

    /// Adds a certificate; one that is there already stays as it is.
    pub(super) fn insert(&mut self, peer: Peer) {
        let of_identity = self.by_identity.entry(peer.certificate.identity().clone()).or_default();
        if !of_identity.iter().any(|known| known.certificate.fingerprint() == peer.certificate.fingerprint()) {
            of_identity.push(peer);
            // The newest first.
            of_identity.sort_by_key(|peer| std::cmp::Reverse(peer.certificate.not_before()));
        }
    }

    pub(super) fn of(&self, identity: &Identity) -> &[Peer] {
        self.by_identity.get(identity).map_or(&[], Vec::as_slice)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Peer> {
        self.by_identity.values().flatten()
    }

    pub(super) fn signer(&self, query: &SignerQuery<'_>) -> Option<Arc<Certificate>> {
        let with_key = || self.of(query.identity).iter().filter(|peer| peer.certificate.key_id() == query.key_id);
        // One that is valid, if there is; else one that says why it is not.
        let valid = with_key().find(|peer| peer.is_known_at(query.now) && peer.certificate.is_valid_at(query.now));
        let known = || with_key().find(|peer| peer.is_known_at(query.now));
        valid.or_else(known).map(|peer| peer.certificate.clone())
    }

    pub(super) fn recipients(&self, query: &RecipientQuery<'_>) -> Vec<Arc<Certificate>> {
        match query.recipient {
            Recipient::One(identity) => current(self.of(identity), query.now),
            Recipient::Mappers => {
                let mappers = self.by_identity.iter().filter(|(identity, _)| identity.role() == Role::Mapper);
                mappers.flat_map(|(_, peers)| current(peers, query.now)).collect()
            }
        }
    }
}

/// The certificates of an identity that can be encrypted to: valid, the newest for each key, at most [`KEYS`].
fn current(peers: &[Peer], now: Timestamp) -> Vec<Arc<Certificate>> {
    let mut found: Vec<Arc<Certificate>> = Vec::with_capacity(1);
    for peer in peers.iter().filter(|peer| peer.is_known_at(now) && peer.certificate.is_valid_at(now)) {
        if found.len() < KEYS && !found.iter().any(|other| other.key_id() == peer.certificate.key_id()) {
            found.push(peer.certificate.clone());
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
    fn s02_signers_are_found_by_identity_and_key_and_recipients_are_valid_ones_only() {
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
        assert_eq!(signer(other.identity(), old.key_id(), now), None, "another's key");
        // An expired one is still named, so that it can be refused for what it is.
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
