//! A certificate authority: creates its own certificate, and issues those of agents and mappers.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use openssl::pkey::{HasPublic, PKeyRef};
use openssl::x509::{X509, X509Ref};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, IsCa, Issuer, KeyIdMethod,
    KeyUsagePurpose, SanType, SerialNumber,
};
use time::OffsetDateTime;
use x509_cert::der::{Decode, Tag, Tagged};

use super::certificate::{Certificate, Suite, allows_nodes, distinguished_name, is_ca, parse_certificates, validity};
use super::issuing::{CertificateRequest, IssueError, OpensslSigner, SubjectKey, rcgen_name};
use super::key::{Credentials, KeyError, KeyType, PrivateKey};
use super::trust::Trust;
use super::trust_anchors::{AuthorityError, trust_domain};
use crate::clock::Timestamp;
use crate::packet::{Identity, is_trust_domain};

/// How long before its issue a certificate becomes valid: the clocks of other machines may be behind.
const BACKDATE: Duration = Duration::from_secs(300);

/// A certificate authority (CA): its certificate and key. It issues certificates of one trust domain.
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
    /// The default validity of a CA certificate: ten years.
    pub const VALID_FOR: Duration = Duration::from_secs(3652 * 86_400);
    /// The default validity of the certificate of an agent or mapper: 30 days.
    pub const LEAF_VALID_FOR: Duration = Duration::from_secs(30 * 86_400);

    /// Creates an authority for a trust domain, with a new key. An RSA key takes up to some seconds of CPU time.
    ///
    /// # Errors
    /// [`IssueError`] when the domain is invalid or the validity cannot be encoded.
    pub fn create(domain: &str, key_type: KeyType, valid_for: Duration, now: Timestamp) -> Result<Self, IssueError> {
        if !is_trust_domain(domain) {
            return Err(IssueError::Domain(domain.to_owned()));
        }
        let key = PrivateKey::generate(key_type)?;
        let signer = OpensslSigner::new(key.pkey())?;
        let mut params = certificate_params(signer.public(), backdated(now), expiry(now, valid_for)?)?;
        params.distinguished_name = rcgen_name([(DnType::OrganizationName, domain), (DnType::CommonName, "nanite CA")]);
        params.subject_alt_names = vec![uri(format!("spiffe://{domain}"))?];
        // It issues certificates to nodes, and not to other CAs.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = X509::from_der(params.self_signed(&signer).map_err(IssueError::encoding)?.der())?;
        Self::new(certificate, key, Some(domain))
    }

    /// An authority from a CA certificate and its key. `domain` is required when the certificate does not name its trust domain by a
    /// URI `spiffe://DOMAIN`, as those of [`create`](Self::create) do.
    ///
    /// # Errors
    /// [`IssueError`] when the certificate is not a CA's, is limited to other purposes by its extended key usage, or belongs to another
    /// key, or when the domain is missing, invalid or another than the certificate's.
    pub fn new(certificate: X509, key: PrivateKey, domain: Option<&str>) -> Result<Self, IssueError> {
        let subject = || distinguished_name(certificate.subject_name());
        if !is_ca(&certificate) {
            return Err(IssueError::NotACa(subject()));
        }
        if !allows_nodes(&certificate) {
            return Err(IssueError::AuthorityKeyUsage(subject()));
        }
        if !certificate.public_key()?.public_eq(key.pkey()) {
            return Err(KeyError::Mismatch(subject()).into());
        }
        let named = trust_domain(&certificate);
        let domain = match (&named, domain) {
            (Some(named), Some(wanted)) if named != wanted => return Err(IssueError::OtherDomain(named.clone())),
            (Some(domain), _) => domain.clone(),
            (None, Some(domain)) if is_trust_domain(domain) => domain.to_owned(),
            (None, Some(domain)) => return Err(IssueError::Domain(domain.to_owned())),
            (None, None) => return Err(IssueError::NoDomain),
        };
        let (not_before, not_after) = validity(&certificate).map_err(IssueError::Unusable)?;
        Ok(Self { certificate, key, domain, not_before, not_after })
    }

    /// An authority from the certificate in a PEM text that belongs to this key. The text may also hold the certificates of other CAs.
    ///
    /// # Errors
    /// As [`CertificateAuthority::new`], and when there is no certificate.
    ///
    /// ```
    /// use nanite::certs::{CertificateAuthority, KeyType};
    /// use nanite::clock::{Clock, SystemClock};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let now = SystemClock.now();
    /// let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    /// let pem = ca.certificate().to_pem()?;
    /// assert_eq!(CertificateAuthority::from_pem(&pem, ca.key().clone(), None)?.domain(), "example.org");
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_pem(text: &[u8], key: PrivateKey, domain: Option<&str>) -> Result<Self, IssueError> {
        let mut certificates = parse_certificates(text).ok_or(IssueError::Malformed)?;
        let is_own = |x509: &X509| x509.public_key().is_ok_and(|public| public.public_eq(key.pkey()));
        let own = certificates.iter().position(is_own).unwrap_or(0);
        Self::new(certificates.swap_remove(own), key, domain)
    }

    /// Checks that the CA certificate is valid at `now`.
    ///
    /// # Errors
    /// [`IssueError::AuthorityNotValid`] when it has expired or is not valid yet.
    pub fn check_valid(&self, now: Timestamp) -> Result<(), IssueError> {
        if now < self.not_before || now >= self.not_after {
            return Err(IssueError::AuthorityNotValid(self.not_before, self.not_after));
        }
        Ok(())
    }

    /// Issues credentials: a certificate for this identity, with a new key.
    ///
    /// # Errors
    /// [`IssueError`] when the CA certificate is not valid now, or would expire before the new one.
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

    /// Issues a certificate for the key of a signing request. `identity` is the identity of the certificate; everything but the key in
    /// the request is ignored.
    ///
    /// # Errors
    /// [`IssueError`] when the CA certificate is not valid now, or would expire before the new one.
    ///
    /// ```
    /// use nanite::certs::{CertificateAuthority, CertificateRequest, KeyType, PrivateKey};
    /// use nanite::clock::{Clock, SystemClock};
    /// use nanite::packet::Identity;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let now = SystemClock.now();
    /// let fred = Identity::agent("fred")?;
    /// // On the node:
    /// let key = PrivateKey::generate(KeyType::P256)?;
    /// let pem = CertificateRequest::new(&fred, &key)?.to_pem()?;
    /// // On the CA's machine:
    /// let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    /// let request = CertificateRequest::from_pem(&pem)?;
    /// let certificate = ca.sign(&request, &fred, CertificateAuthority::LEAF_VALID_FOR, now)?;
    /// assert_eq!(certificate.identity(), &fred);
    /// # Ok(())
    /// # }
    /// ```
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
        let subject_key = SubjectKey::new(key)?;
        let mut leaf = certificate_params(&subject_key, backdated(now).max(self.not_before), not_after)?;
        leaf.distinguished_name = rcgen_name([(DnType::CommonName, identity.as_str())]);
        leaf.subject_alt_names = vec![uri(identity.uri(&self.domain))?];
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = match Suite::of(key).ok_or(IssueError::KeyType)? {
            Suite::P256 => vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyAgreement],
            Suite::Rsa => vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment],
        };
        let issued = leaf.signed_by(&subject_key, &self.issuer()?.0).map_err(IssueError::encoding)?;
        Certificate::from_der(issued.der()).map(Arc::new).map_err(IssueError::Unusable)
    }

    /// This CA as rcgen's issuer, and its key id.
    pub(super) fn issuer(&self) -> Result<(Issuer<'_, OpensslSigner<'_>>, Vec<u8>), IssueError> {
        let signer = OpensslSigner::new(self.key.pkey())?;
        let key_id = self.certificate.subject_key_id().map(|id| id.as_slice().to_vec());
        let key_id = key_id.unwrap_or(signer.public().key_id());
        let mut issuer = CertificateParams::default();
        issuer.distinguished_name = issuer_name(&self.certificate)?;
        issuer.key_identifier_method = KeyIdMethod::PreSpecified(key_id.clone());
        Ok((Issuer::new(issuer, signer), key_id))
    }

    /// A [`Trust`] in the certificates that this authority issues.
    ///
    /// # Errors
    /// [`AuthorityError`] when OpenSSL fails.
    pub fn trust(&self) -> Result<Trust, AuthorityError> {
        Ok(Trust::authorities([self.certificate.clone()])?.for_domain(&self.domain))
    }

    /// Its trust domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The CA certificate.
    pub fn certificate(&self) -> &X509Ref {
        &self.certificate
    }

    /// The CA's key. Keep it where only the CA can read it.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// The end of the CA certificate's validity, exclusive.
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

