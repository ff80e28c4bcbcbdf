//! s02: certificates from a directory that changes, alone and behind a cache.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nanite::certs::{
    CachedCertificateStore, Certificate, CertificateAuthority, CertificateStore, DirectoryCertificateStore,
    DirectoryError, KeyType, Recipient, RecipientQuery, SignerQuery, StoreError, TrustError,
};
use nanite::clock::Timestamp;
use nanite::packet::Identity;

use crate::harness::pki::{T0, agent, at, mapper};

const DAY: Duration = Duration::from_secs(86_400);

/// A directory with a CA certificate, and the CA.
struct Place {
    dir: tempfile::TempDir,
    ca: CertificateAuthority,
}

impl Place {
    fn new() -> Self {
        let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 1000, T0).unwrap();
        let place = Self { dir: tempfile::tempdir().unwrap(), ca };
        place.write("ca.pem", &place.ca.certificate().to_pem().unwrap());
        place
    }

    fn issue(&self, identity: &Identity, now: Timestamp) -> Arc<Certificate> {
        self.ca.issue(identity, KeyType::P256, DAY, now).unwrap().certificate().clone()
    }

    /// Writes a file as the tool does: under another name, then renamed.
    fn write(&self, name: &str, content: &[u8]) {
        let temporary = self.path().join(".temporary");
        std::fs::write(&temporary, content).unwrap();
        std::fs::rename(&temporary, self.path().join(name)).unwrap();
    }

    fn put(&self, certificate: &Certificate) {
        let identity = certificate.identity();
        self.write(&format!("{}-{}.pem", identity.role(), identity.name()), &certificate.to_pem());
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn open(&self) -> DirectoryCertificateStore {
        DirectoryCertificateStore::open(self.path(), T0).unwrap()
    }
}

fn to(store: &dyn CertificateStore, recipient: Recipient<'_>, now: Timestamp) -> HashSet<[u8; 32]> {
    let found = store.recipients(&RecipientQuery::new(recipient, now)).unwrap();
    found.iter().map(|certificate| *certificate.fingerprint()).collect()
}

fn signs(store: &dyn CertificateStore, certificate: &Certificate, now: Timestamp) -> bool {
    let found = store.signer(&SignerQuery::new(certificate.identity(), certificate.key_id(), now)).unwrap();
    found.is_some_and(|found| found.fingerprint() == certificate.fingerprint())
}

fn set(certificates: &[&Arc<Certificate>]) -> HashSet<[u8; 32]> {
    certificates.iter().map(|certificate| *certificate.fingerprint()).collect()
}

/// Waits for what the system tells of a directory, with a clock that stands still: nothing else can bring the change.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn s02_a_directory_holds_agents_mappers_and_a_ca() {
    let place = Place::new();
    let (fred, m1, m2) = (agent("fred"), mapper("m1"), mapper("m2"));
    let [fred_is, m1_is, m2_is] = [&fred, &m1, &m2].map(|identity| place.issue(identity, T0));
    [&fred_is, &m1_is, &m2_is].into_iter().for_each(|certificate| place.put(certificate));
    // Keys and whatever else is there are nobody's certificates, and are not touched.
    place.write("agent-fred-key.pem", b"not even a key");
    place.write("notes.txt", b"hello");
    let store = place.open();
    assert_eq!(to(&store, Recipient::One(&fred), T0), set(&[&fred_is]));
    assert_eq!(to(&store, Recipient::Mappers, T0), set(&[&m1_is, &m2_is]));
    assert!(signs(&store, &fred_is, T0));
    assert!(!signs(&store, &place.issue(&fred, T0), T0), "a key that nobody knows");
    assert_eq!(store.certificates().len(), 3);
    assert_eq!(store.errors(), Vec::<String>::new());
    assert_eq!(store.trust().unwrap().verify(&fred_is, &[], T0), Ok(()));
}

#[test]
fn s02_new_and_removed_files_take_effect_by_themselves() {
    let place = Place::new();
    let store = place.open();
    let fred = place.issue(&agent("fred"), T0);
    assert!(!signs(&store, &fred, T0));
    let before = store.generation();
    place.put(&fred);
    eventually("fred is known", || signs(&store, &fred, T0));
    assert!(store.generation() > before);
    let before = store.generation();
    std::fs::remove_file(place.path().join("agent-fred.pem")).unwrap();
    eventually("fred is forgotten", || !signs(&store, &fred, T0));
    assert!(to(&store, Recipient::One(&agent("fred")), T0).is_empty());
    assert!(store.generation() > before);
}

