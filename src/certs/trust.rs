//! Whether a known certificate may be believed: chain, validity, revocation and usage.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use lru::LruCache;
use openssl::x509::{X509, X509Crl, X509KeyUsage};

use super::anchors::Anchors;
use super::{Certificate, Suite, pem};
use crate::clock::Timestamp;

/// How long a good verdict is kept at most.
const KEEP: Duration = Duration::from_secs(60);
/// How many good verdicts are kept.
const VERDICTS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);

/// Decides whether a certificate may be believed.
///
/// By default that takes a chain to one of the given CA certificates, checked by OpenSSL with its strict rules; the system's own
/// CAs count for nothing. A CA whose certificate names a trust domain, as `nanite certs init` makes them, is believed for identities
/// of that domain only. More than one CA can be given, as when one takes over from another. Where revocation lists are given,
/// every certificate of a chain but the anchor's own must be covered by one that is current: a list that is out of date refuses
/// everybody.
///
/// A good verdict is kept for up to a minute (and never past the validity of a certificate or revocation list it rests on), so
/// that a check for each message costs next to nothing.
///
/// ```
/// use nanite::certs::Trust;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let nonsense = Trust::from_pem(b"no certificate in here");
/// assert!(nonsense.is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Trust {
    state: RwLock<Arc<State>>,
}

/// What verdicts rest on, and the verdicts: they are replaced together.
#[derive(Debug)]
struct State {
    /// None: pinned.
    anchors: Option<Arc<Anchors>>,
    domain: Option<String>,
    verdicts: Mutex<LruCache<[u8; 32], Verdict>>,
}

/// A certificate was good at a moment, and is good until another.
#[derive(Clone, Copy, Debug)]
struct Verdict {
    from: Timestamp,
    until: Timestamp,
}

/// Why a certificate is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// Its validity has ended.
    #[error("it expired at {0}")]
    Expired(Timestamp),
    /// Its validity has not begun.
    #[error("it is not valid before {0}")]
    NotYetValid(Timestamp),
    /// It lacks a key usage that its suite needs, or has one that only a CA may have.
    #[error("its key usage does not fit: {0}")]
    KeyUsage(&'static str),
    /// Its identity is of another trust domain.
    #[error("it is of the domain {found}, not of {wanted}")]
    Domain {
        /// The domain of its URI.
        found: String,
        /// The domain that is asked for.
        wanted: String,
    },
    /// None of the CA certificates has issued it.
    #[error("it was not issued by a known CA")]
    UnknownIssuer,
    /// A CA certificate of its chain has expired.
    #[error("a CA certificate above it has expired")]
    AuthorityExpired,
    /// A CA certificate of its chain is not valid yet.
    #[error("a CA certificate above it is not valid yet")]
    AuthorityNotYetValid,
    /// It is revoked.
    #[error("it is revoked")]
    Revoked,
    /// A CA certificate of its chain is revoked.
    #[error("a CA certificate above it is revoked")]
    AuthorityRevoked,
    /// Revocation lists are in use, and none is of its issuer.
    #[error("there is no revocation list of its issuer")]
    NoCrl,
    /// The revocation list of its issuer is out of date.
    #[error("the revocation list of its issuer is out of date")]
    StaleCrl,
    /// Another fault of the chain, in OpenSSL's words.
    #[error("its chain is not valid: {0}")]
    Chain(String),
}

/// Why CA certificates or revocation lists cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No certificates in PEM.
    #[error("no CA certificate in PEM")]
    Malformed,
    /// No certificate, or more than 256.
    #[error("{0} CA certificates, 1 to 256 are possible")]
    Count(usize),
    /// A certificate may not sign others.
    #[error("the certificate {0} is not a CA's")]
    NotACa(String),
    /// A revocation list cannot be read, or says no moment of its next update.
    #[error("no revocation list in PEM with a next update")]
    Crl,
    /// A revocation list says only what has changed since another: it is of no use without that, and not used with it.
    #[error("a revocation list holds only the changes since another (a delta list): give the complete one")]
    DeltaCrl,
    /// Revocation lists cannot be kept in a temporary file.
    #[error("cannot use the directory for temporary files")]
    Temporary(#[source] std::io::Error),
    /// Revocation lists say nothing of pinned certificates.
    #[error("revocation lists need CA certificates")]
    Pinned,
}

impl Trust {
    /// Believes what these CAs have issued. Certificates between a CA and its leaves may be among them; a chain always has to
    /// end in one that is signed by itself.
    ///
    /// # Errors
    /// [`AuthorityError`] when there is none, or one is not a CA's.
    pub fn authorities(certificates: impl IntoIterator<Item = X509>) -> Result<Self, AuthorityError> {
        Ok(Self::of(Some(Arc::new(Anchors::new(certificates.into_iter().collect())?))))
    }

    /// Believes what the CAs in this PEM text have issued.
    ///
    /// # Errors
    /// [`AuthorityError`] when there is none, or one is not a CA's.
    pub fn from_pem(text: &[u8]) -> Result<Self, AuthorityError> {
        Self::authorities(pem::certificates(text).map_err(|_| AuthorityError::Malformed)?)
    }

