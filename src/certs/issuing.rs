//! Certificate signing requests, and what all issuing shares: its error, and OpenSSL's keys as rcgen needs them. Only the files that
//! issue name rcgen.

use std::fmt;

use openssl::bn::BigNumContext;
use openssl::ec::PointConversionForm;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{HasPublic, PKey, PKeyRef, Private, Public};
use openssl::x509::X509Req;
use rcgen::{CertificateParams, DistinguishedName, DnType, PublicKeyData, SignatureAlgorithm, SigningKey};

use super::certificate::{CertificateError, Suite, distinguished_name};
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
    /// The extended key usage of the CA certificate limits the CA to other purposes.
    #[error("the extended key usage of the CA certificate {0} allows neither clientAuth nor emailProtection")]
    AuthorityKeyUsage(String),
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
