//! s03 and s04: revoking and renewing by the program, its lists by OpenSSL's judgement, and what a running node refuses by them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nanite::certs::{CertificateDirectory, DirectoryCertificateStore, TrustError};
use nanite::clock::{Clock, SystemClock, Timestamp};
use nanite::packet::{Identity, Packet, Ping, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenErrorKind, SealRequest, Serializer};
use serde_json::Value;

use crate::harness::pki::{agent, mapper};
use crate::harness::program::{Ended, nanite, run};

/// A directory with a CA, two agents and a mapper.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn new() -> Self {
        let place = Self::empty();
        place.ok(&["init", "--domain", "example.org"]);
        for (role, name) in [("agent", "fred"), ("agent", "bob"), ("mapper", "m1")] {
            place.ok(&["issue", role, name]);
        }
        place
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
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
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
fn s03_openssl_agrees_with_what_was_revoked_and_lists_are_numbered() {
    let place = Place::new();
    assert!(place.ok(&["list"]).contains("nothing is checked for revocation"));
    let first = place.json(&["crl", "--json"]);
    assert_eq!((&first["number"], &first["in_all"]), (&1.into(), &0.into()));
    let revoked = place.json(&["revoke", "agent", "fred", "--json"]);
    assert_eq!((&revoked["number"], &revoked["revoked"], &revoked["in_all"]), (&2.into(), &1.into(), &1.into()));
    let again = place.json(&["revoke", "agent", "fred", "--json"]);
    assert_eq!((&again["number"], &again["revoked"], &again["in_all"]), (&3.into(), &0.into(), &1.into()));

    let (good, said) = place.openssl(&["crl", "-in", "crl.pem", "-noout", "-text", "-CAfile", "ca.pem"]);
    assert!(good && said.contains("verify OK") && said.contains("Key Compromise"), "{said}");
    let (_, number) = place.openssl(&["crl", "-in", "crl.pem", "-noout", "-crlnumber"]);
    assert!(number.contains("crlNumber=0x03") || number.contains("crlNumber=03"), "{number}");
    let verify = |file| {
        place.openssl(&["verify", "-x509_strict", "-crl_check", "-CAfile", "ca.pem", "-CRLfile", "crl.pem", file])
    };
    let (good, said) = verify("agent-fred.pem");
    assert!(!good && said.contains("certificate revoked"), "{said}");
    let (good, said) = verify("agent-bob.pem");
    assert!(good, "{said}");

    let listed = place.json(&["list", "--json"]);
    let rows = listed["certificates"].as_array().unwrap();
    let revoked: Vec<_> = rows.iter().filter(|row| row["revoked"] == true).map(|row| &row["identity"]).collect();
    assert_eq!(revoked, ["nanite-fred"]);
    assert_eq!(listed["revocation_checked"], true);
    let verified = place.run(&["verify"]);
    assert_eq!(verified.code(), 6);
    assert!(verified.out.contains("nanite-fred") && verified.out.contains("it is revoked"), "{}", verified.out);
    // A new certificate for the name is good again.
    place.ok(&["issue", "agent", "fred", "--force"]);
    assert_eq!(place.run(&["verify"]).code(), 0);
}

#[test]
fn s04_a_running_node_refuses_what_was_revoked_whatever_it_believed_before() {
    let place = Place::new();
    let [m1, fred, bob] = [mapper("m1"), agent("fred"), agent("bob")].map(|identity| place.serializer(&identity));
    let say = |by: &SecureSerializer, now: Timestamp| {
        let identity = by.identity().clone();
        let ping = Packet::Ping(Ping { identity, status: Status::new(1.0), instance: None });
        let bytes = by.seal(&ping, &SealRequest::new(&Audience::Mappers, now)).unwrap().bytes;
        m1.open(&bytes, &OpenContext::new(InboundQueue::Presence, now)).map(drop)
    };
    let now = SystemClock.now();
    assert!(say(&fred, now).is_ok() && say(&bob, now).is_ok());
    place.ok(&["revoke", "agent", "fred"]);
    // Past the moment at which the directory is looked at again.
    let later = SystemClock.now().saturating_add(Duration::from_secs(6));
    let refused = say(&fred, later).unwrap_err();
    assert_eq!(refused.kind, OpenErrorKind::BadCertificate);
    assert!(refused.why.contains("revoked"), "{refused:?}");
    assert!(say(&bob, later).is_ok());
    // The list is gone: what it revoked stays revoked.
    fs::remove_file(place.dir.path().join("crl.pem")).unwrap();
    let later = later.saturating_add(Duration::from_secs(6));
    assert_eq!(say(&fred, later).unwrap_err().kind, OpenErrorKind::BadCertificate);
    assert!(say(&bob, later).is_ok());
}

