//! Trust anchors: CA certificates and their revocation lists, verification of chains by OpenSSL, and why a chain or an anchor is refused.

use std::fmt;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use openssl::error::ErrorStack;
use openssl::ssl::SslFiletype;
use openssl::stack::Stack;
use openssl::x509::store::{X509Lookup, X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509Crl, X509CrlRef, X509PurposeId, X509Ref, X509StoreContext, X509VerifyResult};
use parking_lot::Mutex;
use x509_cert::der::asn1::AnyRef;
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::Extension;

use super::certificate::{Certificate, allows_nodes, distinguished_name, is_ca, timestamp, validity};
use crate::clock::Timestamp;
use crate::packet::is_trust_domain;

/// The most intermediate certificates between a leaf and its anchor.
const MAX_INTERMEDIATES: i32 = 8;
/// OpenSSL's security level for 112 bits: no SHA-1 and no RSA key below 2,048 bits in a chain.
const SECURITY_LEVEL: i32 = 2;
/// The most CA certificates of one trust.
const MAX_ANCHORS: usize = 256;

/// Why a certificate is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// Its validity ended then.
    #[error("it expired at {0}")]
    Expired(Timestamp),
    /// Its validity begins then.
    #[error("it is not valid before {0}")]
    NotYetValid(Timestamp),
    /// It lacks a key usage that its suite requires, has one that only a CA may have, or its extended key usage limits it to other
    /// purposes.
    #[error("its key usage does not fit: {0}")]
    KeyUsage(&'static str),
    /// Its identity belongs to another trust domain.
    #[error("it is of the domain {found}, not of {wanted}")]
    Domain {
        /// The trust domain of its URI.
        found: String,
        /// The required trust domain.
        wanted: String,
    },
    /// No chain leads to one of the CA certificates.
    #[error("it was not issued by a known CA")]
    UnknownIssuer,
    /// A CA certificate in its chain has expired.
    #[error("a CA certificate above it has expired")]
    AuthorityExpired,
    /// A CA certificate in its chain is not valid yet.
    #[error("a CA certificate above it is not valid yet")]
    AuthorityNotYetValid,
    /// The extended key usage of a CA certificate in its chain limits that CA to other purposes.
    #[error("the extended key usage of a CA certificate above it allows neither clientAuth nor emailProtection")]
    AuthorityKeyUsage,
    /// It is revoked.
    #[error("it is revoked")]
    Revoked,
    /// A CA certificate in its chain is revoked.
    #[error("a CA certificate above it is revoked")]
    AuthorityRevoked,
    /// Revocation lists are in use, but none is its issuer's.
    #[error("there is no revocation list of its issuer")]
    NoCrl,
    /// The revocation list of its issuer is out of date.
    #[error("the revocation list of its issuer is out of date")]
    StaleCrl,
    /// Another error of the chain, as OpenSSL describes it.
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
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// Not certificates in PEM.
    #[error("no CA certificate in PEM")]
    Malformed,
    /// There is no certificate, or more than 256.
    #[error("{0} CA certificates, but 1 to 256 are allowed")]
    Count(usize),
    /// A certificate is not a CA's.
    #[error("the certificate {0} is not a CA's")]
    NotACa(String),
    /// A revocation list cannot be parsed, or has no next update.
    #[error("no revocation list in PEM with a next update")]
    Crl,
    /// A revocation list is a delta list, which is not supported.
    #[error("a revocation list holds only the changes since another (a delta list): give the complete one")]
    DeltaCrl,
    /// The temporary file for revocation lists cannot be written.
    #[error("cannot use the directory for temporary files")]
    TemporaryFile(#[source] std::io::Error),
    /// Revocation lists do not apply to pinned certificates.
    #[error("revocation lists need CA certificates")]
    Pinned,
}

/// CA certificates and their revocation lists.
pub(super) struct TrustAnchors {
    certificates: Vec<X509>,
    crls: Option<CrlFile>,
    /// OpenSSL's store for the second of the latest verification: the time is a parameter of the store.
    store: Mutex<Option<(u64, Arc<X509Store>)>>,
}

impl fmt::Debug for TrustAnchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.certificates.iter().map(|certificate| distinguished_name(certificate.subject_name()));
        f.debug_struct("TrustAnchors").field("subjects", &names.collect::<Vec<_>>()).field("crls", &self.crls).finish()
    }
}

impl TrustAnchors {
    pub(super) fn new(certificates: Vec<X509>) -> Result<Self, AuthorityError> {
        if certificates.is_empty() || certificates.len() > MAX_ANCHORS {
            return Err(AuthorityError::Count(certificates.len()));
        }
        for certificate in &certificates {
            if !is_ca(certificate) {
                return Err(AuthorityError::NotACa(distinguished_name(certificate.subject_name())));
            }
        }
        Ok(Self { certificates, crls: None, store: Mutex::new(None) })
    }

    pub(super) fn with_crls(&self, crls: &[X509Crl]) -> Result<Self, AuthorityError> {
        let certificates = self.certificates.clone();
        Ok(Self { certificates, crls: Some(CrlFile::new(crls)?), store: Mutex::new(None) })
    }

