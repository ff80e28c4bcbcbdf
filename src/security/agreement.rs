//! Key agreement, with a cache of shared secrets so that most messages need none.
//!
//! A sender uses one ephemeral key for at most [`EPHEMERAL_KEY_LIFETIME`] and [`MAX_EPHEMERAL_KEY_USES`] messages, towards all recipients,
//! and caches the shared secret with each. A receiver caches the shared secret with a bounded number of senders' ephemeral keys. Every
//! message still has its own key encryption key, because 32 fresh random bytes go into its derivation (the user keying material of
//! RFC 5753), and its own content encryption key.
//!
//! This gives up nothing that ephemeral-static agreement has. With a recipient's private key an attacker opens everything that was
//! encrypted to it, with one ephemeral key or with many. With an ephemeral key or a cached secret from the memory of a process an attacker
//! opens the messages that used it: some seconds of one sender. The same memory holds these messages, or the private key.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use lru::LruCache;
use openssl::pkey::{PKey, Private};
use parking_lot::Mutex;

use super::cms::POINT;
use super::crypto::{Crypto, Failed, Secret};
use crate::certs::{Certificate, PrivateKey};
use crate::clock::Timestamp;

/// How long one ephemeral key is used.
pub(super) const EPHEMERAL_KEY_LIFETIME: Duration = Duration::from_secs(10);
/// How many messages one ephemeral key is used for.
pub(super) const MAX_EPHEMERAL_KEY_USES: u32 = 1_000;
/// How long a shared secret with a sender's ephemeral key is cached: the key's lifetime, the lifetime of a live message and the clock skew.
const RECEIVED_SECRET_LIFETIME: Duration = Duration::from_secs(100);
/// How often expired keys and secrets are removed, at most.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(5);
/// How many shared secrets of one ephemeral key are cached, one per recipient.
const MAX_SENT_SECRETS: usize = 4_096;
/// How many shared secrets with senders' ephemeral keys are cached.
const MAX_RECEIVED_SECRETS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4_095);

/// The cache of key agreements.
pub(super) struct Agreements {
    reuse: bool,
    current: Mutex<Option<Arc<Ephemeral>>>,
    received: Mutex<LruCache<Received, CachedSecret>>,
    /// When expired entries were last removed, in microseconds.
    expired_at: AtomicU64,
}

struct CachedSecret {
    secret: Arc<Secret>,
    cached_at: Timestamp,
}

/// A sender's point, and the fingerprint of the own certificate.
type Received = ([u8; POINT], [u8; 32]);

/// One ephemeral key and its shared secrets.
pub(super) struct Ephemeral {
    key: PKey<Private>,
    point: [u8; POINT],
    made_at: Timestamp,
    uses: AtomicU32,
    shared: Mutex<HashMap<[u8; 32], Arc<Secret>>>,
}

impl Agreements {
    /// An empty cache. Without `reuse` it stays empty.
    pub fn new(reuse: bool) -> Self {
        let received = Mutex::new(LruCache::new(MAX_RECEIVED_SECRETS));
        Self { reuse, current: Mutex::new(None), received, expired_at: AtomicU64::new(0) }
    }

    /// Removes expired keys and secrets, at most every [`EXPIRY_INTERVAL`]. Called for every message that is sealed or opened, so that a
    /// node that sends or receives heartbeats holds nothing for longer than its lifetime and a heartbeat's interval.
    pub fn expire(&self, now: Timestamp) {
        let last = Timestamp::from_micros(self.expired_at.load(Ordering::Relaxed));
        if now >= last && now.since(last) < EXPIRY_INTERVAL {
            return;
        }
        self.expired_at.store(now.as_micros(), Ordering::Relaxed);
        let mut current = self.current.lock();
        if current.as_ref().is_some_and(|ephemeral| !ephemeral.is_young(now)) {
            *current = None;
        }
        drop(current);
        let mut received = self.received.lock();
        let is_expired =
            |cached: &CachedSecret| now < cached.cached_at || now.since(cached.cached_at) >= RECEIVED_SECRET_LIFETIME;
        let expired: Vec<Received> =
            received.iter().filter(|(_, cached)| is_expired(cached)).map(|(key, _)| *key).collect();
        for key in expired {
            received.pop(&key);
        }
    }

    /// Removes all keys and secrets, as at a rotation of the credentials.
    pub fn clear(&self) {
        *self.current.lock() = None;
        self.received.lock().clear();
    }

    /// How many keys and secrets are held.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.received.lock().len() + usize::from(self.current.lock().is_some())
    }

    /// The ephemeral key for one more message.
    pub fn ephemeral(&self, crypto: &Crypto, now: Timestamp) -> Result<Arc<Ephemeral>, Failed> {
        let mut current = self.current.lock();
        if let Some(ephemeral) = current.as_ref().filter(|one| self.reuse && one.serves(now)) {
            return Ok(ephemeral.clone());
        }
        let (key, point) = crypto.ephemeral()?;
        let (uses, shared) = (AtomicU32::new(1), Mutex::new(HashMap::new()));
        let ephemeral = Arc::new(Ephemeral { key, point, made_at: now, uses, shared });
        if self.reuse {
            *current = Some(ephemeral.clone());
        }
        Ok(ephemeral)
    }

    /// The cached secret that the own key of this certificate shares with a sender's point.
    pub fn recall(&self, point: &[u8; POINT], own: &[u8; 32]) -> Option<Arc<Secret>> {
        let mut received = self.received.lock();
        received.get(&(*point, *own)).map(|cached| cached.secret.clone())
    }

    /// The secret that the own key shares with a sender's point.
    pub fn agree(&self, crypto: &Crypto, point: &[u8; POINT], own: &PrivateKey) -> Result<Arc<Secret>, Failed> {
        let public = crypto.public_key(point)?;
        Ok(Arc::new(crypto.agree(own.pkey(), &public)?))
    }

    /// Caches a secret, after a message was opened with it.
    pub fn remember(&self, point: &[u8; POINT], own: &[u8; 32], secret: Arc<Secret>, now: Timestamp) {
        if self.reuse {
            self.received.lock().put((*point, *own), CachedSecret { secret, cached_at: now });
        }
    }
}

