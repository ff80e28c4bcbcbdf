//! A store that caches the answers of another one.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::collections::hash_map;
use std::fmt;
use std::hash::Hash;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::certificate::{Certificate, KeyId};
use super::store::{CertificateStore, Recipient, RecipientQuery, SignerQuery, StoreError};
use crate::clock::Timestamp;
use crate::limits::nonzero;
use crate::packet::Identity;

/// The default time to live of answers.
const DEFAULT_TIME_TO_LIVE: Duration = Duration::from_secs(60);
/// The default time to live of negative answers.
const DEFAULT_NEGATIVE_TIME_TO_LIVE: Duration = Duration::from_secs(5);
/// The most negative answers in a cache.
const MAX_NEGATIVE_ANSWERS: NonZeroUsize = nonzero(1000);

/// A certificate store that caches the answers of another one, for slow stores such as a database or a directory service.
///
/// * Answers are cached for a time to live (by default a minute), but not beyond the expiry of a certificate in them. When a cache is full,
///   the least recently used answer is removed.
/// * Negative answers (the identity or key is unknown) are cached only briefly (5 s), and separately: a flood of unknown names cannot
///   displace other answers.
/// * When many threads make the same query at once, the other store gets one query. All of them get its error, if it fails; errors are not
///   cached.
/// * When the other store's [`generation`](CertificateStore::generation) changes, the caches are cleared.
///
/// ```
/// use std::time::Duration;
/// use nanite::certs::{CachedCertificateStore, StaticCertificateStore};
///
/// let slow = StaticCertificateStore::default();
/// let store = CachedCertificateStore::new(slow).capacity(1_000).time_to_live(Duration::from_secs(300));
/// ```
pub struct CachedCertificateStore {
    inner: Arc<dyn CertificateStore>,
    time_to_live: Duration,
    negative_time_to_live: Duration,
    signers: Cache<(Identity, KeyId)>,
    recipients: Cache<OwnedRecipient>,
}

/// For a signer one certificate or none, for recipients any number.
type Answer = Vec<Arc<Certificate>>;

/// [`Recipient`], owned.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum OwnedRecipient {
    One(Identity),
    Mappers,
}

impl CachedCertificateStore {
    /// The default capacity of the cache for each of the two queries, in answers.
    pub const DEFAULT_CAPACITY: usize = 100;

    /// Caches the answers of `inner`.
    pub fn new(inner: impl CertificateStore + 'static) -> Self {
        Self {
            inner: Arc::new(inner),
            time_to_live: DEFAULT_TIME_TO_LIVE,
            negative_time_to_live: DEFAULT_NEGATIVE_TIME_TO_LIVE,
            signers: Cache::new(Self::DEFAULT_CAPACITY),
            recipients: Cache::new(Self::DEFAULT_CAPACITY),
        }
    }

    /// Sets the capacity of the cache for each of the two queries, in answers; at least one.
    #[must_use]
    pub fn capacity(self, answers: usize) -> Self {
        Self { signers: Cache::new(answers), recipients: Cache::new(answers), ..self }
    }

    /// Sets how long answers are cached. A certificate that the other store no longer returns may be used for this long, unless the other
    /// store has a [`generation`](CertificateStore::generation).
    #[must_use]
    pub fn time_to_live(self, time: Duration) -> Self {
        Self { time_to_live: time, ..self }
    }

    /// Sets how long negative answers are cached.
    #[must_use]
    pub fn negative_time_to_live(self, time: Duration) -> Self {
        Self { negative_time_to_live: time, ..self }
    }

    /// Clears the caches.
    pub fn clear(&self) {
        self.signers.lock().clear();
        self.recipients.lock().clear();
    }

    fn get_or_load<K: Clone + Eq + Hash>(
        &self,
        cache: &Cache<K>,
        key: K,
        now: Timestamp,
        load: impl FnOnce() -> Result<Answer, StoreError>,
    ) -> Result<Answer, StoreError> {
        let generation = self.inner.generation();
        let (loading, epoch) = {
            let mut answers = cache.lock();
            answers.clear_if_changed(generation);
            if let Some(answer) = answers.get(&key, now) {
                return Ok(answer);
            }
            let epoch = answers.epoch;
            match answers.loading.entry(key.clone()) {
                hash_map::Entry::Occupied(entry) => {
                    let loading = entry.get().clone();
                    drop(answers);
                    return loading.wait();
                }
                hash_map::Entry::Vacant(entry) => (entry.insert(Arc::default()).clone(), epoch),
            }
        };
        // Other threads may wait for the result from here on: the guard wakes them even after a panic.
        let mut guard = LoadGuard { cache, key, loading, result: None };
        let result = load();
        if let Ok(answer) = &result {
            let time_to_live = if answer.is_empty() { self.negative_time_to_live } else { self.time_to_live };
            let latest = now.saturating_add(time_to_live);
            let expiry = answer.iter().map(|certificate| certificate.not_after()).min();
            let until = expiry.map_or(latest, |expiry| expiry.min(latest));
            let generation = self.inner.generation();
            let mut answers = cache.lock();
            answers.clear_if_changed(generation);
            // An answer that was loaded while the store changed may be outdated.
            if answers.epoch == epoch && now < until {
                answers.put(guard.key.clone(), CachedAnswer { answer: answer.clone(), from: now, until });
            }
        }
        guard.result = Some(shareable(&result));
        result
    }
}

