//! The credentials of this node: those that it signs with, their successors, and all keys that it opens with.

use std::sync::Arc;
use std::time::Duration;

use super::envelope::announces_certificate;
use crate::certs::{Certificate, Credentials};
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind};

/// How long other nodes have to learn a new certificate before everything is signed with it, by default.
pub(super) const ROTATION_GRACE_PERIOD: Duration = Duration::from_secs(15);
/// How many older keys a node opens with.
const MAX_OLDER_KEYS: usize = 4;

/// Credentials that belong to another node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the credentials are of {found}, not of {own}")]
#[non_exhaustive]
pub struct IdentityMismatch {
    /// The identity of this node.
    pub own: Identity,
    /// The identity in the credentials.
    pub found: Identity,
}

/// Checks that all of these credentials are of one node.
pub(super) fn check_identity<'a>(
    own: &Identity,
    all: impl IntoIterator<Item = &'a Credentials>,
) -> Result<(), IdentityMismatch> {
    match all.into_iter().map(|credentials| credentials.certificate().identity()).find(|found| *found != own) {
        Some(found) => Err(IdentityMismatch { own: own.clone(), found: found.clone() }),
        None => Ok(()),
    }
}

/// The credentials of a node at one time. Immutable: a rotation replaces the set.
pub(super) struct CredentialSet {
    signing: Credentials,
    /// The successor, and the time from which everything is signed with it.
    next: Option<(Credentials, Timestamp)>,
    older: Vec<Credentials>,
}

impl CredentialSet {
    pub fn new(signing: Credentials, older: Vec<Credentials>) -> Self {
        Self { signing, next: None, older }
    }

    /// The credentials to sign a message of this kind with. Messages that carry the certificate are signed with the successor at once, so
    /// that other nodes learn it; everything else after the grace period.
    pub fn signing(&self, kind: Kind, now: Timestamp) -> &Credentials {
        match &self.next {
            Some((next, from)) if next.certificate().is_valid_at(now) => {
                let grace_period_over = now >= *from || !self.signing.certificate().is_valid_at(now);
                if grace_period_over || announces_certificate(kind) { next } else { &self.signing }
            }
            _ => &self.signing,
        }
    }

    /// The newest certificate.
    pub fn newest(&self) -> &Arc<Certificate> {
        self.next.as_ref().map_or(&self.signing, |(next, _)| next).certificate()
    }

    /// All credentials that messages are opened with.
    pub fn all(&self) -> impl Iterator<Item = &Credentials> {
        self.next.iter().map(|(next, _)| next).chain(std::iter::once(&self.signing)).chain(&self.older)
    }

    /// The set after a rotation to `new`. Messages encrypted to the previous credentials are opened while these are valid.
    pub fn followed_by(
        &self,
        new: Credentials,
        older: Vec<Credentials>,
        now: Timestamp,
        rotation_grace_period: Duration,
    ) -> Self {
        let signing = self.signing(Kind::Ping, now).clone();
        if signing.certificate().fingerprint() == new.certificate().fingerprint() {
            return Self { signing: new, next: None, older: self.opening(older, now, &[]) };
        }
        let all = self.opening(older, now, &[&signing, &new]);
        Self { signing, next: Some((new, now.saturating_add(rotation_grace_period))), older: all }
    }

    fn opening(&self, more: Vec<Credentials>, now: Timestamp, but: &[&Credentials]) -> Vec<Credentials> {
        let same = |a: &Credentials, b: &Credentials| a.certificate().fingerprint() == b.certificate().fingerprint();
        let mut all: Vec<Credentials> = Vec::new();
        for one in self.all().cloned().chain(more) {
            let is_known = all.iter().chain(but.iter().copied()).any(|other| same(other, &one));
            if !is_known && one.certificate().is_valid_at(now) && all.len() < MAX_OLDER_KEYS {
                all.push(one);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, KeyType};
    use crate::clock::{Clock, SystemClock};

    #[test]
    fn s07_new_certificate_signs_everything_after_the_rotation_grace_period() {
        let now = SystemClock.now();
        let day = Duration::from_secs(86_400);
        let ca = CertificateAuthority::create("example.org", KeyType::P256, day * 30, now).unwrap();
        let fred = Identity::agent("fred").unwrap();
        let issue = |days: u32| ca.issue(&fred, KeyType::P256, day * days, now).unwrap();
        let (old, new, newer) = (issue(1), issue(2), issue(3));
        let is = |own: &CredentialSet, kind, at, expected: &Credentials| {
            let signing = own.signing(kind, at).certificate().fingerprint();
            assert_eq!(signing, expected.certificate().fingerprint());
        };
        let own = CredentialSet::new(old.clone(), Vec::new()).followed_by(
            new.clone(),
            Vec::new(),
            now,
            ROTATION_GRACE_PERIOD,
        );
        is(&own, Kind::Register, now, &new);
        is(&own, Kind::Advertise, now, &new);
        is(&own, Kind::Outcome, now, &old);
        let settled = now.saturating_add(ROTATION_GRACE_PERIOD);
        is(&own, Kind::Outcome, settled, &new);
        assert_eq!(own.all().count(), 2);
        // Another rotation, within and after the grace period.
        let early = own.followed_by(newer.clone(), Vec::new(), now, ROTATION_GRACE_PERIOD);
        is(&early, Kind::Outcome, now, &old);
        is(&early, Kind::Register, now, &newer);
        assert_eq!(early.all().count(), 3, "all three open");
        let late = own.followed_by(newer.clone(), Vec::new(), settled, ROTATION_GRACE_PERIOD);
        is(&late, Kind::Outcome, settled, &new);
        // The previous certificate has expired: it signs nothing, and the next rotation drops it.
        let expired = now.saturating_add(day);
        let next = CredentialSet::new(old.clone(), Vec::new()).followed_by(newer.clone(), Vec::new(), expired, day * 9);
        is(&next, Kind::Outcome, expired, &newer);
        let again = next.followed_by(new.clone(), Vec::new(), expired, ROTATION_GRACE_PERIOD);
        assert_eq!(again.all().count(), 2);
        // The same credentials again change nothing.
        let same = CredentialSet::new(old.clone(), Vec::new()).followed_by(
            old.clone(),
            vec![old.clone()],
            now,
            ROTATION_GRACE_PERIOD,
        );
        is(&same, Kind::Register, now, &old);
        assert!(same.all().count() <= 2);
    }
}
