//! s03: `nanite certs` as a program, with the openssl program to check its output.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nanite::certs::{CertificateAuthority, KeyType};
use nanite::clock::{Clock, SystemClock};
use openssl::nid::Nid;
use serde_json::Value;

use crate::harness::forge::{Forge, p256};
use crate::harness::pki::agent;
use crate::harness::program::{Ended, nanite, run};

const DAY: Duration = Duration::from_secs(86_400);

/// A certificate directory that does not exist yet.
struct Certs {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Certs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("certs");
        Self { _dir: dir, path }
    }

    /// With a CA, and certificates for an agent and a mapper.
    fn with_nodes() -> Self {
        let certs = Self::new();
        certs.ok(&["init", "--domain", "example.org"]);
        certs.ok(&["issue", "agent", "fred"]);
        certs.ok(&["issue", "mapper", "m1"]);
        certs
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        run(nanite(["certs"]).args(arguments).arg("--dir").arg(&self.path))
    }

    /// Runs a command that must succeed without a message.
    fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!((ended.code(), ended.err.as_str()), (0, ""), "{arguments:?}: {ended:?}");
        ended.out
    }

    /// Runs a command that must fail with this code, one line with the error and one with the remedy.
    fn refused(&self, code: i32, arguments: &[&str], message: &str, remedy: &str) {
        let ended = self.run(arguments);
        let what = format!("{arguments:?}: {ended:?}");
        assert_eq!((ended.code(), ended.out.as_str()), (code, ""), "{what}");
        let [error, help] = ended.err.lines().collect::<Vec<_>>()[..] else { panic!("not two lines: {what}") };
        assert!(error.strip_prefix("error: ").unwrap().contains(message), "{what}");
        assert!(help.strip_prefix("help: ").unwrap().contains(remedy), "{what}");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.file(name)).unwrap().permissions().mode() & 0o7777
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Runs the openssl program on some files.
fn openssl(arguments: &str, paths: &[&Path]) -> Ended {
    run(Command::new("openssl").args(arguments.split(' ')).args(paths))
}

fn openssl_accepts(ca: &Path, certificate: &Path) -> bool {
    openssl("verify -x509_strict -policy_check -auth_level 2 -CAfile", &[ca, certificate]).code() == 0
}

fn text(certificate: &Path) -> String {
    openssl("x509 -noout -text -in", &[certificate]).out
}

