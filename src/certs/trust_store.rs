//! A store that learns the certificates of peers from their verified messages.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;

use super::certificate::Certificate;
use super::store::{
    CertificateStore, MAX_KEYS_PER_RECIPIENT, Recipient, RecipientQuery, SignerQuery, StaticCertificateStore,
    StoreError,
};
use super::trust::Trust;
use super::trust_anchors::TrustError;
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::packet::{Identity, Role};

/// The default limit of agents' certificates.
const DEFAULT_MAX_AGENT_CERTIFICATES: NonZeroUsize = nonzero(16_384);
/// The limit of mappers' certificates.
const MAX_MAPPER_CERTIFICATES: NonZeroUsize = nonzero(256);
/// The limit of certificates of one identity.
const MAX_CERTIFICATES_PER_IDENTITY: usize = 4;
/// The most certificates that a message for all mappers is encrypted for. An envelope has room for 64 recipients.
const MAX_MAPPER_RECIPIENTS: usize = 60;
/// How long a certificate counts as active after it last signed a message.
const ACTIVE_PERIOD: Duration = Duration::from_secs(3600);
/// The shortest time between two searches for expired and revoked certificates.
const CLEANUP_INTERVAL: Duration = Duration::from_secs(60);

/// A certificate store that learns the certificates of peers from their messages. A node with such a store needs only its own certificate
/// and key and the CA certificate: agents and mappers send their certificates when they register and advertise.
///
/// * A certificate is learned only if the [`Trust`] accepts its chain, and it came with a message whose signature, destination and
///   freshness were verified and whose sender is authorized to send such a message.
/// * The store is bounded: by default to 16,384 certificates of agents, 256 of mappers, and 4 of each identity. When it is full, a new
///   certificate replaces one that has expired, was revoked, or has signed nothing for an hour; otherwise the new one is not learned. A
///   flood of new certificates cannot displace those in use.
/// * After a renewal, messages are encrypted for both the old and the new certificate, until the old one has signed nothing for an hour.
/// * A message for *all mappers* is encrypted for the mappers that have signed a message within the last hour; at most for the 60 that did
///   so last. Mappers announce themselves every few minutes.
/// * It can also answer from another store ([`with_store`](Self::with_store)), whose certificates need not be learned. A mapper needs its
///   own certificate there, so that it can open messages that it seals for all mappers.
///
/// It needs no cache in front of it.
///
/// ```
/// use nanite::certs::{CertificateAuthority, CertificateStore, KeyType, SignerQuery, TrustStore};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let now = SystemClock.now();
/// # let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// # let fred = Identity::agent("fred")?;
/// # let issued = ca.issue(&fred, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
/// # let certificate = issued.certificate();
/// let store = TrustStore::new(ca.trust()?);
/// let query = SignerQuery::new(&fred, certificate.key_id(), now);
/// assert!(store.signer(&query)?.is_none());
/// store.learn(certificate, now);
/// assert!(store.signer(&query)?.is_some());
/// # Ok(())
/// # }
/// ```
pub struct TrustStore {
    trust: Arc<Trust>,
    /// Answers before the learned certificates do.
    base: Arc<dyn CertificateStore>,
    state: RwLock<State>,
    max_agents: NonZeroUsize,
    learned: AtomicU64,
}

#[derive(Default)]
struct State {
    by_identity: HashMap<Identity, Vec<Entry>>,
    agents: usize,
    mappers: usize,
    cleaned_up_at: Option<Timestamp>,
    /// Until when every agent's or mapper's certificate is active, so that none can be replaced.
    full_until: [Option<Timestamp>; 2],
}

/// A learned certificate.
struct Entry {
    certificate: Arc<Certificate>,
    /// When it last signed a verified message, in microseconds since the Unix epoch.
    last_used: AtomicU64,
}

impl Entry {
    fn last_used(&self) -> Timestamp {
        Timestamp::from_micros(self.last_used.load(Ordering::Relaxed))
    }

    fn is_active(&self, now: Timestamp) -> bool {
        now.since(self.last_used()) <= ACTIVE_PERIOD
    }

    fn record_use(&self, now: Timestamp) {
        self.last_used.fetch_max(now.as_micros(), Ordering::Relaxed);
    }
}

impl TrustStore {
    /// A store without certificates.
    pub fn new(trust: impl Into<Arc<Trust>>) -> Self {
        Self {
            trust: trust.into(),
            base: Arc::new(StaticCertificateStore::default()),
            state: RwLock::default(),
            max_agents: DEFAULT_MAX_AGENT_CERTIFICATES,
            learned: AtomicU64::new(0),
        }
    }

    /// Answers from another store as well, and first.
    #[must_use]
    pub fn with_store(mut self, store: impl CertificateStore + 'static) -> Self {
        self.base = Arc::new(store);
        self
    }

