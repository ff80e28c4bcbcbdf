//! A directory of certificate and key files, as `nanite certs` creates it: file names, reading, and errors.

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::x509::{X509, X509Crl};

use super::certificate::{Certificate, CertificateError, is_ca};
use super::files;
use super::key::{Credentials, KeyError, PrivateKey};
#[cfg(feature = "cli")]
use super::store::StoreError;
use super::trust::Trust;
use super::trust_anchors::{AuthorityError, CaCertificate};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// The file of the CA certificates.
pub(super) const CA_FILE: &str = "ca.pem";

/// The file of the CAs' revocation lists.
pub(super) const CRL_FILE: &str = "crl.pem";

/// A directory with the files that `nanite certs` creates: `ca.pem` and `ca-key.pem`, and for each node `agent-NAME.pem` and
/// `agent-NAME-key.pem`, or `mapper-NAME.pem` and `mapper-NAME-key.pem`.
///
/// A `crl.pem` holds the revocation lists of all CAs in `ca.pem`; without it, revocation is not checked. After a renewal, the previous key
/// is `agent-NAME.old-key.pem`.
///
/// A certificate file holds the node's certificate. It may also hold intermediate certificates and, during a rotation, the previous
/// certificate. Every call reads the files again.
///
/// ```
/// use nanite::certs::{CertificateAuthority, CertificateDirectory, KeyType};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::os::unix::fs::PermissionsExt;
/// # let now = SystemClock.now();
/// # let dir = tempfile::tempdir()?;
/// # let fred = Identity::agent("fred")?;
/// # let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// # let issued = ca.issue(&fred, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)?;
/// let directory = CertificateDirectory::new(dir.path());
/// assert!(directory.certificate_path(&fred)?.ends_with("agent-fred.pem"));
/// # std::fs::write(directory.ca_path(), ca.certificate().to_pem()?)?;
/// # std::fs::write(directory.certificate_path(&fred)?, issued.certificate().to_pem())?;
/// # std::fs::write(directory.key_path(&fred)?, issued.key().to_pem()?)?;
/// # std::fs::set_permissions(directory.key_path(&fred)?, std::fs::Permissions::from_mode(0o600))?;
/// let credentials = directory.credentials(&fred, None, now)?;
/// directory.trust()?.verify(credentials.certificate(), credentials.intermediates(), now)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateDirectory {
    path: PathBuf,
}

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

impl CertificateDirectory {
    /// The directory at this path. Reads nothing.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of the CA certificates: `ca.pem`.
    pub fn ca_path(&self) -> PathBuf {
        self.path.join(CA_FILE)
    }

    /// The path of the revocation lists: `crl.pem`.
    pub fn crl_path(&self) -> PathBuf {
        self.path.join(CRL_FILE)
    }

    /// The path of a node's key before its last renewal, such as `agent-fred.old-key.pem`.
    ///
    /// # Errors
    /// [`DirectoryError::AmbiguousName`] for a name that ends in `-key`.
    pub fn old_key_path(&self, identity: &Identity) -> Result<PathBuf, DirectoryError> {
        Ok(self.path.join(format!("{}.old-key.pem", stem(identity)?)))
    }

    /// The path of the CA's key, on the machine that issues certificates: `ca-key.pem`.
    pub fn ca_key_path(&self) -> PathBuf {
        self.path.join("ca-key.pem")
    }

    /// The path of a node's certificate, such as `agent-fred.pem`.
    ///
    /// # Errors
    /// [`DirectoryError::AmbiguousName`] for a name that ends in `-key`.
    pub fn certificate_path(&self, identity: &Identity) -> Result<PathBuf, DirectoryError> {
        Ok(self.path.join(format!("{}.pem", stem(identity)?)))
    }

    /// The path of a node's key, such as `agent-fred-key.pem`.
    ///
    /// # Errors
    /// [`DirectoryError::AmbiguousName`] for a name that ends in `-key`.
    pub fn key_path(&self, identity: &Identity) -> Result<PathBuf, DirectoryError> {
        Ok(self.path.join(format!("{}-key.pem", stem(identity)?)))
    }

