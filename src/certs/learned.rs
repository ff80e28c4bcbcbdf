//! A store that learns the certificates of others from what they send.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use super::{
    Certificate, CertificateStore, Recipient, RecipientQuery, SignerQuery, StaticCertificateStore, StoreError, Trust,
    TrustError,
};
use crate::clock::Timestamp;
use crate::packet::{Identity, Role};

/// How many agents' certificates are kept, unless said otherwise.
const AGENTS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(16_383);
/// How many mappers' certificates are kept.
const MAPPERS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);
/// How many certificates of one identity are kept.
const EACH: usize = 4;
/// To how many keys of one identity a message is encrypted: during a rotation to the new and the old one.
const KEYS: usize = 2;
/// To how many keys of mappers a message is encrypted: those heard last. An envelope has room for 64.
const GROUP: usize = 60;
/// For how long somebody counts as present who is not heard: an older certificate beside a newer one, a mapper of the group, and
/// whoever is not to give way to others when the store is full.
const PRESENT: Duration = Duration::from_secs(3600);
/// How often what has expired or was revoked is looked for, at most.
const SWEEP: Duration = Duration::from_secs(60);

/// A certificate store for nodes that have nothing but their own certificate and key and the CA's certificate: it learns the
/// certificates of others from their messages. Agents and mappers send theirs along when they register and advertise.
///
/// * Only a certificate whose chain the [`Trust`] believes, that came with a message whose signature, destination and freshness
///   were verified, and whose sender may send such a message, is kept.
/// * What is kept is bounded: by default 16,384 certificates of agents, 256 of mappers, 4 of each identity. When it is full, only
///   what has expired, was revoked, or has not signed anything for an hour gives way; a flood of new certificates cannot displace
///   those in use, but is not kept.
/// * After a renewal both certificates are known. Messages are encrypted to both until the older one has signed nothing for an hour.
/// * *The mappers* are those that were heard within the last hour; mappers say every few minutes that they are there. At most the
///   60 heard last are encrypted to.
/// * Certificates can be given in advance ([`with_known`](Self::with_known)); these are known without having been heard. Give the own
///   one when the node is a mapper, so that it can open what it seals for the mappers.
///
/// It keeps what is expensive itself: it needs no cache in front of it.
pub struct TrustStore {
    trust: Arc<Trust>,
    known: Arc<dyn CertificateStore>,
    state: RwLock<State>,
    agents: NonZeroUsize,
    mappers: NonZeroUsize,
    learned: AtomicU64,
}

#[derive(Default)]
struct State {
    by_identity: HashMap<Identity, Vec<Peer>>,
    agents: usize,
    mappers: usize,
    swept_at: Option<Timestamp>,
    /// Nothing can give way before these moments, of agents and of mappers: no need to look.
    full_until: [Option<Timestamp>; 2],
}

struct Peer {
    certificate: Arc<Certificate>,
    /// When it last signed something that was verified, in microseconds.
    heard: AtomicU64,
}

impl Peer {
    fn heard(&self) -> Timestamp {
        Timestamp::from_micros(self.heard.load(Ordering::Relaxed))
    }

    fn is_present(&self, now: Timestamp) -> bool {
        now.since(self.heard()) <= PRESENT
    }

    fn hear(&self, now: Timestamp) {
        self.heard.fetch_max(now.as_micros(), Ordering::Relaxed);
    }
}

impl TrustStore {
    /// A store that knows nobody yet.
    pub fn new(trust: impl Into<Arc<Trust>>) -> Self {
        Self {
            trust: trust.into(),
            known: Arc::new(StaticCertificateStore::default()),
            state: RwLock::default(),
            agents: AGENTS,
            mappers: MAPPERS,
            learned: AtomicU64::new(0),
        }
    }

    /// Beside what is learned, everybody that this store knows is known.
    #[must_use]
    pub fn with_known(mut self, store: Arc<dyn CertificateStore>) -> Self {
        self.known = store;
        self
    }

    /// How many certificates of agents are kept at most.
    #[must_use]
    pub fn capacity(mut self, agents: NonZeroUsize) -> Self {
        self.agents = agents;
        self
    }

