//! The memory of answers, seen from those who ask.

use super::*;
use crate::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;

const DAY: Duration = Duration::from_secs(86_400);
const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

fn after(time: Duration) -> Timestamp {
    NOW.saturating_add(time)
}

/// A store that counts its questions, and can be made to fail or to wait.
#[derive(Debug, Default)]
struct Counting {
    inner: Mutex<StaticCertificateStore>,
    asked: AtomicUsize,
    generation: AtomicU64,
    fails: Mutex<Option<&'static str>>,
    gate: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Counting {
    fn count<T>(&self, answer: impl FnOnce(&StaticCertificateStore) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let gate = self.gate.lock().unwrap().take();
        if let Some(gate) = gate {
            gate.recv().unwrap();
        }
        match *self.fails.lock().unwrap() {
            Some("panic") => panic!("a store of the user's own"),
            Some(why) => Err(StoreError::Other(why.into())),
            None => answer(&self.inner.lock().unwrap()),
        }
    }

    fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

impl CertificateStore for Counting {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        self.count(|inner| inner.signer(query))
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        self.count(|inner| inner.recipients(query))
    }

    fn generation(&self) -> Option<u64> {
        Some(self.generation.load(Ordering::SeqCst))
    }
}

struct Bench {
    counting: Arc<Counting>,
    store: CachedCertificateStore,
    certificates: Vec<Arc<Certificate>>,
}

fn bench(names: usize) -> Bench {
    let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 100, NOW).unwrap();
    let issue = |name| {
        let identity = Identity::agent(&format!("a{name}")).unwrap();
        ca.issue(&identity, KeyType::P256, DAY, NOW).unwrap().certificate().clone()
    };
    let certificates: Vec<_> = (0..names).map(issue).collect();
    let counting = Counting::default();
    *counting.inner.lock().unwrap() = StaticCertificateStore::new(certificates.clone());
    let counting = Arc::new(counting);
    Bench { store: CachedCertificateStore::new(counting.clone()), counting, certificates }
}

impl Bench {
    fn signer(&self, certificate: &Certificate, now: Timestamp) -> Result<bool, StoreError> {
        let query = SignerQuery::new(certificate.identity(), certificate.key_id(), now);
        Ok(self.store.signer(&query)?.is_some())
    }

    fn recipients(&self, name: &str, now: Timestamp) -> usize {
        let identity = Identity::agent(name).unwrap();
        self.store.recipients(&RecipientQuery::new(Recipient::One(&identity), now)).unwrap().len()
    }
}

#[test]
fn s02_an_answer_is_asked_for_once_and_again_after_its_time() {
    let bench = bench(1);
    let certificate = &bench.certificates[0];
    for _ in 0..3 {
        assert!(bench.signer(certificate, NOW).unwrap());
        assert_eq!(bench.recipients("a0", NOW), 1);
    }
    assert_eq!(bench.counting.asked(), 2, "once for each question");
    let almost = after(Duration::from_micros(59_999_999));
    assert!(bench.signer(certificate, almost).unwrap());
    assert_eq!(bench.counting.asked(), 0);
    assert!(bench.signer(certificate, after(Duration::from_secs(60))).unwrap());
    assert_eq!(bench.counting.asked(), 1);
    assert!(bench.signer(certificate, NOW).unwrap(), "the clock went back");
    assert_eq!(bench.counting.asked(), 1);
}

#[test]
fn s02_nothing_is_kept_past_the_expiry_of_a_certificate() {
    let mut bench = bench(1);
    bench.store = CachedCertificateStore::new(bench.counting.clone()).time_to_live(DAY * 10);
    assert_eq!(bench.recipients("a0", NOW), 1);
    assert_eq!(bench.recipients("a0", after(DAY)), 0);
    assert_eq!(bench.counting.asked(), 2);
}

#[test]
fn s02_at_most_the_capacity_is_kept_and_the_least_used_goes() {
    let mut bench = bench(101);
    let ask = |bench: &Bench, n: usize| bench.recipients(&format!("a{n}"), NOW);
    (0..100).for_each(|n| assert_eq!(ask(&bench, n), 1));
    assert_eq!(ask(&bench, 0), 1);
    assert_eq!(bench.counting.asked(), 100);
    assert_eq!((ask(&bench, 100), ask(&bench, 0)), (1, 1));
    assert_eq!(bench.counting.asked(), 1);
    assert_eq!(ask(&bench, 1), 1);
    assert_eq!(bench.counting.asked(), 1, "the one that was not used for longest has gone");
    bench.store = CachedCertificateStore::new(bench.counting.clone()).capacity(0);
    assert_eq!((ask(&bench, 0), ask(&bench, 0)), (1, 1));
    assert_eq!(bench.counting.asked(), 1, "one is always kept");
}

#[test]
fn s02_a_flood_of_unknown_names_pushes_out_nothing() {
    let bench = bench(100);
    let known = || (0..100).map(|n| bench.recipients(&format!("a{n}"), NOW)).sum::<usize>();
    assert_eq!(known(), 100);
    (0..10_000).for_each(|n| assert_eq!(bench.recipients(&format!("unknown{n}"), NOW), 0));
    assert_eq!(bench.store.recipients.lock().missing.len(), 1000);
    bench.counting.asked();
    assert_eq!(known(), 100);
    assert_eq!(bench.counting.asked(), 0);
}

