//! What a CA issues besides certificates: answers to signing requests, and revocation lists.

use std::fmt;
use std::time::Duration;

use openssl::bn::BigNumContext;
use openssl::ec::PointConversionForm;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{HasPublic, PKey, PKeyRef, Private, Public};
use openssl::x509::{CrlStatus, ReasonCode, X509Crl, X509CrlRef, X509Req};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, KeyIdMethod, PublicKeyData,
    RevokedCertParams, SerialNumber, SignatureAlgorithm, SigningKey,
};
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;
use x509_cert::der::asn1::UintRef;

use super::authority::{CertificateAuthority, backdated, expiry, rcgen_date};
use super::certificate::{Certificate, CertificateError, Suite, distinguished_name, parse_crls, timestamp};
use super::key::{KeyError, PrivateKey};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// The longest certificate signing request that is read, in bytes.
const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// The longest common or organisation name, in characters (RFC 5280, appendix A).
const MAX_NAME_CHARS: usize = 64;

/// Why a certificate could not be issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The trust domain is not 1 to 255 of `a-z`, `0-9`, `.`, `-`, `_`.
    #[error("'{0}' is not a trust domain: 1 to 255 of a-z, 0-9, '.', '-' and '_'")]
    Domain(String),
    /// The type or size of the key is not supported.
    #[error("the key is neither P-256 nor RSA of 2048 to 8192 bits")]
    KeyType,
    /// The CA certificate cannot be parsed.
    #[error("no CA certificate in PEM")]
    Malformed,
    /// The certificate is not a CA's.
    #[error("the certificate {0} is not a CA's")]
    NotACa(String),
    /// The CA certificate names no trust domain, and none was given.
    #[error("the CA certificate names no domain")]
    NoDomain,
    /// The CA certificate names another trust domain than the one that was given.
    #[error("the CA certificate is of the domain {0}")]
    OtherDomain(String),
    /// The subject of the CA certificate cannot be encoded as an issuer.
    #[error("the subject of the CA certificate has parts that cannot be encoded as an issuer's name")]
    AuthorityName,
    /// The CA certificate is not valid now; from when until when it is.
    #[error("the CA certificate is not valid now: it is valid from {0} to {1}")]
    AuthorityNotValid(Timestamp, Timestamp),
    /// The certificate would expire after its CA's, which expires then.
    #[error("the CA certificate expires at {0}, before the new one would")]
    OutlivesAuthority(Timestamp),
    /// The validity is shorter than a second or ends after the year 9999.
    #[error("the validity is shorter than a second or ends after the year 9999")]
    Validity,
    /// Not a certificate signing request in PEM.
    #[error("not a certificate signing request in PEM")]
    MalformedRequest,
    /// Not revocation lists in PEM, or one of the CA has no number or no next update.
    #[error("no revocation list in PEM that this CA can continue")]
    MalformedList,
    /// The request lacks its proof of possession: it is not signed by the key that it contains.
    #[error("the signing request is not signed by its own key")]
    NoProofOfPossession,
    /// The key does not match the certificate, or cannot be generated.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Nodes could not use the new certificate.
    #[error("the new certificate is not usable: {0}")]
    Unusable(CertificateError),
    /// OpenSSL failed.
    #[error("OpenSSL failed")]
    Openssl(#[from] ErrorStack),
    /// The certificate, request or list could not be encoded.
    #[error("the certificate could not be encoded")]
    Encoding(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl IssueError {
    pub(super) fn encoding(error: rcgen::Error) -> Self {
        Self::Encoding(Box::new(error))
    }
}

/// A certificate signing request (PKCS #10, RFC 2986): a public key, and the proof of possession of the private key.
///
/// Everything else in a request is ignored: the caller of [`CertificateAuthority::sign`](super::CertificateAuthority::sign) decides the
/// identity of the certificate.
///
/// ```
/// use nanite::certs::{CertificateRequest, KeyType, PrivateKey};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let key = PrivateKey::generate(KeyType::P256)?;
/// let pem = CertificateRequest::new(&Identity::agent("fred")?, &key)?.to_pem()?;
/// assert!(CertificateRequest::from_pem(&pem)?.subject().contains("nanite-fred"));
/// # Ok(())
/// # }
/// ```
pub struct CertificateRequest {
    request: X509Req,
    public_key: PKey<Public>,
}

impl CertificateRequest {
    /// A request for this key. The identity is included for people to read.
    ///
    /// # Errors
    /// [`IssueError`] when OpenSSL fails.
    pub fn new(identity: &Identity, key: &PrivateKey) -> Result<Self, IssueError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen_name([(DnType::CommonName, identity.as_str())]);
        let request = params.serialize_request(&OpensslSigner::new(key.pkey())?).map_err(IssueError::encoding)?;
        Self::verified(X509Req::from_der(request.der())?)
    }

    /// Parses a request in PEM and verifies its proof of possession.
    ///
    /// # Errors
    /// [`IssueError`] when it cannot be parsed, its key is not supported, or it is not signed by that key.
    pub fn from_pem(text: &[u8]) -> Result<Self, IssueError> {
        if text.len() > MAX_REQUEST_BYTES {
            return Err(IssueError::MalformedRequest);
        }
        Self::verified(X509Req::from_pem(text).map_err(|_| IssueError::MalformedRequest)?)
    }

    fn verified(request: X509Req) -> Result<Self, IssueError> {
        let public_key = request.public_key().map_err(|_| IssueError::KeyType)?;
        Suite::of(&public_key).ok_or(IssueError::KeyType)?;
        match request.verify(&public_key) {
            Ok(true) => Ok(Self { request, public_key }),
            _ => Err(IssueError::NoProofOfPossession),
        }
    }

    /// The request in PEM.
    ///
    /// # Errors
    /// [`IssueError`] when OpenSSL fails.
    pub fn to_pem(&self) -> Result<Vec<u8>, IssueError> {
        Ok(self.request.to_pem()?)
    }

    /// The subject that it asks for, for people to read; it is not verified.
    pub fn subject(&self) -> String {
        distinguished_name(self.request.subject_name())
    }

    pub(super) fn public_key(&self) -> &PKeyRef<Public> {
        &self.public_key
    }
}

impl fmt::Debug for CertificateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateRequest").field("subject", &self.subject()).finish_non_exhaustive()
    }
}

