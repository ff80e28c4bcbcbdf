//! s02: the directory store while the directory changes, alone and behind a cache.

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

use crate::harness::WAIT_TIMEOUT;
use crate::harness::pki::{T0, agent, at, mapper};

const DAY: Duration = Duration::from_secs(86_400);

/// A directory with a CA certificate, and the CA.
struct TestDirectory {
    dir: tempfile::TempDir,
    ca: CertificateAuthority,
}

impl TestDirectory {
    fn new() -> Self {
        let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 1000, T0).unwrap();
        let directory = Self { dir: tempfile::tempdir().unwrap(), ca };
        directory.write("ca.pem", &directory.ca.certificate().to_pem().unwrap());
        directory
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

/// Waits for a condition. The tests' clock does not move, so that only change notifications can cause it.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {WAIT_TIMEOUT:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn s02_directory_store_reads_agents_mappers_and_ca() {
    let test = TestDirectory::new();
    let (fred, m1, m2) = (agent("fred"), mapper("m1"), mapper("m2"));
    let [fred_is, m1_is, m2_is] = [&fred, &m1, &m2].map(|identity| test.issue(identity, T0));
    [&fred_is, &m1_is, &m2_is].into_iter().for_each(|certificate| test.put(certificate));
    // Keys and other files are ignored.
    test.write("agent-fred-key.pem", b"not even a key");
    test.write("notes.txt", b"hello");
    let store = test.open();
    assert_eq!(to(&store, Recipient::One(&fred), T0), set(&[&fred_is]));
    assert_eq!(to(&store, Recipient::Mappers, T0), set(&[&m1_is, &m2_is]));
    assert!(signs(&store, &fred_is, T0));
    assert!(!signs(&store, &test.issue(&fred, T0), T0), "an unknown key");
    assert_eq!(store.certificates().len(), 3);
    assert_eq!(store.errors(), Vec::<String>::new());
    assert_eq!(store.trust().unwrap().verify(&fred_is, &[], T0), Ok(()));
}

#[test]
fn s02_new_and_removed_files_are_noticed() {
    let test = TestDirectory::new();
    let store = test.open();
    let fred = test.issue(&agent("fred"), T0);
    assert!(!signs(&store, &fred, T0));
    let before = store.generation();
    test.put(&fred);
    eventually("fred is known", || signs(&store, &fred, T0));
    assert!(store.generation() > before);
    let before = store.generation();
    std::fs::remove_file(test.path().join("agent-fred.pem")).unwrap();
    eventually("fred is unknown", || !signs(&store, &fred, T0));
    assert!(to(&store, Recipient::One(&agent("fred")), T0).is_empty());
    assert!(store.generation() > before);
}

#[test]
fn s02_directory_store_may_block_only_when_a_scan_is_due() {
    let test = TestDirectory::new();
    let store = test.open();
    let ask = |now| to(&store, Recipient::One(&agent("fred")), now).len();
    assert_eq!(ask(T0), 0);
    assert!(!store.may_block(T0), "it was scanned just now");
    let later = T0.saturating_add(Duration::from_secs(60));
    assert!(store.may_block(later));
    assert_eq!(ask(later), 0);
    assert!(!store.may_block(later));
    test.put(&test.issue(&agent("fred"), T0));
    eventually("the change is notified", || store.may_block(later));
    eventually("fred is known", || ask(later) == 1);
    eventually("no scan is due", || {
        ask(later);
        !store.may_block(later)
    });
}

#[test]
fn s02_replaced_certificate_stays_known_for_an_hour() {
    let test = TestDirectory::new();
    let fred = agent("fred");
    let (old, new) = (test.issue(&fred, T0), test.issue(&fred, at(3600)));
    test.put(&old);
    let store = test.open();
    test.put(&new);
    let now = at(3600);
    eventually("the new one is used", || signs(&store, &new, now));
    assert!(signs(&store, &old, now), "messages that it signed may still arrive");
    assert_eq!(to(&store, Recipient::One(&fred), now), set(&[&old, &new]), "fred may not use the new one yet");
    let end = at(3600 + 3600);
    assert!(!signs(&store, &old, end) && signs(&store, &new, end));
    assert_eq!(to(&store, Recipient::One(&fred), end), set(&[&new]));
    // Both stay known while they are in the file.
    test.write("agent-fred.pem", &[new.to_pem(), old.to_pem()].concat());
    eventually("both are known", || signs(&store, &old, end) && signs(&store, &new, end));
}