    pub(super) fn has_crls(&self) -> bool {
        self.crls.is_some()
    }

    pub(super) fn certificates(&self) -> &[X509] {
        &self.certificates
    }

    /// Verifies the chain from `leaf` to one of these anchors at `now`. Returns the time until which the result holds. An anchor that
    /// names a trust domain is trusted for identities of that domain only (SPIFFE X509-SVID, section 3.2).
    pub(super) fn verify(
        &self,
        leaf: &Certificate,
        intermediates: &[Vec<u8>],
        now: Timestamp,
    ) -> Result<Timestamp, TrustError> {
        let chain = self.verify_chain(leaf.x509(), intermediates, now)?;
        match chain.domain {
            Some(wanted) if wanted != leaf.domain() => {
                Err(TrustError::Domain { found: leaf.domain().to_owned(), wanted })
            }
            _ => Ok(chain.valid_until),
        }
    }

    /// The part of the verification that OpenSSL does: path, dates, revocation, constraints and policies.
    pub(super) fn verify_chain(
        &self,
        leaf: &X509Ref,
        intermediates: &[Vec<u8>],
        now: Timestamp,
    ) -> Result<VerifiedChain, TrustError> {
        if intermediates.len() > MAX_INTERMEDIATES as usize {
            return Err(TrustError::Chain(format!("more than {MAX_INTERMEDIATES} intermediate certificates")));
        }
        let mut untrusted = Stack::new().map_err(openssl_failed)?;
        for der in intermediates {
            let malformed = |_| TrustError::Chain("an intermediate certificate cannot be read".into());
            untrusted.push(X509::from_der(der).map_err(malformed)?).map_err(openssl_failed)?;
        }
        let store = self.store_at(now)?;
        let mut context = X509StoreContext::new().map_err(openssl_failed)?;
        let outcome = context.init(&store, leaf, &untrusted, |context| {
            let verified = context.verify_cert()?;
            let chain = || context.chain().into_iter().flatten();
            let valid_until = chain().filter_map(|x509| Some(validity(x509).ok()?.1)).min();
            let domain = chain().last().and_then(trust_domain);
            // An extended key usage of a CA limits everything below it, as OpenSSL and others treat it.
            let allows_nodes = chain().skip(1).all(allows_nodes);
            let chain = valid_until.map(|valid_until| VerifiedChain { valid_until, domain, allows_nodes });
            Ok((chain.filter(|_| verified), context.error(), context.error_depth()))
        });
        // A refusal leaves its reasons on this thread's error queue, and the next OpenSSL call that fails would report them.
        drop(ErrorStack::get());
        match outcome.map_err(openssl_failed)? {
            (Some(chain), ..) if !chain.allows_nodes => Err(TrustError::AuthorityKeyUsage),
            (Some(mut chain), ..) => {
                if let Some(crls) = &self.crls {
                    chain.valid_until = chain.valid_until.min(crls.next_update);
                }
                Ok(chain)
            }
            (None, error, depth) => Err(refusal(error, depth)),
        }
    }

    fn store_at(&self, now: Timestamp) -> Result<Arc<X509Store>, TrustError> {
        let mut cached = self.store.lock();
        match &*cached {
            Some((second, store)) if *second == now.as_secs() => Ok(store.clone()),
            _ => {
                let store = Arc::new(self.build(now).map_err(openssl_failed)?);
                *cached = Some((now.as_secs(), store.clone()));
                Ok(store)
            }
        }
    }

    fn build(&self, now: Timestamp) -> Result<X509Store, ErrorStack> {
        // A chain may require a certificate policy; nanite itself requires none.
        let mut flags = X509VerifyFlags::X509_STRICT | X509VerifyFlags::POLICY_CHECK;
        let mut builder = X509StoreBuilder::new()?;
        for certificate in &self.certificates {
            builder.add_cert(certificate.clone())?;
        }
        if let Some(crls) = &self.crls {
            crls.load(&mut builder)?;
            flags |= X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL;
        }
        let mut param = X509VerifyParam::new()?;
        param.set_flags(flags)?;
        param.set_purpose(X509PurposeId::ANY)?;
        param.set_depth(MAX_INTERMEDIATES);
        param.set_auth_level(SECURITY_LEVEL);
        param.set_time(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        builder.set_param(&param)?;
        Ok(builder.build())
    }
}

/// A chain that OpenSSL has verified.
pub(super) struct VerifiedChain {
    /// The first expiry of a certificate in the chain or of a revocation list.
    pub(super) valid_until: Timestamp,
    /// The trust domain that the anchor names.
    domain: Option<String>,
    /// Whether the extended key usage of each CA in it allows what nodes do.
    allows_nodes: bool,
}

/// Revocation lists in an unnamed file: OpenSSL's store loads them only from files.
#[derive(Debug)]
struct CrlFile {
    file: File,
    count: usize,
    /// The earliest next update of a list.
    next_update: Timestamp,
}

impl CrlFile {
    fn new(crls: &[X509Crl]) -> Result<Self, AuthorityError> {
        let (mut pem, mut earliest) = (Vec::new(), None::<Timestamp>);
        for crl in crls {
            if is_delta_crl(crl).ok_or(AuthorityError::Crl)? {
                return Err(AuthorityError::DeltaCrl);
            }
            let next = crl.next_update().and_then(timestamp).ok_or(AuthorityError::Crl)?;
            earliest = Some(earliest.map_or(next, |earliest| earliest.min(next)));
            pem.extend(crl.to_pem().map_err(|_| AuthorityError::Crl)?);
        }
        let next_update = earliest.ok_or(AuthorityError::Crl)?;
        let mut file = tempfile::tempfile().map_err(AuthorityError::TemporaryFile)?;
        file.write_all(&pem).map_err(AuthorityError::TemporaryFile)?;
        Ok(Self { file, count: crls.len(), next_update })
    }

