//! A store in front of another one that remembers its answers.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::hash::Hash;
use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;

use crate::certs::{Certificate, CertificateStore, KeyId, Recipient, RecipientQuery, SignerQuery, StoreError};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// A certificate store that asks another one, and remembers the answers: for stores that are slow to answer, such as a database
/// or a directory service.
///
/// * Answers are kept for a time to live (a minute, unless said otherwise), and never past the expiry of a certificate in them.
///   When there is no room, the one that was not used for longest goes.
/// * That somebody is *not* known is remembered only briefly (5 s), and in a memory of its own: a flood of unknown names cannot
///   push out what is known.
/// * Many threads that ask the same at once cause one question to the other store. Errors are given to those who wait for that
///   answer, and not kept.
/// * When the other store's [`generation`](CertificateStore::generation) changes, everything is forgotten.
///
/// ```
/// use std::{sync::Arc, time::Duration};
/// use nanite::certs::{CachedCertificateStore, StaticCertificateStore};
///
/// let slow = Arc::new(StaticCertificateStore::default());
/// let store = CachedCertificateStore::new(slow).capacity(1_000).time_to_live(Duration::from_secs(300));
/// ```
pub struct CachedCertificateStore {
    inner: Arc<dyn CertificateStore>,
    time_to_live: Duration,
    miss_time: Duration,
    signers: Memory<(Identity, KeyId)>,
    recipients: Memory<Who>,
}

/// An answer: of signers one certificate or none, of recipients any number.
type Answer = Vec<Arc<Certificate>>;

/// [`Recipient`], owned.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Who {
    One(Identity),
    Mappers,
}

impl CachedCertificateStore {
    /// How many answers to each of the two questions are kept, unless said otherwise.
    pub const CAPACITY: usize = 100;
    /// How many unknown names are remembered.
    const MISSES: NonZeroUsize = NonZeroUsize::MIN.saturating_add(999);

    /// Remembers the answers of `inner`.
    pub fn new(inner: Arc<dyn CertificateStore>) -> Self {
        Self {
            inner,
            time_to_live: Duration::from_secs(60),
            miss_time: Duration::from_secs(5),
            signers: Memory::new(Self::CAPACITY),
            recipients: Memory::new(Self::CAPACITY),
        }
    }

    /// Keeps at most so many answers to each question; at least one.
    #[must_use]
    pub fn capacity(self, answers: usize) -> Self {
        Self { signers: Memory::new(answers), recipients: Memory::new(answers), ..self }
    }

    /// Keeps answers for so long. A certificate that the other store no longer returns is used for as long as this, unless the
    /// other store counts its generations.
    #[must_use]
    pub fn time_to_live(self, time: Duration) -> Self {
        Self { time_to_live: time, ..self }
    }

    /// Remembers for so long that somebody is not known.
    #[must_use]
    pub fn miss_time(self, time: Duration) -> Self {
        Self { miss_time: time, ..self }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.signers.lock().clear();
        self.recipients.lock().clear();
    }

    fn ask<K: Clone + Eq + Hash>(
        &self,
        memory: &Memory<K>,
        key: K,
        now: Timestamp,
        load: impl FnOnce() -> Result<Answer, StoreError>,
    ) -> Result<Answer, StoreError> {
        let generation = self.inner.generation();
        let (flight, epoch) = {
            let mut kept = memory.lock();
            kept.follow(generation);
            if let Some(answer) = kept.find(&key, now) {
                return Ok(answer);
            }
            let epoch = kept.epoch;
            match kept.flights.entry(key.clone()) {
                Entry::Occupied(other) => {
                    let flight = other.get().clone();
                    drop(kept);
                    return flight.wait();
                }
                Entry::Vacant(place) => (place.insert(Arc::default()).clone(), epoch),
            }
        };
        // From here on somebody may wait for this flight: whatever happens, it has to land.
        let mut landing = Landing { memory, key, flight, outcome: None };
        let outcome = load();
        if let Ok(answer) = &outcome {
            let keep = if answer.is_empty() { self.miss_time } else { self.time_to_live };
            let expiry = answer.iter().map(|certificate| certificate.not_after()).min();
            let until = expiry.map_or(now.saturating_add(keep), |expiry| expiry.min(now.saturating_add(keep)));
            let generation = self.inner.generation();
            let mut kept = memory.lock();
            kept.follow(generation);
            // What was read while the store changed may be old already.
            if kept.epoch == epoch && now < until {
                kept.put(landing.key.clone(), Kept { answer: answer.clone(), from: now, until });
            }
        }
        landing.outcome = Some(share(&outcome));
        outcome
    }
}