/// A name for rcgen with these attributes, cut to the longest that RFC 5280 allows.
pub(super) fn rcgen_name<const N: usize>(attributes: [(DnType, &str); N]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for (kind, value) in attributes {
        name.push(kind, value.chars().take(MAX_NAME_CHARS).collect::<String>());
    }
    name
}

/// A public key for rcgen.
#[derive(Debug)]
pub(super) struct SubjectKey {
    /// The content of the BIT STRING in the SubjectPublicKeyInfo.
    bits: Vec<u8>,
    suite: Suite,
}

impl SubjectKey {
    pub(super) fn new<T: HasPublic>(key: &PKeyRef<T>) -> Result<Self, IssueError> {
        let suite = Suite::of(key).ok_or(IssueError::KeyType)?;
        Ok(Self { bits: public_key_bits(key, suite)?, suite })
    }

    /// The key id: the first 20 bytes of the SHA-256 of the key (RFC 7093, section 2, method 1).
    pub(super) fn key_id(&self) -> Vec<u8> {
        openssl::sha::sha256(&self.bits).into_iter().take(20).collect()
    }
}

fn public_key_bits<T: HasPublic>(key: &PKeyRef<T>, suite: Suite) -> Result<Vec<u8>, ErrorStack> {
    match suite {
        Suite::P256 => {
            let ec = key.ec_key()?;
            let mut context = BigNumContext::new()?;
            ec.public_key().to_bytes(ec.group(), PointConversionForm::UNCOMPRESSED, &mut context)
        }
        Suite::Rsa => key.rsa()?.public_key_to_der_pkcs1(),
    }
}

impl PublicKeyData for SubjectKey {
    fn der_bytes(&self) -> &[u8] {
        &self.bits
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        match self.suite {
            Suite::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Suite::Rsa => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

/// A private key for rcgen. It signs certificates by ECDSA or RSA PKCS #1 v1.5, each with SHA-256. PKCS #1 v1.5 is the usual signature of
/// certificates by RSA keys; messages signed with it are refused.
pub(super) struct OpensslSigner<'a> {
    key: &'a PKeyRef<Private>,
    public: SubjectKey,
}

impl<'a> OpensslSigner<'a> {
    pub(super) fn new(key: &'a PKeyRef<Private>) -> Result<Self, IssueError> {
        Ok(Self { key, public: SubjectKey::new(key)? })
    }

    pub(super) fn public(&self) -> &SubjectKey {
        &self.public
    }
}

impl PublicKeyData for OpensslSigner<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.public.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.public.algorithm()
    }
}

