//! Tests of the cache through the store's interface.

use super::*;
use crate::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;

const DAY: Duration = Duration::from_secs(86_400);
const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

fn after(time: Duration) -> Timestamp {
    NOW.saturating_add(time)
}

/// A store that counts its queries, and fails, panics or blocks when told to.
#[derive(Debug, Default)]
struct CountingStore {
    inner: Mutex<StaticCertificateStore>,
    queries: AtomicUsize,
    generation: AtomicU64,
    failure: Mutex<Option<&'static str>>,
    gate: Mutex<Option<mpsc::Receiver<()>>>,
}

impl CountingStore {
    fn count<T>(&self, answer: impl FnOnce(&StaticCertificateStore) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.queries.fetch_add(1, Ordering::SeqCst);
        let gate = self.gate.lock().take();
        if let Some(gate) = gate {
            gate.recv().unwrap();
        }
        match *self.failure.lock() {
            Some("panic") => panic!("the store panics"),
            Some(why) => Err(StoreError::Other(why.into())),
            None => answer(&self.inner.lock()),
        }
    }

    fn take_count(&self) -> usize {
        self.queries.swap(0, Ordering::SeqCst)
    }
}

impl CertificateStore for CountingStore {
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

struct TestStore {
    counting: Arc<CountingStore>,
    store: CachedCertificateStore,
    certificates: Vec<Arc<Certificate>>,
}

fn store_with(names: usize) -> TestStore {
    let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 100, NOW).unwrap();
    let issue = |name| {
        let identity = Identity::agent(&format!("a{name}")).unwrap();
        ca.issue(&identity, KeyType::P256, DAY, NOW).unwrap().certificate().clone()
    };
    let certificates: Vec<_> = (0..names).map(issue).collect();
    let counting = CountingStore::default();
    *counting.inner.lock() = StaticCertificateStore::new(certificates.clone());
    let counting = Arc::new(counting);
    TestStore { store: CachedCertificateStore::new(counting.clone()), counting, certificates }
}