    /// Every certificate that was learned and is still kept.
    pub fn learned_certificates(&self) -> Vec<Arc<Certificate>> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.by_identity.values().flatten().map(|peer| peer.certificate.clone()).collect()
    }

    fn limit(&self, role: Role) -> usize {
        match role {
            Role::Agent => self.agents.get(),
            Role::Mapper => self.mappers.get(),
        }
    }

    /// Whether there is no hope for it: one that only lacks its intermediate certificates here may still be believed elsewhere.
    fn is_over(&self, certificate: &Certificate, now: Timestamp) -> bool {
        !certificate.is_valid_at(now)
            || matches!(
                self.trust.verify(certificate, &[], now),
                Err(TrustError::Revoked | TrustError::AuthorityRevoked | TrustError::AuthorityExpired)
            )
    }

    /// Makes room for one more certificate of this role; false when everything there is in use.
    fn make_room(&self, state: &mut State, role: Role, now: Timestamp) -> bool {
        if state.swept_at.is_none_or(|at| now.since(at).max(at.since(now)) >= SWEEP) {
            state.swept_at = Some(now);
            state.retain(|peer| !self.is_over(&peer.certificate, now));
        }
        if state.count(role) < self.limit(role) {
            return true;
        }
        if state.full_until.get(role as usize).copied().flatten().is_some_and(|until| now < until) {
            return false;
        }
        let of_role = state.by_identity.iter().filter(|(identity, _)| identity.role() == role);
        let least = of_role.flat_map(|(_, peers)| peers).min_by_key(|peer| peer.heard());
        match least {
            Some(peer) if peer.is_present(now) => {
                let until = peer.heard().saturating_add(PRESENT);
                if let Some(full) = state.full_until.get_mut(role as usize) {
                    *full = Some(until);
                }
                tracing::warn!(%role, limit = self.limit(role), "no room for more certificates: all that are known are in use");
                false
            }
            Some(peer) => {
                let fingerprint = *peer.certificate.fingerprint();
                state.retain(|peer| *peer.certificate.fingerprint() != fingerprint);
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

    fn retain(&mut self, keep: impl Fn(&Peer) -> bool) {
        let (mut agents, mut mappers) = (0, 0);
        self.by_identity.retain(|identity, peers| {
            peers.retain(&keep);
            match identity.role() {
                Role::Agent => agents += peers.len(),
                Role::Mapper => mappers += peers.len(),
            }
            !peers.is_empty()
        });
        (self.agents, self.mappers) = (agents, mappers);
        self.full_until = [None; 2];
    }

    fn of(&self, identity: &Identity) -> &[Peer] {
        self.by_identity.get(identity).map_or(&[], Vec::as_slice)
    }
}

/// Those of one identity that can be encrypted to: valid, the newest, and the older ones that are still heard.
fn current(peers: &[Peer], now: Timestamp) -> impl Iterator<Item = &Peer> {
    let valid = peers.iter().filter(move |peer| peer.certificate.is_valid_at(now));
    valid.enumerate().filter(move |(index, peer)| *index == 0 || peer.is_present(now)).map(|(_, peer)| peer).take(KEYS)
}

impl CertificateStore for TrustStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        let known = self.known.signer(query)?;
        let is_other = |known: &Certificate| {
            query.presented.is_some_and(|presented| presented.fingerprint() != known.fingerprint())
        };
        if known.as_ref().is_some_and(|known| known.is_valid_at(query.now) && !is_other(known)) {
            return Ok(known);
        }
        let is_it = |one: &Certificate| one.identity() == query.identity && one.key_id() == query.key_id;
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let learned = state.of(query.identity).iter().map(|peer| &peer.certificate);
        let mut learned = learned.filter(|one| is_it(one) && one.is_valid_at(query.now));
        // What comes along may be renewed with the same key.
        Ok(match query.presented.filter(|presented| is_it(presented)) {
            Some(presented) => {
                let same = learned.find(|one| one.fingerprint() == presented.fingerprint());
                Some(same.unwrap_or(presented).clone())
            }
            // One that has expired says why its messages are refused.
            None => learned.next().cloned().or(known),
        })
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let mut found = self.known.recipients(query)?;
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let now = query.now;
        let learned: Vec<Arc<Certificate>> = match query.recipient {
            Recipient::One(identity) => current(state.of(identity), now).map(|peer| peer.certificate.clone()).collect(),
            Recipient::Mappers => {
                let mappers = state.by_identity.iter().filter(|(identity, _)| identity.role() == Role::Mapper);
                let present = mappers.flat_map(|(_, peers)| current(peers, now)).filter(|peer| peer.is_present(now));
                let mut present: Vec<&Peer> = present.collect();
                present.sort_by_key(|peer| std::cmp::Reverse(peer.heard()));
                let room = GROUP.saturating_sub(found.len());
                present.into_iter().take(room).map(|peer| peer.certificate.clone()).collect()
            }
        };
        for certificate in learned {
            if !found.iter().any(|known| known.fingerprint() == certificate.fingerprint()) {
                found.push(certificate);
            }
        }
        Ok(found)
    }

    fn learned(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.known.learned(certificate, now);
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let same = |peer: &&Peer| peer.certificate.fingerprint() == certificate.fingerprint();
        if let Some(peer) = state.of(certificate.identity()).iter().find(same) {
            peer.hear(now);
            return;
        }
        let role = certificate.identity().role();
        let full = state.of(certificate.identity()).len() >= EACH;
        if !full && !self.make_room(&mut state, role, now) {
            return;
        }
        let peers = state.by_identity.entry(certificate.identity().clone()).or_default();
        let before = peers.len();
        while peers.len() >= EACH {
            let silent = peers.iter().enumerate().min_by_key(|(_, peer)| peer.heard()).map_or(0, |(index, _)| index);
            peers.remove(silent);
        }
        peers.push(Peer { certificate: certificate.clone(), heard: AtomicU64::new(now.as_micros()) });
        // The newest first.
        peers.sort_by_key(|peer| std::cmp::Reverse(peer.certificate.not_before()));
        let after = peers.len();
        let count = state.count_mut(role);
        *count = count.saturating_sub(before).saturating_add(after);
        self.learned.fetch_add(1, Ordering::AcqRel);
        tracing::debug!(identity = %certificate.identity(), "learned a certificate");
    }

    fn heard(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.known.heard(certificate, now);
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let same = |peer: &&Peer| peer.certificate.fingerprint() == certificate.fingerprint();
        if let Some(peer) = state.of(certificate.identity()).iter().find(same) {
            peer.hear(now);
        }
    }

    fn learns(&self) -> bool {
        true
    }

    fn may_block(&self, now: Timestamp) -> bool {
        self.known.may_block(now)
    }

    fn generation(&self) -> Option<u64> {
        Some(self.known.generation()?.saturating_add(self.learned.load(Ordering::Acquire)))
    }
}

