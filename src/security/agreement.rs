//! Key agreement, and what is remembered of it so that most messages need none.
//!
//! A sender uses one ephemeral key for [`EPHEMERAL_LIFE`] and [`EPHEMERAL_USES`] messages at most, towards all recipients, and
//! remembers the shared secret with each. A receiver remembers the shared secret with a bounded number of senders' ephemeral
//! keys. Every message still has a key encryption key of its own, since 32 fresh random bytes go into its derivation (the user
//! keying material of RFC 5753), and a content encryption key of its own.
//!
//! What this gives up: nothing that ephemeral-static agreement has. Whoever gets a recipient's private key can open everything
//! that was sealed to it, with one ephemeral key or with many; whoever gets an ephemeral key or a remembered secret out of a
//! process's memory can open what was sealed with it, which is some seconds of one sender's messages, and that memory holds the
//! messages themselves or the private key beside it.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;
use openssl::pkey::{PKey, Private};

use super::cms::POINT;
use super::crypto::{Crypto, Failed, Secret};
use crate::certs::{Certificate, PrivateKey};
use crate::clock::Timestamp;

/// How long one ephemeral key is used.
pub(super) const EPHEMERAL_LIFE: Duration = Duration::from_secs(10);
/// For how many messages one ephemeral key is used.
pub(super) const EPHEMERAL_USES: u32 = 1_000;
/// With how many recipients the shared secret of one ephemeral key is remembered.
const SENT: usize = 4_096;
/// With how many ephemeral keys of senders the shared secret is remembered.
const RECEIVED: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4_095);

/// What is remembered of key agreements.
pub(super) struct Agreements {
    reuse: bool,
    current: Mutex<Option<Arc<Ephemeral>>>,
    received: Mutex<LruCache<Received, Arc<Secret>>>,
}

/// A sender's point, and the fingerprint of the own certificate whose key goes with it.
type Received = ([u8; POINT], [u8; 32]);

/// One ephemeral key, and the secrets it shares.
pub(super) struct Ephemeral {
    key: PKey<Private>,
    point: [u8; POINT],
    made_at: Timestamp,
    uses: AtomicU32,
    shared: Mutex<HashMap<[u8; 32], Arc<Secret>>>,
}

impl Agreements {
    /// Remembers nothing yet; and never anything unless `reuse` says so.
    pub fn new(reuse: bool) -> Self {
        Self { reuse, current: Mutex::new(None), received: Mutex::new(LruCache::new(RECEIVED)) }
    }

    /// The ephemeral key for one more message.
    pub fn ephemeral(&self, crypto: &Crypto, now: Timestamp) -> Result<Arc<Ephemeral>, Failed> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// The secret that the own key of this certificate shares with a sender's point, if it is remembered.
    pub fn recall(&self, point: &[u8; POINT], own: &[u8; 32]) -> Option<Arc<Secret>> {
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        received.get(&(*point, *own)).cloned()
    }

    /// The secret that the own key shares with a sender's point.
    pub fn agree(&self, crypto: &Crypto, point: &[u8; POINT], own: &PrivateKey) -> Result<Arc<Secret>, Failed> {
        let public = crypto.public_key(point)?;
        Ok(Arc::new(crypto.agree(own.pkey(), &public)?))
    }

    /// Remembers a secret, once a message could be opened by it.
    pub fn remember(&self, point: &[u8; POINT], own: &[u8; 32], secret: Arc<Secret>) {
        if self.reuse {
            self.received.lock().unwrap_or_else(PoisonError::into_inner).put((*point, *own), secret);
        }
    }
}

impl Ephemeral {
    /// Counts one more use; false when it has served its time.
    fn serves(&self, now: Timestamp) -> bool {
        let young = now >= self.made_at && now.since(self.made_at) < EPHEMERAL_LIFE;
        young && self.uses.fetch_add(1, Ordering::Relaxed) < EPHEMERAL_USES
    }

    /// Its point.
    pub fn point(&self) -> &[u8; POINT] {
        &self.point
    }

    /// The secret it shares with a recipient.
    pub fn shared(&self, crypto: &Crypto, recipient: &Certificate) -> Result<Arc<Secret>, Failed> {
        let peers = self.shared.lock().unwrap_or_else(PoisonError::into_inner).get(recipient.fingerprint()).cloned();
        if let Some(secret) = peers {
            return Ok(secret);
        }
        let secret = Arc::new(crypto.agree(&self.key, recipient.public_key())?);
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.len() < SENT {
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
    fn an_ephemeral_key_serves_for_a_short_time() {
        let (agreements, crypto) = (Agreements::new(true), Crypto::new().unwrap());
        let first = point(&agreements, &crypto, NOW);
        let almost = NOW.saturating_add(EPHEMERAL_LIFE).saturating_sub(Duration::from_micros(1));
        assert_eq!(point(&agreements, &crypto, almost), first);
        let second = point(&agreements, &crypto, NOW.saturating_add(EPHEMERAL_LIFE));
        assert_ne!(second, first);
        assert_ne!(point(&agreements, &crypto, NOW), second, "nor before it was made, when a clock goes back");
    }

    #[test]
    fn an_ephemeral_key_serves_for_few_messages() {
        let (agreements, crypto) = (Agreements::new(true), Crypto::new().unwrap());
        let first = point(&agreements, &crypto, NOW);
        for _ in 1..EPHEMERAL_USES {
            assert_eq!(point(&agreements, &crypto, NOW), first);
        }
        assert_ne!(point(&agreements, &crypto, NOW), first);
    }

    #[test]
    fn nothing_is_remembered_where_nothing_is_reused() {
        let (agreements, crypto) = (Agreements::new(false), Crypto::new().unwrap());
        let first = point(&agreements, &crypto, NOW);
        assert_ne!(point(&agreements, &crypto, NOW), first);
        agreements.remember(&first, &[0; 32], Arc::default());
        assert!(agreements.recall(&first, &[0; 32]).is_none());
    }

    #[test]
    fn secrets_are_remembered_by_point_and_own_key() {
        let agreements = Agreements::new(true);
        let secret = Arc::new(Secret::new([7; 32]));
        agreements.remember(&[4; POINT], &[0; 32], secret.clone());
        assert_eq!(agreements.recall(&[4; POINT], &[0; 32]), Some(secret));
        assert!(agreements.recall(&[4; POINT], &[1; 32]).is_none());
        assert!(agreements.recall(&[5; POINT], &[0; 32]).is_none());
        for number in 0..RECEIVED.get() as u32 {
            let mut point = [0; POINT];
            point[..4].copy_from_slice(&number.to_be_bytes());
            agreements.remember(&point, &[0; 32], Arc::default());
        }
        assert!(agreements.recall(&[4; POINT], &[0; 32]).is_none(), "the one not used for longest goes first");
    }
}
