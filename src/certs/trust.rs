//! Trust: whether a certificate is accepted, by its chain, validity, revocation and key usage.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use openssl::x509::{X509, X509Crl, X509KeyUsage};
use parking_lot::{Mutex, RwLock};

use super::certificate::{Certificate, MAX_CERTIFICATES_BYTES, Suite, allows_nodes, parse_certificates, parse_crls};
use super::files;
use super::trust_anchors::{AuthorityError, TrustAnchors, TrustError};
use crate::clock::Timestamp;
use crate::limits::nonzero;

/// The longest time that a successful verification is cached.
const CACHE_LIFETIME: Duration = Duration::from_secs(60);
/// The most successful verifications in the cache.
const MAX_CACHED_CERTIFICATES: NonZeroUsize = nonzero(4096);

/// Verifies certificates.
///
/// A trusted certificate needs a chain to one of the given CA certificates, which OpenSSL verifies by its strict rules; the system's CAs
/// are not used. A CA certificate that names a trust domain, as those of `nanite certs init` do, is trusted for identities of that domain
/// only. Give several CA certificates while one replaces another. With revocation lists, every certificate of a chain except the anchor
/// needs a current list of its issuer: an outdated list refuses every certificate of that issuer.
///
/// Successful verifications are cached for up to a minute, but not beyond the expiry of a certificate or revocation list that they rely
/// on, so that verifying the certificate of every message costs little.
///
/// ```
/// use nanite::certs::{CertificateAuthority, KeyType, Trust, TrustError};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let now = SystemClock.now();
/// let ours = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// let theirs = CertificateAuthority::create("example.com", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// let fred = Identity::agent("fred")?;
/// let issue = |ca: &CertificateAuthority| ca.issue(&fred, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now);
///
/// let trust = Trust::from_pem(&ours.certificate().to_pem()?)?;
/// assert_eq!(trust.verify(issue(&ours)?.certificate(), &[], now), Ok(()));
/// assert_eq!(trust.verify(issue(&theirs)?.certificate(), &[], now), Err(TrustError::UnknownIssuer));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Trust {
    state: RwLock<Arc<State>>,
}

/// The rules, and the cache of verifications by them: they are replaced together.
#[derive(Debug)]
struct State {
    /// None when certificates are pinned.
    anchors: Option<Arc<TrustAnchors>>,
    domain: Option<String>,
    /// Successful verifications by fingerprint.
    cache: Mutex<LruCache<[u8; 32], CachedVerification>>,
}

/// When a successful verification was made, and until when it is used.
#[derive(Clone, Copy, Debug)]
struct CachedVerification {
    from: Timestamp,
    until: Timestamp,
}

impl Trust {
    /// Trusts certificates that these CAs issued. Intermediate certificates may be among them; every chain must end in a self-signed one.
    ///
    /// # Errors
    /// [`AuthorityError`] when there is no certificate, or one is not a CA's.
    pub fn authorities(certificates: impl IntoIterator<Item = X509>) -> Result<Self, AuthorityError> {
        Ok(Self::new(Some(Arc::new(TrustAnchors::new(certificates.into_iter().collect())?)), None))
    }

    /// Trusts certificates that the CAs in a PEM text issued.
    ///
    /// # Errors
    /// [`AuthorityError`] when there is no certificate, or one is not a CA's.
    pub fn from_pem(text: &[u8]) -> Result<Self, AuthorityError> {
        Self::authorities(parse_certificates(text).ok_or(AuthorityError::Malformed)?)
    }

    /// Trusts certificates that the CAs in a PEM file issued. Reads the file.
    ///
    /// # Errors
    /// [`AuthorityError`] when the file cannot be read, holds no certificate, or holds one that is not a CA's.
    pub fn from_file(path: &Path) -> Result<Self, AuthorityError> {
        let text = files::read_bounded(path, MAX_CERTIFICATES_BYTES)
            .map_err(|source| AuthorityError::Unreadable { path: path.to_owned(), source })?;
        Self::from_pem(&text)
    }