    /// Sets the limit of agents' certificates.
    #[must_use]
    pub fn capacity(mut self, agents: NonZeroUsize) -> Self {
        self.max_agents = agents;
        self
    }

    /// All learned certificates.
    pub fn learned_certificates(&self) -> Vec<Arc<Certificate>> {
        let state = self.state.read();
        state.by_identity.values().flatten().map(|entry| entry.certificate.clone()).collect()
    }

    fn limit(&self, role: Role) -> usize {
        match role {
            Role::Agent => self.max_agents.get(),
            Role::Mapper => MAX_MAPPER_CERTIFICATES.get(),
        }
    }

    /// Whether a certificate has expired or was revoked. An unknown issuer does not count: its intermediate certificates may be missing
    /// here only.
    fn is_obsolete(&self, certificate: &Certificate, now: Timestamp) -> bool {
        !certificate.is_valid_at(now)
            || matches!(
                self.trust.verify(certificate, &[], now),
                Err(TrustError::Revoked | TrustError::AuthorityRevoked | TrustError::AuthorityExpired)
            )
    }

    /// Makes room for a certificate of this role; false when every certificate is in use.
    fn make_room(&self, state: &mut State, role: Role, now: Timestamp) -> bool {
        if state.cleaned_up_at.is_none_or(|at| now.since(at).max(at.since(now)) >= CLEANUP_INTERVAL) {
            state.cleaned_up_at = Some(now);
            state.retain(|entry| !self.is_obsolete(&entry.certificate, now));
        }
        if state.count(role) < self.limit(role) {
            return true;
        }
        if state.full_until.get(role as usize).copied().flatten().is_some_and(|until| now < until) {
            return false;
        }
        let of_role = state.by_identity.iter().filter(|(identity, _)| identity.role() == role);
        let least_recently_used = of_role.flat_map(|(_, entries)| entries).min_by_key(|entry| entry.last_used());
        match least_recently_used {
            Some(entry) if entry.is_active(now) => {
                let until = entry.last_used().saturating_add(ACTIVE_PERIOD);
                if let Some(full_until) = state.full_until.get_mut(role as usize) {
                    *full_until = Some(until);
                }
                tracing::warn!(%role, limit = self.limit(role), "the certificate store is full, and every certificate is in use");
                false
            }
            Some(entry) => {
                let fingerprint = *entry.certificate.fingerprint();
                state.retain(|entry| *entry.certificate.fingerprint() != fingerprint);
                true
            }
            None => false,
        }
    }
}

impl State {
    fn count(&self, role: Role) -> usize {
        match role {
            Role::Agent => self.agents,
            Role::Mapper => self.mappers,
        }
    }

    fn count_mut(&mut self, role: Role) -> &mut usize {
        match role {
            Role::Agent => &mut self.agents,
            Role::Mapper => &mut self.mappers,
        }
    }

    fn retain(&mut self, keep: impl Fn(&Entry) -> bool) {
        let (mut agents, mut mappers) = (0, 0);
        self.by_identity.retain(|identity, entries| {
            entries.retain(&keep);
            match identity.role() {
                Role::Agent => agents += entries.len(),
                Role::Mapper => mappers += entries.len(),
            }
            !entries.is_empty()
        });
        (self.agents, self.mappers) = (agents, mappers);
        self.full_until = [None; 2];
    }

    fn of(&self, identity: &Identity) -> &[Entry] {
        self.by_identity.get(identity).map_or(&[], Vec::as_slice)
    }

    fn entry(&self, certificate: &Certificate) -> Option<&Entry> {
        let mut entries = self.of(certificate.identity()).iter();
        entries.find(|entry| entry.certificate.fingerprint() == certificate.fingerprint())
    }
}

/// The certificates of one identity to encrypt for: valid, the newest one, and older ones that are active.
fn usable(entries: &[Entry], now: Timestamp) -> impl Iterator<Item = &Entry> {
    let valid = entries.iter().filter(move |entry| entry.certificate.is_valid_at(now)).enumerate();
    let usable = valid.filter(move |(index, entry)| *index == 0 || entry.is_active(now));
    usable.map(|(_, entry)| entry).take(MAX_KEYS_PER_RECIPIENT)
}

