//! A directory of certificates as a node sees it: its own certificate and key, and the CA's.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openssl::x509::{X509, X509Crl};

use super::anchors::{Authority, is_ca};
use super::{AuthorityError, Certificate, CertificateError, Credentials, KeyError, PrivateKey, Trust, pem};
use crate::clock::Timestamp;
use crate::packet::Identity;

/// The name of the file with the CA certificates.
pub(super) const CA_FILE: &str = "ca.pem";

/// The name of the file with the revocation lists of the CAs.
pub(super) const CRL_FILE: &str = "crl.pem";

/// A directory with the files that `nanite certs` makes: `ca.pem` and `ca-key.pem`, and for each node
/// `agent-NAME.pem` and `agent-NAME-key.pem`, or `mapper-NAME.pem` and `mapper-NAME-key.pem`.
///
/// Where there is a `crl.pem`, it holds the revocation lists of all CAs in `ca.pem`, and what they revoke is refused; without it
/// nothing is checked for revocation. After a renewal, the key before is `agent-NAME.old-key.pem`.
///
/// A certificate file holds the node's certificate, and may hold those between it and its CA, and (during a rotation) the one
/// before it. Reading is done anew at every call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateDirectory {
    path: PathBuf,
}

/// Why a node cannot start with what a directory holds.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// There is no such directory.
    #[error("there is no directory {0}")]
    NoDirectory(PathBuf),
    /// The name of a node ends in `-key`, so that its certificate would be another's key file.
    #[error("{0} cannot have files in a directory: its name ends in '-key'")]
    AmbiguousName(Identity),
    /// There is no certificate for the node.
    #[error("there is no certificate for {identity}: no file {path}")]
    NoCertificate {
        /// For whom.
        identity: Identity,
        /// Where it should be.
        path: PathBuf,
    },
    /// There is no key for the node.
    #[error("there is no key for {identity}: no file {path}")]
    NoKey {
        /// For whom.
        identity: Identity,
        /// Where it should be.
        path: PathBuf,
    },
    /// A certificate file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A certificate file holds no certificate of a node.
    #[error("{path} cannot be used")]
    Invalid {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: CertificateError,
    },
    /// A certificate file holds another node's certificate.
    #[error("{path} holds the certificate of {found}")]
    OtherIdentity {
        /// Which.
        path: PathBuf,
        /// Whose certificate it holds.
        found: Identity,
    },
    /// A key file cannot be used: unreadable, too widely readable, or no key.
    #[error("the key file {path} cannot be used")]
    Key {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// The key is not that of the certificate.
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
        /// Which file.
        path: PathBuf,
        /// When.
        at: Timestamp,
    },
    /// The certificate is not valid yet.
    #[error("the certificate {path} is not valid before {at}")]
    NotYetValid {
        /// Which file.
        path: PathBuf,
        /// From when on it is.
        at: Timestamp,
    },
    /// A file is named as those of agents and mappers are, but not after one.
    #[error("{path} is not named after an agent or mapper")]
    FileName {
        /// Which file.
        path: PathBuf,
    },
    /// There is no CA certificate.
    #[error("there is no CA certificate: no file {0}")]
    NoAuthority(PathBuf),
    /// The CA certificate cannot be used.
    #[error("the CA certificate {path} cannot be used")]
    Authority {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: AuthorityError,
    },
    /// The revocation lists cannot be used.
    #[error("the revocation lists {path} cannot be used")]
    Revocation {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: AuthorityError,
    },
}

impl CertificateDirectory {
    /// The directory at this path. Nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the CA certificate is: `ca.pem`.
    pub fn ca_path(&self) -> PathBuf {
        self.path.join(CA_FILE)
    }

    /// Where the revocation lists are: `crl.pem`.
    pub fn crl_path(&self) -> PathBuf {
        self.path.join(CRL_FILE)
    }

    /// Where a node's key before the last renewal is, such as `agent-fred.old-key.pem`.
    ///
    /// # Errors
    /// [`DirectoryError::AmbiguousName`] for a name that ends in `-key`.
    pub fn old_key_path(&self, identity: &Identity) -> Result<PathBuf, DirectoryError> {
        Ok(self.path.join(format!("{}.old-key.pem", stem(identity)?)))
    }

    /// Where the CA's key is, on the machine that issues certificates: `ca-key.pem`.
    pub fn ca_key_path(&self) -> PathBuf {
        self.path.join("ca-key.pem")
    }

    /// Where a node's certificate is, such as `agent-fred.pem`.
    ///
    /// # Errors
    /// [`DirectoryError::AmbiguousName`] for a name that ends in `-key`.
    pub fn certificate_path(&self, identity: &Identity) -> Result<PathBuf, DirectoryError> {
        Ok(self.path.join(format!("{}.pem", stem(identity)?)))
    }