impl SigningKey for OpensslSigner<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signed = openssl::sign::Signer::new(MessageDigest::sha256(), self.key)
            .and_then(|mut signer| signer.sign_oneshot_to_vec(message));
        signed.map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

/// The OID of the CRL number (RFC 5280, section 5.2.3).
const CRL_NUMBER: &str = "2.5.29.20";

/// Why a certificate is revoked (RFC 5280, section 5.3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RevocationReason {
    /// No reason is given.
    #[default]
    Unspecified,
    /// Its key is or may be known to others.
    KeyCompromise,
    /// Another certificate replaces it.
    Superseded,
    /// Its node no longer exists.
    CessationOfOperation,
}

/// A revoked certificate.
#[derive(Clone, Debug)]
struct Entry {
    serial: Vec<u8>,
    revoked_at: Timestamp,
    reason: Option<rcgen::RevocationReason>,
}

/// A CA's certificate revocation list. It is valid until its next update: issue the next list before then.
///
/// ```
/// use nanite::certs::{CertificateAuthority, KeyType, RevocationList, RevocationReason};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let now = SystemClock.now();
/// # let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// # let issued = ca.issue(&Identity::agent("fred")?, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
/// # let fred = issued.certificate();
/// let first = RevocationList::issue(None, &ca, &[], RevocationList::VALID_FOR, now)?;
/// let revoked = [(&**fred, RevocationReason::KeyCompromise)];
/// let second = RevocationList::issue(Some(&first), &ca, &revoked, RevocationList::VALID_FOR, now)?;
/// assert!(!first.revokes(fred) && second.revokes(fred));
/// assert_eq!((second.number(), second.len()), (2, 1));
/// # Ok(())
/// # }
/// ```
pub struct RevocationList {
    crl: X509Crl,
    number: u64,
    entries: Vec<Entry>,
    next_update: Timestamp,
}

impl RevocationList {
    /// The default time from the issue of a list to its next update: 30 days.
    pub const VALID_FOR: Duration = Duration::from_secs(30 * 86_400);

    /// Issues the CA's list that follows `previous`: with its entries, these certificates, and the next higher number. Without a
    /// previous list it has the number 1.
    ///
    /// # Errors
    /// [`IssueError`] when the CA certificate is not valid now, or may not sign lists.
    pub fn issue(
        previous: Option<&Self>,
        ca: &CertificateAuthority,
        revoked: &[(&Certificate, RevocationReason)],
        valid_for: Duration,
        now: Timestamp,
    ) -> Result<Self, IssueError> {
        let mut entries = previous.map(|previous| previous.entries.clone()).unwrap_or_default();
        for (certificate, reason) in revoked {
            let serial = certificate.x509().serial_number().to_bn()?.to_vec();
            if !entries.iter().any(|entry| entry.serial == serial) {
                let reason = match reason {
                    RevocationReason::Unspecified => None,
                    RevocationReason::KeyCompromise => Some(rcgen::RevocationReason::KeyCompromise),
                    RevocationReason::Superseded => Some(rcgen::RevocationReason::Superseded),
                    RevocationReason::CessationOfOperation => Some(rcgen::RevocationReason::CessationOfOperation),
                };
                entries.push(Entry { serial, revoked_at: now, reason });
            }
        }
        let number = previous.map_or(1, |previous| previous.number.saturating_add(1));
        Self::sign(ca, entries, number, valid_for, now)
    }

    /// Parses the lists of a PEM text. Returns the latest list that this CA has signed, and the lists of other CAs.
    ///
    /// # Errors
    /// [`IssueError::MalformedList`] when a list cannot be parsed, or a list of this CA has no number or no next update.
    pub fn from_pem(text: &[u8], ca: &CertificateAuthority) -> Result<(Option<Self>, Vec<X509Crl>), IssueError> {
        let crls = parse_crls(text).ok_or(IssueError::MalformedList)?;
        let key = ca.certificate().public_key()?;
        let (own, others): (Vec<_>, Vec<_>) = crls.into_iter().partition(|crl| crl.verify(&key).unwrap_or(false));
        let mut own = own.into_iter().map(Self::from_crl).collect::<Result<Vec<_>, _>>()?;
        own.sort_by_key(|list| list.number);
        Ok((own.pop(), others))
    }