    /// Adds the lists to a store. The caller holds the lock on the store, because on some systems all openers of `/dev/fd/N` share one
    /// position.
    fn load(&self, builder: &mut X509StoreBuilder) -> Result<(), ErrorStack> {
        let lookup = builder.add_lookup(X509Lookup::file())?;
        let rewound = (&self.file).seek(SeekFrom::Start(0)).is_ok();
        let path = format!("/dev/fd/{}", self.file.as_raw_fd());
        let loaded = if rewound { lookup.load_crl_file(path, SslFiletype::PEM)? } else { 0 };
        // A missing list would hide the certificates that it revokes.
        if usize::try_from(loaded) == Ok(self.count) { Ok(()) } else { Err(ErrorStack::get()) }
    }
}

/// Whether a revocation list is a delta list (RFC 5280, section 5.2.4); `None` when it cannot be parsed. OpenSSL would treat it as a
/// complete list, and so miss the certificates that its base list revokes.
fn is_delta_crl(crl: &X509CrlRef) -> Option<bool> {
    const DELTA_CRL_INDICATOR: &str = "2.5.29.27";
    let der = crl.to_der().ok()?;
    let list = Vec::<AnyRef<'_>>::from_der(&der).ok()?;
    let content = list.first()?.decode_as::<Vec<AnyRef<'_>>>().ok()?;
    let last = content.last()?;
    if !matches!(last.tag(), Tag::ContextSpecific { constructed: true, .. }) {
        return Some(false);
    }
    let extensions = Vec::<Extension>::from_der(last.value()).ok()?;
    Some(extensions.iter().any(|extension| extension.extn_id.to_string() == DELTA_CRL_INDICATOR))
}

/// A CA certificate, for display.
#[cfg_attr(not(feature = "cli"), expect(dead_code, reason = "the program shows more than the stores use"))]
#[derive(Clone, Debug)]
pub(crate) struct CaCertificate {
    pub(crate) subject: String,
    /// The trust domain that it names by its URI.
    pub(crate) domain: Option<String>,
    pub(crate) not_before: Timestamp,
    /// Exclusive.
    pub(crate) not_after: Timestamp,
    pub(crate) x509: X509,
}

impl CaCertificate {
    /// Fails when the certificate is not a CA's.
    pub(crate) fn new(x509: X509) -> Result<Self, AuthorityError> {
        let subject = distinguished_name(x509.subject_name());
        if !is_ca(&x509) {
            return Err(AuthorityError::NotACa(subject));
        }
        let (not_before, not_after) = validity(&x509).map_err(|_| AuthorityError::Malformed)?;
        Ok(Self { subject, domain: trust_domain(&x509), not_before, not_after, x509 })
    }
}

/// The trust domain that a CA certificate names: that of its only URI, `spiffe://DOMAIN`.
pub(super) fn trust_domain(ca: &X509Ref) -> Option<String> {
    let names = ca.subject_alt_names()?;
    let uris: Vec<&str> = names.iter().filter_map(|name| name.uri()).collect();
    let [uri] = uris[..] else { return None };
    uri.strip_prefix("spiffe://").filter(|domain| is_trust_domain(domain)).map(str::to_owned)
}

fn openssl_failed(_: ErrorStack) -> TrustError {
    TrustError::Chain("OpenSSL could not check it".into())
}

/// The error for OpenSSL's verdict. The numbers are its `X509_V_ERR_*` constants, which the `openssl` crate does not name.
fn refusal(error: X509VerifyResult, depth: u32) -> TrustError {
    match error.as_raw() {
        // The issuer is missing, or the signature is not by the key of the certificate with the issuer's name.
        2 | 7 | 18..=21 => TrustError::UnknownIssuer,
        3 | 33 => TrustError::NoCrl,
        9 if depth > 0 => TrustError::AuthorityNotYetValid,
        10 if depth > 0 => TrustError::AuthorityExpired,
        11 | 12 => TrustError::StaleCrl,
        23 if depth > 0 => TrustError::AuthorityRevoked,
        23 => TrustError::Revoked,
        _ => TrustError::Chain(error.error_string().to_owned()),
    }
}