    /// Trusts certificates that the CAs in `ca.pem` of a directory issued. Reads the file.
    ///
    /// # Errors
    /// [`AuthorityError`] when the file cannot be read, holds no certificate, or holds one that is not a CA's.
    pub fn from_dir(directory: &Path) -> Result<Self, AuthorityError> {
        Self::from_file(&directory.join("ca.pem"))
    }

    /// Trusts every certificate that the certificate store returns, without a CA: the store is the list of allowed nodes. Validity and
    /// key usage are still checked. Use it only with a store that others cannot write to.
    #[must_use]
    pub fn pinned() -> Self {
        Self::new(None, None)
    }

    /// Whether certificates are [pinned](Self::pinned): then only those in the store are trusted, and nothing is learned from messages.
    pub fn is_pinned(&self) -> bool {
        self.state().anchors.is_none()
    }

    fn new(anchors: Option<Arc<TrustAnchors>>, domain: Option<String>) -> Self {
        let cache = Mutex::new(LruCache::new(MAX_CACHED_CERTIFICATES));
        Self { state: RwLock::new(Arc::new(State { anchors, domain, cache })) }
    }

    fn state(&self) -> Arc<State> {
        self.state.read().clone()
    }

    /// Checks revocation by these lists, which replace those given before.
    ///
    /// # Errors
    /// [`AuthorityError`] when there are none, one is a delta list or has no next update, or certificates are pinned.
    pub fn with_crls(self, crls: &[X509Crl]) -> Result<Self, AuthorityError> {
        let state = self.state();
        let anchors = state.anchors.as_ref().ok_or(AuthorityError::Pinned)?.with_crls(crls)?;
        Ok(Self::new(Some(Arc::new(anchors)), state.domain.clone()))
    }

    /// Checks revocation by the lists in a PEM text, which replace those given before.
    ///
    /// # Errors
    /// As [`Trust::with_crls`], and when one cannot be parsed.
    ///
    /// ```
    /// use nanite::certs::{CertificateAuthority, KeyType, RevocationList, RevocationReason, TrustError};
    /// use nanite::clock::{Clock, SystemClock};
    /// use nanite::packet::Identity;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let now = SystemClock.now();
    /// # let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    /// let issued = ca.issue(&Identity::agent("fred")?, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
    /// let fred = issued.certificate();
    /// let revoked = [(&**fred, RevocationReason::KeyCompromise)];
    /// let list = RevocationList::issue(None, &ca, &revoked, RevocationList::VALID_FOR, now)?;
    /// let trust = ca.trust()?.with_crls_pem(&list.to_pem()?)?;
    /// assert_eq!(trust.verify(fred, &[], now), Err(TrustError::Revoked));
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_crls_pem(self, text: &[u8]) -> Result<Self, AuthorityError> {
        self.with_crls(&parse_crls(text).ok_or(AuthorityError::Crl)?)
    }

    /// Trusts identities of this trust domain only.
    #[must_use]
    pub fn for_domain(self, domain: &str) -> Self {
        Self::new(self.state().anchors.clone(), Some(domain.to_owned()))
    }

    /// Replaces the CA certificates and revocation lists by those of `other`. The trust domain stays; the cache of verifications is
    /// cleared.
    pub fn replace_authorities(&self, other: &Trust) {
        let anchors = other.state().anchors.clone();
        let mut state = self.state.write();
        *state = Self::new(anchors, state.domain.clone()).state();
    }

    /// The CA certificates; none when certificates are pinned.
    pub fn certificates(&self) -> Vec<X509> {
        self.state().anchors.iter().flat_map(|anchors| anchors.certificates()).cloned().collect()
    }

    /// Whether revocation lists are in use.
    pub fn checks_revocation(&self) -> bool {
        self.state().anchors.as_ref().is_some_and(|anchors| anchors.has_crls())
    }

