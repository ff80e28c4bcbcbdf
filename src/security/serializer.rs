//! [`SecureSerializer`]: its public interface and its counters.

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

/// Packets in the secure envelope: signed by this node, encrypted for their recipients, and opened in the steps that the
/// [module](super) documents. See [`SecureSerializer::builder`].
///
/// It can be shared between threads. Its replay memory and its key agreements are its own, so use one per process and identity.
pub struct SecureSerializer {
    pub(super) context: Context,
    pub(super) counters: Counters,
}

impl SecureSerializer {
    /// How many messages were sealed, opened and refused.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Replaces the credentials with new ones of the same identity, as after a renewal, while messages are sent and received.
    ///
    /// Registrations and advertises carry the certificate, so they are signed with the new key at once: make the node
    /// [announce](crate::agent::Announcer::announce) itself. Everything else is signed with the new key after the
    /// [rotation grace period](super::SecureSerializerBuilder::rotation_grace_period), or at once when the previous certificate is no
    /// longer valid. Messages that were encrypted to the previous credentials, or to those in `older`, are opened until these expire.
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
        // A certificate that others refuse, such as a revoked one, signs nothing more.
        let rotation_grace_period = if self.context.peers.verify(&before, &[], now).is_ok() {
            self.context.rotation_grace_period
        } else {
            Duration::ZERO
        };
        self.context.peers.set_own_chain(new.intermediates().to_vec());
        let mut current = self.context.credentials.write();
        *current = Arc::new(current.followed_by(new, older, now, rotation_grace_period));
        drop(current);
        self.context.agreements.clear();
        Ok(())
    }

    /// The newest certificate of this node.
    pub fn certificate(&self) -> Arc<Certificate> {
        self.context.credentials().newest().clone()
    }

    /// Verifies this node's own certificate: its dates, its chain, and the revocation lists that this node has.
    ///
    /// # Errors
    /// [`TrustError`]: why other nodes refuse messages signed with it.
    pub fn check_own_certificate(&self, now: Timestamp) -> Result<(), TrustError> {
        self.context.peers.verify(self.context.credentials().newest(), &[], now)
    }

    /// How many message ids are in the replay memory.
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
        // Opening checked that there is room. An expired message is refused by its expiry and need not be remembered.
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
    use crate::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
    use crate::clock::{Clock, SystemClock};

    #[test]
    fn s07_rotation_clears_agreed_secrets() {
        let now = SystemClock.now();
        let day = std::time::Duration::from_secs(86_400);
        let ca = CertificateAuthority::create("example.org", KeyType::P256, day, now).unwrap();
        let fred = Identity::agent("fred").unwrap();
        let issue = || ca.issue(&fred, KeyType::P256, day / 2, now).unwrap();
        let own = issue();
        let store = StaticCertificateStore::new([own.certificate().clone()]);
        let serializer = SecureSerializer::builder(own, store, ca.trust().unwrap()).build().unwrap();
        let push = crate::packet::Request::new("/a/b".parse().unwrap(), crate::packet::Payload::default());
        let audience = crate::serializer::Audience::One(fred.clone());
        serializer.seal(&Packet::Push(push), &SealRequest::new(&audience, now)).unwrap();
        assert_ne!(serializer.context.agreements.held(), 0);
        serializer.replace_credentials(issue(), Vec::new(), now).unwrap();
        assert_eq!(serializer.context.agreements.held(), 0);
    }

    #[test]
    fn every_kind_has_its_own_count() {
        let counters = Counters::default();
        OpenErrorKind::ALL.into_iter().for_each(|kind| counters.count_refused(kind));
        assert!(OpenErrorKind::ALL.into_iter().all(|kind| counters.refused(kind) == 1));
        assert_eq!(counters.refused_in_all(), 12);
    }
}