impl Ephemeral {
    /// Counts a use; false when the key is used up or too old.
    fn serves(&self, now: Timestamp) -> bool {
        self.is_young(now) && self.uses.fetch_add(1, Ordering::Relaxed) < MAX_EPHEMERAL_KEY_USES
    }

    fn is_young(&self, now: Timestamp) -> bool {
        now >= self.made_at && now.since(self.made_at) < EPHEMERAL_KEY_LIFETIME
    }

    /// The public point.
    pub fn point(&self) -> &[u8; POINT] {
        &self.point
    }

    /// The secret shared with a recipient.
    pub fn shared(&self, crypto: &Crypto, recipient: &Certificate) -> Result<Arc<Secret>, Failed> {
        let cached = self.shared.lock().get(recipient.fingerprint()).cloned();
        if let Some(secret) = cached {
            return Ok(secret);
        }
        let secret = Arc::new(crypto.agree(&self.key, recipient.public_key())?);
        let mut shared = self.shared.lock();
        if shared.len() < MAX_SENT_SECRETS {
            shared.insert(*recipient.fingerprint(), secret.clone());
        }
        Ok(secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(1_795_500_000);

    fn point(agreements: &Agreements, crypto: &Crypto, now: Timestamp) -> [u8; POINT] {
        *agreements.ephemeral(crypto, now).unwrap().point()
    }

    #[test]
    fn ephemeral_key_is_replaced_after_its_lifetime() {
        let (agreements, crypto) = (Agreements::new(true), Crypto::new().unwrap());
        let first = point(&agreements, &crypto, NOW);
        let almost = NOW.saturating_add(EPHEMERAL_KEY_LIFETIME).saturating_sub(Duration::from_micros(1));
        assert_eq!(point(&agreements, &crypto, almost), first);
        let second = point(&agreements, &crypto, NOW.saturating_add(EPHEMERAL_KEY_LIFETIME));
        assert_ne!(second, first);
        assert_ne!(point(&agreements, &crypto, NOW), second, "a key from the future is not used");
    }

    #[test]
    fn ephemeral_key_is_replaced_after_its_uses() {
        let (agreements, crypto) = (Agreements::new(true), Crypto::new().unwrap());
        let first = point(&agreements, &crypto, NOW);
        for _ in 1..MAX_EPHEMERAL_KEY_USES {
            assert_eq!(point(&agreements, &crypto, NOW), first);
        }
        assert_ne!(point(&agreements, &crypto, NOW), first);
    }

    #[test]
    fn without_reuse_nothing_is_cached() {
        let (agreements, crypto) = (Agreements::new(false), Crypto::new().unwrap());
        let first = point(&agreements, &crypto, NOW);
        assert_ne!(point(&agreements, &crypto, NOW), first);
        agreements.remember(&first, &[0; 32], Arc::default(), NOW);
        assert!(agreements.recall(&first, &[0; 32]).is_none());
    }

    #[test]
    fn secrets_are_cached_by_point_and_own_key() {
        let agreements = Agreements::new(true);
        let secret = Arc::new(Secret::new([7; 32]));
        agreements.remember(&[4; POINT], &[0; 32], secret.clone(), NOW);
        assert_eq!(agreements.recall(&[4; POINT], &[0; 32]), Some(secret));
        assert!(agreements.recall(&[4; POINT], &[1; 32]).is_none());
        assert!(agreements.recall(&[5; POINT], &[0; 32]).is_none());
        for number in 0..MAX_RECEIVED_SECRETS.get() as u32 {
            let mut point = [0; POINT];
            point[..4].copy_from_slice(&number.to_be_bytes());
            agreements.remember(&point, &[0; 32], Arc::default(), NOW);
        }
        assert!(agreements.recall(&[4; POINT], &[0; 32]).is_none(), "the least recently used secret is evicted");
    }

    #[test]
    fn s07_agreed_secrets_and_ephemeral_keys_expire_and_are_cleared() {
        let (agreements, crypto) = (Agreements::new(true), Crypto::new().unwrap());
        let after = |seconds| NOW.saturating_add(Duration::from_secs(seconds));
        agreements.expire(NOW);
        point(&agreements, &crypto, NOW);
        agreements.remember(&[4; POINT], &[0; 32], Arc::default(), NOW);
        agreements.expire(after(9));
        assert_eq!(agreements.held(), 2);
        agreements.expire(after(15));
        assert_eq!(agreements.held(), 1, "the ephemeral key has expired");
        agreements.expire(after(100));
        assert_eq!(agreements.held(), 0, "the secret has expired");
        // A clock that is set back keeps nothing longer.
        agreements.remember(&[4; POINT], &[0; 32], Arc::default(), after(1000));
        agreements.expire(after(10));
        assert_eq!(agreements.held(), 0);
        point(&agreements, &crypto, NOW);
        agreements.remember(&[4; POINT], &[0; 32], Arc::default(), NOW);
        agreements.clear();
        assert_eq!(agreements.held(), 0);
    }
}