impl CertificateStore for TrustStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        let from_base = self.base.signer(query)?;
        let is_presented = |certificate: &Certificate| {
            query.presented.is_none_or(|presented| presented.fingerprint() == certificate.fingerprint())
        };
        if from_base.as_ref().is_some_and(|found| found.is_valid_at(query.now) && is_presented(found)) {
            return Ok(from_base);
        }
        let matches = |found: &Certificate| found.identity() == query.identity && found.key_id() == query.key_id;
        let state = self.state.read();
        let learned = state.of(query.identity).iter().map(|entry| &entry.certificate);
        let mut learned = learned.filter(|found| matches(found) && found.is_valid_at(query.now));
        // The presented certificate may be a renewal with the same key.
        Ok(match query.presented.filter(|presented| matches(presented)) {
            Some(presented) => {
                let same = learned.find(|found| found.fingerprint() == presented.fingerprint());
                Some(same.unwrap_or(presented).clone())
            }
            // An expired certificate is better than none: verifying it tells why messages are refused.
            None => learned.next().cloned().or(from_base),
        })
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let mut found = self.base.recipients(query)?;
        let state = self.state.read();
        let now = query.now;
        let learned: Vec<&Entry> = match query.recipient {
            Recipient::One(identity) => usable(state.of(identity), now).collect(),
            Recipient::Mappers => {
                let mappers = state.by_identity.iter().filter(|(identity, _)| identity.role() == Role::Mapper);
                let usable = mappers.flat_map(|(_, entries)| usable(entries, now));
                let mut active: Vec<&Entry> = usable.filter(|entry| entry.is_active(now)).collect();
                active.sort_by_key(|entry| std::cmp::Reverse(entry.last_used()));
                active.truncate(MAX_MAPPER_RECIPIENTS.saturating_sub(found.len()));
                active
            }
        };
        for Entry { certificate, .. } in learned {
            if !found.iter().any(|other| other.fingerprint() == certificate.fingerprint()) {
                found.push(certificate.clone());
            }
        }
        Ok(found)
    }

    fn learn(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.base.learn(certificate, now);
        let mut state = self.state.write();
        if let Some(entry) = state.entry(certificate) {
            entry.record_use(now);
            return;
        }
        let role = certificate.identity().role();
        let replaces_own = state.of(certificate.identity()).len() >= MAX_CERTIFICATES_PER_IDENTITY;
        if !replaces_own && !self.make_room(&mut state, role, now) {
            return;
        }
        let entries = state.by_identity.entry(certificate.identity().clone()).or_default();
        let before = entries.len();
        while entries.len() >= MAX_CERTIFICATES_PER_IDENTITY {
            let by_use = entries.iter().enumerate().min_by_key(|(_, entry)| entry.last_used());
            entries.remove(by_use.map_or(0, |(index, _)| index));
        }
        entries.push(Entry { certificate: certificate.clone(), last_used: AtomicU64::new(now.as_micros()) });
        // The newest first.
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.certificate.not_before()));
        let after = entries.len();
        let count = state.count_mut(role);
        *count = count.saturating_sub(before).saturating_add(after);
        self.learned.fetch_add(1, Ordering::AcqRel);
        tracing::debug!(identity = %certificate.identity(), "learned a certificate");
    }

    fn record_use(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.base.record_use(certificate, now);
        if let Some(entry) = self.state.read().entry(certificate) {
            entry.record_use(now);
        }
    }

    fn learns_certificates(&self) -> bool {
        true
    }

    fn may_block(&self, now: Timestamp) -> bool {
        self.base.may_block(now)
    }

    fn generation(&self) -> Option<u64> {
        Some(self.base.generation()?.saturating_add(self.learned.load(Ordering::Acquire)))
    }
}