/// The fields that all certificates have.
fn certificate_params(key: &SubjectKey, from: Timestamp, to: Timestamp) -> Result<CertificateParams, IssueError> {
    let mut serial = [0; 16];
    openssl::rand::rand_bytes(&mut serial)?;
    let mut params = CertificateParams::default();
    params.not_before = rcgen_date(from)?;
    params.not_after = rcgen_date(to)?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.key_identifier_method = KeyIdMethod::PreSpecified(key.key_id());
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn uri(text: String) -> Result<SanType, IssueError> {
    Ok(SanType::URI(text.try_into().map_err(IssueError::encoding)?))
}

pub(super) fn rcgen_date(at: Timestamp) -> Result<OffsetDateTime, IssueError> {
    let seconds = i64::try_from(at.as_secs()).map_err(|_| IssueError::Validity)?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| IssueError::Validity)
}

pub(super) fn backdated(now: Timestamp) -> Timestamp {
    now.saturating_sub(BACKDATE)
}

pub(super) fn expiry(now: Timestamp, valid_for: Duration) -> Result<Timestamp, IssueError> {
    if valid_for.as_secs() == 0 {
        return Err(IssueError::Validity);
    }
    Ok(now.saturating_add(valid_for))
}

/// The subject of a CA certificate as the issuer's name for rcgen. A name that rcgen would encode differently is refused, because chains
/// are built by name.
fn issuer_name(ca: &X509Ref) -> Result<DistinguishedName, IssueError> {
    let der = ca.to_der()?;
    let parsed = x509_cert::Certificate::from_der(&der).map_err(|_| IssueError::AuthorityName)?;
    let mut name = DistinguishedName::new();
    for relative in &parsed.tbs_certificate.subject.0 {
        let [attribute] = relative.0.as_slice() else { return Err(IssueError::AuthorityName) };
        let oid: Vec<u64> = attribute.oid.arcs().map(u64::from).collect();
        let kind = DnType::from_oid(&oid);
        let text = std::str::from_utf8(attribute.value.value()).map_err(|_| IssueError::AuthorityName)?;
        let value = match attribute.value.tag() {
            Tag::Utf8String => DnValue::Utf8String(text.to_owned()),
            Tag::PrintableString => DnValue::PrintableString(text.try_into().map_err(IssueError::encoding)?),
            Tag::Ia5String => DnValue::Ia5String(text.try_into().map_err(IssueError::encoding)?),
            _ => return Err(IssueError::AuthorityName),
        };
        if name.get(&kind).is_some() {
            return Err(IssueError::AuthorityName);
        }
        name.push(kind, value);
    }
    Ok(name)
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
    fn s03_every_pair_of_key_types_issues_trusted_certificates() {
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
    fn s03_serial_numbers_and_keys_are_unique() {
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
    fn s03_ca_issues_only_within_its_own_validity() {
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
        // A backdated certificate still begins no earlier than its CA's.
        let early = ca.issue(&fred, KeyType::P256, DAY / 2, now.saturating_sub(Duration::from_secs(200))).unwrap();
        assert_eq!(early.certificate().not_before().as_secs(), now.as_secs() - 300);
    }

    #[test]
    fn s03_ca_loads_only_with_its_own_key_and_domain() {
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
    fn s03_ca_takes_only_the_key_from_a_signing_request() {
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
    fn s03_rejects_signing_request_without_proof_of_possession() {
        let key = PrivateKey::generate(KeyType::P256).unwrap();
        let request = CertificateRequest::new(&Identity::agent("a").unwrap(), &key).unwrap();
        let mut der = openssl::x509::X509Req::from_pem(&request.to_pem().unwrap()).unwrap().to_der().unwrap();
        // The name is in the signed part: `nanite-a` becomes `nanite-b`.
        let at = der.windows(8).position(|window| window == b"nanite-a").unwrap();
        der[at + 7] = b'b';
        let pem = openssl::x509::X509Req::from_der(&der).unwrap().to_pem().unwrap();
        assert!(matches!(CertificateRequest::from_pem(&pem), Err(IssueError::NoProofOfPossession)));
        assert!(matches!(CertificateRequest::from_pem(b"no request"), Err(IssueError::MalformedRequest)));
        assert!(matches!(CertificateRequest::from_pem(&[b'x'; 65 * 1024]), Err(IssueError::MalformedRequest)));
    }
}
