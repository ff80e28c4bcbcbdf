//! What a chain may end in: CA certificates and their revocation lists, as an OpenSSL store for one moment.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use openssl::error::ErrorStack;
use openssl::ssl::SslFiletype;
use openssl::stack::Stack;
use openssl::x509::store::{X509Lookup, X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509Crl, X509CrlRef, X509PurposeId, X509Ref, X509StoreContext, X509VerifyResult};
use x509_cert::der::asn1::AnyRef;
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::Extension;

use super::certificate::{moment, validity};
use super::{AuthorityError, Certificate, TrustError};
use crate::clock::Timestamp;
use crate::packet::is_trust_domain;

/// How many certificates there may be between a leaf and its anchor.
const MAX_DEPTH: i32 = 8;
/// OpenSSL's level of 112 bits: no SHA-1, no RSA below 2,048 bits anywhere in a chain.
const AUTH_LEVEL: i32 = 2;
/// How many CA certificates one trust can hold.
const MAX_AUTHORITIES: usize = 256;

/// CA certificates, and the revocation lists that go with them.
pub(super) struct Anchors {
    certificates: Vec<X509>,
    crls: Option<Crls>,
    /// The store of the last second that was asked for: OpenSSL takes the time with the store, not with the question.
    store: Mutex<Option<(u64, Arc<X509Store>)>>,
}

impl fmt::Debug for Anchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.certificates.iter().map(|certificate| subject(certificate));
        f.debug_struct("Anchors").field("subjects", &names.collect::<Vec<_>>()).field("crls", &self.crls).finish()
    }
}

impl Anchors {
    pub(super) fn new(certificates: Vec<X509>) -> Result<Self, AuthorityError> {
        if certificates.is_empty() || certificates.len() > MAX_AUTHORITIES {
            return Err(AuthorityError::Count(certificates.len()));
        }
        for certificate in &certificates {
            if !is_ca(certificate) {
                return Err(AuthorityError::NotACa(subject(certificate)));
            }
        }
        Ok(Self { certificates, crls: None, store: Mutex::new(None) })
    }

    pub(super) fn with_crls(&self, crls: &[X509Crl]) -> Result<Self, AuthorityError> {
        let certificates = self.certificates.clone();
        Ok(Self { certificates, crls: Some(Crls::new(crls)?), store: Mutex::new(None) })
    }

    pub(super) fn has_crls(&self) -> bool {
        self.crls.is_some()
    }

    pub(super) fn certificates(&self) -> &[X509] {
        &self.certificates
    }

    /// Checks the chain from `leaf` to one of these at `now`; gives the moment up to which that holds. An anchor that names a
    /// domain vouches for identities of that domain only (SPIFFE X509-SVID, section 3.2).
    pub(super) fn verify(
        &self,
        leaf: &Certificate,
        intermediates: &[Vec<u8>],
        now: Timestamp,
    ) -> Result<Timestamp, TrustError> {
        match self.verify_chain(leaf.x509(), intermediates, now)? {
            (_, Some(wanted)) if wanted != leaf.domain() => {
                Err(TrustError::Domain { found: leaf.domain().to_owned(), wanted })
            }
            (until, _) => Ok(until),
        }
    }

    /// What of this is OpenSSL's: path, dates, revocation, constraints and policies. Gives the moment up to which it holds, and the
    /// domain that the anchor names.
    pub(super) fn verify_chain(
        &self,
        leaf: &X509Ref,
        intermediates: &[Vec<u8>],
        now: Timestamp,
    ) -> Result<(Timestamp, Option<String>), TrustError> {
        if intermediates.len() > MAX_DEPTH as usize {
            return Err(TrustError::Chain("more than 8 intermediate certificates".into()));
        }
        let mut untrusted = Stack::new().map_err(failed)?;
        for der in intermediates {
            let unreadable = |_| TrustError::Chain("an intermediate certificate cannot be read".into());
            untrusted.push(X509::from_der(der).map_err(unreadable)?).map_err(failed)?;
        }
        let store = self.store_at(now)?;
        let mut context = X509StoreContext::new().map_err(failed)?;
        let outcome = context.init(&store, leaf, &untrusted, |context| {
            let good = context.verify_cert()?;
            let chain = || context.chain().into_iter().flatten();
            let until = chain().filter_map(|x509| Some(validity(x509).ok()?.1)).min();
            let domain = chain().last().and_then(domain_of);
            Ok((good.then_some((until, domain)), context.error(), context.error_depth()))
        });
        // A refusal leaves its reasons on this thread's error queue, where the next failure would pick them up.
        drop(ErrorStack::get());
        match outcome.map_err(failed)? {
            (Some((Some(until), domain)), ..) => {
                Ok((self.crls.as_ref().map_or(until, |crls| until.min(crls.until)), domain))
            }
            (_, error, depth) => Err(refusal(error, depth)),
        }
    }

