//! A directory of certificate and key files, as `nanite certs` creates it: file names, and reading credentials, CAs and peers.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use openssl::x509::X509Crl;

use super::files::{CertificateFile, DirectoryError, read_authorities, read_revocations};
use super::key::{Credentials, KeyError, PrivateKey};
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
            // Only a file that does not exist is no list: a link to a missing file is a list that cannot be read.
            Err(DirectoryError::Revocation { source: AuthorityError::Unreadable { source, path }, .. })
                if source.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() =>
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::{CertificateAuthority, CertificateError, KeyType, files};
    use crate::clock::{Clock, SystemClock};
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    const DAY: Duration = Duration::from_secs(86_400);

    struct TestDirectory {
        dir: tempfile::TempDir,
        ca: CertificateAuthority,
        now: Timestamp,
    }

    impl TestDirectory {
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
    fn s03_every_fault_of_a_nodes_files_has_its_own_error() {
        use DirectoryError as E;
        let test = TestDirectory::new();
        let fred = Identity::agent("fred").unwrap();
        assert!(matches!(test.load(&fred), Err(E::NoCertificate { .. })));
        let made = test.issue(&fred, "agent-fred");
        assert_eq!(test.load(&fred).unwrap().certificate().fingerprint(), made.certificate().fingerprint());

        let key = test.path("agent-fred-key.pem");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        let wide = test.load(&fred);
        assert!(matches!(wide, Err(E::Key { source: KeyError::TooOpen { mode: 0o640, .. }, .. })), "{wide:?}");
        std::fs::remove_file(&key).unwrap();
        assert!(matches!(test.load(&fred), Err(E::NoKey { .. })));
        std::fs::create_dir(&key).unwrap();
        assert!(matches!(test.load(&fred), Err(E::Key { source: KeyError::Unreadable { .. }, .. })));
        std::fs::remove_dir(&key).unwrap();
        let other = PrivateKey::generate(KeyType::P256).unwrap();
        files::write(&key, &other.to_pem().unwrap(), files::SECRET, false).unwrap();
        assert!(matches!(test.load(&fred), Err(E::Mismatch { .. })));
        files::write(&key, b"nothing", files::SECRET, true).unwrap();
        assert!(matches!(test.load(&fred), Err(E::Key { source: KeyError::Malformed, .. })));

        test.issue(&Identity::agent("bob").unwrap(), "agent-fred");
        assert!(matches!(test.load(&fred), Err(E::OtherIdentity { found, .. }) if found.name() == "bob"));
        std::fs::write(test.path("agent-fred.pem"), "nothing").unwrap();
        assert!(matches!(test.load(&fred), Err(E::Invalid { source: CertificateError::Malformed, .. })));
        std::fs::copy(test.path("ca.pem"), test.path("agent-fred.pem")).unwrap();
        assert!(matches!(test.load(&fred), Err(E::Invalid { source: CertificateError::IsCa, .. })));

        let missing = CertificateDirectory::new("/nonexistent");
        assert!(matches!(missing.credentials(&fred, None, test.now), Err(E::NoDirectory(_))));
        assert!(matches!(missing.trust(), Err(E::NoDirectory(_))));
    }

    #[test]
    fn s03_certificate_is_loaded_only_while_valid() {
        let test = TestDirectory::new();
        let fred = Identity::agent("fred").unwrap();
        test.issue(&fred, "agent-fred");
        let directory = CertificateDirectory::new(test.dir.path());
        let late = directory.credentials(&fred, None, test.now.saturating_add(DAY));
        assert!(matches!(late, Err(DirectoryError::Expired { .. })));
        let early = directory.credentials(&fred, None, test.now.saturating_sub(DAY));
        assert!(matches!(early, Err(DirectoryError::NotYetValid { .. })));
    }

    #[test]
    fn s03_missing_ca_certificate_is_reported() {
        let test = TestDirectory::new();
        let directory = CertificateDirectory::new(test.dir.path());
        let fred = test.issue(&Identity::agent("fred").unwrap(), "agent-fred");
        assert_eq!(directory.trust().unwrap().verify(fred.certificate(), &[], test.now), Ok(()));
        std::fs::copy(test.path("agent-fred.pem"), directory.ca_path()).unwrap();
        assert!(matches!(directory.trust(), Err(DirectoryError::Authority { .. })));
        std::fs::remove_file(directory.ca_path()).unwrap();
        assert!(matches!(directory.trust(), Err(DirectoryError::NoAuthority(_))));
    }

    #[test]
    fn s03_certificate_of_the_key_is_found_behind_another_during_rotation() {
        let test = TestDirectory::new();
        let fred = Identity::agent("fred").unwrap();
        let own = test.issue(&fred, "agent-fred");
        let next = test.ca.issue(&fred, KeyType::P256, DAY, test.now).unwrap();
        let both = [next.certificate().to_pem(), own.certificate().to_pem()].concat();
        std::fs::write(test.path("agent-fred.pem"), both).unwrap();
        assert_eq!(test.load(&fred).unwrap().certificate().fingerprint(), own.certificate().fingerprint());
    }

    #[test]
    fn s03_previous_credentials_are_loaded_only_while_valid() {
        let test = TestDirectory::new();
        let fred = Identity::agent("fred").unwrap();
        let old = test.issue(&fred, "agent-fred");
        let new = test.ca.issue(&fred, KeyType::P256, DAY * 9, test.now.saturating_add(DAY / 2)).unwrap();
        let directory = CertificateDirectory::new(test.dir.path());
        std::fs::rename(test.path("agent-fred-key.pem"), directory.old_key_path(&fred).unwrap()).unwrap();
        files::write(&test.path("agent-fred-key.pem"), &new.key().to_pem().unwrap(), files::SECRET, true).unwrap();
        let both = [new.certificate().to_pem(), old.certificate().to_pem()].concat();
        std::fs::write(test.path("agent-fred.pem"), both).unwrap();
        let previous = |at| {
            let found = directory.previous_credentials(&fred, None, at).unwrap();
            found.map(|found| found.certificate().fingerprint().to_owned())
        };
        let end = old.certificate().not_after();
        let last = Timestamp::from_micros(end.as_micros() - 1);
        assert_eq!(previous(last), Some(*old.certificate().fingerprint()));
        assert_eq!(previous(end), None, "expired");
        let start = old.certificate().not_before();
        assert_eq!(previous(start), Some(*old.certificate().fingerprint()));
        assert_eq!(previous(Timestamp::from_micros(start.as_micros() - 1)), None, "not valid yet");
        // The new ones are still there: only the previous are gone.
        assert_eq!(
            directory.credentials(&fred, None, end).unwrap().certificate().fingerprint(),
            new.certificate().fingerprint()
        );
    }

    #[test]
    fn s04_revocation_lists_that_cannot_be_read_refuse_the_directory() {
        let test = TestDirectory::new();
        let directory = CertificateDirectory::new(test.dir.path());
        let path = directory.crl_path();
        assert!(!directory.trust().unwrap().checks_revocation(), "no file: revocation is not checked");
        let refused = |what: &str| match directory.trust() {
            Err(DirectoryError::Revocation { source, .. }) => source,
            other => panic!("{what}: {other:?}"),
        };
        let unreadable = |error| matches!(error, AuthorityError::Unreadable { .. });
        std::fs::create_dir(&path).unwrap();
        assert!(unreadable(refused("a directory")));
        std::fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink(test.path("missing.pem"), &path).unwrap();
        assert!(unreadable(refused("a link to a missing file")));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&path, &path).unwrap();
        assert!(unreadable(refused("a link to itself")));
        std::fs::remove_file(&path).unwrap();
        std::fs::File::create(&path).unwrap().set_len(17 * 1024 * 1024).unwrap();
        assert!(unreadable(refused("too long")));
        for (what, text) in [("empty", &b""[..]), ("no list", b"no list"), ("not text", &[0xff; 9])] {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(refused(what), AuthorityError::Crl), "{what}");
        }
        // The store that nodes use does not open either.
        let opened = crate::certs::DirectoryCertificateStore::open(test.dir.path(), test.now);
        assert!(matches!(opened, Err(DirectoryError::Revocation { .. })), "{opened:?}");
    }

    #[test]
    fn s03_certificate_file_name_is_never_a_key_file_name() {
        let test = TestDirectory::new();
        let tricky = Identity::agent("fred-key").unwrap();
        assert!(matches!(test.load(&tricky), Err(DirectoryError::AmbiguousName(_))));
        assert_eq!(identity_of_file("agent-fred-key.pem"), None);
        assert_eq!(identity_of_file("mapper-m_1.pem"), Identity::mapper("m_1").ok());
        for name in ["ca.pem", "ca-key.pem", "agent-.pem", "agent-a.pem.bak", ".agent-a.pem.12", "root-a.pem"] {
            assert_eq!(identity_of_file(name), None, "{name}");
        }
    }
}