impl CertificateStore for CachedCertificateStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        if query.presented.is_some() {
            // The answer may depend on the presented certificate.
            return self.inner.signer(query);
        }
        let key = (query.identity.clone(), query.key_id.clone());
        let load = || Ok(self.inner.signer(query)?.into_iter().collect());
        Ok(self.get_or_load(&self.signers, key, query.now, load)?.into_iter().next())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let key = match query.recipient {
            Recipient::One(identity) => OwnedRecipient::One(identity.clone()),
            Recipient::Mappers => OwnedRecipient::Mappers,
        };
        self.get_or_load(&self.recipients, key, query.now, || self.inner.recipients(query))
    }

    fn learn(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.inner.learn(certificate, now);
        // The cached answers may lack this certificate.
        let identity = certificate.identity();
        self.signers.lock().invalidate(&(identity.clone(), certificate.key_id().clone()));
        let mut recipients = self.recipients.lock();
        recipients.invalidate(&OwnedRecipient::One(identity.clone()));
        recipients.invalidate(&OwnedRecipient::Mappers);
    }

    fn record_use(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.inner.record_use(certificate, now);
    }

    fn may_block(&self, now: Timestamp) -> bool {
        self.inner.may_block(now)
    }

    fn learns_certificates(&self) -> bool {
        self.inner.learns_certificates()
    }

    fn generation(&self) -> Option<u64> {
        self.inner.generation()
    }
}

impl fmt::Debug for CachedCertificateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedCertificateStore").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// The cache for one kind of query. Its lock is not held while the other store is queried.
struct Cache<K: Eq + Hash>(Mutex<Answers<K>>);

struct Answers<K: Eq + Hash> {
    positive: LruCache<K, CachedAnswer>,
    negative: LruCache<K, CachedAnswer>,
    loading: HashMap<K, Arc<Loading>>,
    /// The other store's generation to which the answers belong.
    generation: Option<u64>,
    /// Increases with every invalidation.
    epoch: u64,
}

struct CachedAnswer {
    answer: Answer,
    from: Timestamp,
    until: Timestamp,
}

impl<K: Clone + Eq + Hash> Cache<K> {
    fn new(capacity: usize) -> Self {
        Self(Mutex::new(Answers {
            positive: LruCache::new(nonzero(capacity)),
            negative: LruCache::new(MAX_NEGATIVE_ANSWERS),
            loading: HashMap::new(),
            generation: None,
            epoch: 0,
        }))
    }
}

impl<K: Eq + Hash> Cache<K> {
    fn lock(&self) -> MutexGuard<'_, Answers<K>> {
        self.0.lock()
    }
}

impl<K: Clone + Eq + Hash> Answers<K> {
    fn clear_if_changed(&mut self, generation: Option<u64>) {
        if self.generation != generation {
            self.clear();
            self.generation = generation;
        }
    }

    fn clear(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.positive.clear();
        self.negative.clear();
    }

    fn get(&mut self, key: &K, now: Timestamp) -> Option<Answer> {
        let current = |cached: &CachedAnswer| (cached.from <= now && now < cached.until).then(|| cached.answer.clone());
        // A key is in at most one of the two caches.
        let found = self.positive.get(key).map(current).or_else(|| self.negative.get(key).map(current))?;
        if found.is_none() {
            self.remove(key);
        }
        found
    }

    fn put(&mut self, key: K, cached: CachedAnswer) {
        self.remove(&key);
        let cache = if cached.answer.is_empty() { &mut self.negative } else { &mut self.positive };
        cache.put(key, cached);
    }

    /// Removes an answer, and keeps the results of running queries out of the cache.
    fn invalidate(&mut self, key: &K) {
        self.epoch = self.epoch.wrapping_add(1);
        self.remove(key);
    }

    fn remove(&mut self, key: &K) {
        self.positive.pop(key);
        self.negative.pop(key);
    }
}

/// A running query to the other store, for whose result other threads can wait.
#[derive(Default)]
struct Loading {
    result: Mutex<Option<Result<Answer, String>>>,
    finished: Condvar,
}

impl Loading {
    fn wait(&self) -> Result<Answer, StoreError> {
        let mut result = self.result.lock();
        self.finished.wait_while(&mut result, |result| result.is_none());
        match &*result {
            Some(Ok(answer)) => Ok(answer.clone()),
            Some(Err(why)) => Err(StoreError::Other(why.clone())),
            None => Err(StoreError::Other("the query was abandoned".into())),
        }
    }
}

/// Finishes a running query when it is dropped, so also when the other store panics.
struct LoadGuard<'a, K: Eq + Hash> {
    cache: &'a Cache<K>,
    key: K,
    loading: Arc<Loading>,
    result: Option<Result<Answer, String>>,
}

impl<K: Eq + Hash> Drop for LoadGuard<'_, K> {
    fn drop(&mut self) {
        self.cache.lock().loading.remove(&self.key);
        let result = self.result.take().unwrap_or_else(|| Err("the certificate store panicked".into()));
        *self.loading.result.lock() = Some(result);
        self.loading.finished.notify_all();
    }
}

/// The result for the threads that wait: a [`StoreError`] cannot be cloned, so it becomes its text.
fn shareable(result: &Result<Answer, StoreError>) -> Result<Answer, String> {
    result.as_ref().cloned().map_err(|error| match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}
