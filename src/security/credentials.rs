//! Whom this node is: the credentials it signs by, those that will take their place, and all keys that it opens with.

use std::sync::Arc;
use std::time::Duration;

use super::envelope::announces_certificate;
use crate::certs::{Certificate, Credentials};
use crate::clock::Timestamp;
use crate::packet::{Identity, Kind};

/// For how long others have time to learn a new certificate before everything is signed by it.
pub(super) const ROTATION_GRACE_PERIOD: Duration = Duration::from_secs(15);
/// How many keys a node opens with at most.
const KEYS: usize = 4;

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

/// The credentials of a node at one time. Replaced as a whole.
pub(super) struct CredentialSet {
    signing: Credentials,
    /// Those that follow, and from when on everything is signed by them.
    next: Option<(Credentials, Timestamp)>,
    older: Vec<Credentials>,
}

impl CredentialSet {
    pub fn new(signing: Credentials, older: Vec<Credentials>) -> Self {
        Self { signing, next: None, older }
    }

    /// What a message of this kind is signed by. What carries the certificate along is signed by the new one at once, so that
    /// others learn it; everything else by the one that they know, until they have had the time for that.
    pub fn signing(&self, kind: Kind, now: Timestamp) -> &Credentials {
        match &self.next {
            Some((next, from)) if next.certificate().is_valid_at(now) => {
                let settled = now >= *from || !self.signing.certificate().is_valid_at(now);
                if settled || announces_certificate(kind) { next } else { &self.signing }
            }
            _ => &self.signing,
        }
    }

    /// The newest certificate.
    pub fn newest(&self) -> &Arc<Certificate> {
        self.next.as_ref().map_or(&self.signing, |(next, _)| next).certificate()
    }

    /// All keys that messages are opened with.
    pub fn all(&self) -> impl Iterator<Item = &Credentials> {
        self.next.iter().map(|(next, _)| next).chain(std::iter::once(&self.signing)).chain(&self.older)
    }

    /// These credentials from now on, and what was sealed to the ones before is still opened while those are valid.
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
            let peers = all.iter().chain(but.iter().copied()).any(|other| same(other, &one));
            if !peers && one.certificate().is_valid_at(now) && all.len() < KEYS {
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
    fn s07_a_new_certificate_is_shown_at_once_and_signs_everything_once_others_could_learn_it() {
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
        // Once more, before and after that.
        let early = own.followed_by(newer.clone(), Vec::new(), now, ROTATION_GRACE_PERIOD);
        is(&early, Kind::Outcome, now, &old);
        is(&early, Kind::Register, now, &newer);
        assert_eq!(early.all().count(), 3, "what was sealed to any of them is opened");
        let late = own.followed_by(newer.clone(), Vec::new(), settled, ROTATION_GRACE_PERIOD);
        is(&late, Kind::Outcome, settled, &new);
        // The one before has expired: it is signed by no more, and is forgotten at the next change.
        let expired = now.saturating_add(day);
        let next = CredentialSet::new(old.clone(), Vec::new()).followed_by(newer.clone(), Vec::new(), expired, day * 9);
        is(&next, Kind::Outcome, expired, &newer);
        let again = next.followed_by(new.clone(), Vec::new(), expired, ROTATION_GRACE_PERIOD);
        assert_eq!(again.all().count(), 2);
        // The same once more changes nothing.
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