#[test]
fn s02_a_directory_says_when_it_has_to_be_looked_at() {
    let place = Place::new();
    let store = place.open();
    let ask = |now| to(&store, Recipient::One(&agent("fred")), now).len();
    assert_eq!(ask(T0), 0);
    assert!(!store.may_block(T0), "it was looked at a moment ago");
    let later = T0.saturating_add(Duration::from_secs(60));
    assert!(store.may_block(later));
    assert_eq!(ask(later), 0);
    assert!(!store.may_block(later));
    place.put(&place.issue(&agent("fred"), T0));
    eventually("the change is told of", || store.may_block(later));
    eventually("fred is known", || ask(later) == 1);
    eventually("nothing is to be looked at any more", || {
        ask(later);
        !store.may_block(later)
    });
}

#[test]
fn s02_a_replaced_certificate_is_known_beside_the_new_one_for_an_hour() {
    let place = Place::new();
    let fred = agent("fred");
    let (old, new) = (place.issue(&fred, T0), place.issue(&fred, at(3600)));
    place.put(&old);
    let store = place.open();
    place.put(&new);
    let now = at(3600);
    eventually("the new one is used", || signs(&store, &new, now));
    assert!(signs(&store, &old, now), "messages signed before are on their way");
    assert_eq!(to(&store, Recipient::One(&fred), now), set(&[&old, &new]), "fred may not have read the new one yet");
    let end = at(3600 + 3600);
    assert!(!signs(&store, &old, end) && signs(&store, &new, end));
    assert_eq!(to(&store, Recipient::One(&fred), end), set(&[&new]));
    // Both in one file are known for as long as they are there.
    place.write("agent-fred.pem", &[new.to_pem(), old.to_pem()].concat());
    eventually("both are back", || signs(&store, &old, end) && signs(&store, &new, end));
}

#[test]
fn s02_a_removed_certificate_does_not_come_back_with_a_new_one() {
    let place = Place::new();
    let (stolen, new) = (place.issue(&agent("fred"), T0), place.issue(&agent("fred"), T0));
    place.put(&stolen);
    let store = place.open();
    std::fs::remove_file(place.path().join("agent-fred.pem")).unwrap();
    eventually("the stolen one is forgotten", || !signs(&store, &stolen, T0));
    place.put(&new);
    eventually("the new one is known", || signs(&store, &new, T0));
    assert!(!signs(&store, &stolen, T0));
}

#[test]
fn s02_a_broken_file_is_reported_and_takes_no_other_down() {
    let place = Place::new();
    let (fred, bob) = (place.issue(&agent("fred"), T0), place.issue(&agent("bob"), T0));
    place.put(&fred);
    place.put(&bob);
    let store = place.open();
    place.write("agent-fred.pem", b"-----BEGIN CERTIFICATE-----\nMII");
    eventually("it is reported", || store.errors().len() == usize::from(signs(&store, &bob, T0)));
    assert!(store.errors()[0].contains("agent-fred.pem"), "{:?}", store.errors());
    assert!(signs(&store, &fred, T0), "it may be in the middle of being written");
    assert!(!signs(&store, &fred, at(60)), "but not for a minute");
    assert!(signs(&store, &bob, at(60)));
    place.put(&fred);
    eventually("it is mended", || signs(&store, &fred, at(60)));
    assert_eq!(store.errors(), Vec::<String>::new());

    for (name, content, why) in [
        ("agent-fred.pem", bob.to_pem(), "certificate of nanite-bob"),
        ("agent-fred.pem", std::fs::read(place.path().join("ca.pem")).unwrap(), "CA certificate"),
        ("agent-a.b.pem", bob.to_pem(), "not named after"),
        ("mapper-bob.pem", bob.to_pem(), "certificate of nanite-bob"),
        ("agent-fred.pem", vec![b'\n'; 2 * 1024 * 1024], "longer than"),
    ] {
        place.write(name, &content);
        eventually(why, || signs(&store, &bob, T0) && store.errors().iter().any(|error| error.contains(why)));
        std::fs::remove_file(place.path().join(name)).unwrap();
        eventually("it is gone", || signs(&store, &bob, T0) && store.errors().is_empty());
    }
}