impl fmt::Debug for TrustStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.read();
        f.debug_struct("TrustStore")
            .field("agents", &state.agents)
            .field("mappers", &state.mappers)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, KeyId, KeyType};
    use crate::clock::{Clock, SystemClock};

    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(86_400);

    struct TestStore {
        ca: CertificateAuthority,
        store: TrustStore,
        now: Timestamp,
    }

    impl TestStore {
        fn new(agents: usize) -> Self {
            let now = SystemClock.now();
            let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 100, now).unwrap();
            let store = TrustStore::new(ca.trust().unwrap()).capacity(NonZeroUsize::new(agents).unwrap());
            Self { ca, store, now }
        }

        fn issue(&self, identity: &Identity, at: Timestamp) -> Arc<Certificate> {
            self.ca.issue(identity, KeyType::P256, DAY * 2, at).unwrap().certificate().clone()
        }

        fn to(&self, recipient: Recipient<'_>, now: Timestamp) -> Vec<Arc<Certificate>> {
            self.store.recipients(&RecipientQuery::new(recipient, now)).unwrap()
        }

        fn knows(&self, certificate: &Certificate, now: Timestamp) -> bool {
            let query = SignerQuery::new(certificate.identity(), certificate.key_id(), now);
            self.store.signer(&query).unwrap().is_some()
        }
    }

    fn agent(name: &str) -> Identity {
        Identity::agent(name).unwrap()
    }

    #[test]
    fn s02_presented_certificate_is_learned_only_after_verification() {
        let test = TestStore::new(10);
        let fred = agent("fred");
        let certificate = test.issue(&fred, test.now);
        let query = SignerQuery::new(&fred, certificate.key_id(), test.now).with_presented(&certificate);
        assert!(test.store.signer(&query).unwrap().is_some());
        assert!(!test.knows(&certificate, test.now), "learned without being verified");
        // It does not answer for another identity or key id.
        let bob = agent("bob");
        let other = SignerQuery::new(&bob, certificate.key_id(), test.now).with_presented(&certificate);
        assert!(test.store.signer(&other).unwrap().is_none());
        let key = KeyId::new(b"another").unwrap();
        let other = SignerQuery::new(&fred, &key, test.now).with_presented(&certificate);
        assert!(test.store.signer(&other).unwrap().is_none());

        test.store.learn(&certificate, test.now);
        assert!(test.knows(&certificate, test.now));
        assert_eq!(test.to(Recipient::One(&fred), test.now).len(), 1);
        assert!(!test.knows(&certificate, test.now.saturating_add(DAY * 3)), "found after its expiry");
    }

    #[test]
    fn s02_old_certificate_is_a_recipient_for_an_hour_after_last_use() {
        let test = TestStore::new(10);
        let fred = agent("fred");
        let (old, later) = (test.issue(&fred, test.now), test.now.saturating_add(HOUR));
        let new = test.issue(&fred, later);
        test.store.learn(&old, test.now);
        test.store.record_use(&old, later);
        test.store.learn(&new, later);
        let both = test.to(Recipient::One(&fred), later);
        assert_eq!(
            both.iter().map(|certificate| certificate.fingerprint()).collect::<Vec<_>>(),
            [new.fingerprint(), old.fingerprint()]
        );
        let after = later.saturating_add(HOUR + Duration::from_secs(1));
        let newest = test.to(Recipient::One(&fred), after);
        assert_eq!(newest.iter().map(|certificate| certificate.fingerprint()).collect::<Vec<_>>(), [new.fingerprint()]);
        assert!(test.knows(&old, after), "messages that it signed may still arrive");
    }

    #[test]
    fn s02_flood_of_new_certificates_displaces_none_in_use() {
        let test = TestStore::new(3);
        let used: Vec<_> = ["a", "b"].map(|name| test.issue(&agent(name), test.now)).into();
        used.iter().for_each(|certificate| test.store.learn(certificate, test.now));
        for n in 0..20 {
            test.store.learn(&test.issue(&agent(&format!("flood-{n}")), test.now), test.now);
        }
        assert!(used.iter().all(|certificate| test.knows(certificate, test.now)));
        assert_eq!(test.store.learned_certificates().len(), 3);
        // Many certificates of one identity displace nothing either.
        for _ in 0..10 {
            test.store.learn(&test.issue(&agent("a"), test.now), test.now);
        }
        assert!(test.knows(&used[1], test.now));
        assert!(test.store.learned_certificates().len() <= 3 + MAX_CERTIFICATES_PER_IDENTITY);
        // A certificate that was not used for long is replaced, one that was used is not.
        let later = test.now.saturating_add(HOUR * 2);
        test.store.record_use(&used[1], later);
        let late = test.issue(&agent("late"), later);
        test.store.learn(&late, later);
        assert!(test.knows(&late, later) && test.knows(&used[1], later));
        // Mappers have a limit of their own.
        let mapper = test.issue(&Identity::mapper("m").unwrap(), later);
        test.store.learn(&mapper, later);
        assert!(test.knows(&mapper, later));
    }

    #[test]
    fn s02_mapper_recipients_are_active_mappers() {
        let test = TestStore::new(3);
        let mappers = ["m1", "m2"].map(|name| test.issue(&Identity::mapper(name).unwrap(), test.now));
        mappers.iter().for_each(|certificate| test.store.learn(certificate, test.now));
        test.store.learn(&test.issue(&agent("a"), test.now), test.now);
        assert_eq!(test.to(Recipient::Mappers, test.now).len(), 2);
        let later = test.now.saturating_add(HOUR * 2);
        test.store.record_use(&mappers[1], later);
        let present = test.to(Recipient::Mappers, later);
        assert_eq!(
            present.iter().map(|certificate| certificate.fingerprint()).collect::<Vec<_>>(),
            [mappers[1].fingerprint()]
        );
    }

    #[test]
    fn s02_expired_certificates_are_removed_from_trust_store() {
        let test = TestStore::new(10);
        let (old, later) = (test.issue(&agent("old"), test.now), test.now.saturating_add(DAY * 3));
        test.store.learn(&old, test.now);
        test.store.learn(&test.issue(&agent("new"), later), later);
        let left = test.store.learned_certificates();
        assert_eq!(left.iter().map(|certificate| certificate.identity().name()).collect::<Vec<_>>(), ["new"]);
    }
}