impl TestStore {
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
fn s02_cache_queries_again_after_time_to_live() {
    let test = store_with(1);
    let certificate = &test.certificates[0];
    for _ in 0..3 {
        assert!(test.signer(certificate, NOW).unwrap());
        assert_eq!(test.recipients("a0", NOW), 1);
    }
    assert_eq!(test.counting.take_count(), 2, "once for each query");
    let almost = after(Duration::from_micros(59_999_999));
    assert!(test.signer(certificate, almost).unwrap());
    assert_eq!(test.counting.take_count(), 0);
    assert!(test.signer(certificate, after(Duration::from_secs(60))).unwrap());
    assert_eq!(test.counting.take_count(), 1);
    assert!(test.signer(certificate, NOW).unwrap(), "the clock went back");
    assert_eq!(test.counting.take_count(), 1);
}

#[test]
fn s02_cache_keeps_no_answer_past_certificate_expiry() {
    let mut test = store_with(1);
    test.store = CachedCertificateStore::new(test.counting.clone()).time_to_live(DAY * 10);
    assert_eq!(test.recipients("a0", NOW), 1);
    assert_eq!(test.recipients("a0", after(DAY)), 0);
    assert_eq!(test.counting.take_count(), 2);
}

#[test]
fn s02_cache_evicts_least_recently_used_answer() {
    let mut test = store_with(101);
    let query = |test: &TestStore, n: usize| test.recipients(&format!("a{n}"), NOW);
    (0..100).for_each(|n| assert_eq!(query(&test, n), 1));
    assert_eq!(query(&test, 0), 1);
    assert_eq!(test.counting.take_count(), 100);
    assert_eq!((query(&test, 100), query(&test, 0)), (1, 1));
    assert_eq!(test.counting.take_count(), 1);
    assert_eq!(query(&test, 1), 1);
    assert_eq!(test.counting.take_count(), 1, "the least recently used answer was removed");
    test.store = CachedCertificateStore::new(test.counting.clone()).capacity(0);
    assert_eq!((query(&test, 0), query(&test, 0)), (1, 1));
    assert_eq!(test.counting.take_count(), 1, "the capacity is at least one");
}

#[test]
fn s02_flood_of_unknown_names_evicts_no_answers() {
    let test = store_with(100);
    let known = || (0..100).map(|n| test.recipients(&format!("a{n}"), NOW)).sum::<usize>();
    assert_eq!(known(), 100);
    (0..10_000).for_each(|n| assert_eq!(test.recipients(&format!("unknown{n}"), NOW), 0));
    assert_eq!(test.store.recipients.lock().negative.len(), 1000);
    test.counting.take_count();
    assert_eq!(known(), 100);
    assert_eq!(test.counting.take_count(), 0);
}

#[test]
fn s02_negative_answers_are_cached_briefly() {
    let test = store_with(1);
    let late = test.certificates[0].clone();
    *test.counting.inner.lock() = StaticCertificateStore::default();
    assert_eq!((test.recipients("a0", NOW), test.recipients("a0", NOW)), (0, 0));
    assert_eq!(test.counting.take_count(), 1);
    *test.counting.inner.lock() = StaticCertificateStore::new([late.clone()]);
    assert_eq!(test.recipients("a0", after(Duration::from_secs(4))), 0);
    assert_eq!(test.recipients("a0", after(Duration::from_secs(5))), 1);
    // Or at once, when its certificate came with a message.
    *test.counting.inner.lock() = StaticCertificateStore::default();
    test.store.clear();
    assert_eq!(test.recipients("a0", NOW), 0);
    *test.counting.inner.lock() = StaticCertificateStore::new([late.clone()]);
    test.store.learn(&late, NOW);
    assert_eq!(test.recipients("a0", NOW), 1);
}

#[test]
fn s02_cache_is_cleared_when_generation_changes() {
    let test = store_with(1);
    assert_eq!(test.recipients("a0", NOW), 1);
    *test.counting.inner.lock() = StaticCertificateStore::default();
    assert_eq!(test.recipients("a0", NOW), 1);
    test.counting.generation.fetch_add(1, Ordering::SeqCst);
    assert_eq!(test.recipients("a0", NOW), 0);
    assert_eq!(test.store.generation(), Some(1));
}

#[test]
fn s02_store_errors_are_returned_and_not_cached() {
    let test = store_with(1);
    *test.counting.failure.lock() = Some("the database is down");
    let refused = test.signer(&test.certificates[0], NOW).unwrap_err();
    assert_eq!(refused.to_string(), "the database is down");
    *test.counting.failure.lock() = None;
    assert!(test.signer(&test.certificates[0], NOW).unwrap());
    assert_eq!(test.counting.take_count(), 2);
}

/// Makes the same query from eight threads at once, while the first blocks in the other store. Returns all results.
fn query_concurrently(test: &TestStore) -> Vec<std::thread::Result<Result<bool, StoreError>>> {
    const OTHERS: usize = 7;
    let (open, gate) = mpsc::channel();
    *test.counting.gate.lock() = Some(gate);
    let all_wait = |waiting: usize| {
        let loading: Vec<_> = test.store.signers.lock().loading.values().cloned().collect();
        // The first thread, this test, the cache and every waiting thread hold a reference.
        loading.len() == 1 && Arc::strong_count(&loading[0]) == waiting + 3
    };
    std::thread::scope(|scope| {
        let query = || test.signer(&test.certificates[0], NOW);
        let mut threads = vec![scope.spawn(query)];
        wait_until(|| test.counting.queries.load(Ordering::SeqCst) == 1);
        threads.extend((0..OTHERS).map(|_| scope.spawn(query)));
        wait_until(|| all_wait(OTHERS));
        open.send(()).unwrap();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    })
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "timed out");
        std::thread::yield_now();
    }
}

#[test]
fn s02_concurrent_queries_are_coalesced() {
    let test = store_with(1);
    let results = query_concurrently(&test);
    assert!(results.into_iter().all(|result| result.unwrap().unwrap()));
    assert_eq!(test.counting.take_count(), 1);
}

#[test]
fn s02_waiting_threads_get_errors_and_survive_a_panic() {
    let test = store_with(1);
    *test.counting.failure.lock() = Some("down");
    assert!(
        query_concurrently(&test).into_iter().all(|result| result.unwrap().is_err_and(|e| e.to_string() == "down"))
    );
    test.counting.take_count();
    *test.counting.failure.lock() = Some("panic");
    let results = query_concurrently(&test);
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1, "the thread that panicked");
    let others = results.into_iter().filter_map(Result::ok);
    assert!(others.map(Result::unwrap_err).all(|error| error.to_string().contains("panicked")));
    test.counting.failure.lock().take();
    assert!(test.signer(&test.certificates[0], NOW).unwrap(), "the next query is made again");
}

#[test]
fn s02_queries_with_presented_certificate_bypass_cache() {
    let test = store_with(1);
    let certificate = &test.certificates[0];
    let query = SignerQuery::new(certificate.identity(), certificate.key_id(), NOW).with_presented(certificate);
    for _ in 0..2 {
        assert!(test.store.signer(&query).unwrap().is_some());
    }
    assert_eq!(test.counting.take_count(), 2);
}