impl CertificateStore for CachedCertificateStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        if query.presented.is_some() {
            // The answer may depend on what came with this one message.
            return self.inner.signer(query);
        }
        let key = (query.identity.clone(), query.key_id.clone());
        let load = || Ok(self.inner.signer(query)?.into_iter().collect());
        Ok(self.ask(&self.signers, key, query.now, load)?.into_iter().next())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let key = match query.recipient {
            Recipient::One(identity) => Who::One(identity.clone()),
            Recipient::Mappers => Who::Mappers,
        };
        self.ask(&self.recipients, key, query.now, || self.inner.recipients(query))
    }

    fn learned(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.inner.learned(certificate, now);
        // It may be the one that was missing a moment ago.
        let identity = certificate.identity();
        self.signers.lock().forget_for_good(&(identity.clone(), certificate.key_id().clone()));
        let mut recipients = self.recipients.lock();
        recipients.forget_for_good(&Who::One(identity.clone()));
        recipients.forget_for_good(&Who::Mappers);
    }

    fn heard(&self, certificate: &Arc<Certificate>, now: Timestamp) {
        self.inner.heard(certificate, now);
    }

    fn may_block(&self, now: Timestamp) -> bool {
        self.inner.may_block(now)
    }

    fn learns(&self) -> bool {
        self.inner.learns()
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

/// What is remembered of one question. The lock is never held while the other store is asked for certificates.
struct Memory<K: Eq + Hash>(Mutex<Answers<K>>);

struct Answers<K: Eq + Hash> {
    known: LruCache<K, Kept>,
    missing: LruCache<K, Kept>,
    flights: HashMap<K, Arc<Flight>>,
    generation: Option<u64>,
    /// Counts up whenever something is forgotten because it may have changed.
    epoch: u64,
}

/// An answer, and from when to when it is good.
struct Kept {
    answer: Answer,
    from: Timestamp,
    until: Timestamp,
}

impl<K: Clone + Eq + Hash> Memory<K> {
    fn new(capacity: usize) -> Self {
        let capacity = NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN);
        Self(Mutex::new(Answers {
            known: LruCache::new(capacity),
            missing: LruCache::new(CachedCertificateStore::MISSES),
            flights: HashMap::new(),
            generation: None,
            epoch: 0,
        }))
    }
}

impl<K: Eq + Hash> Memory<K> {
    fn lock(&self) -> MutexGuard<'_, Answers<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Clone + Eq + Hash> Answers<K> {
    /// Forgets everything when the other store has changed.
    fn follow(&mut self, generation: Option<u64>) {
        if self.generation != generation {
            self.clear();
            self.generation = generation;
        }
    }

    fn clear(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.known.clear();
        self.missing.clear();
    }

    fn find(&mut self, key: &K, now: Timestamp) -> Option<Answer> {
        let good = |kept: &Kept| (kept.from <= now && now < kept.until).then(|| kept.answer.clone());
        // A key is in one of the two at most.
        let found = self.known.get(key).map(good).or_else(|| self.missing.get(key).map(good))?;
        if found.is_none() {
            self.forget(key);
        }
        found
    }

    fn put(&mut self, key: K, kept: Kept) {
        self.forget(&key);
        let place = if kept.answer.is_empty() { &mut self.missing } else { &mut self.known };
        place.put(key, kept);
    }

    /// Forgets an answer, and does not keep one that is on its way.
    fn forget_for_good(&mut self, key: &K) {
        self.epoch = self.epoch.wrapping_add(1);
        self.forget(key);
    }

    fn forget(&mut self, key: &K) {
        self.known.pop(key);
        self.missing.pop(key);
    }
}

/// One question on its way to the other store, and those who wait for its answer.
#[derive(Default)]
struct Flight {
    outcome: Mutex<Option<Result<Answer, String>>>,
    landed: Condvar,
}

impl Flight {
    fn wait(&self) -> Result<Answer, StoreError> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome =
            self.landed.wait_while(outcome, |outcome| outcome.is_none()).unwrap_or_else(PoisonError::into_inner);
        match &*outcome {
            Some(Ok(answer)) => Ok(answer.clone()),
            Some(Err(why)) => Err(StoreError::Other(why.clone())),
            None => Err(StoreError::Other("the question was given up".into())),
        }
    }
}

/// Lands a flight when it is dropped, even by a panic in the other store.
struct Landing<'a, K: Eq + Hash> {
    memory: &'a Memory<K>,
    key: K,
    flight: Arc<Flight>,
    outcome: Option<Result<Answer, String>>,
}

impl<K: Eq + Hash> Drop for Landing<'_, K> {
    fn drop(&mut self) {
        self.memory.lock().flights.remove(&self.key);
        let outcome = self.outcome.take().unwrap_or_else(|| Err("the certificate store panicked".into()));
        *self.flight.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.flight.landed.notify_all();
    }
}

/// An outcome for those who wait: an error as its text, because errors cannot be copied.
fn share(outcome: &Result<Answer, StoreError>) -> Result<Answer, String> {
    outcome.as_ref().cloned().map_err(|error| match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}