    /// Verifies a certificate at `now`: validity, key usage, trust domain, chain and revocation. `intermediates` holds untrusted
    /// certificates in DER from which the chain may be built; at most 8.
    ///
    /// The first verification of a certificate takes about a millisecond of CPU time, and 6 to 7 where a CA has name constraints. It does
    /// not block.
    ///
    /// # Errors
    /// [`TrustError`] for the first check that fails.
    pub fn verify(
        &self,
        certificate: &Certificate,
        intermediates: &[Vec<u8>],
        now: Timestamp,
    ) -> Result<(), TrustError> {
        let state = self.state();
        if now < certificate.not_before() {
            return Err(TrustError::NotYetValid(certificate.not_before()));
        }
        if !certificate.is_valid_at(now) {
            return Err(TrustError::Expired(certificate.not_after()));
        }
        if state.is_cached(certificate, now) {
            return Ok(());
        }
        check_usage(certificate)?;
        if let Some(wanted) = state.domain.as_ref().filter(|wanted| *wanted != certificate.domain()) {
            return Err(TrustError::Domain { found: certificate.domain().to_owned(), wanted: wanted.clone() });
        }
        let valid_until = match &state.anchors {
            Some(anchors) => anchors.verify(certificate, intermediates, now)?,
            None => certificate.not_after(),
        };
        let until = valid_until.min(now.saturating_add(CACHE_LIFETIME));
        state.cache.lock().put(*certificate.fingerprint(), CachedVerification { from: now, until });
        Ok(())
    }

    /// Verifies only the chain, of a certificate that may not be a node's: for test suites of certificates.
    ///
    /// # Errors
    /// [`TrustError`] for the first check that fails.
    #[cfg(feature = "fuzzing")]
    pub fn verify_chain(&self, leaf: &X509, intermediates: &[Vec<u8>], now: Timestamp) -> Result<(), TrustError> {
        let anchors = self.state().anchors.clone();
        anchors.ok_or(TrustError::UnknownIssuer)?.verify_chain(leaf, intermediates, now).map(drop)
    }

    /// Whether these intermediate certificates complete the chain of a certificate. Does not use the cache of verifications.
    pub(crate) fn has_valid_chain(&self, certificate: &Certificate, intermediates: &[Vec<u8>], now: Timestamp) -> bool {
        let anchors = self.state().anchors.clone();
        anchors.is_none_or(|anchors| anchors.verify(certificate, intermediates, now).is_ok())
    }
}

impl State {
    fn is_cached(&self, certificate: &Certificate, now: Timestamp) -> bool {
        let mut cache = self.cache.lock();
        cache.get(certificate.fingerprint()).is_some_and(|cached| cached.from <= now && now < cached.until)
    }
}

