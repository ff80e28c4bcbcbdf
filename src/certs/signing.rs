//! What rcgen needs to make certificates with keys that OpenSSL holds: the only file, with `issue` and `request`, that names it.

use openssl::bn::BigNumContext;
use openssl::ec::PointConversionForm;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{HasPublic, PKeyRef, Private};
use openssl::x509::X509Ref;
use rcgen::{DistinguishedName, DnType, DnValue, PublicKeyData, SignatureAlgorithm, SigningKey};
use x509_cert::der::{Decode, Tag, Tagged};

use super::{IssueError, Suite};

/// A public key, as rcgen wants it.
#[derive(Debug)]
pub(super) struct PublicPart {
    /// The content of the BIT STRING in the SubjectPublicKeyInfo.
    bits: Vec<u8>,
    suite: Suite,
}

impl PublicPart {
    pub(super) fn new<T: HasPublic>(key: &PKeyRef<T>) -> Result<Self, IssueError> {
        let suite = Suite::of(key).ok_or(IssueError::KeyType)?;
        Ok(Self { bits: bits(key, suite)?, suite })
    }

    /// The key id: the first 20 bytes of the SHA-256 of the key (RFC 7093, section 2, method 1).
    pub(super) fn key_id(&self) -> Vec<u8> {
        openssl::sha::sha256(&self.bits).into_iter().take(20).collect()
    }
}

fn bits<T: HasPublic>(key: &PKeyRef<T>, suite: Suite) -> Result<Vec<u8>, ErrorStack> {
    match suite {
        Suite::P256 => {
            let ec = key.ec_key()?;
            let mut context = BigNumContext::new()?;
            ec.public_key().to_bytes(ec.group(), PointConversionForm::UNCOMPRESSED, &mut context)
        }
        Suite::Rsa => key.rsa()?.public_key_to_der_pkcs1(),
    }
}

impl PublicKeyData for PublicPart {
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

/// A private key that OpenSSL holds, to sign certificates with: ECDSA or PKCS #1 v1.5, each with SHA-256. (The latter is what
/// certificates signed by RSA keys bear everywhere; in messages it is not accepted.)
pub(super) struct OpensslSigner<'a> {
    key: &'a PKeyRef<Private>,
    public: PublicPart,
}

impl<'a> OpensslSigner<'a> {
    pub(super) fn new(key: &'a PKeyRef<Private>) -> Result<Self, IssueError> {
        Ok(Self { key, public: PublicPart::new(key)? })
    }

    pub(super) fn public(&self) -> &PublicPart {
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

/// The subject of a CA certificate, as the issuer of others. Names that rcgen would write in another way are refused, because
/// chains are found by name.
pub(super) fn issuer_name(ca: &X509Ref) -> Result<DistinguishedName, IssueError> {
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
            Tag::PrintableString => DnValue::PrintableString(text.try_into()?),
            Tag::Ia5String => DnValue::Ia5String(text.try_into()?),
            _ => return Err(IssueError::AuthorityName),
        };
        if name.get(&kind).is_some() {
            return Err(IssueError::AuthorityName);
        }
        name.push(kind, value);
    }
    Ok(name)
}
