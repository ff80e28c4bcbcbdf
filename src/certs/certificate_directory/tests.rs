//! Tests of reading a directory of certificates and keys.

use super::*;
use crate::certs::{CertificateAuthority, KeyType, files};
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
