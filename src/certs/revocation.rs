//! Revocation lists: what a CA says of certificates that it does not stand by any more.

use openssl::x509::{CrlStatus, ReasonCode, X509Crl, X509CrlRef};
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber};
use std::time::Duration;
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;
use x509_cert::der::asn1::UintRef;

use super::certificate::moment;
use super::issue::{date, expiry};
use super::{Certificate, CertificateAuthority, IssueError, pem};
use crate::clock::Timestamp;

/// The extension that numbers a CA's lists (RFC 5280, section 5.2.3).
const CRL_NUMBER: &str = "2.5.29.20";

/// Why a certificate is revoked (RFC 5280, section 5.3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reason {
    /// Not said.
    #[default]
    Unspecified,
    /// Its key is, or may be, in the hands of others.
    KeyCompromise,
    /// Another has taken its place.
    Superseded,
    /// Its node is no more.
    CessationOfOperation,
}

/// A certificate's serial number, and since when and why it is revoked.
#[derive(Clone, Debug)]
struct Entry {
    serial: Vec<u8>,
    since: Timestamp,
    reason: Option<RevocationReason>,
}

/// A CA's list of what it has revoked. Nothing is valid by it after its next update: a list has to be made anew before that.
pub struct RevocationList {
    crl: X509Crl,
    number: u64,
    entries: Vec<Entry>,
    next_update: Timestamp,
}

impl RevocationList {
    /// How long a list holds, unless said otherwise: 30 days.
    pub const VALID_FOR: Duration = Duration::from_secs(30 * 86_400);

    /// The next list of this CA after `before`, if there was one: with these certificates revoked beside those that are, and a number
    /// that is one higher.
    ///
    /// # Errors
    /// [`IssueError`] when the CA is not valid now, or may not sign lists.
    pub fn next(
        before: Option<&Self>,
        ca: &CertificateAuthority,
        revoked: &[(&Certificate, Reason)],
        valid_for: Duration,
        now: Timestamp,
    ) -> Result<Self, IssueError> {
        let mut entries = before.map(|before| before.entries.clone()).unwrap_or_default();
        for (certificate, reason) in revoked {
            let serial = certificate.x509().serial_number().to_bn()?.to_vec();
            if !entries.iter().any(|entry| entry.serial == serial) {
                let reason = match reason {
                    Reason::Unspecified => None,
                    Reason::KeyCompromise => Some(RevocationReason::KeyCompromise),
                    Reason::Superseded => Some(RevocationReason::Superseded),
                    Reason::CessationOfOperation => Some(RevocationReason::CessationOfOperation),
                };
                entries.push(Entry { serial, since: now, reason });
            }
        }
        let number = before.map_or(1, |before| before.number.saturating_add(1));
        Self::sign(ca, entries, number, valid_for, now)
    }

    /// The CA's list among those of a PEM text, and those of other CAs. Only one that the CA's key has signed is its.
    ///
    /// # Errors
    /// [`IssueError::MalformedList`] when the text holds something else.
    pub fn from_pem(text: &[u8], ca: &CertificateAuthority) -> Result<(Option<Self>, Vec<X509Crl>), IssueError> {
        let all = pem::crls(text).ok_or(IssueError::MalformedList)?;
        let key = ca.certificate().public_key()?;
        let (own, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|crl| crl.verify(&key).unwrap_or(false));
        let mut own = own.into_iter().map(Self::read).collect::<Result<Vec<_>, _>>()?;
        own.sort_by_key(|list| list.number);
        Ok((own.pop(), others))
    }

    fn read(crl: X509Crl) -> Result<Self, IssueError> {
        let number = number(&crl).ok_or(IssueError::MalformedList)?;
        let next_update = crl.next_update().and_then(moment).ok_or(IssueError::MalformedList)?;
        let mut entries = Vec::new();
        for revoked in crl.get_revoked().into_iter().flatten() {
            let reason = revoked.extension::<ReasonCode>().map_err(|_| IssueError::MalformedList)?;
            let code = reason.map(|(_, code)| code.get_i64()).transpose()?;
            entries.push(Entry {
                serial: revoked.serial_number().to_bn()?.to_vec(),
                since: moment(revoked.revocation_date()).ok_or(IssueError::MalformedList)?,
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
                revocation_time: date(entry.since)?,
                reason_code: entry.reason,
                invalidity_date: None,
            })
        };
        let (issuer, key_id) = ca.issuer()?;
        let params = CertificateRevocationListParams {
            // Clocks of other machines may be behind.
            this_update: date(now.saturating_sub(super::issue::BACKDATE))?,
            next_update: date(next_update)?,
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: entries.iter().map(revoked).collect::<Result<_, _>>()?,
            key_identifier_method: KeyIdMethod::PreSpecified(key_id),
        };
        let crl = X509Crl::from_der(params.signed_by(&issuer)?.der())?;
        Ok(Self { crl, number, entries, next_update })
    }

    /// Whether it revokes this certificate.
    pub fn revokes(&self, certificate: &Certificate) -> bool {
        matches!(self.crl.get_by_cert(&certificate.x509().to_owned()), CrlStatus::Revoked(_))
    }

    /// Its number; each list of a CA has a higher one than that before.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// How many certificates it revokes.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it revokes none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// When it is out of date.
    pub fn next_update(&self) -> Timestamp {
        self.next_update
    }

    /// It in PEM.
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

/// The number of a list; one that does not fit is none of ours.
fn number(crl: &X509CrlRef) -> Option<u64> {
    let list = CertificateList::from_der(&crl.to_der().ok()?).ok()?;
    let extensions = list.tbs_cert_list.crl_extensions?;
    let extension = extensions.iter().find(|extension| extension.extn_id.to_string() == CRL_NUMBER)?;
    let bytes = UintRef::from_der(extension.extn_value.as_bytes()).ok()?.as_bytes().to_vec();
    (bytes.len() <= 8).then(|| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn reason_of(code: i64) -> Option<RevocationReason> {
    use RevocationReason as R;
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