#[test]
fn s02_removed_certificate_stays_unknown_when_a_new_one_arrives() {
    let test = TestDirectory::new();
    let (compromised, new) = (test.issue(&agent("fred"), T0), test.issue(&agent("fred"), T0));
    test.put(&compromised);
    let store = test.open();
    std::fs::remove_file(test.path().join("agent-fred.pem")).unwrap();
    eventually("the compromised one is unknown", || !signs(&store, &compromised, T0));
    test.put(&new);
    eventually("the new one is known", || signs(&store, &new, T0));
    assert!(!signs(&store, &compromised, T0));
}

#[test]
fn s02_broken_file_is_reported_and_affects_no_other() {
    let test = TestDirectory::new();
    let (fred, bob) = (test.issue(&agent("fred"), T0), test.issue(&agent("bob"), T0));
    test.put(&fred);
    test.put(&bob);
    let store = test.open();
    test.write("agent-fred.pem", b"-----BEGIN CERTIFICATE-----\nMII");
    eventually("it is reported", || store.errors().len() == usize::from(signs(&store, &bob, T0)));
    assert!(store.errors()[0].contains("agent-fred.pem"), "{:?}", store.errors());
    assert!(signs(&store, &fred, T0), "another program may be writing it");
    assert!(!signs(&store, &fred, at(60)), "only for a minute");
    assert!(signs(&store, &bob, at(60)));
    test.put(&fred);
    eventually("the error is gone", || signs(&store, &fred, at(60)));
    assert_eq!(store.errors(), Vec::<String>::new());

    for (name, content, why) in [
        ("agent-fred.pem", bob.to_pem(), "certificate of nanite-bob"),
        ("agent-fred.pem", std::fs::read(test.path().join("ca.pem")).unwrap(), "CA certificate"),
        ("agent-a.b.pem", bob.to_pem(), "not named after"),
        ("mapper-bob.pem", bob.to_pem(), "certificate of nanite-bob"),
        ("agent-fred.pem", vec![b'\n'; 2 * 1024 * 1024], "longer than"),
    ] {
        test.write(name, &content);
        eventually(why, || signs(&store, &bob, T0) && store.errors().iter().any(|error| error.contains(why)));
        std::fs::remove_file(test.path().join(name)).unwrap();
        eventually("the error is gone", || signs(&store, &bob, T0) && store.errors().is_empty());
    }
}