/// A node signs messages and receives keys by key agreement (P-256) or key encipherment (RSA). It signs no certificates. An extended key
/// usage, if there is one, must allow that: messages are the CMS of emailProtection, and clientAuth is the purpose of most identities.
fn check_usage(certificate: &Certificate) -> Result<(), TrustError> {
    let usage = certificate.x509().key_usage().ok_or(TrustError::KeyUsage("it is not stated"))?;
    if !usage.contains(X509KeyUsage::DIGITAL_SIGNATURE) {
        return Err(TrustError::KeyUsage("digitalSignature is missing"));
    }
    match certificate.suite() {
        Suite::P256 if !usage.contains(X509KeyUsage::KEY_AGREEMENT) => {
            Err(TrustError::KeyUsage("keyAgreement is missing"))
        }
        Suite::Rsa if !usage.contains(X509KeyUsage::KEY_ENCIPHERMENT) => {
            Err(TrustError::KeyUsage("keyEncipherment is missing"))
        }
        _ if usage.intersects(X509KeyUsage::KEY_CERT_SIGN | X509KeyUsage::CRL_SIGN) => {
            Err(TrustError::KeyUsage("it may sign certificates or revocation lists"))
        }
        _ if !allows_nodes(certificate.x509()) => {
            Err(TrustError::KeyUsage("its extended key usage allows neither clientAuth nor emailProtection"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, KeyType, RevocationList};
    use crate::clock::{Clock, SystemClock};
    use crate::packet::Identity;

    const HOUR: Duration = Duration::from_secs(3600);

    fn authority(domain: &str, now: Timestamp) -> CertificateAuthority {
        CertificateAuthority::create(domain, KeyType::P256, CertificateAuthority::VALID_FOR, now).unwrap()
    }

    fn leaf(ca: &CertificateAuthority, now: Timestamp) -> Arc<Certificate> {
        let fred = Identity::agent("fred").unwrap();
        ca.issue(&fred, KeyType::P256, HOUR, now).unwrap().certificate().clone()
    }

    #[test]
    fn s04_validity_is_checked_despite_cached_verification() {
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let certificate = leaf(&ca, now);
        for trust in [ca.trust().unwrap(), Trust::pinned()] {
            assert_eq!(trust.verify(&certificate, &[], now), Ok(()));
            let end = certificate.not_after();
            let last = Timestamp::from_micros(end.as_micros() - 1);
            assert_eq!(trust.verify(&certificate, &[], last), Ok(()));
            assert_eq!(trust.verify(&certificate, &[], end), Err(TrustError::Expired(end)));
            let early = Timestamp::from_micros(certificate.not_before().as_micros() - 1);
            let refused = TrustError::NotYetValid(certificate.not_before());
            assert_eq!(trust.verify(&certificate, &[], early), Err(refused));
            assert_eq!(trust.verify(&certificate, &[], certificate.not_before()), Ok(()));
        }
    }

    #[test]
    fn s04_trust_tells_what_it_rests_on() {
        let now = SystemClock.now();
        let (ca, other) = (authority("example.org", now), authority("example.org", now));
        let (trust, pinned) = (ca.trust().unwrap(), Trust::pinned());
        assert!(pinned.is_pinned() && !trust.is_pinned());
        let fingerprints: Vec<_> = trust.certificates().iter().map(|ca| ca.to_der().unwrap()).collect();
        assert_eq!(fingerprints, [ca.certificate().to_der().unwrap()]);
        assert!(pinned.certificates().is_empty());
        let (own, foreign) = (leaf(&ca, now), leaf(&other, now));
        assert!(trust.has_valid_chain(&own, &[], now) && !trust.has_valid_chain(&foreign, &[], now));
        let list = RevocationList::issue(None, &ca, &[], HOUR, now).unwrap();
        assert!(!trust.checks_revocation() && !pinned.checks_revocation());
        assert!(trust.with_crls_pem(&list.to_pem().unwrap()).unwrap().checks_revocation());
    }

    #[test]
    fn s04_rejects_other_ca_with_same_name() {
        let now = SystemClock.now();
        let (ours, theirs) = (authority("example.org", now), authority("example.org", now));
        let forged = leaf(&theirs, now);
        assert_eq!(ours.trust().unwrap().verify(&forged, &[], now), Err(TrustError::UnknownIssuer));
        // Nor when its CA is presented with it.
        let presented = vec![theirs.certificate().to_der().unwrap()];
        assert_eq!(ours.trust().unwrap().verify(&forged, &presented, now), Err(TrustError::UnknownIssuer));
    }

    #[test]
    fn s04_both_cas_are_trusted_during_rollover() {
        let now = SystemClock.now();
        let (old, new) = (authority("example.org", now), authority("example.org", now));
        let both = Trust::authorities([old.certificate().to_owned(), new.certificate().to_owned()]).unwrap();
        let (first, second) = (leaf(&old, now), leaf(&new, now));
        assert_eq!(both.verify(&first, &[], now), Ok(()));
        assert_eq!(both.verify(&second, &[], now), Ok(()));
        both.replace_authorities(&new.trust().unwrap());
        assert_eq!(both.verify(&first, &[], now), Err(TrustError::UnknownIssuer), "the cache was not cleared");
        assert_eq!(both.verify(&second, &[], now), Ok(()));
    }

    #[test]
    fn s04_rejects_other_trust_domain() {
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let trust = Trust::authorities([ca.certificate().to_owned()]).unwrap().for_domain("example.com");
        let wanted = TrustError::Domain { found: "example.org".into(), wanted: "example.com".into() };
        assert_eq!(trust.verify(&leaf(&ca, now), &[], now), Err(wanted));
    }

    #[test]
    fn s04_verification_is_cached_for_a_minute() {
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let certificate = leaf(&ca, now);
        let trust = ca.trust().unwrap();
        let cached = |at| trust.state().is_cached(&certificate, at);
        assert!(!cached(now));
        trust.verify(&certificate, &[], now).unwrap();
        assert!(cached(now) && cached(now.saturating_add(CACHE_LIFETIME - Duration::from_micros(1))));
        assert!(!cached(now.saturating_add(CACHE_LIFETIME)));
        assert!(!cached(now.saturating_sub(Duration::from_micros(1))), "the clock went back");
    }

    #[test]
    fn s04_trust_requires_a_ca_certificate() {
        assert!(matches!(Trust::authorities([]), Err(AuthorityError::Count(0))));
        assert!(matches!(Trust::from_pem(b""), Err(AuthorityError::Malformed)));
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let not_a_ca = leaf(&ca, now).to_pem();
        assert!(matches!(Trust::from_pem(&not_a_ca), Err(AuthorityError::NotACa(_))));
        assert!(matches!(ca.trust().unwrap().with_crls_pem(b"no list"), Err(AuthorityError::Crl)));
        assert!(matches!(ca.trust().unwrap().with_crls(&[]), Err(AuthorityError::Crl)));
        assert!(matches!(Trust::from_dir(Path::new("/nonexistent")), Err(AuthorityError::Unreadable { .. })));
        let empty = vec![b'\n'; MAX_CERTIFICATES_BYTES + 1];
        assert!(matches!(Trust::from_pem(&empty), Err(AuthorityError::Malformed)));
    }

    #[test]
    fn s04_rejects_damaged_revocation_list() {
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let list = |before| RevocationList::issue(before, &ca, &[], HOUR, now).unwrap();
        let first = list(None);
        let texts = [&first, &list(Some(&first))].map(|list| String::from_utf8(list.to_pem().unwrap()).unwrap());
        let with = |text: String| ca.trust().unwrap().with_crls_pem(text.as_bytes()).map(drop);
        with(texts.concat()).unwrap();
        for (sound, damaged) in [("BEGIN", "BEGXN"), ("-----BEGIN", "----BEGIN"), ("-----END", "----END")] {
            for (first, second) in [
                (texts[0].replace(sound, damaged), texts[1].clone()),
                (texts[0].clone(), texts[1].replace(sound, damaged)),
            ] {
                assert!(matches!(with(first + &second), Err(AuthorityError::Crl)), "{damaged}");
            }
        }
        for (sound, damaged) in [("-----BEGIN", "x-----BEGIN"), ("BEGIN X509 CRL-----\n", "BEGIN X509 CRL-----")] {
            assert!(matches!(with(texts[0].replace(sound, damaged)), Err(AuthorityError::Crl)), "{damaged}");
        }
        for (sound, damaged) in [("\n-----END", "-----END"), ("END X509 CRL-----", "END X509 CRL-----x")] {
            assert!(matches!(with(texts[0].replace(sound, damaged)), Err(AuthorityError::Crl)), "{damaged}");
        }
        with(format!("a note\n{}", texts.concat().replace('\n', " \r\n"))).unwrap();
        // The boundary between two lists is missing or unrecognizable: the second list is inside the block of the first.
        let [first, second] = texts.each_ref().map(String::as_str);
        let (first, second) = (first.split("-----END").next().unwrap(), second.split("CRL-----\n").nth(1).unwrap());
        for between in ["", "\n", "---I$K", "-\n", "====\n", "#"] {
            let text = format!("{first}{between}{second}CRL-----\n");
            assert!(matches!(with(text), Err(AuthorityError::Crl)), "{between:?}");
        }
    }
}
