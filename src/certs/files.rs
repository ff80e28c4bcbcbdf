//! Certificate and key files: bounded reading of PEM, and atomic writing.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use openssl::x509::{X509, X509Crl};

#[cfg(any(feature = "cli", test))]
pub(crate) use write::{PUBLIC, SECRET, create_directory, write};

/// The longest PEM text of certificates that is read, in bytes.
pub(super) const MAX_CERTIFICATES_BYTES: usize = 1024 * 1024;
/// The longest PEM text of revocation lists that is read, in bytes.
pub(super) const MAX_CRLS_BYTES: usize = 16 * 1024 * 1024;

/// The PEM label of revocation lists.
const CRL_LABEL: &str = "X509 CRL";

/// Reads a regular file of at most `max` bytes.
pub(super) fn read_bounded(path: &Path, max: usize) -> std::io::Result<Vec<u8>> {
    // Opening anything else, such as a named pipe, could block.
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

#[cfg(any(feature = "cli", test))]
mod write {
    use std::fs::{DirBuilder, OpenOptions};
    use std::io::{self, Write};
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    use std::path::Path;

    /// The mode of key files: only the owner reads and writes.
    pub(crate) const SECRET: u32 = 0o600;
    /// The mode of certificate files: everyone may read.
    pub(crate) const PUBLIC: u32 = 0o644;

    /// Writes a file with this mode: under a temporary name first, so that no reader sees half of it. An existing file is replaced only
    /// when `replace` is set.
    pub(crate) fn write(path: &Path, content: &[u8], mode: u32, replace: bool) -> io::Result<()> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
        let directory = path.parent().unwrap_or(Path::new(""));
        // Certificate stores ignore names that begin with a dot.
        let create = |path: &Path| OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
        let mut file = tempfile::Builder::new().prefix(&format!(".{name}.")).make_in(directory, create)?;
        // Not by `file` itself, whose errors name the temporary file.
        file.as_file_mut().write_all(content)?;
        file.as_file().sync_all()?;
        let persisted = if replace { file.persist(path) } else { file.persist_noclobber(path) };
        persisted.map(drop).map_err(|error| error.error)
    }

    /// Creates a directory that only its owner can enter, unless it exists.
    pub(crate) fn create_directory(path: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn s03_file_is_replaced_only_on_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/a.pem");
        create_directory(path.parent().unwrap()).unwrap();
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        write(&path, b"one", SECRET, false).unwrap();
        assert_eq!(write(&path, b"two", SECRET, false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        write(&path, b"three", SECRET, true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"three");
        let names: Vec<_> =
            std::fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["a.pem"], "temporary files are left");
    }

    #[test]
    fn s03_file_is_not_written_through_symlink() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link.pem"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert_eq!(write(&link, b"x", SECRET, false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        write(&link, b"x", SECRET, true).unwrap();
        assert!(!target.exists());
    }
}