#[test]
fn s02_named_pipe_in_directory_does_not_block() {
    let test = TestDirectory::new();
    let bob = test.issue(&agent("bob"), T0);
    test.put(&bob);
    nix::unistd::mkfifo(&test.path().join("agent-fred.pem"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let store = test.open();
    assert!(signs(&store, &bob, T0));
    assert!(store.errors()[0].contains("not a file"), "{:?}", store.errors());
}

#[test]
fn s02_change_without_notification_is_noticed_within_five_seconds() {
    let test = TestDirectory::new();
    let fred = test.issue(&agent("fred"), T0);
    // Changes behind a symbolic link are not notified.
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("fred.pem");
    std::fs::write(&target, fred.to_pem()).unwrap();
    std::os::unix::fs::symlink(&target, test.path().join("agent-fred.pem")).unwrap();
    let store = test.open();
    assert!(signs(&store, &fred, T0));
    let new = test.issue(&agent("fred"), T0);
    std::fs::write(&target, new.to_pem()).unwrap();
    assert!(!signs(&store, &new, at(4)));
    assert!(signs(&store, &new, at(5)));
    let newest = test.issue(&agent("fred"), T0);
    std::fs::write(&target, newest.to_pem()).unwrap();
    assert!(signs(&store, &newest, T0), "a clock that goes back causes a scan");
}

#[test]
fn s02_missing_directory_fails_queries_until_it_is_back() {
    let test = TestDirectory::new();
    let fred = test.issue(&agent("fred"), T0);
    test.put(&fred);
    let store = test.open();
    let away = test.path().with_extension("away");
    std::fs::rename(test.path(), &away).unwrap();
    let query = SignerQuery::new(fred.identity(), fred.key_id(), T0);
    eventually("it fails", || matches!(store.signer(&query), Err(StoreError::Unreadable { .. })));
    assert!(store.errors()[0].contains("no directory"), "{:?}", store.errors());
    assert!(store.reload(T0).is_err());
    std::fs::rename(&away, test.path()).unwrap();
    assert!(signs(&store, &fred, at(5)));
    assert_eq!(store.errors(), Vec::<String>::new());
    // Notifications work as before.
    let bob = test.issue(&agent("bob"), T0);
    test.put(&bob);
    eventually("bob is known", || signs(&store, &bob, at(5)));
}

#[test]
fn s02_trust_follows_ca_pem_and_survives_a_broken_one() {
    let test = TestDirectory::new();
    let store = test.open();
    let trust = store.trust().unwrap();
    let next = CertificateAuthority::create("example.org", KeyType::P256, DAY * 1000, T0).unwrap();
    let theirs = next.issue(&agent("fred"), KeyType::P256, DAY, T0).unwrap().certificate().clone();
    let ours = test.issue(&agent("bob"), T0);
    let verify = |certificate: &Certificate| {
        // A query makes the store scan.
        assert!(!signs(&store, certificate, T0));
        trust.verify(certificate, &[], T0)
    };
    assert_eq!(verify(&theirs), Err(TrustError::UnknownIssuer));
    let pems = [test.ca.certificate(), next.certificate()].map(|ca| ca.to_pem().unwrap());
    test.write("ca.pem", &pems.concat());
    eventually("both are trusted", || verify(&theirs) == Ok(()) && verify(&ours) == Ok(()));
    test.write("ca.pem", b"nothing");
    eventually("it is reported", || verify(&theirs) == Ok(()) && store.errors().len() == 1);
    std::fs::remove_file(test.path().join("ca.pem")).unwrap();
    eventually("the missing file is reported", || verify(&ours) == Ok(()) && store.errors()[0].contains("no CA"));
    test.write("ca.pem", &pems[1]);
    eventually("the old CA is not trusted", || verify(&ours) == Err(TrustError::UnknownIssuer));
    assert_eq!((verify(&theirs), store.errors()), (Ok(()), Vec::new()));
}

#[test]
fn s02_unusable_directory_is_refused_at_open() {
    let missing = DirectoryCertificateStore::open("/nonexistent", T0);
    assert!(matches!(missing, Err(DirectoryError::NoDirectory(_))));
    let test = TestDirectory::new();
    test.write("ca.pem", b"nothing");
    let broken = DirectoryCertificateStore::open(test.path(), T0);
    assert!(matches!(broken, Err(DirectoryError::Authority { .. })));
    std::fs::remove_file(test.path().join("ca.pem")).unwrap();
    assert!(test.open().trust().is_none(), "there is no trust without a CA");
}

#[test]
fn s02_cache_follows_the_directory_store() {
    let test = TestDirectory::new();
    let fred = test.issue(&agent("fred"), T0);
    let store = CachedCertificateStore::new(Arc::new(test.open()));
    assert!(!signs(&store, &fred, T0));
    test.put(&fred);
    eventually("fred is known", || signs(&store, &fred, T0));
    std::fs::remove_file(test.path().join("agent-fred.pem")).unwrap();
    eventually("fred is unknown", || !signs(&store, &fred, T0));
}

#[test]
fn s02_concurrent_queries_while_the_directory_changes() {
    let test = TestDirectory::new();
    let bob = test.issue(&agent("bob"), T0);
    test.put(&bob);
    let store = test.open();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(signs(&store, &bob, T0), "bob is known all the time");
                }
            });
        }
        let _done = SetOnDrop(&done);
        for n in 0..20 {
            let fred = test.issue(&agent(&format!("fred{n}")), T0);
            test.put(&fred);
            eventually("fred is known", || signs(&store, &fred, T0));
        }
    });
    assert_eq!(store.certificates().len(), 21);
}

/// Sets a flag, even when a test panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
