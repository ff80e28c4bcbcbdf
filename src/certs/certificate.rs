//! A node's certificate, parsed: its identity, key and validity; and PEM texts of certificates and revocation lists.

use std::fmt;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::ec::Asn1Flag;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Public};
use openssl::x509::{X509, X509Crl, X509ExtendedKeyUsage, X509NameRef, X509Ref};

use crate::clock::Timestamp;
use crate::packet::{Identity, InvalidIdentity};

/// The longest PEM text of certificates that is read, in bytes.
pub(super) const MAX_CERTIFICATES_BYTES: usize = 1024 * 1024;
/// The longest PEM text of revocation lists that is read, in bytes.
pub(super) const MAX_CRLS_BYTES: usize = 16 * 1024 * 1024;

/// The PEM label of revocation lists.
const CRL_LABEL: &str = "X509 CRL";

/// The longest distinguished name that is shown, in characters.
const MAX_NAME_CHARS: usize = 200;

/// A subject key identifier: it names a certificate in messages. Displayed in hexadecimal digits.
///
/// ```
/// use nanite::certs::KeyId;
///
/// assert_eq!(KeyId::new(&[0x0a, 0xff]).map(|id| id.to_string()), Some("0aff".into()));
/// assert!(KeyId::new(&[0; KeyId::MAX_BYTES + 1]).is_none());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Arc<[u8]>);

impl KeyId {
    /// The longest key id, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// The key id with these bytes; none when there are none or more than [`KeyId::MAX_BYTES`].
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (1..=Self::MAX_BYTES).contains(&bytes.len()).then(|| Self(bytes.into()))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The algorithms of a key: there is one suite for each key type, and no negotiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Suite {
    /// ECDSA and ephemeral-static ECDH on P-256, SHA-256, AES-256 key wrap.
    P256,
    /// RSASSA-PSS and RSAES-OAEP with SHA-256; 2,048 to 8,192 bits.
    Rsa,
}

impl Suite {
    /// The suite of a key; none when its type or size is not supported. A key on P-256 must name the curve: one with the curve's
    /// parameters in place of its name is refused, as RFC 5480 demands (section 2.1.1), though OpenSSL recognizes the curve.
    pub(crate) fn of<T: openssl::pkey::HasPublic>(key: &openssl::pkey::PKeyRef<T>) -> Option<Suite> {
        match key.id() {
            Id::EC => {
                let key = key.ec_key().ok()?;
                let is_p256 = key.group().curve_name() == Some(Nid::X9_62_PRIME256V1);
                (is_p256 && key.group().asn1_flag() == Asn1Flag::NAMED_CURVE).then_some(Suite::P256)
            }
            Id::RSA => (2048..=8192).contains(&key.bits()).then_some(Suite::Rsa),
            _ => None,
        }
    }
}

/// Why a certificate cannot be used by a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// Not an X.509 certificate.
    #[error("not an X.509 certificate")]
    Malformed,
    /// The type or size of the key is not supported.
    #[error("the key is neither P-256 nor RSA of 2048 to 8192 bits")]
    KeyType,
    /// It has no subject key identifier.
    #[error("no subject key identifier")]
    NoKeyId,
    /// It does not have exactly one URI among its subject alternative names.
    #[error("{0} identity URIs, exactly one is needed")]
    IdentityCount(usize),
    /// Its URI is not an identity.
    #[error("{0}")]
    Identity(#[from] InvalidIdentity),
    /// It is a CA certificate.
    #[error("a CA certificate, not a node's")]
    IsCa,
    /// Its validity cannot be parsed.
    #[error("its validity cannot be parsed")]
    Validity,
}

/// A node's certificate, parsed. Parsing takes longer than sealing a message, so share it in an [`Arc`].
///
/// A parsed certificate is not yet trusted: see [`Trust`](super::Trust).
///
/// ```
/// use nanite::certs::{Certificate, CertificateAuthority, KeyType};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let now = SystemClock.now();
/// # let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// # let issued = ca.issue(&Identity::agent("fred")?, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
/// # let pem = issued.certificate().to_pem();
/// let certificate = Certificate::from_pem(&pem)?;
/// assert_eq!(certificate.identity(), &Identity::agent("fred")?);
/// assert_eq!(certificate.domain(), "example.org");
/// assert!(certificate.is_valid_at(now));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Certificate {
    x509: X509,
    der: Vec<u8>,
    fingerprint: [u8; 32],
    identity: Identity,
    domain: String,
    key_id: KeyId,
    suite: Suite,
    public_key: PKey<Public>,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl Certificate {
    /// Parses a certificate in DER.
    ///
    /// # Errors
    /// [`CertificateError`] when a node cannot use the certificate.
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        Self::from_x509(X509::from_der(der).map_err(|_| CertificateError::Malformed)?)
    }

