//! s03: the certificate tool, as a program, with OpenSSL's own as the judge of what it makes.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nanite::certs::{CertificateAuthority, KeyType};
use nanite::clock::{Clock, SystemClock};
use serde_json::Value;

use crate::harness::forge::{Forge, p256};
use crate::harness::pki::agent;
use crate::harness::program::{Ended, nanite, run};

const DAY: Duration = Duration::from_secs(86_400);

/// A directory for certificates that does not exist yet.
struct Place {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("certs");
        Self { _dir: dir, path }
    }

    /// With a CA, and certificates for an agent and a mapper.
    fn filled() -> Self {
        let place = Self::new();
        place.made(&["init", "--domain", "example.org"]);
        place.made(&["issue", "agent", "fred"]);
        place.made(&["issue", "mapper", "m1"]);
        place
    }

    fn certs(&self, arguments: &[&str]) -> Ended {
        run(nanite(["certs"]).args(arguments).arg("--dir").arg(&self.path))
    }

    /// What has to work.
    fn made(&self, arguments: &[&str]) -> String {
        let ended = self.certs(arguments);
        assert_eq!((ended.code(), ended.err.as_str()), (0, ""), "{arguments:?}: {ended:?}");
        ended.out
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.made(arguments)).unwrap()
    }

    /// What has to fail with this code, one line of what is wrong and one of what to do.
    fn refused(&self, code: i32, arguments: &[&str], message: &str, remedy: &str) {
        let ended = self.certs(arguments);
        let what = format!("{arguments:?}: {ended:?}");
        assert_eq!(ended.code(), code, "{what}");
        assert_eq!(ended.out, "", "{what}");
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
        let mut names: Vec<_> =
            fs::read_dir(&self.path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The openssl program.
fn openssl<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ended {
    run(Command::new("openssl").args(arguments))
}

fn verified(ca: &Path, certificate: &Path) -> bool {
    let ended = openssl([
        "verify".as_ref(),
        "-x509_strict".as_ref(),
        "-policy_check".as_ref(),
        "-auth_level".as_ref(),
        "2".as_ref(),
        "-CAfile".as_ref(),
        ca.as_os_str(),
        certificate.as_os_str(),
    ]);
    ended.code() == 0
}

fn text(certificate: &Path) -> String {
    openssl(["x509".as_ref(), "-noout".as_ref(), "-text".as_ref(), "-in".as_ref(), certificate.as_os_str()]).out
}

#[test]
fn s03_init_and_issue_make_files_with_the_right_modes_and_say_what_they_made() {
    let place = Place::new();
    let said = place.made(&["init", "--domain", "example.org"]);
    assert!(said.starts_with("CA of example.org, valid until 20"), "{said}");
    let said = place.made(&["issue", "agent", "fred", "--valid-for", "12h"]);
    assert!(said.starts_with("nanite-fred, valid until 20"), "{said}");
    for name in ["agent-fred.pem", "agent-fred-key.pem"] {
        assert!(said.contains(place.file(name).to_str().unwrap()), "{said}");
    }
    assert_eq!(said.lines().count(), 3, "{said}");
    assert_eq!(place.names(), ["agent-fred-key.pem", "agent-fred.pem", "ca-key.pem", "ca.pem"]);
    assert_eq!(fs::metadata(&place.path).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!((place.mode("ca-key.pem"), place.mode("agent-fred-key.pem")), (0o600, 0o600));
    assert_eq!((place.mode("ca.pem"), place.mode("agent-fred.pem")), (0o644, 0o644));
}

#[test]
fn s03_openssl_accepts_what_is_made_by_its_strict_rules_in_every_key_type() {
    for ca_type in ["p256", "rsa2048"] {
        let place = Place::new();
        place.made(&["init", "--domain", "example.org", "--key-type", ca_type]);
        // Long RSA keys take long to make: one of them is enough.
        let leaf_types: &[&str] = if ca_type == "p256" { &["p256", "rsa2048", "rsa3072"] } else { &["p256"] };
        for key_type in leaf_types {
            place.made(&["issue", "mapper", key_type, "--key-type", key_type]);
            let path = place.file(&format!("mapper-{key_type}.pem"));
            assert!(verified(&place.file("ca.pem"), &path), "{ca_type} {key_type}");
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
        let text = text(&place.file("ca.pem"));
        for part in ["CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "URI:spiffe://example.org\n"] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let other = Place::filled();
        assert!(!verified(&other.file("ca.pem"), &place.file("mapper-p256.pem")), "the judge says yes to anything");
    }
}

#[test]
fn s03_nothing_is_replaced_without_force() {
    let place = Place::filled();
    let before: Vec<_> = place.names().iter().map(|name| fs::read(place.file(name)).unwrap()).collect();
    place.refused(6, &["init"], "ca.pem exists", "--force");
    place.refused(6, &["issue", "agent", "fred"], "agent-fred.pem exists", "--force");
    place.refused(6, &["csr", "agent", "fred"], "agent-fred-key.pem exists", "--force");
    let after: Vec<_> = place.names().iter().map(|name| fs::read(place.file(name)).unwrap()).collect();
    assert!(before == after, "something has changed");
    // One of the two files is enough to stop it, and nothing is made.
    fs::remove_file(place.file("agent-fred.pem")).unwrap();
    place.refused(6, &["issue", "agent", "fred"], "agent-fred-key.pem exists", "--force");
    assert!(!place.file("agent-fred.pem").exists());

    let key = fs::read(place.file("agent-fred-key.pem")).unwrap();
    place.made(&["issue", "agent", "fred", "--force"]);
    assert_ne!(fs::read(place.file("agent-fred-key.pem")).unwrap(), key);
    assert_eq!(place.mode("agent-fred-key.pem"), 0o600);
    assert_eq!(place.certs(&["verify"]).code(), 0);
}

#[test]
fn s03_list_and_show_say_whose_until_when_and_where() {
    let place = Place::filled();
    place.made(&["issue", "agent", "short", "--valid-for", "12h"]);
    // Some hours over the days, so that a second more or less counts none fewer.
    place.made(&["issue", "agent", "fred", "--valid-for", "725h", "--force"]);
    place.made(&["issue", "mapper", "m1", "--valid-for", "725h", "--force"]);
    let listed = place.made(&["list"]);
    let rows: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["IDENTITY", "EXPIRES", "DAYS", "LEFT", "FILE"]);
    assert_eq!(&rows[1][..3], ["CA", "of", "example.org"]);
    assert_eq!(listed.lines().last(), Some("no crl.pem: nothing is checked for revocation"));
    let identities: Vec<_> = rows[2..rows.len() - 1].iter().map(|row| (row[0], row[2])).collect();
    assert_eq!(identities, [("nanite-fred", "30"), ("nanite-short", "0"), ("mapper-m1", "30")], "{listed}");

    let json = place.json(&["list", "--json"]);
    let rows = json["certificates"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[1]["identity"], "nanite-fred");
    assert_eq!(rows[1]["days_left"], 30);
    assert_eq!(rows[1]["file"], place.file("agent-fred.pem").to_str().unwrap());
    assert_eq!(json["errors"], Value::Array(Vec::new()));

    let path = place.file("agent-fred.pem");
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
    let sha256 = openssl([
        "x509".as_ref(),
        "-noout".as_ref(),
        "-fingerprint".as_ref(),
        "-sha256".as_ref(),
        "-in".as_ref(),
        path.as_os_str(),
    ]);
    let sha256 = sha256.out.trim().rsplit('=').next().unwrap().replace(':', "").to_lowercase();
    assert_eq!(json[0]["sha256"], sha256);
    assert_eq!(json[0]["kind"], "agent");
}

#[test]
fn s03_show_explains_a_certificate_that_is_nobodys() {
    let place = Place::filled();
    let two = "URI:spiffe://example.org/agent/fred,URI:spiffe://example.org/agent/bob";
    let forged = Forge::leaf().set(openssl::nid::Nid::SUBJECT_ALT_NAME, two).self_signed();
    fs::write(place.file("odd.pem"), forged.x509.to_pem().unwrap()).unwrap();
    let ended = run(nanite(["certs", "show"]).arg(place.file("odd.pem")));
    assert_eq!(ended.code(), 6);
    assert!(ended.out.contains("cannot be used: 2 identity URIs"), "{ended:?}");
    let ended = run(nanite(["certs", "show"]).arg(place.file("agent-fred-key.pem")));
    assert_eq!((ended.code(), ended.out.as_str()), (6, ""));
    assert!(ended.err.contains("holds no usable certificate") && ended.err.contains("help: "), "{ended:?}");
}

#[test]
fn s03_a_csr_is_signed_where_the_ca_is_for_whom_the_signer_says() {
    let (node, ca) = (Place::new(), Place::filled());
    node.made(&["csr", "agent", "bob"]);
    assert_eq!(node.names(), ["agent-bob-key.pem", "agent-bob.csr"]);
    assert_eq!(node.mode("agent-bob-key.pem"), 0o600);
    let csr = node.file("agent-bob.csr");
    let judged = openssl(["req".as_ref(), "-verify".as_ref(), "-noout".as_ref(), "-in".as_ref(), csr.as_os_str()]);
    assert_eq!(judged.code(), 0, "{judged:?}");
    // The request says bob; who signs says alice.
    ca.made(&["sign", "agent", "alice", csr.to_str().unwrap(), "--valid-for", "1h"]);
    assert!(!ca.file("agent-alice-key.pem").exists());
    let text = text(&ca.file("agent-alice.pem"));
    assert!(text.contains("URI:spiffe://example.org/agent/alice\n") && !text.contains("bob"), "{text}");
    // As bob it works on the node.
    ca.made(&["sign", "agent", "bob", csr.to_str().unwrap()]);
    for name in ["agent-bob.pem", "ca.pem"] {
        fs::copy(ca.file(name), node.file(name)).unwrap();
    }
    let verified = node.made(&["verify"]);
    assert_eq!(verified.lines().filter(|line| line.starts_with("ok ")).count(), 3, "{verified}");
}

#[test]
fn s03_what_a_request_of_another_tool_asks_for_is_not_believed() {
    let (place, request) = (Place::filled(), Place::new());
    fs::create_dir(&request.path).unwrap();
    let (key, csr) = (request.file("key.pem"), request.file("hostile.csr"));
    let asks = [
        "subjectAltName=URI:spiffe://example.org/mapper/m1",
        "basicConstraints=critical,CA:TRUE",
        "keyUsage=critical,keyCertSign",
    ];
    let mut command = Command::new("openssl");
    command.args([
        "req",
        "-new",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=mapper-m1",
    ]);
    command.args(asks.iter().flat_map(|ask| ["-addext", ask])).arg("-keyout").arg(&key).arg("-out").arg(&csr);
    let made = run(&mut command);
    assert_eq!(made.code(), 0, "{made:?}");
    place.made(&["sign", "agent", "eve", csr.to_str().unwrap()]);
    let text = text(&place.file("agent-eve.pem"));
    assert!(text.contains("URI:spiffe://example.org/agent/eve\n"), "{text}");
    for part in ["m1", "CA:TRUE", "Certificate Sign"] {
        assert!(!text.contains(part), "{part:?} is in:\n{text}");
    }
    // Changed after it was signed.
    let mut der = openssl::x509::X509Req::from_pem(&fs::read(&csr).unwrap()).unwrap().to_der().unwrap();
    let at = der.windows(9).position(|window| window == b"mapper-m1").unwrap();
    der[at + 8] = b'2';
    fs::write(&csr, openssl::x509::X509Req::from_der(&der).unwrap().to_pem().unwrap()).unwrap();
    place.refused(
        6,
        &["sign", "agent", "eve2", csr.to_str().unwrap()],
        "not signed by its own key",
        "nanite certs csr",
    );
    place.refused(6, &["sign", "agent", "eve2", "/nonexistent"], "cannot read /nonexistent", "check the path");
    let certificate = place.file("ca.pem");
    place.refused(
        6,
        &["sign", "agent", "eve2", certificate.to_str().unwrap()],
        "not a certificate signing request",
        "csr",
    );
    assert!(!place.file("agent-eve2.pem").exists());
}

#[test]
fn s03_bad_arguments_are_refused_before_anything_is_made() {
    let place = Place::new();
    place.refused(2, &["init", "--domain", "Example org"], "is not a trust domain", "--domain");
    place.refused(2, &["init", "--valid-for", "0s"], "validity", "--valid-for");
    assert!(!place.path.exists());
    let usage = |arguments: &[&str]| {
        let ended = place.certs(arguments);
        assert_eq!((ended.code(), ended.out.as_str()), (2, ""), "{ended:?}");
        ended.err
    };
    assert!(usage(&["init", "--key-type", "dsa"]).contains("p256"), "the choices are named");
    assert!(usage(&["issue", "root", "fred"]).contains("agent, mapper"));
    assert!(usage(&["issue", "agent", "fred", "--valid-for", "30"]).contains("15s, 5m, 12h or 30d"));
    for name in ["../fred", "", "a b", "-x", "fred.", "a/b", &"x".repeat(65)] {
        let ended = run(nanite(["certs", "issue", "--dir"]).arg(&place.path).args(["agent", "--", name]));
        assert_eq!((ended.code(), ended.out.as_str()), (2, ""), "{ended:?}");
        assert!(ended.err.contains("a name is 1 to 64 letters"), "{ended:?}");
    }
    assert!(run(&mut nanite(["certs", "list"])).err.contains("--dir"));
    assert!(!place.path.exists());
}

#[test]
fn s03_without_a_ca_nothing_is_issued() {
    let place = Place::new();
    place.refused(6, &["issue", "agent", "fred"], "there is no directory", "nanite certs init --dir");
    fs::create_dir(&place.path).unwrap();
    place.refused(6, &["issue", "agent", "fred"], "there is no CA certificate", "nanite certs init --dir");
    place.refused(6, &["verify"], "there is no CA certificate", "copy ca.pem");
    let place = Place::filled();
    fs::remove_file(place.file("ca-key.pem")).unwrap();
    place.refused(6, &["issue", "agent", "bob"], "there is no CA key", "nanite certs csr");
    fs::write(place.file("ca-key.pem"), p256().private_key_to_pem_pkcs8().unwrap()).unwrap();
    place.refused(6, &["issue", "agent", "bob"], "has mode 0644", "chmod 600");
    fs::set_permissions(place.file("ca-key.pem"), Permissions::from_mode(0o600)).unwrap();
    place.refused(6, &["issue", "agent", "bob"], "is not the key of", "one CA");
    fs::write(place.file("ca-key.pem"), "nothing").unwrap();
    place.refused(6, &["issue", "agent", "bob"], "not a private key", "right file");
    fs::write(place.file("ca.pem"), "nothing").unwrap();
    place.refused(6, &["issue", "agent", "bob"], "no CA certificate in PEM", "ca.pem has to hold");
    fs::copy(place.file("agent-fred.pem"), place.file("ca.pem")).unwrap();
    place.refused(6, &["issue", "agent", "bob"], "is not a CA's", "ca.pem has to hold");
    place.refused(6, &["issue", "agent", "fred-key"], "its name ends in '-key'", "choose a name");
    assert!(!place.file("agent-bob.pem").exists() && !place.file("agent-bob-key.pem").exists());
}

#[test]
fn s03_nothing_is_issued_beyond_the_validity_of_the_ca() {
    let place = Place::new();
    place.made(&["init", "--valid-for", "10d"]);
    place.refused(6, &["issue", "agent", "fred"], "before the new one would", "--valid-for");
    place.made(&["issue", "agent", "fred", "--valid-for", "9d"]);
    let past = SystemClock.now().saturating_sub(DAY * 20);
    let old = CertificateAuthority::create("example.org", KeyType::P256, DAY, past).unwrap();
    fs::write(place.file("ca.pem"), old.certificate().to_pem().unwrap()).unwrap();
    fs::write(place.file("ca-key.pem"), &*old.key().to_pem().unwrap()).unwrap();
    place.refused(6, &["issue", "agent", "bob", "--valid-for", "1h"], "not valid now", "clock");
}

/// Runs `verify` on a directory with one fault; gives the bad lines with their remedies.
fn bad(place: &Place) -> Vec<(String, String, String)> {
    let ended = place.certs(&["verify", "--json"]);
    assert_eq!((ended.code(), ended.err.as_str()), (6, ""), "{ended:?}");
    let all: Vec<Value> = serde_json::from_str(&ended.out).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let bad = all.iter().filter(|finding| finding["ok"] == false).map(|finding| {
        let file = Path::new(finding["file"].as_str().unwrap()).file_name().unwrap().to_str().unwrap().to_owned();
        (file, text(&finding["message"]), text(&finding["remedy"]))
    });
    bad.collect()
}

#[test]
fn s03_verify_names_each_fault_with_its_file_and_remedy() {
    let now = SystemClock.now();
    let key_of = |place: &Place, name: &str| fs::read(place.file(name)).unwrap();
    let other = Place::filled();
    let expired = |place: &Place| {
        let past = now.saturating_sub(DAY * 40);
        let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * 100, past).unwrap();
        fs::write(place.file("ca.pem"), ca.certificate().to_pem().unwrap()).unwrap();
        fs::write(place.file("ca-key.pem"), &*ca.key().to_pem().unwrap()).unwrap();
        fs::remove_file(place.file("mapper-m1.pem")).unwrap();
        let fred = ca.issue(&agent("fred"), KeyType::P256, DAY, past).unwrap();
        fs::write(place.file("agent-fred.pem"), fred.certificate().to_pem()).unwrap();
        fs::write(place.file("agent-fred-key.pem"), &*fred.key().to_pem().unwrap()).unwrap();
    };
    type Spoil<'a> = Box<dyn Fn(&Place) + 'a>;
    let cases: Vec<(Spoil<'_>, &str, &str, &str)> = vec![
        (Box::new(expired), "agent-fred.pem", "it expired at", "nanite certs issue"),
        (
            Box::new(|p| fs::write(p.file("agent-fred-key.pem"), key_of(&other, "agent-fred-key.pem")).unwrap()),
            "agent-fred-key.pem",
            "does not belong to",
            "issue both anew",
        ),
        (
            Box::new(|p| fs::set_permissions(p.file("agent-fred-key.pem"), Permissions::from_mode(0o644)).unwrap()),
            "agent-fred-key.pem",
            "has mode 0644",
            "chmod 600",
        ),
        (
            Box::new(|p| fs::set_permissions(p.file("ca-key.pem"), Permissions::from_mode(0o660)).unwrap()),
            "ca-key.pem",
            "has mode 0660",
            "chmod 600",
        ),
        (
            Box::new(|p| fs::write(p.file("agent-fred-key.pem"), "nothing").unwrap()),
            "agent-fred-key.pem",
            "not a private key",
            "right file",
        ),
        (
            Box::new(|p| fs::write(p.file("agent-fred.pem"), "nothing").unwrap()),
            "agent-fred.pem",
            "not an X.509 certificate",
            "nanite certs issue agent fred",
        ),
        (
            Box::new(|p| fs::rename(p.file("mapper-m1.pem"), p.file("agent-odd.pem")).unwrap()),
            "agent-odd.pem",
            "holds the certificate of mapper-m1",
            "name the file after mapper-m1",
        ),
        (
            Box::new(|p| fs::rename(p.file("mapper-m1.pem"), p.file("mapper-a.b.pem")).unwrap()),
            "mapper-a.b.pem",
            "not named after",
            "rename",
        ),
    ];
    for (spoil, file, message, remedy) in cases {
        let place = Place::filled();
        assert_eq!(place.certs(&["verify"]).code(), 0);
        spoil(&place);
        let bad = bad(&place);
        let [(at, said, help)] = &bad[..] else { panic!("not one fault: {bad:?}") };
        assert_eq!(at, file, "{bad:?}");
        assert!(said.contains(message) && help.contains(remedy), "{bad:?}");
    }
}

#[test]
fn s03_verify_refuses_what_another_ca_has_issued() {
    let (place, other) = (Place::filled(), Place::filled());
    fs::copy(other.file("ca.pem"), place.file("ca.pem")).unwrap();
    let bad = bad(&place);
    let expected = ["agent-fred.pem", "ca-key.pem", "mapper-m1.pem"];
    let mut files: Vec<_> = bad.iter().map(|(file, ..)| file.as_str()).collect();
    files.sort_unstable();
    assert_eq!(files, expected, "{bad:?}");
    assert!(bad.iter().any(|(_, said, help)| said.contains("not issued by a known CA") && help.contains("ca.pem")));
    // With both CAs in the file, as during a roll-over, both are believed.
    let both = [fs::read(other.file("ca.pem")).unwrap(), {
        place.made(&["init", "--force", "--domain", "example.org"]);
        fs::read(place.file("ca.pem")).unwrap()
    }];
    fs::write(other.file("ca.pem"), both.concat()).unwrap();
    assert_eq!(other.certs(&["verify"]).code(), 0);
    other.made(&["issue", "agent", "bob"]);
    assert!(verified(&other.file("ca.pem"), &other.file("agent-bob.pem")));
}

#[test]
fn s03_verify_of_some_files_looks_at_these() {
    let place = Place::filled();
    fs::set_permissions(place.file("agent-fred-key.pem"), Permissions::from_mode(0o644)).unwrap();
    let mapper = place.file("mapper-m1.pem");
    let said = place.made(&["verify", mapper.to_str().unwrap()]);
    assert_eq!(said.lines().count(), 1, "{said}");
    let key = place.file("agent-fred-key.pem");
    assert_eq!(place.certs(&["verify", key.to_str().unwrap()]).code(), 6);
    place.refused(2, &["verify", "/etc/passwd"], "is no certificate or key file of", "--dir");
}

#[test]
fn s03_no_key_and_no_secret_is_ever_said() {
    let place = Place::new();
    let mut said = String::new();
    for arguments in [
        &["init"][..],
        &["issue", "agent", "fred"],
        &["csr", "agent", "bob"],
        &["list"],
        &["verify"],
        &["issue", "agent", "fred"],
        &["--log", "trace", "verify"],
    ] {
        let ended = place.certs(arguments);
        said.push_str(&ended.out);
        said.push_str(&ended.err);
    }
    for name in place.names().iter().filter(|name| name.ends_with("-key.pem")) {
        for line in fs::read_to_string(place.file(name)).unwrap().lines().filter(|line| !line.starts_with('-')) {
            assert!(!said.contains(line), "a line of {name} is in the output");
        }
    }
    assert!(!said.contains("PRIVATE"), "{said}");
}
