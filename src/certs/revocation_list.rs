//! Certificate revocation lists of a CA: issuing, parsing and continuing them.

use std::time::Duration;

use openssl::x509::{CrlStatus, ReasonCode, X509Crl, X509CrlRef};
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;
use x509_cert::der::asn1::UintRef;

use super::authority::{CertificateAuthority, backdated, expiry, rcgen_date};
use super::certificate::{Certificate, parse_crls, timestamp};
use super::issuing::IssueError;
use crate::clock::Timestamp;

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
