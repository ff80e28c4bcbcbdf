//! The secure serializer as its users see it: sealing, opening, and replacing its credentials while messages come and go.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::context::Context;
use super::credentials::{IdentityMismatch, check_identity};
use crate::certs::{Certificate, Credentials, Suite, TrustError};
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind, Packet};
use crate::serializer::{
    Cost, Inbound, OpenContext, OpenError, OpenErrorKind, Proof, SealError, SealRequest, Sealed, Serializer,
    Verification, Verified, sealed,
};

/// The content type of secure messages.
pub const CONTENT_TYPE: &str = "application/vnd.nanite.secure";

/// Up to this many bytes, the time goes into signatures and key agreements rather than into the bytes.
const MAX_SHORT_BYTES: usize = 16 << 10;

/// Packets in the secure envelope: signed by this node, encrypted for their recipients, and opened in the order that the
/// [module](super) documents.
///
/// It can be shared between threads; what it remembers (replays, key agreements) is its own, so use one per process and identity.
///
/// ```
/// use std::sync::Arc;
/// use nanite::certs::{CertificateStore, Credentials, Trust};
/// use nanite::security::{BuildError, SecureSerializer};
///
/// fn serializer(own: Credentials, store: Arc<dyn CertificateStore>, trust: Trust) -> Result<SecureSerializer, BuildError> {
///     SecureSerializer::builder(own, store, trust).build()
/// }
/// ```
pub struct SecureSerializer {
    pub(super) context: Context,
    pub(super) counters: Counters,
}

impl SecureSerializer {
    /// How many messages were sealed, opened and refused.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes new credentials of the same identity, as after a renewal, while messages come and go. What carries the certificate along
    /// (registrations and advertises: have the node [announce](crate::agent::Announcer::announce) itself) is signed by them at once,
    /// everything else once others have had the time to learn it ([`SecureSerializerBuilder::rotation_grace_period`]), or at once when the certificate before is not
    /// to be believed any more. What was sealed to the credentials before
    /// is opened until these expire; so is what was sealed to the `older` ones that are given.
    ///
    /// # Errors
    /// [`IdentityMismatch`] when one is somebody else's; nothing has changed then.
    pub fn replace_credentials(
        &self,
        new: Credentials,
        older: Vec<Credentials>,
        now: Timestamp,
    ) -> Result<(), IdentityMismatch> {
        check_identity(&self.context.identity, older.iter().chain([&new]))?;
        let before = self.context.credentials().signing(Kind::Ping, now).certificate().clone();
        // What others refuse, as one that is revoked, is not signed by any longer.
        let rotation_grace_period = if self.context.peers.trusts(&before, &[], now).is_ok() {
            self.context.rotation_grace_period
        } else {
            Duration::ZERO
        };
        self.context.peers.set_own_chain(new.intermediates().to_vec());
        let mut current = self.context.credentials.write();
        *current = Arc::new(current.followed_by(new, older, now, rotation_grace_period));
        Ok(())
    }

    /// The certificate of this node: the newest, when it was renewed.
    pub fn certificate(&self) -> Arc<Certificate> {
        self.context.credentials().newest().clone()
    }

    /// Whether this node's own certificate may be believed now, as far as it can tell itself: its dates, its chain, and the
    /// revocation lists it has.
    ///
    /// # Errors
    /// [`TrustError`]: why others refuse what is signed by it.
    pub fn check_own_certificate(&self, now: Timestamp) -> Result<(), TrustError> {
        self.context.peers.trusts(self.context.credentials().newest(), &[], now)
    }

    /// How many messages are in the replay memory.
    pub fn remembered(&self) -> usize {
        self.context.replay.len()
    }
}

impl Serializer for SecureSerializer {
    fn content_type(&self) -> &str {
        CONTENT_TYPE
    }

    fn identity(&self) -> &Identity {
        &self.context.identity
    }

    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        let sealed = self.context.seal(packet, request)?;
        self.counters.count_sealed();
        Ok(sealed)
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        let opened = self.context.open(bytes, context);
        match &opened {
            Ok(_) => self.counters.count_opened(),
            Err(error) => self.counters.count_refused(error.kind),
        }
        opened
    }

    fn cost(&self, bytes: usize, now: Timestamp) -> Cost {
        let quick = self.context.credentials().newest().suite() == Suite::P256;
        if quick && bytes <= MAX_SHORT_BYTES && !self.context.peers.may_block(now) { Cost::Short } else { Cost::Long }
    }

    fn verification(&self) -> Option<&dyn Verification> {
        Some(self)
    }
}

impl sealed::Sealed for SecureSerializer {}

impl Verification for SecureSerializer {
    fn instance(&self) -> u64 {
        self.context.started_at.as_micros()
    }

    fn mark_completed(&self, message: &Verified, now: Timestamp) {
        let (id, expires_at) = (message.id(), message.expires_at());
        // It was checked that there is room when it was opened; what has expired meanwhile is refused without being remembered.
        let _ = self.context.replay.admit(message.signer(), id, expires_at, now);
    }

    fn is_completed(&self, message: &Verified) -> bool {
        self.context.replay.knows(message.signer(), message.id())
    }

    fn verify_proof(&self, proof: &Arc<Proof>, now: Timestamp) -> Result<Inbound, OpenError> {
        self.context.verify_proof(proof, now)
    }

    fn learns_peers(&self) -> bool {
        self.context.peers.learns()
    }
}

impl fmt::Debug for SecureSerializer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecureSerializer").field("identity", &self.context.identity).finish_non_exhaustive()
    }
}

/// The counts of a [`SecureSerializer`](super::SecureSerializer).
#[derive(Debug, Default)]
pub struct Counters {
    sealed: AtomicU64,
    opened: AtomicU64,
    refused: [AtomicU64; OpenErrorKind::ALL.len()],
}

impl Counters {
    /// How many messages were sealed.
    pub fn sealed(&self) -> u64 {
        self.sealed.load(Ordering::Relaxed)
    }

    /// How many messages were opened.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// How many messages were refused at this step.
    pub fn refused(&self, kind: OpenErrorKind) -> u64 {
        self.refused.get(kind as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// How many messages were refused at any step.
    pub fn refused_in_all(&self) -> u64 {
        self.refused.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    pub(super) fn count_sealed(&self) {
        self.sealed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_refused(&self, kind: OpenErrorKind) {
        if let Some(count) = self.refused.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_count() {
        let counters = Counters::default();
        OpenErrorKind::ALL.into_iter().for_each(|kind| counters.count_refused(kind));
        assert!(OpenErrorKind::ALL.into_iter().all(|kind| counters.refused(kind) == 1));
        assert_eq!(counters.refused_in_all(), 12);
    }
}