    /// Believes what the CAs in this PEM file have issued. Reads the file.
    ///
    /// # Errors
    /// [`AuthorityError`] when it cannot be read, holds none, or one is not a CA's.
    pub fn from_file(path: &Path) -> Result<Self, AuthorityError> {
        let text = pem::read(path, pem::MAX_CERTIFICATES)
            .map_err(|source| AuthorityError::Unreadable { path: path.to_owned(), source })?;
        Self::from_pem(&text)
    }

    /// Believes what the CAs in `ca.pem` of this directory have issued. Reads the file.
    ///
    /// # Errors
    /// [`AuthorityError`] when it cannot be read, holds none, or one is not a CA's.
    pub fn from_dir(directory: &Path) -> Result<Self, AuthorityError> {
        Self::from_file(&directory.join("ca.pem"))
    }

    /// Believes every certificate that the certificate store returns: the store itself is the list of who may take part, and
    /// there is no CA. Dates and key usage are still checked. Use it only with a store whose content nobody else can change.
    #[must_use]
    pub fn pinned() -> Self {
        Self::of(None)
    }

    fn of(anchors: Option<Arc<Anchors>>) -> Self {
        Self::with(anchors, None)
    }

    fn with(anchors: Option<Arc<Anchors>>, domain: Option<String>) -> Self {
        let verdicts = Mutex::new(LruCache::new(VERDICTS));
        Self { state: RwLock::new(Arc::new(State { anchors, domain, verdicts })) }
    }

    fn state(&self) -> Arc<State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Only with these revocation lists, in place of any given before.
    ///
    /// # Errors
    /// [`AuthorityError`] when there are none, one is a delta list or has no next update, or there is no CA that they could be of.
    pub fn with_crls(self, crls: &[X509Crl]) -> Result<Self, AuthorityError> {
        let state = self.state();
        let anchors = state.anchors.as_ref().ok_or(AuthorityError::Pinned)?.with_crls(crls)?;
        Ok(Self::with(Some(Arc::new(anchors)), state.domain.clone()))
    }

    /// Only with the revocation lists in this PEM text.
    ///
    /// # Errors
    /// As [`Trust::with_crls`], and when one cannot be read.
    pub fn with_crls_pem(self, text: &[u8]) -> Result<Self, AuthorityError> {
        self.with_crls(&pem::crls(text).ok_or(AuthorityError::Crl)?)
    }

    /// Only identities of this trust domain.
    #[must_use]
    pub fn for_domain(self, domain: &str) -> Self {
        Self::with(self.state().anchors.clone(), Some(domain.to_owned()))
    }

    /// From now on believes the CAs that `other` believes, with its revocation lists, for the same domain as before. Verdicts
    /// of before are forgotten.
    pub fn replace_authorities(&self, other: &Trust) {
        let anchors = other.state().anchors.clone();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        *state = Self::with(anchors, state.domain.clone()).state();
    }

    /// The CA certificates; none when certificates are pinned.
    pub fn certificates(&self) -> Vec<X509> {
        self.state().anchors.iter().flat_map(|anchors| anchors.certificates()).cloned().collect()
    }

    /// Whether revocation lists are in use.
    pub fn checks_revocation(&self) -> bool {
        self.state().anchors.as_ref().is_some_and(|anchors| anchors.has_crls())
    }

    /// Checks that a certificate may be believed at `now`: validity, key usage, trust domain, chain and revocation.
    /// `intermediates` is the DER of what may help to build the chain; it is not believed for that.
    ///
    /// May use the CPU for a millisecond the first time a certificate is seen; never blocks for longer.
    ///
    /// # Errors
    /// [`TrustError`] says what is wrong first.
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
        if state.remembers(certificate, now) {
            return Ok(());
        }
        check_usage(certificate)?;
        if let Some(wanted) = state.domain.as_ref().filter(|wanted| *wanted != certificate.domain()) {
            return Err(TrustError::Domain { found: certificate.domain().to_owned(), wanted: wanted.clone() });
        }
        let until = match &state.anchors {
            Some(anchors) => anchors.verify(certificate, intermediates, now)?,
            None => certificate.not_after(),
        };
        state.remember(certificate, Verdict { from: now, until: until.min(now.saturating_add(KEEP)) });
        Ok(())
    }

    /// That part of [`Trust::verify`] that knows nothing of nodes: for test suites whose certificates name none.
    #[doc(hidden)]
    pub fn verify_chain(&self, leaf: &X509, intermediates: &[Vec<u8>], now: Timestamp) -> Result<(), TrustError> {
        let anchors = self.state().anchors.clone();
        let anchors = anchors.ok_or(TrustError::UnknownIssuer)?;
        anchors.verify_chain(leaf, intermediates, now).map(drop)
    }
}

