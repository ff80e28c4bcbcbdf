//! A certificate authority: makes its own certificate, and issues those of agents and mappers.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use openssl::error::ErrorStack;
use openssl::pkey::{HasPublic, PKeyRef};
use openssl::x509::{X509, X509Ref};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyIdMethod, KeyUsagePurpose,
    SanType, SerialNumber,
};
use time::OffsetDateTime;

use super::anchors::{domain_of, is_ca};
use super::certificate::validity;
use super::signing::{OpensslSigner, PublicPart, issuer_name};
use super::{
    AuthorityError, Certificate, CertificateError, CertificateRequest, Credentials, KeyError, KeyType, PrivateKey,
    Suite, Trust, TrustError, pem,
};
use crate::clock::Timestamp;
use crate::packet::{Identity, is_trust_domain};

/// How far before the moment of issue a certificate becomes valid: clocks of other machines may be behind.
pub(super) const BACKDATE: Duration = Duration::from_secs(300);
/// The longest common or organisation name (RFC 5280, appendix A).
const MAX_NAME: usize = 64;

/// Why a certificate could not be issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The domain is not 1 to 255 of `a-z`, `0-9`, `.`, `-`, `_`.
    #[error("'{0}' is no domain: 1 to 255 of a-z, 0-9, '.', '-' and '_' are possible")]
    Domain(String),
    /// The key is of another type or size.
    #[error("the key is neither P-256 nor RSA of 2048 to 8192 bits")]
    KeyType,
    /// The CA certificate cannot be read.
    #[error("no CA certificate in PEM")]
    Malformed,
    /// The certificate may not sign others.
    #[error("the certificate {0} is not a CA's")]
    NotACa(String),
    /// The CA certificate names no domain, and none was given.
    #[error("the CA certificate names no domain")]
    NoDomain,
    /// The CA certificate is of another domain than the one that was asked for.
    #[error("the CA certificate is of the domain {0}")]
    OtherDomain(String),
    /// The subject of the CA certificate cannot be written as an issuer.
    #[error("the subject of the CA certificate has parts that cannot be written as an issuer's name")]
    AuthorityName,
    /// The CA certificate has expired or is not valid yet.
    #[error("the CA certificate is not valid now, but from {0} to {1}")]
    AuthorityNotValid(Timestamp, Timestamp),
    /// The certificate would be valid for longer than its CA's.
    #[error("the CA certificate expires at {0}, before the new one would")]
    OutlivesAuthority(Timestamp),
    /// No validity at all, or beyond the year 9999.
    #[error("such a validity cannot be written")]
    Validity,
    /// No signing request in PEM with a key of a usable type.
    #[error("no certificate signing request in PEM")]
    MalformedRequest,
    /// No revocation list in PEM, or one without a number or next update.
    #[error("no revocation list in PEM that this CA can go on with")]
    MalformedList,
    /// The request is not signed by the key it is for.
    #[error("the signing request is not signed by its own key")]
    NoPossession,
    /// The key does not fit, or cannot be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// What was issued is not what it should be.
    #[error("the new certificate is not usable: {0}")]
    Unusable(#[from] CertificateError),
    /// What was issued would not be believed.
    #[error("the new certificate would not be believed: {0}")]
    Unbelievable(#[from] TrustError),
    /// OpenSSL failed.
    #[error("OpenSSL failed")]
    Openssl(#[from] ErrorStack),
    /// The certificate could not be written.
    #[error("the certificate could not be written")]
    Encoding(#[from] rcgen::Error),
}

/// A certificate authority: its certificate and key. It issues certificates of one trust domain.
///
/// ```
/// use nanite::certs::{CertificateAuthority, KeyType};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let now = SystemClock.now();
/// let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// let fred = Identity::agent("fred")?;
/// let credentials = ca.issue(&fred, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
/// assert_eq!(credentials.certificate().identity(), &fred);
/// ca.trust()?.verify(credentials.certificate(), &[], now)?;
/// # Ok(())
/// # }
/// ```
pub struct CertificateAuthority {
    certificate: X509,
    key: PrivateKey,
    domain: String,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl CertificateAuthority {
    /// How long a CA certificate is valid, unless said otherwise: ten years.
    pub const VALID_FOR: Duration = Duration::from_secs(3652 * 86_400);
    /// How long the certificate of an agent or mapper is valid, unless said otherwise: 30 days.
    pub const LEAF_VALID_FOR: Duration = Duration::from_secs(30 * 86_400);

    /// Makes a new authority for a trust domain, with a new key. Making an RSA key uses the CPU for up to some seconds.
    ///
    /// # Errors
    /// [`IssueError`] when the domain is none or the validity cannot be written.
    pub fn create(domain: &str, key_type: KeyType, valid_for: Duration, now: Timestamp) -> Result<Self, IssueError> {
        if !is_trust_domain(domain) {
            return Err(IssueError::Domain(domain.to_owned()));
        }
        let key = PrivateKey::generate(key_type)?;
        let signer = OpensslSigner::new(key.pkey())?;
        let mut params = params(signer.public(), now.saturating_sub(BACKDATE), expiry(now, valid_for)?)?;
        params.distinguished_name = name([(DnType::OrganizationName, domain), (DnType::CommonName, "nanite CA")]);
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{domain}").try_into()?)];
        // It issues to nodes only, to no other CA.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = X509::from_der(params.self_signed(&signer)?.der())?;
        Self::new(certificate, key, Some(domain))
    }

    /// Takes an existing CA certificate and its key. The domain has to be given when the certificate does not name it by a URI
    /// `spiffe://DOMAIN`, as those made here do.
    ///
    /// # Errors
    /// [`IssueError`] when it is not a CA's, the key is another's, or the domain is not known.
    pub fn new(certificate: X509, key: PrivateKey, domain: Option<&str>) -> Result<Self, IssueError> {
        let subject = || super::anchors::subject(&certificate);
        if !is_ca(&certificate) {
            return Err(IssueError::NotACa(subject()));
        }
        if !certificate.public_key()?.public_eq(key.pkey()) {
            return Err(KeyError::Mismatch(subject()).into());
        }
        let named = domain_of(&certificate);
        let domain = match (&named, domain) {
            (Some(named), Some(wanted)) if named != wanted => return Err(IssueError::OtherDomain(named.clone())),
            (Some(domain), _) => domain.clone(),
            (None, Some(domain)) if is_trust_domain(domain) => domain.to_owned(),
            (None, Some(domain)) => return Err(IssueError::Domain(domain.to_owned())),
            (None, None) => return Err(IssueError::NoDomain),
        };
        let (not_before, not_after) = validity(&certificate)?;
        Ok(Self { certificate, key, domain, not_before, not_after })
    }

    /// Takes the certificate that belongs to this key from a PEM text: there may be others of CAs that came before.
    ///
    /// # Errors
    /// As [`CertificateAuthority::new`], and when there is no certificate.
    pub fn from_pem(text: &[u8], key: PrivateKey, domain: Option<&str>) -> Result<Self, IssueError> {
        let mut certificates = pem::certificates(text).map_err(|_| IssueError::Malformed)?;
        let is_own = |x509: &X509| x509.public_key().is_ok_and(|public| public.public_eq(key.pkey()));
        let own = certificates.iter().position(is_own).unwrap_or(0);
        Self::new(certificates.swap_remove(own), key, domain)
    }

    /// Whether it can issue at `now`.
    ///
    /// # Errors
    /// [`IssueError::AuthorityNotValid`] when its certificate has expired or is not valid yet.
    pub fn check_valid(&self, now: Timestamp) -> Result<(), IssueError> {
        if now < self.not_before || now >= self.not_after {
            return Err(IssueError::AuthorityNotValid(self.not_before, self.not_after));
        }
        Ok(())
    }

    /// Issues a certificate with a new key of this type: what an agent or mapper needs to sign and open messages.
    ///
    /// # Errors
    /// [`IssueError`] when the authority is not valid now, or would expire before the certificate.
    pub fn issue(
        &self,
        identity: &Identity,
        key_type: KeyType,
        valid_for: Duration,
        now: Timestamp,
    ) -> Result<Credentials, IssueError> {
        let key = PrivateKey::generate(key_type)?;
        let certificate = self.certify(identity, key.pkey(), valid_for, now)?;
        Ok(Credentials::new(certificate, key)?)
    }

    /// Issues a certificate for the key of a signing request. Only the key is taken from the request: whose certificate it
    /// becomes is said here, and what else the request asks for is not looked at.
    ///
    /// # Errors
    /// [`IssueError`] when the authority is not valid now, or would expire before the certificate.
    pub fn sign(
        &self,
        request: &CertificateRequest,
        identity: &Identity,
        valid_for: Duration,
        now: Timestamp,
    ) -> Result<Arc<Certificate>, IssueError> {
        self.certify(identity, request.public_key(), valid_for, now)
    }

    fn certify<T: HasPublic>(
        &self,
        identity: &Identity,
        key: &PKeyRef<T>,
        valid_for: Duration,
        now: Timestamp,
    ) -> Result<Arc<Certificate>, IssueError> {
        let not_after = expiry(now, valid_for)?;
        self.check_valid(now)?;
        if not_after > self.not_after {
            return Err(IssueError::OutlivesAuthority(self.not_after));
        }
        let public = PublicPart::new(key)?;
        let mut leaf = params(&public, now.saturating_sub(BACKDATE).max(self.not_before), not_after)?;
        leaf.distinguished_name = name([(DnType::CommonName, identity.as_str())]);
        leaf.subject_alt_names = vec![SanType::URI(identity.uri(&self.domain).try_into()?)];
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = match Suite::of(key).ok_or(IssueError::KeyType)? {
            Suite::P256 => vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyAgreement],
            Suite::Rsa => vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment],
        };
        let issued = leaf.signed_by(&public, &self.issuer()?.0)?;
        Ok(Arc::new(Certificate::from_der(issued.der())?))
    }

    /// What rcgen needs to sign as this CA, and the key id by which others find it.
    pub(super) fn issuer(&self) -> Result<(Issuer<'_, OpensslSigner<'_>>, Vec<u8>), IssueError> {
        let signer = OpensslSigner::new(self.key.pkey())?;
        let key_id = self.certificate.subject_key_id().map(|id| id.as_slice().to_vec());
        let key_id = key_id.unwrap_or(signer.public().key_id());
        let mut issuer = CertificateParams::default();
        issuer.distinguished_name = issuer_name(&self.certificate)?;
        issuer.key_identifier_method = KeyIdMethod::PreSpecified(key_id.clone());
        Ok((Issuer::new(issuer, signer), key_id))
    }

    /// A [`Trust`] in what this authority issues.
    ///
    /// # Errors
    /// None that is expected; it says so when OpenSSL fails.
    pub fn trust(&self) -> Result<Trust, AuthorityError> {
        Ok(Trust::authorities([self.certificate.clone()])?.for_domain(&self.domain))
    }

    /// Its trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Its certificate.
    pub fn certificate(&self) -> &X509Ref {
        &self.certificate
    }

    /// Its key: to be kept where nobody else can read it.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// The last moment at which its certificate is valid.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority")
            .field("domain", &self.domain)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// What every certificate has in common.
fn params(key: &PublicPart, from: Timestamp, to: Timestamp) -> Result<CertificateParams, IssueError> {
    let mut serial = [0; 16];
    openssl::rand::rand_bytes(&mut serial)?;
    let mut params = CertificateParams::default();
    params.not_before = date(from)?;
    params.not_after = date(to)?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.key_identifier_method = KeyIdMethod::PreSpecified(key.key_id());
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

pub(super) fn date(at: Timestamp) -> Result<OffsetDateTime, IssueError> {
    let seconds = i64::try_from(at.as_secs()).map_err(|_| IssueError::Validity)?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| IssueError::Validity)
}

pub(super) fn expiry(now: Timestamp, valid_for: Duration) -> Result<Timestamp, IssueError> {
    if valid_for.as_secs() == 0 {
        return Err(IssueError::Validity);
    }
    Ok(now.saturating_add(valid_for))
}

fn name<const N: usize>(parts: [(DnType, &str); N]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for (kind, value) in parts {
        name.push(kind, value.chars().take(MAX_NAME).collect::<String>());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, SystemClock};

    const DAY: Duration = Duration::from_secs(86_400);

    fn authority(key_type: KeyType, now: Timestamp) -> CertificateAuthority {
        CertificateAuthority::create("example.org", key_type, CertificateAuthority::VALID_FOR, now).unwrap()
    }

    #[test]
    fn s03_every_pair_of_key_types_gives_a_certificate_that_is_believed() {
        let now = SystemClock.now();
        for ca_type in [KeyType::P256, KeyType::Rsa2048] {
            let ca = authority(ca_type, now);
            for leaf_type in [KeyType::P256, KeyType::Rsa2048] {
                let node = Identity::mapper("m-1").unwrap();
                let credentials = ca.issue(&node, leaf_type, DAY, now).unwrap();
                let certificate = credentials.certificate();
                assert_eq!((certificate.identity(), certificate.domain()), (&node, "example.org"));
                assert_eq!(certificate.not_after().as_secs(), now.as_secs() + 86_400);
                assert_eq!(certificate.not_before().as_secs(), now.as_secs() - 300);
                assert_eq!(certificate.key_id().as_bytes().len(), 20);
                assert_eq!(ca.trust().unwrap().verify(certificate, &[], now), Ok(()), "{ca_type} {leaf_type}");
            }
        }
    }

    #[test]
    fn s03_serial_numbers_and_keys_differ() {
        let now = SystemClock.now();
        let ca = authority(KeyType::P256, now);
        let serials: std::collections::HashSet<_> = (0..20)
            .map(|_| {
                let issued = ca.issue(&Identity::agent("a").unwrap(), KeyType::P256, DAY, now).unwrap();
                let serial = issued.certificate().x509().serial_number().to_bn().unwrap().to_vec();
                assert!((12..=16).contains(&serial.len()), "{}", serial.len());
                (serial, issued.certificate().key_id().clone())
            })
            .collect();
        assert_eq!(serials.len(), 20);
    }

    #[test]
    fn s03_an_authority_issues_only_while_it_is_valid_and_for_no_longer() {
        let now = SystemClock.now();
        let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY, now).unwrap();
        let fred = Identity::agent("fred").unwrap();
        let issue = |valid_for, at| ca.issue(&fred, KeyType::P256, valid_for, at).map(drop);
        assert!(matches!(issue(DAY * 2, now), Err(IssueError::OutlivesAuthority(_))));
        assert!(matches!(issue(DAY, now.saturating_add(DAY * 2)), Err(IssueError::AuthorityNotValid(..))));
        assert!(matches!(issue(DAY, now.saturating_sub(DAY)), Err(IssueError::AuthorityNotValid(..))));
        assert!(matches!(issue(Duration::from_millis(999), now), Err(IssueError::Validity)));
        assert!(matches!(issue(Duration::MAX, now), Err(IssueError::OutlivesAuthority(_))));
        let beyond = CertificateAuthority::create("example.org", KeyType::P256, Duration::MAX, now);
        assert!(matches!(beyond, Err(IssueError::Validity)));
        // From the first second of the authority on, no certificate begins before it.
        let early = ca.issue(&fred, KeyType::P256, DAY / 2, now.saturating_sub(Duration::from_secs(200))).unwrap();
        assert_eq!(early.certificate().not_before().as_secs(), now.as_secs() - 300);
    }

    #[test]
    fn s03_an_authority_is_read_back_with_its_domain_and_only_with_its_own_key() {
        let now = SystemClock.now();
        let ca = authority(KeyType::P256, now);
        let pem = ca.certificate().to_pem().unwrap();
        let again = CertificateAuthority::from_pem(&pem, ca.key().clone(), None).unwrap();
        assert_eq!(again.domain(), "example.org");
        let fred = again.issue(&Identity::agent("fred").unwrap(), KeyType::P256, DAY, now).unwrap();
        assert_eq!(ca.trust().unwrap().verify(fred.certificate(), &[], now), Ok(()));

        let other = PrivateKey::generate(KeyType::P256).unwrap();
        let mismatch = CertificateAuthority::from_pem(&pem, other, None);
        assert!(matches!(mismatch, Err(IssueError::Key(KeyError::Mismatch(_)))));
        let domain = CertificateAuthority::from_pem(&pem, ca.key().clone(), Some("example.com"));
        assert!(matches!(domain, Err(IssueError::OtherDomain(found)) if found == "example.org"));
        let leaf = CertificateAuthority::from_pem(&fred.certificate().to_pem(), fred.key().clone(), None);
        assert!(matches!(leaf, Err(IssueError::NotACa(name)) if name == "CN=nanite-fred"));
        let bad = CertificateAuthority::create("Example org", KeyType::P256, DAY, now);
        assert!(matches!(bad, Err(IssueError::Domain(_))));
    }

    #[test]
    fn s03_a_signing_request_gives_its_key_and_nothing_else() {
        let now = SystemClock.now();
        let ca = authority(KeyType::P256, now);
        let key = PrivateKey::generate(KeyType::P256).unwrap();
        let asks_for_bob = CertificateRequest::new(&Identity::mapper("bob").unwrap(), &key).unwrap();
        let request = CertificateRequest::from_pem(&asks_for_bob.to_pem().unwrap()).unwrap();
        let fred = Identity::agent("fred").unwrap();
        let certificate = ca.sign(&request, &fred, DAY, now).unwrap();
        assert_eq!(certificate.identity(), &fred);
        assert!(Credentials::new(certificate, key).is_ok());
    }

    #[test]
    fn s03_a_signing_request_that_proves_nothing_is_refused() {
        let key = PrivateKey::generate(KeyType::P256).unwrap();
        let request = CertificateRequest::new(&Identity::agent("a").unwrap(), &key).unwrap();
        let mut der = openssl::x509::X509Req::from_pem(&request.to_pem().unwrap()).unwrap().to_der().unwrap();
        // The name is in the signed part: `nanite-a` becomes `nanite-b`.
        let at = der.windows(8).position(|window| window == b"nanite-a").unwrap();
        der[at + 7] = b'b';
        let pem = openssl::x509::X509Req::from_der(&der).unwrap().to_pem().unwrap();
        assert!(matches!(CertificateRequest::from_pem(&pem), Err(IssueError::NoPossession)));
        assert!(matches!(CertificateRequest::from_pem(b"no request"), Err(IssueError::MalformedRequest)));
        assert!(matches!(CertificateRequest::from_pem(&[b'x'; MAX_READ]), Err(IssueError::MalformedRequest)));
    }

    const MAX_READ: usize = 65 * 1024;
}