    /// Parses the first certificate of a PEM text.
    ///
    /// # Errors
    /// [`CertificateError`] when a node cannot use the certificate.
    pub fn from_pem(pem: &[u8]) -> Result<Self, CertificateError> {
        let certificates = parse_certificates(pem).unwrap_or_default();
        Self::from_x509(certificates.into_iter().next().ok_or(CertificateError::Malformed)?)
    }

    /// Takes a certificate that OpenSSL has parsed.
    ///
    /// # Errors
    /// [`CertificateError`] when a node cannot use the certificate.
    pub fn from_x509(x509: X509) -> Result<Self, CertificateError> {
        let public_key = x509.public_key().map_err(|_| CertificateError::KeyType)?;
        let suite = Suite::of(&public_key).ok_or(CertificateError::KeyType)?;
        let key_id = x509.subject_key_id().and_then(|id| KeyId::new(id.as_slice())).ok_or(CertificateError::NoKeyId)?;
        let names = x509.subject_alt_names();
        let uris: Vec<&str> = names.iter().flatten().filter_map(|name| name.uri()).collect();
        let [uri] = uris[..] else { return Err(CertificateError::IdentityCount(uris.len())) };
        let (domain, identity) = Identity::from_uri(uri)?;
        let domain = domain.to_owned();
        let der = x509.to_der().map_err(|_| CertificateError::Malformed)?;
        if ca_flag(&der).ok_or(CertificateError::Malformed)? {
            return Err(CertificateError::IsCa);
        }
        strict_extensions(&der).ok_or(CertificateError::Malformed)?;
        let fingerprint = openssl::sha::sha256(&der);
        let (not_before, not_after) = validity(&x509)?;
        Ok(Self { der, fingerprint, identity, domain, key_id, suite, public_key, not_before, not_after, x509 })
    }

    /// The identity in its URI.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The trust domain in its URI.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The key id that names it in messages.
    pub fn key_id(&self) -> &KeyId {
        &self.key_id
    }

    /// The algorithms of its key.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// Its public key.
    pub fn public_key(&self) -> &PKey<Public> {
        &self.public_key
    }

