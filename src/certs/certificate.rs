//! One certificate, parsed once and kept: its identity, key and validity.

use std::fmt;
use std::sync::Arc;

use openssl::asn1::{Asn1Time, Asn1TimeRef};
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Public};
use openssl::x509::{X509, X509Ref};

use crate::clock::Timestamp;
use crate::packet::{Identity, InvalidIdentity};

/// A subject key identifier: how a message names a certificate.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Arc<[u8]>);

impl KeyId {
    /// The longest that is accepted, in bytes.
    pub const MAX: usize = 64;

    /// The key id of these bytes; none when it is empty or longer than [`KeyId::MAX`].
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (1..=Self::MAX).contains(&bytes.len()).then(|| Self(bytes.into()))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The algorithms that go with a key: there is one suite per key type, and nothing is negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suite {
    /// ECDSA and ephemeral-static ECDH on P-256, SHA-256, AES-256 key wrap.
    P256,
    /// RSASSA-PSS and RSAES-OAEP with SHA-256; 2,048 to 8,192 bits.
    Rsa,
}

impl Suite {
    /// The suite of a key, if it has one.
    pub(crate) fn of<T: openssl::pkey::HasPublic>(key: &openssl::pkey::PKeyRef<T>) -> Option<Suite> {
        match key.id() {
            Id::EC => (key.ec_key().ok()?.group().curve_name() == Some(Nid::X9_62_PRIME256V1)).then_some(Suite::P256),
            Id::RSA => (2048..=8192).contains(&key.bits()).then_some(Suite::Rsa),
            _ => None,
        }
    }
}

/// Why bytes are no certificate that can be used here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// No X.509 certificate.
    #[error("no X.509 certificate")]
    Malformed,
    /// The key is of another type or size.
    #[error("the key is neither P-256 nor RSA of 2048 to 8192 bits")]
    KeyType,
    /// There is no subject key identifier.
    #[error("no subject key identifier")]
    NoKeyId,
    /// There is not exactly one URI among the subject alternative names.
    #[error("{0} identity URIs, exactly one is needed")]
    IdentityCount(usize),
    /// The URI is no identity.
    #[error("{0}")]
    Identity(#[from] InvalidIdentity),
    /// Not a leaf: it may sign certificates.
    #[error("a CA certificate is no node's")]
    IsCa,
    /// The validity cannot be read.
    #[error("its validity cannot be read")]
    Validity,
}

/// A node's certificate, parsed once: parsing costs more than sealing a message, so it is kept and shared.
///
/// That it parses says nothing of trust: see [`Trust`](super::Trust).
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
    /// Reads a certificate in DER.
    ///
    /// # Errors
    /// [`CertificateError`] says what it lacks.
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        Self::from_x509(X509::from_der(der).map_err(|_| CertificateError::Malformed)?)
    }

    /// Reads the first certificate of a PEM text.
    ///
    /// # Errors
    /// [`CertificateError`] says what it lacks.
    pub fn from_pem(pem: &[u8]) -> Result<Self, CertificateError> {
        let mut all = super::pem::certificates(pem)?;
        Self::from_x509(all.swap_remove(0))
    }

    /// Takes what OpenSSL has parsed.
    ///
    /// # Errors
    /// [`CertificateError`] says what it lacks.
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

    /// Who it belongs to, by its URI.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The trust domain of its URI.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// How messages name it.
    pub fn key_id(&self) -> &KeyId {
        &self.key_id
    }

    /// The algorithms that go with its key.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// Its public key.
    pub fn public_key(&self) -> &PKey<Public> {
        &self.public_key
    }

    /// Valid from this moment.
    pub fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// Valid until this moment, which is not counted in (as OpenSSL does it; RFC 5280 counts that last second in).
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// Whether it is valid at `now`, by its dates alone.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.not_before <= now && now < self.not_after
    }

    /// Its DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// It in PEM.
    pub fn to_pem(&self) -> Vec<u8> {
        // The only failure is a lack of memory.
        self.x509.to_pem().unwrap_or_default()
    }

    /// The SHA-256 of its DER.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// What OpenSSL parsed.
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

/// The validity of a certificate, as moments.
pub(super) fn validity(x509: &X509Ref) -> Result<(Timestamp, Timestamp), CertificateError> {
    match (moment(x509.not_before()), moment(x509.not_after())) {
        (Some(from), Some(to)) => Ok((from, to)),
        _ => Err(CertificateError::Validity),
    }
}

/// An ASN.1 time as a moment; times before 1970 become 1970.
pub(crate) fn moment(time: &Asn1TimeRef) -> Option<Timestamp> {
    let diff = Asn1Time::from_unix(0).and_then(|epoch| epoch.diff(time)).ok()?;
    let seconds = i64::from(diff.days) * 86_400 + i64::from(diff.secs);
    Some(Timestamp::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Whether the basic constraints of a certificate make it a CA; `None` when the certificate cannot be read.
pub(super) fn ca_flag(der: &[u8]) -> Option<bool> {
    use der::Decode;
    use x509_cert::ext::pkix::BasicConstraints;
    let certificate = x509_cert::Certificate::from_der(der).ok()?;
    let constraints = certificate.tbs_certificate.get::<BasicConstraints>().ok()?;
    Some(constraints.is_some_and(|(_, constraints)| constraints.ca))
}

/// The extensions that are believed here are DER of their form to a second, stricter parser as well; OpenSSL, for one, does not mind what
/// stands behind them.
fn strict_extensions(der: &[u8]) -> Option<()> {
    use der::Decode;
    use x509_cert::ext::pkix::{KeyUsage, SubjectAltName, SubjectKeyIdentifier};
    let certificate = x509_cert::Certificate::from_der(der).ok()?.tbs_certificate;
    certificate.get::<SubjectAltName>().ok()?;
    certificate.get::<SubjectKeyIdentifier>().ok()?;
    certificate.get::<KeyUsage>().ok()?;
    Some(())
}