#[test]
fn s02_a_named_pipe_among_the_certificates_hangs_nobody() {
    let place = Place::new();
    let bob = place.issue(&agent("bob"), T0);
    place.put(&bob);
    nix::unistd::mkfifo(&place.path().join("agent-fred.pem"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let store = place.open();
    assert!(signs(&store, &bob, T0));
    assert!(store.errors()[0].contains("not a file"), "{:?}", store.errors());
}

#[test]
fn s02_a_change_that_nobody_tells_of_is_seen_within_five_seconds() {
    let place = Place::new();
    let fred = place.issue(&agent("fred"), T0);
    // Behind a symbolic link, changes of the content are not told of.
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("fred.pem");
    std::fs::write(&target, fred.to_pem()).unwrap();
    std::os::unix::fs::symlink(&target, place.path().join("agent-fred.pem")).unwrap();
    let store = place.open();
    assert!(signs(&store, &fred, T0));
    let new = place.issue(&agent("fred"), T0);
    std::fs::write(&target, new.to_pem()).unwrap();
    assert!(!signs(&store, &new, at(4)));
    assert!(signs(&store, &new, at(5)));
    let newest = place.issue(&agent("fred"), T0);
    std::fs::write(&target, newest.to_pem()).unwrap();
    assert!(signs(&store, &newest, T0), "a clock that goes back is no reason to wait");
}

#[test]
fn s02_a_directory_that_is_gone_answers_with_an_error_until_it_is_back() {
    let place = Place::new();
    let fred = place.issue(&agent("fred"), T0);
    place.put(&fred);
    let store = place.open();
    let away = place.path().with_extension("away");
    std::fs::rename(place.path(), &away).unwrap();
    let question = SignerQuery::new(fred.identity(), fred.key_id(), T0);
    eventually("it fails", || matches!(store.signer(&question), Err(StoreError::Unreadable { .. })));
    assert!(store.errors()[0].contains("no directory"), "{:?}", store.errors());
    assert!(store.reload(T0).is_err());
    std::fs::rename(&away, place.path()).unwrap();
    assert!(signs(&store, &fred, at(5)));
    assert_eq!(store.errors(), Vec::<String>::new());
    // And it is followed as before.
    let bob = place.issue(&agent("bob"), T0);
    place.put(&bob);
    eventually("bob is known", || signs(&store, &bob, at(5)));
}

#[test]
fn s02_the_trust_follows_ca_pem_and_survives_a_broken_one() {
    let place = Place::new();
    let store = place.open();
    let trust = store.trust().unwrap();
    let next = CertificateAuthority::create("example.org", KeyType::P256, DAY * 1000, T0).unwrap();
    let theirs = next.issue(&agent("fred"), KeyType::P256, DAY, T0).unwrap().certificate().clone();
    let ours = place.issue(&agent("bob"), T0);
    let believes = |certificate: &Certificate| {
        // A question makes the store look.
        assert!(!signs(&store, certificate, T0));
        trust.verify(certificate, &[], T0)
    };
    assert_eq!(believes(&theirs), Err(TrustError::UnknownIssuer));
    let pems = [place.ca.certificate(), next.certificate()].map(|ca| ca.to_pem().unwrap());
    place.write("ca.pem", &pems.concat());
    eventually("both are believed", || believes(&theirs) == Ok(()) && believes(&ours) == Ok(()));
    place.write("ca.pem", b"nothing");
    eventually("it is reported", || believes(&theirs) == Ok(()) && store.errors().len() == 1);
    std::fs::remove_file(place.path().join("ca.pem")).unwrap();
    eventually("its lack is reported", || believes(&ours) == Ok(()) && store.errors()[0].contains("no CA"));
    place.write("ca.pem", &pems[1]);
    eventually("the old one has gone", || believes(&ours) == Err(TrustError::UnknownIssuer));
    assert_eq!((believes(&theirs), store.errors()), (Ok(()), Vec::new()));
}

#[test]
fn s02_a_directory_that_cannot_be_used_is_refused_at_once() {
    let missing = DirectoryCertificateStore::open("/nonexistent", T0);
    assert!(matches!(missing, Err(DirectoryError::NoDirectory(_))));
    let place = Place::new();
    place.write("ca.pem", b"nothing");
    let broken = DirectoryCertificateStore::open(place.path(), T0);
    assert!(matches!(broken, Err(DirectoryError::Authority { .. })));
    std::fs::remove_file(place.path().join("ca.pem")).unwrap();
    assert!(place.open().trust().is_none(), "without a CA there is nothing to trust by");
}

#[test]
fn s02_a_cache_in_front_follows_the_directory() {
    let place = Place::new();
    let fred = place.issue(&agent("fred"), T0);
    let store = CachedCertificateStore::new(Arc::new(place.open()));
    assert!(!signs(&store, &fred, T0));
    place.put(&fred);
    eventually("fred is known", || signs(&store, &fred, T0));
    std::fs::remove_file(place.path().join("agent-fred.pem")).unwrap();
    eventually("fred is forgotten", || !signs(&store, &fred, T0));
}

#[test]
fn s02_many_threads_ask_while_the_directory_changes() {
    let place = Place::new();
    let bob = place.issue(&agent("bob"), T0);
    place.put(&bob);
    let store = place.open();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(signs(&store, &bob, T0), "bob was there all the time");
                }
            });
        }
        let _done = OnDrop(&done);
        for n in 0..20 {
            let fred = place.issue(&agent(&format!("fred{n}")), T0);
            place.put(&fred);
            eventually("fred is known", || signs(&store, &fred, T0));
        }
    });
    assert_eq!(store.certificates().len(), 21);
}

/// Sets a flag however a test ends.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