    /// Where a node's key is, such as `agent-fred-key.pem`.
    ///
    /// # Errors
    /// [`DirectoryError::AmbiguousName`] for a name that ends in `-key`.
    pub fn key_path(&self, identity: &Identity) -> Result<PathBuf, DirectoryError> {
        Ok(self.path.join(format!("{}-key.pem", stem(identity)?)))
    }

    /// Reads the CA certificates of `ca.pem`, and the revocation lists of `crl.pem` where there is one.
    ///
    /// # Errors
    /// [`DirectoryError`] when there are no CA certificates, or one of the files cannot be used.
    pub fn trust(&self) -> Result<Trust, DirectoryError> {
        let path = self.ca_path();
        self.exists()?;
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

    /// Reads a node's certificate and key, and checks that they belong to each other and to the node, and that the certificate
    /// is valid at `now`. Whether others will believe it is [`Trust::verify`]'s question.
    ///
    /// # Errors
    /// [`DirectoryError`] says which file is missing or wrong.
    pub fn credentials(
        &self,
        identity: &Identity,
        passphrase: Option<&[u8]>,
        now: Timestamp,
    ) -> Result<Credentials, DirectoryError> {
        let path = self.certificate_path(identity)?;
        let key_path = self.key_path(identity)?;
        self.exists()?;
        let file = read(&path).map_err(|error| match error {
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
        let own = file.nodes.iter().find_map(|certificate| Credentials::new(certificate.clone(), key.clone()).ok());
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

    /// Reads the credentials that a node had before its last renewal, if they are there and still valid at `now`: what was sealed to
    /// them is opened until they expire.
    ///
    /// # Errors
    /// [`DirectoryError`] when the old key is there and cannot be used.
    pub fn older_credentials(
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
        let certificates = self.certificate_path(identity)?;
        let file = read(&certificates)?;
        file.check_identity(identity, &certificates)?;
        let valid = file.nodes.into_iter().filter(|certificate| certificate.is_valid_at(now));
        let mut own = valid.filter_map(|certificate| Credentials::new(certificate, key.clone()).ok());
        Ok(own.next().map(|own| own.with_intermediates(file.intermediates)))
    }

    /// The names of the certificate files that are there: the CA's and its lists first, then those of agents and mappers in order.
    pub(crate) fn file_names(&self) -> Result<Vec<String>, DirectoryError> {
        self.exists()?;
        let unreadable = |source| DirectoryError::Unreadable { path: self.path.clone(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(unreadable)? {
            // Names that are not UTF-8 are nobody's.
            names.extend(entry.map_err(unreadable)?.file_name().into_string());
        }
        names.retain(|name| name == CA_FILE || name == CRL_FILE || is_node_file(name));
        names.sort_unstable_by_key(|name| (name != CA_FILE, name != CRL_FILE, name.clone()));
        Ok(names)
    }

    /// Reads one of these files.
    pub(crate) fn read_file(&self, name: &str) -> Result<Content, DirectoryError> {
        let path = self.path.join(name);
        if name == CA_FILE {
            return read_authorities(&path).map(Content::Authorities);
        }
        if name == CRL_FILE {
            return read_revocations(&path).map(Content::Revocations);
        }
        let identity = identity_of(name).ok_or_else(|| DirectoryError::FileName { path: path.clone() })?;
        let file = read(&path)?;
        file.check_identity(&identity, &path)?;
        Ok(Content::Node(identity, file))
    }

    /// Reads every certificate file, in the order of [`file_names`](Self::file_names). A file that cannot be used is an entry
    /// with its error.
    #[cfg(feature = "cli")]
    pub(crate) fn entries(&self) -> Result<Vec<Entry>, DirectoryError> {
        let entry = |name: String| Entry { path: self.path.join(&name), content: self.read_file(&name) };
        Ok(self.file_names()?.into_iter().map(entry).collect())
    }

    fn exists(&self) -> Result<(), DirectoryError> {
        if self.path.is_dir() { Ok(()) } else { Err(DirectoryError::NoDirectory(self.path.clone())) }
    }
}

/// The name of a node's files, without the ending.
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

/// What a certificate file holds.
pub(crate) enum Content {
    Authorities(Vec<Authority>),
    Revocations(Vec<X509Crl>),
    Node(Identity, CertificateFile),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Authorities(all) => f.debug_tuple("Authorities").field(all).finish(),
            Self::Revocations(all) => f.debug_tuple("Revocations").field(&all.len()).finish(),
            Self::Node(identity, file) => f.debug_tuple("Node").field(identity).field(file).finish(),
        }
    }
}

fn read_authorities(path: &Path) -> Result<Vec<Authority>, DirectoryError> {
    let failed = |source| DirectoryError::Authority { path: path.to_owned(), source };
    let unreadable = |source| AuthorityError::Unreadable { path: path.to_owned(), source };
    let text = pem::read(path, pem::MAX_CERTIFICATES).map_err(|source| failed(unreadable(source)))?;
    let all = pem::certificates(&text).map_err(|_| failed(AuthorityError::Malformed))?;
    all.into_iter().map(Authority::new).collect::<Result<_, _>>().map_err(failed)
}

fn read_revocations(path: &Path) -> Result<Vec<X509Crl>, DirectoryError> {
    let failed = |source| DirectoryError::Revocation { path: path.to_owned(), source };
    let unreadable = |source| failed(AuthorityError::Unreadable { path: path.to_owned(), source });
    let text = pem::read(path, pem::MAX_CRLS).map_err(unreadable)?;
    pem::crls(&text).ok_or_else(|| failed(AuthorityError::Crl))
}

/// Whether a file is named as the certificates of agents and mappers are.
fn is_node_file(name: &str) -> bool {
    let begins = name.starts_with("agent-") || name.starts_with("mapper-");
    begins && name.ends_with(".pem") && !name.ends_with("-key.pem")
}

/// Whose certificate a file with this name holds; none for keys and for files of other kinds.
pub(super) fn identity_of(file_name: &str) -> Option<Identity> {
    let stem = file_name.strip_suffix(".pem").filter(|stem| !stem.ends_with("-key"))?;
    let (role, name) = stem.split_once('-')?;
    Identity::new(role.parse().ok()?, name).ok()
}

/// What a node's certificate file holds.
#[derive(Debug)]
pub(crate) struct CertificateFile {
    /// The node's certificates: one, or during a rotation two. In the order of the file.
    pub(crate) nodes: Vec<Arc<Certificate>>,
    /// The DER of the certificates between them and the CA.
    pub(crate) intermediates: Vec<Vec<u8>>,
}

impl CertificateFile {
    pub(super) fn check_identity(&self, identity: &Identity, path: &Path) -> Result<(), DirectoryError> {
        match self.nodes.iter().find(|certificate| certificate.identity() != identity) {
            Some(other) => {
                Err(DirectoryError::OtherIdentity { path: path.to_owned(), found: other.identity().clone() })
            }
            None => Ok(()),
        }
    }
}

/// Reads a node's certificate file.
pub(super) fn read(path: &Path) -> Result<CertificateFile, DirectoryError> {
    let unreadable = |source| DirectoryError::Unreadable { path: path.to_owned(), source };
    let text = pem::read(path, pem::MAX_CERTIFICATES).map_err(unreadable)?;
    parse(&text).map_err(|source| DirectoryError::Invalid { path: path.to_owned(), source })
}

fn parse(text: &[u8]) -> Result<CertificateFile, CertificateError> {
    let (authorities, nodes): (Vec<X509>, Vec<X509>) = pem::certificates(text)?.into_iter().partition(|x| is_ca(x));
    if nodes.is_empty() {
        return Err(CertificateError::IsCa);
    }
    let nodes = nodes.into_iter().map(|x509| Certificate::from_x509(x509).map(Arc::new)).collect::<Result<_, _>>()?;
    let intermediates = authorities.iter().filter_map(|x509| x509.to_der().ok()).collect();
    Ok(CertificateFile { nodes, intermediates })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, KeyType, files};
    use crate::clock::{Clock, SystemClock};
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    const DAY: Duration = Duration::from_secs(86_400);

    struct Place {
        dir: tempfile::TempDir,
        ca: CertificateAuthority,
        now: Timestamp,
    }

    impl Place {
        fn new() -> Self {
            let now = SystemClock.now();
            let dir = tempfile::tempdir().unwrap();
            let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 365, now).unwrap();
            std::fs::write(dir.path().join("ca.pem"), ca.certificate().to_pem().unwrap()).unwrap();
            Self { dir, ca, now }
        }

        fn issue(&self, identity: &Identity, file: &str) -> Credentials {
            let credentials = self.ca.issue(identity, KeyType::P256, DAY, self.now).unwrap();
            let write = |name: String, content: &[u8], mode| {
                files::write(&self.dir.path().join(name), content, mode, true).unwrap();
            };
            write(format!("{file}.pem"), &credentials.certificate().to_pem(), files::PUBLIC);
            write(format!("{file}-key.pem"), &credentials.key().to_pem().unwrap(), files::SECRET);
            credentials
        }

        fn load(&self, identity: &Identity) -> Result<Credentials, DirectoryError> {
            CertificateDirectory::new(self.dir.path()).credentials(identity, None, self.now)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }
    }

    #[test]
    fn s03_each_thing_that_can_be_wrong_with_a_nodes_files_has_its_own_error() {
        use DirectoryError as E;
        let place = Place::new();
        let fred = Identity::agent("fred").unwrap();
        assert!(matches!(place.load(&fred), Err(E::NoCertificate { .. })));
        let made = place.issue(&fred, "agent-fred");
        assert_eq!(place.load(&fred).unwrap().certificate().fingerprint(), made.certificate().fingerprint());

        let key = place.path("agent-fred-key.pem");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        let wide = place.load(&fred);
        assert!(matches!(wide, Err(E::Key { source: KeyError::TooOpen { mode: 0o640, .. }, .. })), "{wide:?}");
        std::fs::remove_file(&key).unwrap();
        assert!(matches!(place.load(&fred), Err(E::NoKey { .. })));
        std::fs::create_dir(&key).unwrap();
        assert!(matches!(place.load(&fred), Err(E::Key { source: KeyError::Unreadable { .. }, .. })));
        std::fs::remove_dir(&key).unwrap();
        let other = PrivateKey::generate(KeyType::P256).unwrap();
        files::write(&key, &other.to_pem().unwrap(), files::SECRET, false).unwrap();
        assert!(matches!(place.load(&fred), Err(E::Mismatch { .. })));
        files::write(&key, b"nothing", files::SECRET, true).unwrap();
        assert!(matches!(place.load(&fred), Err(E::Key { source: KeyError::Malformed, .. })));

        place.issue(&Identity::agent("bob").unwrap(), "agent-fred");
        assert!(matches!(place.load(&fred), Err(E::OtherIdentity { found, .. }) if found.name() == "bob"));
        std::fs::write(place.path("agent-fred.pem"), "nothing").unwrap();
        assert!(matches!(place.load(&fred), Err(E::Invalid { source: CertificateError::Malformed, .. })));
        std::fs::copy(place.path("ca.pem"), place.path("agent-fred.pem")).unwrap();
        assert!(matches!(place.load(&fred), Err(E::Invalid { source: CertificateError::IsCa, .. })));

        let nowhere = CertificateDirectory::new("/nonexistent");
        assert!(matches!(nowhere.credentials(&fred, None, place.now), Err(E::NoDirectory(_))));
        assert!(matches!(nowhere.trust(), Err(E::NoDirectory(_))));
    }

    #[test]
    fn s03_a_certificate_is_loaded_only_while_it_is_valid() {
        let place = Place::new();
        let fred = Identity::agent("fred").unwrap();
        place.issue(&fred, "agent-fred");
        let directory = CertificateDirectory::new(place.dir.path());
        let late = directory.credentials(&fred, None, place.now.saturating_add(DAY));
        assert!(matches!(late, Err(DirectoryError::Expired { .. })));
        let early = directory.credentials(&fred, None, place.now.saturating_sub(DAY));
        assert!(matches!(early, Err(DirectoryError::NotYetValid { .. })));
    }

    #[test]
    fn s03_the_ca_certificate_is_read_or_its_lack_is_said() {
        let place = Place::new();
        let directory = CertificateDirectory::new(place.dir.path());
        let fred = place.issue(&Identity::agent("fred").unwrap(), "agent-fred");
        assert_eq!(directory.trust().unwrap().verify(fred.certificate(), &[], place.now), Ok(()));
        std::fs::copy(place.path("agent-fred.pem"), directory.ca_path()).unwrap();
        assert!(matches!(directory.trust(), Err(DirectoryError::Authority { .. })));
        std::fs::remove_file(directory.ca_path()).unwrap();
        assert!(matches!(directory.trust(), Err(DirectoryError::NoAuthority(_))));
    }

    #[test]
    fn s03_during_a_rotation_the_certificate_of_the_key_is_found_behind_another() {
        let place = Place::new();
        let fred = Identity::agent("fred").unwrap();
        let own = place.issue(&fred, "agent-fred");
        let next = place.ca.issue(&fred, KeyType::P256, DAY, place.now).unwrap();
        let both = [next.certificate().to_pem(), own.certificate().to_pem()].concat();
        std::fs::write(place.path("agent-fred.pem"), both).unwrap();
        assert_eq!(place.load(&fred).unwrap().certificate().fingerprint(), own.certificate().fingerprint());
    }

    #[test]
    fn s03_no_nodes_certificate_is_ever_another_nodes_key_file() {
        let place = Place::new();
        let tricky = Identity::agent("fred-key").unwrap();
        assert!(matches!(place.load(&tricky), Err(DirectoryError::AmbiguousName(_))));
        assert_eq!(identity_of("agent-fred-key.pem"), None);
        assert_eq!(identity_of("mapper-m_1.pem"), Identity::mapper("m_1").ok());
        for name in ["ca.pem", "ca-key.pem", "agent-.pem", "agent-a.pem.bak", ".agent-a.pem.12", "root-a.pem"] {
            assert_eq!(identity_of(name), None, "{name}");
        }
    }
}