    /// The start of its validity.
    pub fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// The end of its validity, exclusive (as in OpenSSL; RFC 5280 includes the last second).
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// Whether `now` is within its validity. Nothing else is checked.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.not_before <= now && now < self.not_after
    }

    /// The certificate in DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The certificate in PEM.
    pub fn to_pem(&self) -> Vec<u8> {
        // The only failure is a lack of memory.
        self.x509.to_pem().unwrap_or_default()
    }

    /// The SHA-256 of its DER.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// The certificate as OpenSSL parsed it.
    pub fn x509(&self) -> &X509Ref {
        &self.x509
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("identity", &self.identity)
            .field("key_id", &self.key_id)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The start and end of a certificate's validity.
pub(super) fn validity(x509: &X509Ref) -> Result<(Timestamp, Timestamp), CertificateError> {
    match (timestamp(x509.not_before()), timestamp(x509.not_after())) {
        (Some(from), Some(to)) => Ok((from, to)),
        _ => Err(CertificateError::Validity),
    }
}

/// Converts an ASN.1 time; times before 1970 become 1970.
pub(crate) fn timestamp(time: &Asn1TimeRef) -> Option<Timestamp> {
    let diff = Asn1Time::from_unix(0).and_then(|epoch| epoch.diff(time)).ok()?;
    let seconds = i64::from(diff.days) * 86_400 + i64::from(diff.secs);
    Some(Timestamp::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Whether the basic constraints of a certificate make it a CA; `None` when the certificate cannot be parsed.
fn ca_flag(der: &[u8]) -> Option<bool> {
    use der::Decode;
    use x509_cert::ext::pkix::BasicConstraints;
    let certificate = x509_cert::Certificate::from_der(der).ok()?;
    let constraints = certificate.tbs_certificate.get::<BasicConstraints>().ok()?;
    Some(constraints.is_some_and(|(_, constraints)| constraints.ca))
}

/// Whether the extended key usage of a certificate allows what nodes do (RFC 5280, section 4.2.1.12): it has none, or it includes
/// clientAuth, emailProtection or anyExtendedKeyUsage. OpenSSL reports one that it cannot read as empty.
pub(crate) fn allows_nodes(x509: &X509Ref) -> bool {
    let purposes = X509ExtendedKeyUsage::SSL_CLIENT | X509ExtendedKeyUsage::SMIME | X509ExtendedKeyUsage::ANYEKU;
    x509.extended_key_usage().is_none_or(|usage| usage.intersects(purposes))
}

/// The names of the purposes in the extended key usage of a certificate; none when it has no such extension, or it cannot be read.
#[cfg(feature = "cli")]
pub(crate) fn purposes(x509: &X509Ref) -> Option<Vec<String>> {
    use der::Decode;
    use x509_cert::ext::pkix::ExtendedKeyUsage;
    let certificate = x509_cert::Certificate::from_der(&x509.to_der().ok()?).ok()?;
    let (_, usage) = certificate.tbs_certificate.get::<ExtendedKeyUsage>().ok()??;
    let name = |oid| match der::oid::db::DB.by_oid(oid) {
        Some(name) => name.trim_start_matches("id-kp-").to_owned(),
        None => oid.to_string(),
    };
    Some(usage.0.iter().map(name).collect())
}

/// Whether these bytes are an X.509 certificate, of a node, a CA or anything else.
pub(crate) fn is_readable(der: &[u8]) -> bool {
    X509::from_der(der).is_ok()
}

/// Whether a certificate is a CA's.
pub(super) fn is_ca(x509: &X509Ref) -> bool {
    x509.to_der().is_ok_and(|der| ca_flag(&der) == Some(true))
}

/// Checks that the extensions that nodes rely on are also valid DER to a second, stricter parser. OpenSSL ignores trailing bytes, for
/// example.
fn strict_extensions(der: &[u8]) -> Option<()> {
    use der::Decode;
    use x509_cert::ext::pkix::{ExtendedKeyUsage, KeyUsage, SubjectAltName, SubjectKeyIdentifier};
    let certificate = x509_cert::Certificate::from_der(der).ok()?.tbs_certificate;
    certificate.get::<SubjectAltName>().ok()?;
    certificate.get::<SubjectKeyIdentifier>().ok()?;
    certificate.get::<KeyUsage>().ok()?;
    let extended = certificate.get::<ExtendedKeyUsage>().ok()?;
    // An empty list is not one (RFC 5280, section 4.2.1.12).
    extended.is_none_or(|(_, purposes)| !purposes.0.is_empty()).then_some(())
}

/// A distinguished name as `CN=..., O=...`, for people to read: unprintable characters are escaped, and a long name is cut.
pub(crate) fn distinguished_name(name: &X509NameRef) -> String {
    let mut text = String::new();
    for entry in name.entries() {
        let key = entry.object().nid().short_name().unwrap_or("?");
        let value = entry.data().to_string().unwrap_or_default();
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.extend([key, "="]);
        text.extend(value.chars().take(MAX_NAME_CHARS).flat_map(|c| c.escape_debug()));
        if text.chars().count() > MAX_NAME_CHARS {
            return text.chars().take(MAX_NAME_CHARS).chain("...".chars()).collect();
        }
    }
    if text.is_empty() { "no name".into() } else { text }
}

/// Parses every certificate of a PEM text, in order; `None` when there is none or one cannot be parsed.
pub(super) fn parse_certificates(pem: &[u8]) -> Option<Vec<X509>> {
    if pem.len() > MAX_CERTIFICATES_BYTES {
        return None;
    }
    X509::stack_from_pem(pem).ok().filter(|certificates| !certificates.is_empty())
}

/// Parses every revocation list of a PEM text; `None` when there is none, when one cannot be parsed, or when one could be overlooked
/// because a boundary line is damaged or has other text beside it.
pub(super) fn parse_crls(pem: &[u8]) -> Option<Vec<X509Crl>> {
    if pem.len() > MAX_CRLS_BYTES {
        return None;
    }
    let mut crls = Vec::new();
    let mut rest = std::str::from_utf8(pem).ok()?;
    while let Some((before, from)) = rest.split_once("-----BEGIN X509 CRL-----") {
        let (block, after) = from.split_once("-----END X509 CRL-----")?;
        let begins_line = before.is_empty() || before.ends_with('\n');
        let lines_are_whole = begins_line && ends_line(block) && block.ends_with('\n') && ends_line(after);
        if !lines_are_whole || before.contains(CRL_LABEL) || block.contains(CRL_LABEL) {
            return None;
        }
        crls.push(parse_crl(block)?);
        rest = after;
    }
    (!crls.is_empty() && !rest.contains(CRL_LABEL)).then_some(crls)
}

/// Parses the text between the boundary lines of a revocation list: base64 of one list in DER and nothing else (RFC 7468, section 3).
/// OpenSSL's own reader ignores lines that are not base64, and so could ignore a damaged boundary.
fn parse_crl(block: &str) -> Option<X509Crl> {
    let text: String = block.split_ascii_whitespace().collect();
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 || !digits.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/') {
        return None;
    }
    let der = openssl::base64::decode_block(&text).ok()?;
    let crl = X509Crl::from_der(&der).ok()?;
    (crl.to_der().ok()? == der).then_some(crl)
}

/// Whether only whitespace follows on the line.
fn ends_line(text: &str) -> bool {
    let text = text.trim_start_matches([' ', '\t', '\r']);
    text.is_empty() || text.starts_with('\n')
}