    fn store_at(&self, now: Timestamp) -> Result<Arc<X509Store>, TrustError> {
        let mut kept = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((second, store)) if *second == now.as_secs() => Ok(store.clone()),
            _ => {
                let store = Arc::new(self.build(now).map_err(failed)?);
                *kept = Some((now.as_secs(), store.clone()));
                Ok(store)
            }
        }
    }

    fn build(&self, now: Timestamp) -> Result<X509Store, ErrorStack> {
        // Policies are for the chain to demand: none is demanded here.
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
        param.set_depth(MAX_DEPTH);
        param.set_auth_level(AUTH_LEVEL);
        param.set_time(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        builder.set_param(&param)?;
        Ok(builder.build())
    }
}

/// Revocation lists. OpenSSL's store takes them from a file only, so they are kept in one that has no name.
#[derive(Debug)]
struct Crls {
    file: File,
    count: usize,
    /// The first moment at which one of them is out of date.
    until: Timestamp,
}

impl Crls {
    fn new(crls: &[X509Crl]) -> Result<Self, AuthorityError> {
        let (mut pem, mut until) = (Vec::new(), None::<Timestamp>);
        for crl in crls {
            if is_delta(crl).ok_or(AuthorityError::Crl)? {
                return Err(AuthorityError::DeltaCrl);
            }
            let next = crl.next_update().and_then(moment).ok_or(AuthorityError::Crl)?;
            until = Some(until.map_or(next, |until| until.min(next)));
            pem.extend(crl.to_pem().map_err(|_| AuthorityError::Crl)?);
        }
        let until = until.ok_or(AuthorityError::Crl)?;
        let file = nameless(&pem).map_err(AuthorityError::Temporary)?;
        Ok(Self { file, count: crls.len(), until })
    }

    /// Adds them to a store. The callers take turns, because on some systems `/dev/fd` shares the position in the file.
    fn load(&self, builder: &mut X509StoreBuilder) -> Result<(), ErrorStack> {
        let lookup = builder.add_lookup(X509Lookup::file())?;
        let rewound = (&self.file).seek(SeekFrom::Start(0)).is_ok();
        let path = format!("/dev/fd/{}", self.file.as_raw_fd());
        let loaded = if rewound { lookup.load_crl_file(path, SslFiletype::PEM)? } else { 0 };
        // Fewer than there are would let a revoked certificate pass.
        if usize::try_from(loaded) == Ok(self.count) { Ok(()) } else { Err(ErrorStack::get()) }
    }
}

/// Whether a list says only what has changed since another (RFC 5280, section 5.2.4). OpenSSL would take it for a complete one, and so
/// pass over what the other revokes. None when it cannot be read.
fn is_delta(crl: &X509CrlRef) -> Option<bool> {
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

/// A file with this content that nobody else can open.
fn nameless(content: &[u8]) -> std::io::Result<File> {
    let mut random = [0; 16];
    openssl::rand::rand_bytes(&mut random)?;
    let path = std::env::temp_dir().join(format!("nanite-{:032x}", u128::from_be_bytes(random)));
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    file.write_all(content)?;
    Ok(file)
}

/// Whether a certificate says that it may sign certificates.
pub(super) fn is_ca(x509: &X509Ref) -> bool {
    let Ok(der) = x509.to_der() else { return false };
    super::certificate::ca_flag(&der) == Some(true)
}

/// The subject of a certificate, for people: `CN=...`.
pub(super) fn subject(x509: &X509Ref) -> String {
    super::name::text(x509.subject_name())
}

/// A CA certificate, as people look at it.
#[cfg_attr(not(feature = "cli"), expect(dead_code, reason = "the program shows more of it than the store uses"))]
#[derive(Clone, Debug)]
pub(crate) struct Authority {
    /// Its subject.
    pub(crate) subject: String,
    /// The domain that it names by its URI.
    pub(crate) domain: Option<String>,
    /// Valid from this moment.
    pub(crate) not_before: Timestamp,
    /// Valid until this moment.
    pub(crate) not_after: Timestamp,
    /// The certificate.
    pub(crate) x509: X509,
}

impl Authority {
    /// Takes a certificate that says that it is a CA's.
    pub(crate) fn new(x509: X509) -> Result<Self, AuthorityError> {
        if !is_ca(&x509) {
            return Err(AuthorityError::NotACa(subject(&x509)));
        }
        let (not_before, not_after) = validity(&x509).map_err(|_| AuthorityError::Malformed)?;
        Ok(Self { subject: subject(&x509), domain: domain_of(&x509), not_before, not_after, x509 })
    }
}

/// The domain that a CA certificate names: that of its only URI, `spiffe://DOMAIN`.
pub(super) fn domain_of(ca: &X509Ref) -> Option<String> {
    let names = ca.subject_alt_names()?;
    let uris: Vec<&str> = names.iter().filter_map(|name| name.uri()).collect();
    let [uri] = uris[..] else { return None };
    uri.strip_prefix("spiffe://").filter(|domain| is_trust_domain(domain)).map(str::to_owned)
}

fn failed(_: ErrorStack) -> TrustError {
    TrustError::Chain("OpenSSL could not check it".into())
}

/// What OpenSSL's verdict means here. The numbers are of its `X509_V_ERR_*`, which the crate does not name.
fn refusal(error: X509VerifyResult, depth: u32) -> TrustError {
    match error.as_raw() {
        // Issuer not found; or found by name, and the signature is not by its key.
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