/// Writes a CA and its key.
fn write_ca(certs: &Certs, ca: &CertificateAuthority) {
    fs::write(certs.file("ca.pem"), ca.certificate().to_pem().unwrap()).unwrap();
    fs::write(certs.file("ca-key.pem"), &*ca.key().to_pem().unwrap()).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn s03_init_and_issue_create_files_with_safe_modes() {
    let certs = Certs::new();
    let output = certs.ok(&["init", "--domain", "example.org"]);
    assert!(output.starts_with("CA of example.org, valid until 20"), "{output}");
    let output = certs.ok(&["issue", "agent", "fred", "--valid-for", "12h"]);
    assert!(output.starts_with("nanite-fred, valid until 20"), "{output}");
    for name in ["agent-fred.pem", "agent-fred-key.pem"] {
        assert!(output.contains(certs.file(name).to_str().unwrap()), "{output}");
    }
    assert_eq!(output.lines().count(), 3, "{output}");
    assert_eq!(certs.names(), ["agent-fred-key.pem", "agent-fred.pem", "ca-key.pem", "ca.pem"]);
    assert_eq!(fs::metadata(&certs.path).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!((certs.mode("ca-key.pem"), certs.mode("agent-fred-key.pem")), (0o600, 0o600));
    assert_eq!((certs.mode("ca.pem"), certs.mode("agent-fred.pem")), (0o644, 0o644));
}

#[test]
fn s03_openssl_strictly_accepts_certificates_of_every_key_type() {
    for ca_type in ["p256", "rsa2048"] {
        let certs = Certs::new();
        certs.ok(&["init", "--domain", "example.org", "--key-type", ca_type]);
        // Creating long RSA keys is slow: one is enough.
        let leaf_types: &[&str] = if ca_type == "p256" { &["p256", "rsa2048", "rsa3072"] } else { &["p256"] };
        for key_type in leaf_types {
            certs.ok(&["issue", "mapper", key_type, "--key-type", key_type]);
            let path = certs.file(&format!("mapper-{key_type}.pem"));
            assert!(openssl_accepts(&certs.file("ca.pem"), &path), "{ca_type} {key_type}");
            let text = text(&path);
            let usage = if *key_type == "p256" { "Key Agreement" } else { "Key Encipherment" };
            for part in [
                &format!("X509v3 Key Usage: critical\n                Digital Signature, {usage}\n"),
                &format!(
                    "X509v3 Subject Alternative Name: \n                URI:spiffe://example.org/mapper/{key_type}\n"
                ),
                "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
                "X509v3 Subject Key Identifier: \n",
                "X509v3 Authority Key Identifier: \n",
                &format!("Subject: CN = mapper-{key_type}\n"),
                "Version: 3",
            ] {
                assert!(text.contains(part), "{part:?} is not in:\n{text}");
            }
            assert!(!text.contains("Extended Key Usage"), "{text}");
        }
        let text = text(&certs.file("ca.pem"));
        for part in ["CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "URI:spiffe://example.org\n"] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let other = Certs::with_nodes();
        assert!(!openssl_accepts(&other.file("ca.pem"), &certs.file("mapper-p256.pem")), "it accepts everything");
    }
}

#[test]
fn s03_existing_files_are_not_replaced_without_force() {
    let certs = Certs::with_nodes();
    let before: Vec<_> = certs.names().iter().map(|name| fs::read(certs.file(name)).unwrap()).collect();
    certs.refused(6, &["init"], "ca.pem exists", "--force");
    certs.refused(6, &["issue", "agent", "fred"], "agent-fred.pem exists", "--force");
    certs.refused(6, &["csr", "agent", "fred"], "agent-fred-key.pem exists", "--force");
    let after: Vec<_> = certs.names().iter().map(|name| fs::read(certs.file(name)).unwrap()).collect();
    assert!(before == after, "a file has changed");
    // One of the two files is enough to refuse, and nothing is created.
    fs::remove_file(certs.file("agent-fred.pem")).unwrap();
    certs.refused(6, &["issue", "agent", "fred"], "agent-fred-key.pem exists", "--force");
    assert!(!certs.file("agent-fred.pem").exists());

    let key = fs::read(certs.file("agent-fred-key.pem")).unwrap();
    certs.ok(&["issue", "agent", "fred", "--force"]);
    assert_ne!(fs::read(certs.file("agent-fred-key.pem")).unwrap(), key);
    assert_eq!(certs.mode("agent-fred-key.pem"), 0o600);
    assert_eq!(certs.run(&["verify"]).code(), 0);
}

#[test]
fn s03_list_and_show_print_identity_expiry_and_file() {
    let certs = Certs::with_nodes();
    certs.ok(&["issue", "agent", "short", "--valid-for", "12h"]);
    // Some hours more than 30 days, so that the seconds of this test do not count.
    certs.ok(&["issue", "agent", "fred", "--valid-for", "725h", "--force"]);
    certs.ok(&["issue", "mapper", "m1", "--valid-for", "725h", "--force"]);
    let listed = certs.ok(&["list"]);
    let rows: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["IDENTITY", "EXPIRES", "DAYS", "LEFT", "FILE"]);
    assert_eq!(&rows[1][..3], ["CA", "of", "example.org"]);
    assert_eq!(listed.lines().last(), Some("no crl.pem: nothing is checked for revocation"));
    let identities: Vec<_> = rows[2..rows.len() - 1].iter().map(|row| (row[0], row[2])).collect();
    assert_eq!(identities, [("nanite-fred", "30"), ("nanite-short", "0"), ("mapper-m1", "30")], "{listed}");

    let json: Value = serde_json::from_str(&certs.ok(&["list", "--json"])).unwrap();
    let rows = json["certificates"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[1]["identity"], "nanite-fred");
    assert_eq!(rows[1]["days_left"], 30);
    assert_eq!(rows[1]["file"], certs.file("agent-fred.pem").to_str().unwrap());
    assert_eq!(json["errors"], Value::Array(Vec::new()));

    let path = certs.file("agent-fred.pem");
    let show = |json: bool| {
        let mut command = nanite(["certs", "show"]);
        command.arg(&path).args(json.then_some("--json"));
        let ended = run(&mut command);
        assert_eq!(ended.code(), 0, "{ended:?}");
        ended.out
    };
    let shown = show(false);
    for part in ["nanite-fred, agent of example.org\n", "(30 days left)", "P-256", "digitalSignature, keyAgreement"] {
        assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
    }
    let json: Value = serde_json::from_str(&show(true)).unwrap();
    let sha256 = openssl("x509 -noout -fingerprint -sha256 -in", &[&path]).out;
    let sha256 = sha256.trim().rsplit('=').next().unwrap().replace(':', "").to_lowercase();
    assert_eq!(json[0]["sha256"], sha256);
    assert_eq!(json[0]["kind"], "agent");
}

#[test]
fn s03_show_explains_an_unusable_certificate() {
    let certs = Certs::with_nodes();
    let two = "URI:spiffe://example.org/agent/fred,URI:spiffe://example.org/agent/bob";
    let forged = Forge::leaf().set(Nid::SUBJECT_ALT_NAME, two).self_signed();
    fs::write(certs.file("odd.pem"), forged.x509.to_pem().unwrap()).unwrap();
    let ended = run(nanite(["certs", "show"]).arg(certs.file("odd.pem")));
    assert_eq!(ended.code(), 6);
    assert!(ended.out.contains("cannot be used: 2 identity URIs"), "{ended:?}");
    let ended = run(nanite(["certs", "show"]).arg(certs.file("agent-fred-key.pem")));
    assert_eq!((ended.code(), ended.out.as_str()), (6, ""));
    assert!(ended.err.contains("holds no usable certificate") && ended.err.contains("help: "), "{ended:?}");
}

#[test]
fn s03_show_verify_and_issue_explain_extended_key_usage() {
    let (certs, now) = (Certs::with_nodes(), SystemClock.now());
    let (from, to) = (now.saturating_sub(DAY), now.saturating_add(DAY * 10));
    let ca = |usage| {
        let names = "URI:spiffe://example.org";
        let ca = Forge::ca("mine").set(Nid::SUBJECT_ALT_NAME, names).set(Nid::EXT_KEY_USAGE, usage);
        ca.valid(from, to).self_signed()
    };
    for (of_ca, of_fred, purposes, message) in [
        ("", "serverAuth,clientAuth", "serverAuth, clientAuth\n", "ok"),
        (
            "",
            "codeSigning",
            "codeSigning (not for nodes)\n",
            "its key usage does not fit: its extended key usage allows",
        ),
        ("", "1.3.6.1.4.1.55555.1", "1.3.6.1.4.1.55555.1 (not for nodes)\n", "its key usage does not fit"),
        ("serverAuth", "", "any\n", "a CA certificate above it allows neither clientAuth nor emailProtection"),
    ] {
        let ca = ca(of_ca);
        let fred = Forge::leaf().set(Nid::EXT_KEY_USAGE, of_fred).valid(from, to).signed_by(&ca);
        fs::write(certs.file("ca.pem"), ca.x509.to_pem().unwrap()).unwrap();
        fs::write(certs.file("ca-key.pem"), ca.key.private_key_to_pem_pkcs8().unwrap()).unwrap();
        fs::write(certs.file("agent-fred.pem"), fred.x509.to_pem().unwrap()).unwrap();
        let shown = run(nanite(["certs", "show"]).arg(certs.file("agent-fred.pem")));
        assert!(shown.out.contains(&format!("  purposes   {purposes}")), "{shown:?}");
        let verified = certs.run(&["verify", certs.file("agent-fred.pem").to_str().unwrap()]);
        assert_eq!(verified.out.lines().next().unwrap().starts_with("ok"), message == "ok", "{verified:?}");
        assert!(verified.out.contains(message), "{verified:?}");
        // A CA for other purposes issues nothing, since no node would accept it.
        match of_ca {
            "" => drop(certs.ok(&["issue", "agent", "bob", "--valid-for", "1h", "--force"])),
            _ => {
                let (message, remedy) = ("extended key usage of the CA certificate CN=mine", "nanite certs init");
                certs.refused(6, &["issue", "agent", "bob", "--valid-for", "1h", "--force"], message, remedy);
                let verified = certs.run(&["verify", certs.file("ca.pem").to_str().unwrap()]);
                assert!(verified.out.contains("the CA CN=mine is limited to other purposes"), "{verified:?}");
            }
        }
    }
}

#[test]
fn s03_csr_is_signed_for_the_identity_that_the_signer_names() {
    let (node, ca) = (Certs::new(), Certs::with_nodes());
    node.ok(&["csr", "agent", "bob"]);
    assert_eq!(node.names(), ["agent-bob-key.pem", "agent-bob.csr"]);
    assert_eq!(node.mode("agent-bob-key.pem"), 0o600);
    let csr = node.file("agent-bob.csr");
    let checked = openssl("req -verify -noout -in", &[&csr]);
    assert_eq!(checked.code(), 0, "{checked:?}");
    // The request names bob, the signer names alice.
    ca.ok(&["sign", "agent", "alice", csr.to_str().unwrap(), "--valid-for", "1h"]);
    assert!(!ca.file("agent-alice-key.pem").exists());
    let text = text(&ca.file("agent-alice.pem"));
    assert!(text.contains("URI:spiffe://example.org/agent/alice\n") && !text.contains("bob"), "{text}");
    // Signed for bob, it is usable on the node.
    ca.ok(&["sign", "agent", "bob", csr.to_str().unwrap()]);
    for name in ["agent-bob.pem", "ca.pem"] {
        fs::copy(ca.file(name), node.file(name)).unwrap();
    }
    let verified = node.ok(&["verify"]);
    assert_eq!(verified.lines().filter(|line| line.starts_with("ok ")).count(), 3, "{verified}");
}

#[test]
fn s03_extensions_in_a_csr_are_ignored() {
    let (certs, request) = (Certs::with_nodes(), Certs::new());
    fs::create_dir(&request.path).unwrap();
    let (key, csr) = (request.file("key.pem"), request.file("hostile.csr"));
    let extensions = [
        "subjectAltName=URI:spiffe://example.org/mapper/m1",
        "basicConstraints=critical,CA:TRUE",
        "keyUsage=critical,keyCertSign",
    ];
    let create = "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=mapper-m1";
    let mut command = Command::new("openssl");
    command.args(create.split(' ')).args(extensions.iter().flat_map(|extension| ["-addext", extension]));
    let created = run(command.arg("-keyout").arg(&key).arg("-out").arg(&csr));
    assert_eq!(created.code(), 0, "{created:?}");
    certs.ok(&["sign", "agent", "eve", csr.to_str().unwrap()]);
    let text = text(&certs.file("agent-eve.pem"));
    assert!(text.contains("URI:spiffe://example.org/agent/eve\n"), "{text}");
    for part in ["m1", "CA:TRUE", "Certificate Sign"] {
        assert!(!text.contains(part), "{part:?} is in:\n{text}");
    }
    // A request that was changed after it was signed.
    let mut der = openssl::x509::X509Req::from_pem(&fs::read(&csr).unwrap()).unwrap().to_der().unwrap();
    let at = der.windows(9).position(|window| window == b"mapper-m1").unwrap();
    der[at + 8] = b'2';
    fs::write(&csr, openssl::x509::X509Req::from_der(&der).unwrap().to_pem().unwrap()).unwrap();
    for (request, message, remedy) in [
        (&csr, "not signed by its own key", "nanite certs csr"),
        (&PathBuf::from("/nonexistent"), "cannot read /nonexistent", "check the path"),
        (&certs.file("ca.pem"), "not a certificate signing request", "csr"),
    ] {
        certs.refused(6, &["sign", "agent", "eve2", request.to_str().unwrap()], message, remedy);
    }
    assert!(!certs.file("agent-eve2.pem").exists());
}

#[test]
fn s03_invalid_arguments_are_refused_before_files_are_created() {
    let certs = Certs::new();
    certs.refused(2, &["init", "--domain", "Example org"], "is not a trust domain", "--domain");
    certs.refused(2, &["init", "--valid-for", "0s"], "validity", "--valid-for");
    assert!(!certs.path.exists());
    let usage = |arguments: &[&str]| {
        let ended = certs.run(arguments);
        assert_eq!((ended.code(), ended.out.as_str()), (2, ""), "{ended:?}");
        ended.err
    };
    assert!(usage(&["init", "--key-type", "dsa"]).contains("p256"), "the choices are named");
    assert!(usage(&["issue", "root", "fred"]).contains("agent, mapper"));
    assert!(usage(&["issue", "agent", "fred", "--valid-for", "30"]).contains("15s, 5m, 12h or 30d"));
    for name in ["../fred", "", "a b", "-x", "fred.", "a/b", &"x".repeat(65)] {
        let ended = run(nanite(["certs", "issue", "--dir"]).arg(&certs.path).args(["agent", "--", name]));
        assert_eq!((ended.code(), ended.out.as_str()), (2, ""), "{ended:?}");
        assert!(ended.err.contains("a name is 1 to 64 letters"), "{ended:?}");
    }
    assert!(run(&mut nanite(["certs", "list"])).err.contains("--dir"));
    assert!(!certs.path.exists());
}

#[test]
fn s03_issue_fails_without_a_usable_ca() {
    let certs = Certs::new();
    certs.refused(6, &["issue", "agent", "fred"], "there is no directory", "nanite certs init --dir");
    fs::create_dir(&certs.path).unwrap();
    certs.refused(6, &["issue", "agent", "fred"], "there is no CA certificate", "nanite certs init --dir");
    certs.refused(6, &["verify"], "there is no CA certificate", "copy ca.pem");
    let certs = Certs::with_nodes();
    fs::remove_file(certs.file("ca-key.pem")).unwrap();
    certs.refused(6, &["issue", "agent", "bob"], "there is no CA key", "nanite certs csr");
    fs::write(certs.file("ca-key.pem"), p256().private_key_to_pem_pkcs8().unwrap()).unwrap();
    certs.refused(6, &["issue", "agent", "bob"], "has mode 0644", "chmod 600");
    set_mode(&certs.file("ca-key.pem"), 0o600);
    certs.refused(6, &["issue", "agent", "bob"], "is not the key of", "one CA");
    fs::write(certs.file("ca-key.pem"), "nothing").unwrap();
    certs.refused(6, &["issue", "agent", "bob"], "not a private key", "right file");
    fs::write(certs.file("ca.pem"), "nothing").unwrap();
    certs.refused(6, &["issue", "agent", "bob"], "no CA certificate in PEM", "ca.pem must hold");
    fs::copy(certs.file("agent-fred.pem"), certs.file("ca.pem")).unwrap();
    certs.refused(6, &["issue", "agent", "bob"], "is not a CA's", "ca.pem must hold");
    certs.refused(6, &["issue", "agent", "fred-key"], "its name ends in '-key'", "choose a name");
    assert!(!certs.file("agent-bob.pem").exists() && !certs.file("agent-bob-key.pem").exists());
}

#[test]
fn s03_certificates_do_not_outlive_their_ca() {
    let certs = Certs::new();
    certs.ok(&["init", "--valid-for", "10d"]);
    certs.refused(6, &["issue", "agent", "fred"], "before the new one would", "--valid-for");
    certs.ok(&["issue", "agent", "fred", "--valid-for", "9d"]);
    let past = SystemClock.now().saturating_sub(DAY * 20);
    let old = CertificateAuthority::create("example.org", KeyType::P256, DAY, past).unwrap();
    write_ca(&certs, &old);
    certs.refused(6, &["issue", "agent", "bob", "--valid-for", "1h"], "not valid now", "clock");
}

/// Runs `verify` on a directory with faults; gives file, message and remedy of each.
fn faults(certs: &Certs) -> Vec<[String; 3]> {
    let ended = certs.run(&["verify", "--json"]);
    assert_eq!((ended.code(), ended.err.as_str()), (6, ""), "{ended:?}");
    let findings: Vec<Value> = serde_json::from_str(&ended.out).unwrap();
    let file_name = |path: &Value| path.as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    let faults = findings.iter().filter(|finding| finding["ok"] == false);
    faults.map(|fault| [file_name(&fault["file"]), fault["message"].to_string(), fault["remedy"].to_string()]).collect()
}

#[test]
fn s03_verify_names_each_fault_with_its_file_and_remedy() {
    let assert_one_fault = |certs: &Certs, file: &str, message: &str, remedy: &str| {
        let faults = faults(certs);
        let [[at, found, help]] = &faults[..] else { panic!("not one fault: {faults:?}") };
        assert_eq!(at, file, "{faults:?}");
        assert!(found.contains(message) && help.contains(remedy), "{faults:?}");
    };
    let other = Certs::with_nodes();
    let other_key = format!("cp {} agent-fred-key.pem", other.file("agent-fred-key.pem").display());
    for (command, file, message, remedy) in [
        (&*other_key, "agent-fred-key.pem", "does not belong to", "issue both again"),
        ("chmod 644 agent-fred-key.pem", "agent-fred-key.pem", "has mode 0644", "chmod 600"),
        ("chmod 660 ca-key.pem", "ca-key.pem", "has mode 0660", "chmod 600"),
        ("echo nothing > agent-fred-key.pem", "agent-fred-key.pem", "not a private key", "right file"),
        (
            "echo nothing > agent-fred.pem",
            "agent-fred.pem",
            "not an X.509 certificate",
            "nanite certs issue agent fred",
        ),
        ("mv mapper-m1.pem agent-odd.pem", "agent-odd.pem", "holds the certificate of mapper-m1", "after mapper-m1"),
        ("mv mapper-m1.pem mapper-a.b.pem", "mapper-a.b.pem", "not named after", "rename"),
    ] {
        let certs = Certs::with_nodes();
        assert_eq!(certs.run(&["verify"]).code(), 0);
        assert!(Command::new("sh").args(["-c", command]).current_dir(&certs.path).status().unwrap().success());
        assert_one_fault(&certs, file, message, remedy);
    }

    let certs = Certs::with_nodes();
    let past = SystemClock.now().saturating_sub(DAY * 40);
    let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 100, past).unwrap();
    write_ca(&certs, &ca);
    fs::remove_file(certs.file("mapper-m1.pem")).unwrap();
    let fred = ca.issue(&agent("fred"), KeyType::P256, DAY, past).unwrap();
    fs::write(certs.file("agent-fred.pem"), fred.certificate().to_pem()).unwrap();
    fs::write(certs.file("agent-fred-key.pem"), &*fred.key().to_pem().unwrap()).unwrap();
    assert_one_fault(&certs, "agent-fred.pem", "it expired at", "nanite certs issue");
}

#[test]
fn s03_verify_rejects_certificates_of_another_ca() {
    let (certs, other) = (Certs::with_nodes(), Certs::with_nodes());
    fs::copy(other.file("ca.pem"), certs.file("ca.pem")).unwrap();
    let mut faults = faults(&certs);
    faults.sort_unstable();
    let files: Vec<_> = faults.iter().map(|[file, ..]| file.as_str()).collect();
    assert_eq!(files, ["agent-fred.pem", "ca-key.pem", "mapper-m1.pem"], "{faults:?}");
    let unknown_issuer =
        |[_, message, help]: &[String; 3]| message.contains("not issued by a known CA") && help.contains("ca.pem");
    assert!(faults.iter().any(unknown_issuer), "{faults:?}");
    // With both CAs in the file, as during a roll-over, both are trusted.
    certs.ok(&["init", "--force", "--domain", "example.org"]);
    let both = [&other, &certs].map(|certs| fs::read(certs.file("ca.pem")).unwrap());
    fs::write(other.file("ca.pem"), both.concat()).unwrap();
    assert_eq!(other.run(&["verify"]).code(), 0);
    other.ok(&["issue", "agent", "bob"]);
    assert!(openssl_accepts(&other.file("ca.pem"), &other.file("agent-bob.pem")));
}

#[test]
fn s03_verify_can_be_limited_to_some_files() {
    let certs = Certs::with_nodes();
    set_mode(&certs.file("agent-fred-key.pem"), 0o644);
    let mapper = certs.file("mapper-m1.pem");
    let output = certs.ok(&["verify", mapper.to_str().unwrap()]);
    assert_eq!(output.lines().count(), 1, "{output}");
    let key = certs.file("agent-fred-key.pem");
    assert_eq!(certs.run(&["verify", key.to_str().unwrap()]).code(), 6);
    certs.refused(2, &["verify", "/etc/passwd"], "is not a certificate or key file of", "--dir");
}

#[test]
fn s03_keys_and_secrets_are_never_printed() {
    let certs = Certs::new();
    let mut output = String::new();
    for arguments in [
        &["init"][..],
        &["issue", "agent", "fred"],
        &["csr", "agent", "bob"],
        &["list"],
        &["verify"],
        &["issue", "agent", "fred"],
        &["--log", "trace", "verify"],
    ] {
        let ended = certs.run(arguments);
        output.push_str(&ended.out);
        output.push_str(&ended.err);
    }
    for name in certs.names().iter().filter(|name| name.ends_with("-key.pem")) {
        for line in fs::read_to_string(certs.file(name)).unwrap().lines().filter(|line| !line.starts_with('-')) {
            assert!(!output.contains(line), "a line of {name} is in the output");
        }
    }
    assert!(!output.contains("PRIVATE"), "{output}");
}
