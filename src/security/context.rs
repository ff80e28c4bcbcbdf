//! What a secure serializer is made of. Sealing ([`super::seal`]), opening ([`super::open`]) and proofs ([`super::proof`]) are methods
//! of [`Context`].

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use super::agreement::Agreements;
use super::credentials::CredentialSet;
use super::crypto::Crypto;
use super::peers::PeerCertificates;
use super::replay::ReplayMemory;
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, MessageId};
use crate::serializer::{Codec, InboundQueue, MessageClass};

/// How many ids of sent messages are kept for answers by slower clocks.
const MAX_SENT_IDS: usize = 16_384;

/// Whether a signer may send this kind of packet to this kind of queue.
pub(super) type Authorize = Arc<dyn Fn(&Identity, Kind, InboundQueue) -> bool + Send + Sync>;

/// The state of a secure serializer.
pub(super) struct Context {
    pub identity: Identity,
    pub credentials: RwLock<Arc<CredentialSet>>,
    pub rotation_grace_period: Duration,
    pub peers: PeerCertificates,
    /// The first one encodes; all decode.
    pub codecs: Vec<Arc<dyn Codec>>,
    pub max_live_lifetime: Duration,
    pub max_stored_lifetime: Duration,
    pub replay: ReplayMemory,
    pub sent_ids: SentIds,
    pub started_at: Timestamp,
    pub sequence: AtomicU64,
    pub authorize: Option<Authorize>,
    pub accept_signed_only: bool,
    pub seal_signed_only: bool,
    pub agreements: Agreements,
    pub crypto: Crypto,
}

impl Context {
    /// The longest that messages of this class may be valid.
    pub fn lifetime(&self, class: MessageClass) -> Duration {
        match class {
            MessageClass::Live => self.max_live_lifetime,
            MessageClass::Stored => self.max_stored_lifetime,
        }
    }

    /// The current credentials.
    pub fn credentials(&self) -> Arc<CredentialSet> {
        self.credentials.read().clone()
    }
}

/// The ids of messages sent since the start, as long as an answer to one could seem older than this process: the clock of its sender may
/// be behind.
pub(super) struct SentIds {
    until: Timestamp,
    over: AtomicBool,
    ids: Mutex<HashSet<MessageId>>,
}

impl SentIds {
    pub fn new(until: Timestamp) -> Self {
        Self { until, over: AtomicBool::new(false), ids: Mutex::default() }
    }

    /// Remembers the id of a sent message.
    pub fn note(&self, id: MessageId, now: Timestamp) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let mut ids = self.ids.lock();
        if now > self.until {
            self.over.store(true, Ordering::Relaxed);
            *ids = HashSet::new();
        } else if ids.len() < MAX_SENT_IDS {
            ids.insert(id);
        }
    }

    /// Whether this process sent the message with this id.
    pub fn knows(&self, id: MessageId) -> bool {
        !self.over.load(Ordering::Relaxed) && self.ids.lock().contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_is_known_for_a_time_and_up_to_a_number() {
        let at = Timestamp::from_secs;
        let sent_ids = SentIds::new(at(100));
        let id = |number: u64| MessageId::from_bytes([number.to_be_bytes(), [0; 8]].concat().try_into().unwrap());
        for number in 0..=MAX_SENT_IDS as u64 {
            sent_ids.note(id(number), at(100));
        }
        assert!(sent_ids.knows(id(0)) && sent_ids.knows(id(MAX_SENT_IDS as u64 - 1)));
        assert!(!sent_ids.knows(id(MAX_SENT_IDS as u64)), "what no longer fits in gets no exemption");
        sent_ids.note(id(0), at(101));
        assert!(!sent_ids.knows(id(0)));
    }
}