impl fmt::Debug for TrustStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_struct("TrustStore")
            .field("agents", &state.agents)
            .field("mappers", &state.mappers)
            .field("known", &self.known)
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

    struct Place {
        ca: CertificateAuthority,
        store: TrustStore,
        now: Timestamp,
    }

    impl Place {
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
    fn s02_a_certificate_that_comes_along_answers_for_its_message_and_is_kept_only_when_told() {
        let place = Place::new(10);
        let fred = agent("fred");
        let certificate = place.issue(&fred, place.now);
        let mut query = SignerQuery::new(&fred, certificate.key_id(), place.now);
        query.presented = Some(&certificate);
        assert!(place.store.signer(&query).unwrap().is_some());
        assert!(!place.knows(&certificate, place.now), "kept without being told");
        // Another's name, or another key, is nobody's.
        let bob = agent("bob");
        let mut other = SignerQuery::new(&bob, certificate.key_id(), place.now);
        other.presented = Some(&certificate);
        assert!(place.store.signer(&other).unwrap().is_none());
        let key = KeyId::new(b"another").unwrap();
        let mut other = SignerQuery::new(&fred, &key, place.now);
        other.presented = Some(&certificate);
        assert!(place.store.signer(&other).unwrap().is_none());

        place.store.learned(&certificate, place.now);
        assert!(place.knows(&certificate, place.now));
        assert_eq!(place.to(Recipient::One(&fred), place.now).len(), 1);
        assert!(!place.knows(&certificate, place.now.saturating_add(DAY * 3)), "known beyond its expiry");
    }

    #[test]
    fn s02_after_a_renewal_both_are_encrypted_to_until_the_older_is_silent_for_an_hour() {
        let place = Place::new(10);
        let fred = agent("fred");
        let (old, later) = (place.issue(&fred, place.now), place.now.saturating_add(HOUR));
        let new = place.issue(&fred, later);
        place.store.learned(&old, place.now);
        place.store.heard(&old, later);
        place.store.learned(&new, later);
        let both = place.to(Recipient::One(&fred), later);
        assert_eq!(
            both.iter().map(|one| one.fingerprint()).collect::<Vec<_>>(),
            [new.fingerprint(), old.fingerprint()]
        );
        let after = later.saturating_add(HOUR + Duration::from_secs(1));
        let one = place.to(Recipient::One(&fred), after);
        assert_eq!(one.iter().map(|one| one.fingerprint()).collect::<Vec<_>>(), [new.fingerprint()]);
        assert!(place.knows(&old, after), "what it signed may still be on its way");
    }

    #[test]
    fn s02_a_flood_of_new_certificates_displaces_nothing_in_use() {
        let place = Place::new(3);
        let used: Vec<_> = ["a", "b"].map(|name| place.issue(&agent(name), place.now)).into();
        used.iter().for_each(|one| place.store.learned(one, place.now));
        for n in 0..20 {
            place.store.learned(&place.issue(&agent(&format!("flood-{n}")), place.now), place.now);
        }
        assert!(used.iter().all(|one| place.knows(one, place.now)));
        assert_eq!(place.store.learned_certificates().len(), 3);
        // Nor does one identity with many certificates.
        for _ in 0..10 {
            place.store.learned(&place.issue(&agent("a"), place.now), place.now);
        }
        assert!(place.knows(&used[1], place.now));
        assert!(place.store.learned_certificates().len() <= 3 + EACH);
        // What is silent for long gives way, what is heard does not.
        let later = place.now.saturating_add(HOUR * 2);
        place.store.heard(&used[1], later);
        let late = place.issue(&agent("late"), later);
        place.store.learned(&late, later);
        assert!(place.knows(&late, later) && place.knows(&used[1], later));
        // A mapper has a place of its own.
        let mapper = place.issue(&Identity::mapper("m").unwrap(), later);
        place.store.learned(&mapper, later);
        assert!(place.knows(&mapper, later));
    }

    #[test]
    fn s02_the_mappers_are_those_that_are_heard() {
        let place = Place::new(3);
        let mappers = ["m1", "m2"].map(|name| place.issue(&Identity::mapper(name).unwrap(), place.now));
        mappers.iter().for_each(|one| place.store.learned(one, place.now));
        place.store.learned(&place.issue(&agent("a"), place.now), place.now);
        assert_eq!(place.to(Recipient::Mappers, place.now).len(), 2);
        let later = place.now.saturating_add(HOUR * 2);
        place.store.heard(&mappers[1], later);
        let present = place.to(Recipient::Mappers, later);
        assert_eq!(present.iter().map(|one| one.fingerprint()).collect::<Vec<_>>(), [mappers[1].fingerprint()]);
    }

    #[test]
    fn s02_what_has_expired_or_was_revoked_is_dropped() {
        let place = Place::new(10);
        let (old, later) = (place.issue(&agent("old"), place.now), place.now.saturating_add(DAY * 3));
        place.store.learned(&old, place.now);
        place.store.learned(&place.issue(&agent("new"), later), later);
        let kept = place.store.learned_certificates();
        assert_eq!(kept.iter().map(|one| one.identity().name()).collect::<Vec<_>>(), ["new"]);
    }
}