#[test]
fn s04_a_list_that_is_out_of_date_or_of_another_ca_refuses_everybody() {
    let place = Place::new();
    place.ok(&["crl", "--valid-for", "1h"]);
    let directory = CertificateDirectory::new(place.dir.path());
    let now = SystemClock.now();
    let credentials = directory.credentials(&agent("bob"), None, now).unwrap();
    let check = |at| directory.trust().unwrap().verify(credentials.certificate(), &[], at);
    assert_eq!(check(now), Ok(()));
    assert_eq!(check(now.saturating_add(Duration::from_secs(3601))), Err(TrustError::StaleCrl));
    // The list of another CA says nothing of this one's certificates.
    let other = Place::new();
    other.ok(&["crl"]);
    let path = place.dir.path().join("crl.pem");
    fs::copy(other.dir.path().join("crl.pem"), &path).unwrap();
    let refused = check(now);
    assert!(matches!(refused, Err(TrustError::NoCrl | TrustError::Chain(_))), "{refused:?}");
    fs::write(&path, "no list").unwrap();
    assert!(directory.trust().is_err());
    let refused = place.run(&["verify"]);
    assert_eq!(refused.code(), 6);
    assert!(refused.err.contains("crl.pem") && refused.err.contains("nanite certs crl"), "{refused:?}");
}

#[test]
fn s03_renewal_by_need_keeps_the_old_beside_the_new() {
    let place = Place::new();
    let code = |arguments: &[&str]| place.run(arguments).code();
    assert_eq!(code(&["needs-renewal", "--all"]), 1);
    assert_eq!(code(&["needs-renewal", "agent", "fred", "--before", "31d"]), 0);
    assert_eq!(code(&["needs-renewal", "agent", "nobody"]), 6);
    let (certificate, key) = (place.read("agent-fred.pem"), place.read("agent-fred-key.pem"));
    place.ok(&["renew", "--all", "--if-needed"]);
    assert_eq!(place.read("agent-fred.pem"), certificate);
    let said = place.dir.path().join("said");
    let command = format!("echo $NANITE_IDENTITY > {}", said.display());
    place.ok(&["renew", "agent", "fred", "--if-needed", "--before", "31d", "--exec", &command]);
    assert_eq!(place.read("said"), "nanite-fred\n");
    assert_ne!(place.read("agent-fred-key.pem"), key);
    let both = place.read("agent-fred.pem");
    assert!(both.ends_with(&certificate) && both.matches("BEGIN CERTIFICATE").count() == 2);
    let directory = CertificateDirectory::new(place.dir.path());
    let now = SystemClock.now();
    let new = directory.credentials(&agent("fred"), None, now).unwrap();
    let old = directory.older_credentials(&agent("fred"), None, now).unwrap().unwrap();
    assert_ne!(new.certificate().fingerprint(), old.certificate().fingerprint());
    let mode = fs::metadata(place.dir.path().join("agent-fred.old-key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(code(&["verify"]), 0);
    let failed = place.run(&["renew", "agent", "fred", "--exec", "exit 3"]);
    assert_eq!(failed.code(), 1);
    assert!(failed.err.contains("is renewed, and the command that was to follow failed"), "{failed:?}");
}

#[test]
fn s03_passphrases_of_keys_come_from_files_that_only_their_owner_reads() {
    let place = Place::new();
    let secret = place.dir.path().join("secret");
    fs::write(&secret, "correct horse\n").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    let file = secret.to_str().unwrap();
    let wide = place.run(&["issue", "agent", "ann", "--passphrase-file", file]);
    assert_eq!(wide.code(), 6);
    assert!(wide.err.contains("chmod 600"), "{wide:?}");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    place.ok(&["issue", "agent", "ann", "--passphrase-file", file]);
    assert!(place.read("agent-ann-key.pem").contains("BEGIN ENCRYPTED PRIVATE KEY"));
    let directory = CertificateDirectory::new(place.dir.path());
    let load = |passphrase: Option<&[u8]>| {
        directory.credentials(&agent("ann"), passphrase, SystemClock.now()).map(drop).is_ok()
    };
    assert!(load(Some(b"correct horse")) && !load(None) && !load(Some(b"wrong")));
    assert_eq!(place.run(&["verify"]).code(), 0);
    let without = place.run(&["renew", "agent", "ann"]);
    assert_eq!(without.code(), 6);
    assert!(without.err.contains("passphrase") && without.err.contains("--passphrase-file"), "{without:?}");
    place.ok(&["renew", "agent", "ann", "--passphrase-file", file]);
    assert!(place.read("agent-ann-key.pem").contains("BEGIN ENCRYPTED PRIVATE KEY"));
    assert!(place.read("agent-ann.old-key.pem").contains("BEGIN ENCRYPTED PRIVATE KEY"));
    // And the CA's.
    let guarded = Place::empty();
    guarded.ok(&["init", "--ca-passphrase-file", file]);
    assert_eq!(guarded.run(&["issue", "agent", "fred"]).code(), 6);
    guarded.ok(&["issue", "agent", "fred", "--ca-passphrase-file", file]);
    guarded.ok(&["revoke", "agent", "fred", "--ca-passphrase-file", file]);
}
