//! PEM texts from files and users: bounded, and cut into the blocks that belong to somebody.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use openssl::x509::{X509, X509Crl};

use super::CertificateError;
#[cfg(feature = "cli")]
use super::StoreError;

/// The longest PEM text of certificates that is read, in bytes.
pub(super) const MAX_CERTIFICATES: usize = 1024 * 1024;
/// The longest PEM text of revocation lists that is read, in bytes.
pub(super) const MAX_CRLS: usize = 16 * 1024 * 1024;

/// What the first and the last line of a revocation list say.
const MARK: &str = "X509 CRL";

/// Reads a file that is no longer than `max` bytes.
pub(super) fn read(path: &Path, max: usize) -> std::io::Result<Vec<u8>> {
    // Opening anything else, a named pipe for one, could wait for ever.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a file"));
    }
    let mut text = Vec::new();
    File::open(path)?.take(max as u64 + 1).read_to_end(&mut text)?;
    if text.len() > max {
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, format!("longer than {max} bytes")));
    }
    Ok(text)
}

/// Every certificate of a PEM text, in its order; none is an error.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<X509>, CertificateError> {
    if pem.len() > MAX_CERTIFICATES {
        return Err(CertificateError::Malformed);
    }
    match X509::stack_from_pem(pem) {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err(CertificateError::Malformed),
    }
}

/// Every certificate of a PEM file.
#[cfg(feature = "cli")]
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<X509>, StoreError> {
    let unreadable = |source| StoreError::Unreadable { path: path.to_owned(), source };
    let text = read(path, MAX_CERTIFICATES).map_err(unreadable)?;
    certificates(&text).map_err(|why| StoreError::Invalid { place: path.display().to_string(), why: why.to_string() })
}

/// The revocation list between its first and last line: base64 of one list in DER, and nothing else (RFC 7468, section 3). OpenSSL's
/// own reader passes over what follows a line that is none.
fn crl(block: &str) -> Option<X509Crl> {
    let text: String = block.split_ascii_whitespace().collect();
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 || !digits.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/') {
        return None;
    }
    let der = openssl::base64::decode_block(&text).ok()?;
    let crl = X509Crl::from_der(&der).ok()?;
    (crl.to_der().ok()? == der).then_some(crl)
}

/// Whether a line ends where this begins.
fn ends(text: &str) -> bool {
    let text = text.trim_start_matches([' ', '\t', '\r']);
    text.is_empty() || text.starts_with('\n')
}

/// Every revocation list of a PEM text; `None` when there is none or one cannot be read, or could be passed over because its first or last
/// line is damaged or does not stand alone.
pub(super) fn crls(pem: &[u8]) -> Option<Vec<X509Crl>> {
    if pem.len() > MAX_CRLS {
        return None;
    }
    let text = std::str::from_utf8(pem).ok()?;
    let mut all = Vec::new();
    let mut rest = text;
    while let Some((before, from)) = rest.split_once("-----BEGIN X509 CRL-----") {
        let (block, after) = from.split_once("-----END X509 CRL-----")?;
        let alone =
            (before.is_empty() || before.ends_with('\n')) && block.ends_with('\n') && ends(block) && ends(after);
        if !alone || before.contains(MARK) || block.contains(MARK) {
            return None;
        }
        all.push(crl(block)?);
        rest = after;
    }
    (!all.is_empty() && !rest.contains(MARK)).then_some(all)
}