impl Trust {
    /// Whether a chain can be built with these certificates, whatever was found before: for whoever keeps them.
    pub(crate) fn chains(&self, certificate: &Certificate, intermediates: &[Vec<u8>], now: Timestamp) -> bool {
        let anchors = self.state().anchors.clone();
        anchors.is_none_or(|anchors| anchors.verify(certificate, intermediates, now).is_ok())
    }
}

impl State {
    fn remembers(&self, certificate: &Certificate, now: Timestamp) -> bool {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        verdicts.get(certificate.fingerprint()).is_some_and(|good| good.from <= now && now < good.until)
    }

    fn remember(&self, certificate: &Certificate, verdict: Verdict) {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        verdicts.put(*certificate.fingerprint(), verdict);
    }
}

/// A node signs messages, and receives keys by agreement (P-256) or encipherment (RSA); it signs no certificates.
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
    fn s04_dates_count_whatever_was_believed_before() {
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
        }
    }

    #[test]
    fn s04_another_ca_of_the_same_name_is_not_believed() {
        let now = SystemClock.now();
        let (ours, theirs) = (authority("example.org", now), authority("example.org", now));
        let forged = leaf(&theirs, now);
        assert_eq!(ours.trust().unwrap().verify(&forged, &[], now), Err(TrustError::UnknownIssuer));
        // Nor when it brings its own CA along.
        let brought = vec![theirs.certificate().to_der().unwrap()];
        assert_eq!(ours.trust().unwrap().verify(&forged, &brought, now), Err(TrustError::UnknownIssuer));
    }

    #[test]
    fn s04_two_cas_are_believed_during_a_roll_over_and_the_old_no_longer_after_it() {
        let now = SystemClock.now();
        let (old, new) = (authority("example.org", now), authority("example.org", now));
        let both = Trust::authorities([old.certificate().to_owned(), new.certificate().to_owned()]).unwrap();
        let (first, second) = (leaf(&old, now), leaf(&new, now));
        assert_eq!(both.verify(&first, &[], now), Ok(()));
        assert_eq!(both.verify(&second, &[], now), Ok(()));
        both.replace_authorities(&new.trust().unwrap());
        assert_eq!(both.verify(&first, &[], now), Err(TrustError::UnknownIssuer), "a kept verdict has survived");
        assert_eq!(both.verify(&second, &[], now), Ok(()));
    }

    #[test]
    fn s04_only_the_own_domain_is_believed() {
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let trust = Trust::authorities([ca.certificate().to_owned()]).unwrap().for_domain("example.com");
        let wanted = TrustError::Domain { found: "example.org".into(), wanted: "example.com".into() };
        assert_eq!(trust.verify(&leaf(&ca, now), &[], now), Err(wanted));
    }

    #[test]
    fn s04_a_verdict_is_kept_for_a_minute_and_never_before_it_was_made() {
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let certificate = leaf(&ca, now);
        let trust = ca.trust().unwrap();
        let kept = |at| trust.state().remembers(&certificate, at);
        assert!(!kept(now));
        trust.verify(&certificate, &[], now).unwrap();
        assert!(kept(now) && kept(now.saturating_add(KEEP - Duration::from_micros(1))));
        assert!(!kept(now.saturating_add(KEEP)));
        assert!(!kept(now.saturating_sub(Duration::from_micros(1))), "the clock went back");
    }

    #[test]
    fn s04_nothing_is_believed_without_a_ca_certificate() {
        assert!(matches!(Trust::authorities([]), Err(AuthorityError::Count(0))));
        assert!(matches!(Trust::from_pem(b""), Err(AuthorityError::Malformed)));
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let not_a_ca = leaf(&ca, now).to_pem();
        assert!(matches!(Trust::from_pem(&not_a_ca), Err(AuthorityError::NotACa(_))));
        assert!(matches!(ca.trust().unwrap().with_crls_pem(b"no list"), Err(AuthorityError::Crl)));
        assert!(matches!(ca.trust().unwrap().with_crls(&[]), Err(AuthorityError::Crl)));
        assert!(matches!(Trust::from_dir(Path::new("/nonexistent")), Err(AuthorityError::Unreadable { .. })));
        let empty = vec![b'\n'; pem::MAX_CERTIFICATES + 1];
        assert!(matches!(Trust::from_pem(&empty), Err(AuthorityError::Malformed)));
    }

    #[test]
    fn s04_a_damaged_revocation_list_is_not_passed_over() {
        let now = SystemClock.now();
        let ca = authority("example.org", now);
        let list = |before| RevocationList::next(before, &ca, &[], HOUR, now).unwrap();
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
        // The lines between two lists are gone, or damaged beyond recognition: the second list is in the block of the first.
        let [first, second] = texts.each_ref().map(String::as_str);
        let (first, second) = (first.split("-----END").next().unwrap(), second.split("CRL-----\n").nth(1).unwrap());
        for between in ["", "\n", "---I$K", "-\n", "====\n", "#"] {
            let text = format!("{first}{between}{second}CRL-----\n");
            assert!(matches!(with(text), Err(AuthorityError::Crl)), "{between:?}");
        }
    }
}