    fn from_crl(crl: X509Crl) -> Result<Self, IssueError> {
        let number = crl_number(&crl).ok_or(IssueError::MalformedList)?;
        let next_update = crl.next_update().and_then(timestamp).ok_or(IssueError::MalformedList)?;
        let mut entries = Vec::new();
        for revoked in crl.get_revoked().into_iter().flatten() {
            let reason = revoked.extension::<ReasonCode>().map_err(|_| IssueError::MalformedList)?;
            let code = reason.map(|(_, code)| code.get_i64()).transpose()?;
            entries.push(Entry {
                serial: revoked.serial_number().to_bn()?.to_vec(),
                revoked_at: timestamp(revoked.revocation_date()).ok_or(IssueError::MalformedList)?,
                reason: code.and_then(reason_of),
            });
        }
        Ok(Self { crl, number, entries, next_update })
    }

    fn sign(
        ca: &CertificateAuthority,
        entries: Vec<Entry>,
        number: u64,
        valid_for: Duration,
        now: Timestamp,
    ) -> Result<Self, IssueError> {
        ca.check_valid(now)?;
        let next_update = expiry(now, valid_for)?;
        let revoked = |entry: &Entry| -> Result<_, IssueError> {
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&entry.serial),
                revocation_time: rcgen_date(entry.revoked_at)?,
                reason_code: entry.reason,
                invalidity_date: None,
            })
        };
        let (issuer, key_id) = ca.issuer()?;
        let params = CertificateRevocationListParams {
            this_update: rcgen_date(backdated(now))?,
            next_update: rcgen_date(next_update)?,
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: entries.iter().map(revoked).collect::<Result<_, _>>()?,
            key_identifier_method: KeyIdMethod::PreSpecified(key_id),
        };
        let crl = X509Crl::from_der(params.signed_by(&issuer).map_err(IssueError::encoding)?.der())?;
        Ok(Self { crl, number, entries, next_update })
    }

    /// Whether the list revokes this certificate.
    pub fn revokes(&self, certificate: &Certificate) -> bool {
        matches!(self.crl.get_by_cert(&certificate.x509().to_owned()), CrlStatus::Revoked(_))
    }

    /// The number of the list. Each list of a CA has a higher number than the previous one.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The number of revoked certificates.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no certificate is revoked.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// When the list becomes outdated.
    pub fn next_update(&self) -> Timestamp {
        self.next_update
    }

    /// The list in PEM.
    ///
    /// # Errors
    /// [`IssueError`] when OpenSSL fails.
    pub fn to_pem(&self) -> Result<Vec<u8>, IssueError> {
        Ok(self.crl.to_pem()?)
    }
}

impl std::fmt::Debug for RevocationList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RevocationList")
            .field("number", &self.number)
            .field("entries", &self.entries.len())
            .field("next_update", &self.next_update)
            .finish()
    }
}

/// The number of a list; `None` when it has none, or one that does not fit.
fn crl_number(crl: &X509CrlRef) -> Option<u64> {
    let list = CertificateList::from_der(&crl.to_der().ok()?).ok()?;
    let extensions = list.tbs_cert_list.crl_extensions?;
    let extension = extensions.iter().find(|extension| extension.extn_id.to_string() == CRL_NUMBER)?;
    let bytes = UintRef::from_der(extension.extn_value.as_bytes()).ok()?.as_bytes().to_vec();
    (bytes.len() <= 8).then(|| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn reason_of(code: i64) -> Option<rcgen::RevocationReason> {
    use rcgen::RevocationReason as R;
    let all = [
        R::KeyCompromise,
        R::CaCompromise,
        R::AffiliationChanged,
        R::Superseded,
        R::CessationOfOperation,
        R::CertificateHold,
        R::PrivilegeWithdrawn,
        R::AaCompromise,
    ];
    all.into_iter().find(|reason| *reason as i64 == code)
}