    /// Reads the CA certificates of `ca.pem`, and the revocation lists of `crl.pem` if it exists.
    ///
    /// # Errors
    /// [`DirectoryError`] when `ca.pem` does not exist, or one of the files cannot be used.
    pub fn trust(&self) -> Result<Trust, DirectoryError> {
        let path = self.ca_path();
        self.check_exists()?;
        let trust = Trust::from_file(&path).map_err(|source| match source {
            AuthorityError::Unreadable { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                DirectoryError::NoAuthority(path)
            }
            source => DirectoryError::Authority { path, source },
        })?;
        match read_revocations(&self.crl_path()) {
            Ok(crls) => {
                trust.with_crls(&crls).map_err(|source| DirectoryError::Revocation { path: self.crl_path(), source })
            }
            Err(DirectoryError::Revocation { source: AuthorityError::Unreadable { source, .. }, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(trust)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads a node's certificate and key. Checks that they belong together and to the node, and that the certificate is valid at `now`;
    /// [`Trust::verify`] checks whether peers will trust it.
    ///
    /// # Errors
    /// [`DirectoryError`] for the file that is missing or cannot be used.
    pub fn credentials(
        &self,
        identity: &Identity,
        passphrase: Option<&[u8]>,
        now: Timestamp,
    ) -> Result<Credentials, DirectoryError> {
        let path = self.certificate_path(identity)?;
        let key_path = self.key_path(identity)?;
        self.check_exists()?;
        let file = CertificateFile::read(&path).map_err(|error| match error {
            DirectoryError::Unreadable { source, path } if source.kind() == io::ErrorKind::NotFound => {
                DirectoryError::NoCertificate { identity: identity.clone(), path }
            }
            error => error,
        })?;
        file.check_identity(identity, &path)?;
        let key = PrivateKey::from_file(&key_path, passphrase).map_err(|source| match source {
            KeyError::Unreadable { source, path } if source.kind() == io::ErrorKind::NotFound => {
                DirectoryError::NoKey { identity: identity.clone(), path }
            }
            source => DirectoryError::Key { path: key_path.clone(), source },
        })?;
        let own =
            file.certificates.iter().find_map(|certificate| Credentials::new(certificate.clone(), key.clone()).ok());
        let own = own.ok_or_else(|| DirectoryError::Mismatch { certificate: path.clone(), key: key_path })?;
        let certificate = own.certificate();
        if now < certificate.not_before() {
            return Err(DirectoryError::NotYetValid { path, at: certificate.not_before() });
        }
        if !certificate.is_valid_at(now) {
            return Err(DirectoryError::Expired { path, at: certificate.not_after() });
        }
        Ok(own.with_intermediates(file.intermediates))
    }

    /// Reads a node's credentials before its last renewal, if they exist and are valid at `now`. They open messages that were encrypted for
    /// them.
    ///
    /// # Errors
    /// [`DirectoryError`] when the old key exists and cannot be used.
    pub fn previous_credentials(
        &self,
        identity: &Identity,
        passphrase: Option<&[u8]>,
        now: Timestamp,
    ) -> Result<Option<Credentials>, DirectoryError> {
        let path = self.old_key_path(identity)?;
        let key = match PrivateKey::from_file(&path, passphrase) {
            Err(KeyError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| DirectoryError::Key { path, source })?,
        };
        let certificates_path = self.certificate_path(identity)?;
        let file = CertificateFile::read(&certificates_path)?;
        file.check_identity(identity, &certificates_path)?;
        let valid = file.certificates.into_iter().filter(|certificate| certificate.is_valid_at(now));
        let mut own = valid.filter_map(|certificate| Credentials::new(certificate, key.clone()).ok());
        Ok(own.next().map(|own| own.with_intermediates(file.intermediates)))
    }

    /// The names of the existing certificate files: the CA certificates, the revocation lists, then those of nodes in order.
    pub(crate) fn file_names(&self) -> Result<Vec<String>, DirectoryError> {
        self.check_exists()?;
        let unreadable = |source| DirectoryError::Unreadable { path: self.path.clone(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(unreadable)? {
            // The names of certificate files are ASCII.
            names.extend(entry.map_err(unreadable)?.file_name().into_string());
        }
        names.retain(|name| name == CA_FILE || name == CRL_FILE || is_node_file(name));
        names.sort_unstable_by_key(|name| (name != CA_FILE, name != CRL_FILE, name.clone()));
        Ok(names)
    }

    /// Reads one of the files of [`file_names`](Self::file_names).
    pub(crate) fn read_file(&self, name: &str) -> Result<Content, DirectoryError> {
        let path = self.path.join(name);
        if name == CA_FILE {
            return read_authorities(&path).map(Content::Authorities);
        }
        if name == CRL_FILE {
            return read_revocations(&path).map(Content::Revocations);
        }
        let identity = identity_of_file(name).ok_or_else(|| DirectoryError::FileName { path: path.clone() })?;
        let file = CertificateFile::read(&path)?;
        file.check_identity(&identity, &path)?;
        Ok(Content::Node(identity, file))
    }

    /// Reads every certificate file, in the order of [`file_names`](Self::file_names). A file that cannot be used has its error as content.
    #[cfg(feature = "cli")]
    pub(crate) fn entries(&self) -> Result<Vec<Entry>, DirectoryError> {
        let entry = |name: String| Entry { path: self.path.join(&name), content: self.read_file(&name) };
        Ok(self.file_names()?.into_iter().map(entry).collect())
    }

    fn check_exists(&self) -> Result<(), DirectoryError> {
        if self.path.is_dir() { Ok(()) } else { Err(DirectoryError::NoDirectory(self.path.clone())) }
    }
}

/// The common part of the names of a node's files.
fn stem(identity: &Identity) -> Result<String, DirectoryError> {
    if identity.name().ends_with("-key") {
        return Err(DirectoryError::AmbiguousName(identity.clone()));
    }
    Ok(format!("{}-{}", identity.role(), identity.name()))
}

/// A certificate file of a directory.
#[cfg(feature = "cli")]
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: PathBuf,
    pub(crate) content: Result<Content, DirectoryError>,
}

/// The content of a certificate file.
pub(crate) enum Content {
    Authorities(Vec<CaCertificate>),
    Revocations(Vec<X509Crl>),
    Node(Identity, CertificateFile),
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Authorities(authorities) => f.debug_tuple("Authorities").field(authorities).finish(),
            Self::Revocations(crls) => f.debug_tuple("Revocations").field(&crls.len()).finish(),
            Self::Node(identity, file) => f.debug_tuple("Node").field(identity).field(file).finish(),
        }
    }
}

fn read_authorities(path: &Path) -> Result<Vec<CaCertificate>, DirectoryError> {
    let failed = |source| DirectoryError::Authority { path: path.to_owned(), source };
    let unreadable = |source| AuthorityError::Unreadable { path: path.to_owned(), source };
    let text = files::read_bounded(path, files::MAX_CERTIFICATES_BYTES).map_err(|source| failed(unreadable(source)))?;
    let certificates = files::parse_certificates(&text).ok_or_else(|| failed(AuthorityError::Malformed))?;
    certificates.into_iter().map(CaCertificate::new).collect::<Result<_, _>>().map_err(failed)
}

fn read_revocations(path: &Path) -> Result<Vec<X509Crl>, DirectoryError> {
    let failed = |source| DirectoryError::Revocation { path: path.to_owned(), source };
    let unreadable = |source| failed(AuthorityError::Unreadable { path: path.to_owned(), source });
    let text = files::read_bounded(path, files::MAX_CRLS_BYTES).map_err(unreadable)?;
    files::parse_crls(&text).ok_or_else(|| failed(AuthorityError::Crl))
}

/// Reads every certificate of a PEM file, of CAs and of nodes.
#[cfg(feature = "cli")]
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<X509>, StoreError> {
    let unreadable = |source| StoreError::Unreadable { path: path.to_owned(), source };
    let text = files::read_bounded(path, files::MAX_CERTIFICATES_BYTES).map_err(unreadable)?;
    files::parse_certificates(&text).ok_or_else(|| StoreError::Invalid {
        location: path.display().to_string(),
        why: CertificateError::Malformed.to_string(),
    })
}

/// Whether a file name has the form of the certificate file of an agent or mapper.
fn is_node_file(name: &str) -> bool {
    let has_role = name.starts_with("agent-") || name.starts_with("mapper-");
    has_role && name.ends_with(".pem") && !name.ends_with("-key.pem")
}

/// The node whose certificate file has this name; none for key files and other files.
pub(super) fn identity_of_file(file_name: &str) -> Option<Identity> {
    let stem = file_name.strip_suffix(".pem").filter(|stem| !stem.ends_with("-key"))?;
    let (role, name) = stem.split_once('-')?;
    Identity::new(role.parse().ok()?, name).ok()
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
    fn read(path: &Path) -> Result<Self, DirectoryError> {
        let unreadable = |source| DirectoryError::Unreadable { path: path.to_owned(), source };
        let text = files::read_bounded(path, files::MAX_CERTIFICATES_BYTES).map_err(unreadable)?;
        Self::parse(&text).map_err(|source| DirectoryError::Invalid { path: path.to_owned(), source })
    }

    fn parse(text: &[u8]) -> Result<Self, CertificateError> {
        let certificates = files::parse_certificates(text).ok_or(CertificateError::Malformed)?;
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

    fn check_identity(&self, identity: &Identity, path: &Path) -> Result<(), DirectoryError> {
        match self.certificates.iter().find(|certificate| certificate.identity() != identity) {
            Some(other) => {
                Err(DirectoryError::OtherIdentity { path: path.to_owned(), found: other.identity().clone() })
            }
            None => Ok(()),
        }
    }
}
