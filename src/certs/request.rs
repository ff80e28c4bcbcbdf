//! Certificate signing requests: how a node gets a certificate without its key leaving the machine.

use std::fmt;

use openssl::pkey::{PKey, PKeyRef, Public};
use openssl::x509::X509Req;
use rcgen::{CertificateParams, DistinguishedName, DnType};

use super::signing::OpensslSigner;
use super::{IssueError, PrivateKey, Suite};
use crate::packet::Identity;

/// The longest request that is read, in bytes.
const MAX: usize = 64 * 1024;

/// A request for a certificate (PKCS #10, RFC 2986): a public key, and the proof that who asks holds the private one.
///
/// What else a request says is not believed: whose certificate it becomes is said by who signs it
/// ([`CertificateAuthority::sign`](super::CertificateAuthority::sign)).
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
    /// A request for this key. The identity is written into it for people to read.
    ///
    /// # Errors
    /// [`IssueError`] when OpenSSL fails.
    pub fn new(identity: &Identity, key: &PrivateKey) -> Result<Self, IssueError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, identity.as_str().chars().take(64).collect::<String>());
        let request = params.serialize_request(&OpensslSigner::new(key.pkey())?)?;
        Self::checked(X509Req::from_der(request.der())?)
    }

    /// Reads a request in PEM, and checks that it is signed by its own key.
    ///
    /// # Errors
    /// [`IssueError`] when it is none, its key is of a type that has no suite, or the signature is wrong.
    pub fn from_pem(text: &[u8]) -> Result<Self, IssueError> {
        if text.len() > MAX {
            return Err(IssueError::MalformedRequest);
        }
        Self::checked(X509Req::from_pem(text).map_err(|_| IssueError::MalformedRequest)?)
    }

    fn checked(request: X509Req) -> Result<Self, IssueError> {
        let public_key = request.public_key().map_err(|_| IssueError::KeyType)?;
        Suite::of(&public_key).ok_or(IssueError::KeyType)?;
        match request.verify(&public_key) {
            Ok(true) => Ok(Self { request, public_key }),
            _ => Err(IssueError::NoPossession),
        }
    }

    /// The request in PEM.
    ///
    /// # Errors
    /// [`IssueError`] when OpenSSL fails.
    pub fn to_pem(&self) -> Result<Vec<u8>, IssueError> {
        Ok(self.request.to_pem()?)
    }

    /// The name it asks for, for people to read. Not believed.
    pub fn subject(&self) -> String {
        super::name::text(self.request.subject_name())
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
