//! s03 and s04: revocation and renewal by the program, its revocation lists verified by OpenSSL, and running nodes that use them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nanite::certs::{AuthorityError, CertificateDirectory, DirectoryCertificateStore, DirectoryError, TrustError};
use nanite::clock::{Clock, SystemClock, Timestamp};
use nanite::packet::{Identity, Packet, Ping, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenErrorKind, SealRequest, Serializer};
use serde_json::Value;

use crate::harness::pki::{agent, mapper};
use crate::harness::program::{Ended, nanite, run};

/// A directory with a CA, two agents and a mapper.
struct TestDirectory {
    dir: tempfile::TempDir,
}

impl TestDirectory {
    fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn new() -> Self {
        let directory = Self::empty();
        directory.ok(&["init", "--domain", "example.org"]);
        for (role, name) in [("agent", "fred"), ("agent", "bob"), ("mapper", "m1")] {
            directory.ok(&["issue", role, name]);
        }
        directory
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        run(nanite(["certs"]).args(arguments).arg("--dir").arg(self.dir.path()))
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code(), 0, "{arguments:?}: {ended:?}");
        ended.out
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    fn openssl(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new("openssl").args(arguments).current_dir(self.dir.path()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    fn serializer(&self, identity: &Identity) -> SecureSerializer {
        let now = SystemClock.now();
        let directory = CertificateDirectory::new(self.dir.path());
        let credentials = directory.credentials(identity, None, now).unwrap();
        let store = DirectoryCertificateStore::open(self.dir.path(), now).unwrap();
        let trust = store.trust().unwrap();
        SecureSerializer::builder(credentials, Arc::new(store), trust).started_at(now).build().unwrap()
    }
}

#[test]
fn s03_openssl_agrees_on_revocation_and_list_numbers() {
    let test = TestDirectory::new();
    assert!(test.ok(&["list"]).contains("nothing is checked for revocation"));
    let first = test.json(&["crl", "--json"]);
    assert_eq!((&first["number"], &first["in_all"]), (&1.into(), &0.into()));
    let revoked = test.json(&["revoke", "agent", "fred", "--json"]);
    assert_eq!((&revoked["number"], &revoked["revoked"], &revoked["in_all"]), (&2.into(), &1.into(), &1.into()));
    let again = test.json(&["revoke", "agent", "fred", "--json"]);
    assert_eq!((&again["number"], &again["revoked"], &again["in_all"]), (&3.into(), &0.into(), &1.into()));

    let (good, output) = test.openssl(&["crl", "-in", "crl.pem", "-noout", "-text", "-CAfile", "ca.pem"]);
    assert!(good && output.contains("verify OK") && output.contains("Key Compromise"), "{output}");
    let (_, number) = test.openssl(&["crl", "-in", "crl.pem", "-noout", "-crlnumber"]);
    assert!(number.contains("crlNumber=0x03") || number.contains("crlNumber=03"), "{number}");
    let verify = |file| {
        test.openssl(&["verify", "-x509_strict", "-crl_check", "-CAfile", "ca.pem", "-CRLfile", "crl.pem", file])
    };
    let (good, output) = verify("agent-fred.pem");
    assert!(!good && output.contains("certificate revoked"), "{output}");
    let (good, output) = verify("agent-bob.pem");
    assert!(good, "{output}");

    let listed = test.json(&["list", "--json"]);
    let rows = listed["certificates"].as_array().unwrap();
    let revoked: Vec<_> = rows.iter().filter(|row| row["revoked"] == true).map(|row| &row["identity"]).collect();
    assert_eq!(revoked, ["nanite-fred"]);
    assert_eq!(listed["revocation_checked"], true);
    let verified = test.run(&["verify"]);
    assert_eq!(verified.code(), 6);
    assert!(verified.out.contains("nanite-fred") && verified.out.contains("it is revoked"), "{}", verified.out);
    // A new certificate for the same name is valid.
    test.ok(&["issue", "agent", "fred", "--force"]);
    assert_eq!(test.run(&["verify"]).code(), 0);
}

#[test]
fn s04_running_node_rejects_revoked_certificate_despite_cache() {
    let test = TestDirectory::new();
    let [m1, fred, bob] = [mapper("m1"), agent("fred"), agent("bob")].map(|identity| test.serializer(&identity));
    let send_ping = |sender: &SecureSerializer, now: Timestamp| {
        let identity = sender.identity().clone();
        let ping = Packet::Ping(Ping::new(identity, Status::new(1.0)));
        let bytes = sender.seal(&ping, &SealRequest::new(&Audience::Mappers, now)).unwrap().bytes;
        m1.open(&bytes, &OpenContext::new(InboundQueue::Presence, now)).map(drop)
    };
    let now = SystemClock.now();
    assert!(send_ping(&fred, now).is_ok() && send_ping(&bob, now).is_ok());
    test.ok(&["revoke", "agent", "fred"]);
    // After the next scan of the directory.
    let later = SystemClock.now().saturating_add(Duration::from_secs(6));
    let refused = send_ping(&fred, later).unwrap_err();
    assert_eq!(refused.kind, OpenErrorKind::BadCertificate);
    assert!(refused.why.contains("revoked"), "{refused:?}");
    assert!(send_ping(&bob, later).is_ok());
    // Removing the list does not undo the revocation.
    fs::remove_file(test.dir.path().join("crl.pem")).unwrap();
    let later = later.saturating_add(Duration::from_secs(6));
    let refused = send_ping(&fred, later).unwrap_err();
    assert_eq!(refused.kind, OpenErrorKind::BadCertificate);
    assert!(refused.why.contains("revoked"), "{refused:?}");
    assert!(send_ping(&bob, later).is_ok());
}

#[test]
fn s04_outdated_or_foreign_revocation_list_refuses_all() {
    let test = TestDirectory::new();
    test.ok(&["crl", "--valid-for", "1h"]);
    let directory = CertificateDirectory::new(test.dir.path());
    let now = SystemClock.now();
    let credentials = directory.credentials(&agent("bob"), None, now).unwrap();
    let check = |at| directory.trust().unwrap().verify(credentials.certificate(), &[], at);
    assert_eq!(check(now), Ok(()));
    assert_eq!(check(now.saturating_add(Duration::from_secs(3601))), Err(TrustError::StaleCrl));
    // The list of another CA does not cover this CA's certificates.
    let other = TestDirectory::new();
    other.ok(&["crl"]);
    let path = test.dir.path().join("crl.pem");
    fs::copy(other.dir.path().join("crl.pem"), &path).unwrap();
    assert_eq!(check(now), Err(TrustError::NoCrl));
    fs::write(&path, "no list").unwrap();
    let refused = directory.trust();
    assert!(matches!(&refused, Err(DirectoryError::Revocation { source: AuthorityError::Crl, .. })), "{refused:?}");
    let refused = test.run(&["verify"]);
    assert_eq!(refused.code(), 6);
    assert!(refused.err.contains("crl.pem") && refused.err.contains("nanite certs crl"), "{refused:?}");
}

/// A real agent and the checks of the program do not start without lists that are there and cannot be read.
#[test]
fn s04_program_does_not_start_with_unreadable_revocation_lists() {
    let test = TestDirectory::new();
    let path = test.dir.path().join("crl.pem");
    std::os::unix::fs::symlink(test.dir.path().join("missing.pem"), &path).unwrap();
    let start = || {
        let mut agent = nanite(["agent", "--token", "fred", "--broker", "amqp://guest:guest@127.0.0.1:1/"]);
        run(agent.arg("--certs").arg(test.dir.path()))
    };
    for ended in [start(), test.run(&["verify"])] {
        assert_eq!(ended.code(), 6, "{ended:?}");
        assert!(ended.err.contains("the revocation lists") && ended.err.contains("crl.pem"), "{ended:?}");
    }
    // Without the link, the agent gets as far as the broker.
    fs::remove_file(&path).unwrap();
    let ended = start();
    assert_eq!(ended.code(), 7, "{ended:?}");
}

#[test]
fn s03_renewal_if_needed_keeps_the_old_certificate() {
    let test = TestDirectory::new();
    let code = |arguments: &[&str]| test.run(arguments).code();
    assert_eq!(code(&["needs-renewal", "--all"]), 1);
    assert_eq!(code(&["needs-renewal", "agent", "fred", "--before", "31d"]), 0);
    assert_eq!(code(&["needs-renewal", "agent", "nobody"]), 6);
    let (certificate, key) = (test.read("agent-fred.pem"), test.read("agent-fred-key.pem"));
    test.ok(&["renew", "--all", "--if-needed"]);
    assert_eq!(test.read("agent-fred.pem"), certificate);
    let identity_file = test.dir.path().join("identity");
    let command = format!("echo $NANITE_IDENTITY > {}", identity_file.display());
    test.ok(&["renew", "agent", "fred", "--if-needed", "--before", "31d", "--exec", &command]);
    assert_eq!(test.read("identity"), "nanite-fred\n");
    assert_ne!(test.read("agent-fred-key.pem"), key);
    let both = test.read("agent-fred.pem");
    assert!(both.ends_with(&certificate) && both.matches("BEGIN CERTIFICATE").count() == 2);
    let directory = CertificateDirectory::new(test.dir.path());
    let now = SystemClock.now();
    let new = directory.credentials(&agent("fred"), None, now).unwrap();
    let old = directory.previous_credentials(&agent("fred"), None, now).unwrap().unwrap();
    assert_ne!(new.certificate().fingerprint(), old.certificate().fingerprint());
    let mode = fs::metadata(test.dir.path().join("agent-fred.old-key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(code(&["verify"]), 0);
    let failed = test.run(&["renew", "agent", "fred", "--exec", "exit 3"]);
    assert_eq!(failed.code(), 1);
    assert!(failed.err.contains("was renewed, but the `--exec` command failed"), "{failed:?}");
}

#[test]
fn s03_key_passphrases_come_from_owner_only_files() {
    let test = TestDirectory::new();
    let secret = test.dir.path().join("secret");
    fs::write(&secret, "correct horse\n").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    let file = secret.to_str().unwrap();
    let wide = test.run(&["issue", "agent", "ann", "--passphrase-file", file]);
    assert_eq!(wide.code(), 6);
    assert!(wide.err.contains("chmod 600"), "{wide:?}");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    test.ok(&["issue", "agent", "ann", "--passphrase-file", file]);
    assert!(test.read("agent-ann-key.pem").contains("BEGIN ENCRYPTED PRIVATE KEY"));
    let directory = CertificateDirectory::new(test.dir.path());
    let load = |passphrase: Option<&[u8]>| {
        directory.credentials(&agent("ann"), passphrase, SystemClock.now()).map(drop).is_ok()
    };
    assert!(load(Some(b"correct horse")) && !load(None) && !load(Some(b"wrong")));
    assert_eq!(test.run(&["verify"]).code(), 0);
    let without = test.run(&["renew", "agent", "ann"]);
    assert_eq!(without.code(), 6);
    assert!(without.err.contains("passphrase") && without.err.contains("--passphrase-file"), "{without:?}");
    test.ok(&["renew", "agent", "ann", "--passphrase-file", file]);
    assert!(test.read("agent-ann-key.pem").contains("BEGIN ENCRYPTED PRIVATE KEY"));
    assert!(test.read("agent-ann.old-key.pem").contains("BEGIN ENCRYPTED PRIVATE KEY"));
    // And the CA's.
    let guarded = TestDirectory::empty();
    guarded.ok(&["init", "--ca-passphrase-file", file]);
    assert_eq!(guarded.run(&["issue", "agent", "fred"]).code(), 6);
    guarded.ok(&["issue", "agent", "fred", "--ca-passphrase-file", file]);
    guarded.ok(&["revoke", "agent", "fred", "--ca-passphrase-file", file]);
}