#[test]
fn s02_who_was_not_known_is_asked_for_again_soon() {
    let bench = bench(1);
    let late = bench.certificates[0].clone();
    *bench.counting.inner.lock().unwrap() = StaticCertificateStore::default();
    assert_eq!((bench.recipients("a0", NOW), bench.recipients("a0", NOW)), (0, 0));
    assert_eq!(bench.counting.asked(), 1);
    *bench.counting.inner.lock().unwrap() = StaticCertificateStore::new([late.clone()]);
    assert_eq!(bench.recipients("a0", after(Duration::from_secs(4))), 0);
    assert_eq!(bench.recipients("a0", after(Duration::from_secs(5))), 1);
    // Or at once, when its certificate has come with a message.
    *bench.counting.inner.lock().unwrap() = StaticCertificateStore::default();
    bench.store.clear();
    assert_eq!(bench.recipients("a0", NOW), 0);
    *bench.counting.inner.lock().unwrap() = StaticCertificateStore::new([late.clone()]);
    bench.store.learned(&late, NOW);
    assert_eq!(bench.recipients("a0", NOW), 1);
}

#[test]
fn s02_everything_is_forgotten_when_the_other_store_has_changed() {
    let bench = bench(1);
    assert_eq!(bench.recipients("a0", NOW), 1);
    *bench.counting.inner.lock().unwrap() = StaticCertificateStore::default();
    assert_eq!(bench.recipients("a0", NOW), 1);
    bench.counting.generation.fetch_add(1, Ordering::SeqCst);
    assert_eq!(bench.recipients("a0", NOW), 0);
    assert_eq!(bench.store.generation(), Some(1));
}

#[test]
fn s02_errors_are_told_and_not_kept() {
    let bench = bench(1);
    *bench.counting.fails.lock().unwrap() = Some("the database is away");
    let refused = bench.signer(&bench.certificates[0], NOW).unwrap_err();
    assert_eq!(refused.to_string(), "the database is away");
    *bench.counting.fails.lock().unwrap() = None;
    assert!(bench.signer(&bench.certificates[0], NOW).unwrap());
    assert_eq!(bench.counting.asked(), 2);
}

/// Lets one thread ask and wait in the other store, and others come; gives what all were told.
fn crowd(bench: &Bench) -> Vec<std::thread::Result<Result<bool, StoreError>>> {
    const OTHERS: usize = 7;
    let (open, gate) = mpsc::channel();
    *bench.counting.gate.lock().unwrap() = Some(gate);
    let flights = |wanted: usize| {
        let flights: Vec<_> = bench.store.signers.lock().flights.values().cloned().collect();
        // The first thread, this test and the memory hold it, and so does everybody who waits.
        flights.len() == 1 && Arc::strong_count(&flights[0]) == wanted + 3
    };
    std::thread::scope(|scope| {
        let ask = || bench.signer(&bench.certificates[0], NOW);
        let mut threads = vec![scope.spawn(ask)];
        wait_until(|| bench.counting.asked.load(Ordering::SeqCst) == 1);
        threads.extend((0..OTHERS).map(|_| scope.spawn(ask)));
        wait_until(|| flights(OTHERS));
        open.send(()).unwrap();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    })
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "it does not come");
        std::thread::yield_now();
    }
}

#[test]
fn s02_many_who_ask_at_once_cause_one_question() {
    let bench = bench(1);
    let told = crowd(&bench);
    assert!(told.into_iter().all(|told| told.unwrap().unwrap()));
    assert_eq!(bench.counting.asked(), 1);
}

#[test]
fn s02_those_who_wait_are_told_of_an_error_and_not_left_alone_by_a_panic() {
    let bench = bench(1);
    *bench.counting.fails.lock().unwrap() = Some("away");
    assert!(crowd(&bench).into_iter().all(|told| told.unwrap().is_err_and(|e| e.to_string() == "away")));
    bench.counting.asked();
    *bench.counting.fails.lock().unwrap() = Some("panic");
    let told = crowd(&bench);
    assert_eq!(told.iter().filter(|told| told.is_err()).count(), 1, "the one that asked");
    let others = told.into_iter().filter_map(Result::ok);
    assert!(others.map(Result::unwrap_err).all(|error| error.to_string().contains("panicked")));
    bench.counting.fails.lock().unwrap_or_else(PoisonError::into_inner).take();
    bench.counting.fails.clear_poison();
    assert!(bench.signer(&bench.certificates[0], NOW).unwrap(), "the next question is asked again");
}

#[test]
fn s02_what_came_with_a_message_is_not_mixed_up_with_what_is_kept() {
    let bench = bench(1);
    let certificate = &bench.certificates[0];
    let mut query = SignerQuery::new(certificate.identity(), certificate.key_id(), NOW);
    query.presented = Some(certificate);
    for _ in 0..2 {
        assert!(bench.store.signer(&query).unwrap().is_some());
    }
    assert_eq!(bench.counting.asked(), 2);
}
