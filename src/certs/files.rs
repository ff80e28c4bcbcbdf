//! Certificate and key files: bounded reading, why one cannot be used, and atomic writing.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::x509::{X509, X509Crl};

use super::certificate::{
    Certificate, CertificateError, MAX_CERTIFICATES_BYTES, MAX_CRLS_BYTES, is_ca, parse_certificates, parse_crls,
};
use super::key::KeyError;
#[cfg(feature = "cli")]
use super::store::StoreError;
use super::trust_anchors::{AuthorityError, CaCertificate};
use crate::clock::Timestamp;
use crate::packet::Identity;

#[cfg(any(feature = "cli", test))]
pub(crate) use write::{PUBLIC, SECRET, create_directory, write};

/// Why the files of a directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// The directory does not exist.
    #[error("there is no directory {0}")]
    NoDirectory(PathBuf),
    /// The name of a node ends in `-key`, so that its certificate file would have the name of another node's key file.
    #[error("{0} cannot have files in a directory: its name ends in '-key'")]
    AmbiguousName(Identity),
    /// The node has no certificate file.
    #[error("there is no certificate for {identity}: no file {path}")]
    NoCertificate {
        /// The node.
        identity: Identity,
        /// The missing file.
        path: PathBuf,
    },
    /// The node has no key file.
    #[error("there is no key for {identity}: no file {path}")]
    NoKey {
        /// The node.
        identity: Identity,
        /// The missing file.
        path: PathBuf,
    },
    /// A certificate file or the directory cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A certificate file does not hold the certificate of a node.
    #[error("{path} cannot be used")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: CertificateError,
    },
    /// A certificate file holds another node's certificate.
    #[error("{path} holds the certificate of {found}")]
    OtherIdentity {
        /// The file.
        path: PathBuf,
        /// The identity in the certificate.
        found: Identity,
    },
    /// A key file cannot be used.
    #[error("the key file {path} cannot be used")]
    Key {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: KeyError,
    },
    /// The key does not belong to the certificate.
    #[error("{key} is not the key of {certificate}")]
    Mismatch {
        /// The certificate file.
        certificate: PathBuf,
        /// The key file.
        key: PathBuf,
    },
    /// The certificate has expired.
    #[error("the certificate {path} expired at {at}")]
    Expired {
        /// The file.
        path: PathBuf,
        /// The end of its validity.
        at: Timestamp,
    },
    /// The certificate is not valid yet.
    #[error("the certificate {path} is not valid before {at}")]
    NotYetValid {
        /// The file.
        path: PathBuf,
        /// The start of its validity.
        at: Timestamp,
    },
    /// A file name begins like that of an agent or mapper, but the rest is not a valid name.
    #[error("{path} is not named after an agent or mapper")]
    FileName {
        /// The file.
        path: PathBuf,
    },
    /// There is no file of CA certificates.
    #[error("there is no CA certificate: no file {0}")]
    NoAuthority(PathBuf),
    /// The CA certificates cannot be used.
    #[error("the CA certificate {path} cannot be used")]
    Authority {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: AuthorityError,
    },
    /// The revocation lists cannot be used.
    #[error("the revocation lists {path} cannot be used")]
    Revocation {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: AuthorityError,
    },
}

/// Reads a regular file of at most `max` bytes.
pub(super) fn read_bounded(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    // Opening anything else, such as a named pipe, could block.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    let mut text = Vec::new();
    File::open(path)?.take(max as u64 + 1).read_to_end(&mut text)?;
    if text.len() > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {max} bytes")));
    }
    Ok(text)
}

pub(super) fn read_authorities(path: &Path) -> Result<Vec<CaCertificate>, DirectoryError> {
    let failed = |source| DirectoryError::Authority { path: path.to_owned(), source };
    let unreadable = |source| AuthorityError::Unreadable { path: path.to_owned(), source };
    let text = read_bounded(path, MAX_CERTIFICATES_BYTES).map_err(|source| failed(unreadable(source)))?;
    let certificates = parse_certificates(&text).ok_or_else(|| failed(AuthorityError::Malformed))?;
    certificates.into_iter().map(CaCertificate::new).collect::<Result<_, _>>().map_err(failed)
}

pub(super) fn read_revocations(path: &Path) -> Result<Vec<X509Crl>, DirectoryError> {
    let failed = |source| DirectoryError::Revocation { path: path.to_owned(), source };
    let unreadable = |source| failed(AuthorityError::Unreadable { path: path.to_owned(), source });
    let text = read_bounded(path, MAX_CRLS_BYTES).map_err(unreadable)?;
    parse_crls(&text).ok_or_else(|| failed(AuthorityError::Crl))
}

/// Reads every certificate of a PEM file, of CAs and of nodes.
#[cfg(feature = "cli")]
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<X509>, StoreError> {
    let unreadable = |source| StoreError::Unreadable { path: path.to_owned(), source };
    let text = read_bounded(path, MAX_CERTIFICATES_BYTES).map_err(unreadable)?;
    parse_certificates(&text).ok_or_else(|| StoreError::Invalid {
        location: path.display().to_string(),
        why: CertificateError::Malformed.to_string(),
    })
}

/// A node's certificate file.
#[derive(Debug)]
pub(crate) struct CertificateFile {
    /// The node's certificates in the order of the file: one, or two during a rotation.
    pub(crate) certificates: Vec<Arc<Certificate>>,
    /// The intermediate certificates, in DER.
    pub(crate) intermediates: Vec<Vec<u8>>,
}

impl CertificateFile {
    pub(super) fn read(path: &Path) -> Result<Self, DirectoryError> {
        let unreadable = |source| DirectoryError::Unreadable { path: path.to_owned(), source };
        let text = read_bounded(path, MAX_CERTIFICATES_BYTES).map_err(unreadable)?;
        Self::parse(&text).map_err(|source| DirectoryError::Invalid { path: path.to_owned(), source })
    }

    fn parse(text: &[u8]) -> Result<Self, CertificateError> {
        let certificates = parse_certificates(text).ok_or(CertificateError::Malformed)?;
        let (authorities, nodes): (Vec<X509>, Vec<X509>) = certificates.into_iter().partition(|x509| is_ca(x509));
        if nodes.is_empty() {
            return Err(CertificateError::IsCa);
        }
        let certificates = nodes.into_iter().map(|x509| Certificate::from_x509(x509).map(Arc::new));
        Ok(Self {
            certificates: certificates.collect::<Result<_, _>>()?,
            intermediates: authorities.iter().filter_map(|x509| x509.to_der().ok()).collect(),
        })
    }

    pub(super) fn check_identity(&self, identity: &Identity, path: &Path) -> Result<(), DirectoryError> {
        match self.certificates.iter().find(|certificate| certificate.identity() != identity) {
            Some(other) => {
                Err(DirectoryError::OtherIdentity { path: path.to_owned(), found: other.identity().clone() })
            }
            None => Ok(()),
        }
    }
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
