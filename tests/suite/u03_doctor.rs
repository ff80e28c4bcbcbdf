//! `nanite doctor`: each test breaks something, and looks for the finding and its remedy.

use std::process::Command;
use std::time::Duration;

use nanite::certs::{CertificateAuthority, CertificateDirectory, KeyType, PrivateKey};
use nanite::clock::{Clock, SystemClock, Timestamp};
use nanite::packet::Identity;
use nix::sys::signal::Signal;
use openssl::nid::Nid;
use serde_json::Value;

use crate::harness::forge::Forge;
use crate::harness::program::{Ended, run};
use crate::harness::site::Site;

const FRED: [&str; 2] = ["--token", "fred"];
const CTL: [&str; 4] = ["--token", "ctl", "--timeout", "30s"];

/// A report of `nanite doctor`, with its exit code.
struct Report(i32, Value);

fn doctor(site: &Site, options: &[&str]) -> Report {
    Report::parse(&run(&mut site.nanite(["doctor", "--json"].iter().chain(options))))
}

impl Report {
    fn parse(ended: &Ended) -> Self {
        let report: Value = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
        assert_eq!(report["ok"], ended.code() == 0, "{report}");
        Self(ended.code(), report)
    }

    /// Asserts the exit code, and that there is a finding of this check with this state, message and remedy.
    fn assert(&self, code: i32, check: &str, state: &str, message: &str, remedy: &str) {
        let contains = |value: &Value, part: &str| value.as_str().unwrap_or_default().contains(part);
        let found = self.1["checks"].as_array().unwrap().iter().any(|finding| {
            (&finding["check"], &finding["state"]) == (&check.into(), &state.into())
                && contains(&finding["message"], message)
                && contains(&finding["remedy"], remedy)
        });
        assert!(
            found && self.0 == code,
            "no {check} {state} {message:?} {remedy:?} with exit code {code} in {}: {:#}",
            self.0,
            self.1
        );
    }
}

#[test]
fn u03_correct_system_has_no_failures() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let _fred = site.start(&["agent", "--token", "fred"]);
    let mapper = doctor(&site, &CTL);
    assert_eq!((mapper.0, &mapper.1["node"]), (0, &"mapper-ctl".into()), "{:#}", mapper.1);
    for check in "directory ca clock key certificate chain expiry protection broker queues".split(' ') {
        mapper.assert(0, check, "ok", "", "");
    }
    mapper.assert(0, "agents", "ok", "1 agent registered", "");
    mapper.assert(0, "round trip", "ok", "nanite-fred answers within", "");
    mapper.assert(0, "ca key", "warn", "ca-key.pem is on this machine", "keep it only where certificates are issued");
    let agent = doctor(&site, &FRED);
    assert_eq!((agent.0, &agent.1["node"]), (0, &"nanite-fred".into()), "{:#}", agent.1);
    agent.assert(0, "round trip", "ok", "through the broker and back", "");
    let shown = site.run(&["doctor", "--token", "fred"]);
    assert_eq!(shown.code(), 0);
    assert!(shown.out.contains("ok    chain         leads to the CA\n"), "{}", shown.out);
    assert!(shown.err.contains("0 failures, 1 warning"), "{}", shown.err);
}

#[test]
fn u03_each_fault_of_the_files_is_reported_and_other_checks_go_on() {
    let site = Site::new(&["agent fred", "agent bob"]);
    site.ok(&["certs", "init", "--dir", "others"]);
    let shell = |command: &str| {
        let status = Command::new("sh").args(["-c", command]).current_dir(site.dir()).status();
        assert!(status.unwrap().success(), "{command}");
    };
    shell("cp -a certs saved");
    let issue_fred = "nanite certs issue agent fred";
    for (command, code, check, state, message, remedy) in [
        ("chmod 640 agent-fred-key.pem", 6, "key", "fail", "mode 0640", "chmod 600 "),
        ("rm agent-fred-key.pem", 6, "key", "fail", "there is no key for nanite-fred", issue_fred),
        ("rm agent-fred.pem", 6, "certificate", "fail", "there is no certificate for nanite-fred", issue_fred),
        ("cp agent-bob-key.pem agent-fred-key.pem", 6, "certificate", "fail", "is not the key of", issue_fred),
        (
            "cp agent-bob.pem agent-fred.pem",
            6,
            "certificate",
            "fail",
            "of nanite-bob",
            "name the file after nanite-bob",
        ),
        ("echo rubbish > agent-fred.pem", 6, "certificate", "fail", "agent-fred.pem", issue_fred),
        ("rm ca.pem", 6, "ca", "fail", "there is no CA certificate", "copy ca.pem"),
        ("cp ../others/ca.pem ca.pem", 6, "chain", "fail", "not issued by a known CA", "add its CA to ca.pem"),
        ("chmod 777 .", 6, "directory", "fail", "mode 0777", "chmod go-w certs"),
        ("chmod 644 ca-key.pem", 6, "ca key", "fail", "mode 0644", "chmod 600 "),
        ("echo rubbish > agent-carol.pem", 0, "peers", "warn", "agent-carol.pem", "nanite certs verify"),
    ] {
        shell(&format!("cd certs && {command}"));
        let report = doctor(&site, &FRED);
        report.assert(code, check, state, message, remedy);
        report.assert(code, "broker", "ok", "accepts the user", "");
        shell("rm -r certs && cp -a saved certs");
    }
    let unknown = doctor(&site, &["--token", "carol"]);
    unknown.assert(6, "identity", "fail", "no files of an agent or mapper carol", "nanite certs issue agent carol");
    doctor(&site, &[]).assert(2, "identity", "fail", "nanite-bob, nanite-fred", "--token NAME");
    let missing = doctor(&site, &["--certs", "nowhere"]);
    missing.assert(6, "identity", "fail", "no directory nowhere", "nanite certs init --dir nowhere");
    let unnamed = run(&mut site.unconfigured(["doctor"]));
    assert!(unnamed.code() == 2 && unnamed.err.contains("--certs DIR"), "{unnamed:?}");
    assert_eq!(doctor(&site, &FRED).0, 0, "without a fault");
}

/// Writes certificates of a CA and of fred with this begin, and runs the doctor.
fn doctor_with(site: &Site, begin: Timestamp, ca_days: u32, fred_days: u32) -> Report {
    let ca = CertificateAuthority::create("example.org", KeyType::P256, DAY * ca_days, begin).unwrap();
    let identity = Identity::agent("fred").unwrap();
    let fred = ca.issue(&identity, KeyType::P256, DAY * fred_days, begin).unwrap();
    let directory = CertificateDirectory::new(site.path("certs"));
    std::fs::write(directory.ca_path(), ca.certificate().to_pem().unwrap()).unwrap();
    std::fs::write(directory.certificate_path(&identity).unwrap(), fred.certificate().to_pem()).unwrap();
    let pem = PrivateKey::to_pem(fred.key()).unwrap();
    std::fs::write(directory.key_path(&identity).unwrap(), &*pem).unwrap();
    site.mode("certs/agent-fred-key.pem", 0o600);
    doctor(site, &FRED)
}

const DAY: Duration = Duration::from_secs(86_400);

#[test]
fn u03_expiry_and_clock_errors_are_reported() {
    let site = Site::new(&["agent fred"]);
    let now = SystemClock.now();
    let ago = |days: u32| now.saturating_sub(DAY * days);
    let tomorrow = now.saturating_add(DAY);
    for (begin, ca_days, fred_days, code, check, state, message, remedy) in [
        (ago(29), 300, 30, 0, "expiry", "warn", "the certificate expires at 20", "nanite certs renew agent fred"),
        (ago(31), 300, 30, 6, "certificate", "fail", "expired at 20", "nanite certs issue agent fred"),
        (ago(10), 30, 20, 0, "ca", "warn", "expires soon", "nanite certs init"),
        (ago(40), 30, 20, 6, "ca", "fail", "expired at 20", "create a new CA"),
        (tomorrow, 30, 20, 6, "clock", "fail", "before the CA was created", "timedatectl"),
        (ago(1), 300, 20, 0, "revocation", "ok", "nothing is checked for revocation", ""),
    ] {
        doctor_with(&site, begin, ca_days, fred_days).assert(code, check, state, message, remedy);
    }
    let ca = Forge::ca("lists").valid(ago(2), tomorrow).set(Nid::NAME_CONSTRAINTS, "").self_signed();
    for (next_update, state, message) in [
        (now.saturating_sub(Duration::from_secs(60)), "fail", "is out of date"),
        (now.saturating_add(Duration::from_secs(3600)), "warn", "all certificates are refused then"),
        (now.saturating_add(DAY * 3), "ok", "valid until 20"),
    ] {
        std::fs::write(site.path("certs/crl.pem"), ca.crl(&[], ago(1), next_update).to_pem().unwrap()).unwrap();
        let report = doctor(&site, &FRED);
        // The list is another CA's, so the chain fails as well.
        report.assert(6, "chain", "fail", "no revocation list of its issuer", "nanite certs crl");
        report.assert(6, "revocation", state, message, if state == "ok" { "" } else { "nanite certs crl" });
    }
    std::fs::write(site.path("certs/crl.pem"), "rubbish").unwrap();
    doctor(&site, &FRED).assert(6, "revocation", "fail", "no revocation list in PEM", "nanite certs crl");
}

#[test]
fn u03_ca_for_other_purposes_is_reported() {
    let site = Site::new(&["agent fred"]);
    let now = SystemClock.now();
    let ca = Forge::ca("servers").valid(now.saturating_sub(DAY), now.saturating_add(DAY * 90));
    let ca = ca.set(Nid::EXT_KEY_USAGE, "serverAuth").self_signed();
    std::fs::write(site.path("certs/ca.pem"), ca.x509.to_pem().unwrap()).unwrap();
    doctor(&site, &FRED).assert(6, "ca", "fail", "limited to other purposes", "nanite certs init");
}

#[test]
fn u03_broker_errors_are_reported() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let doctor_at = |url: &str, options: &[&str]| {
        let arguments = ["doctor", "--json"].iter().chain(options);
        Report::parse(&run(site.nanite(arguments).env("NANITE_BROKER", url)))
    };
    let user = site.broker.add_user("pass");
    let url = site.broker.url_for(&user, "pass");
    let closed = "amqp://guest:guest@127.0.0.1:1/";
    doctor_at(closed, &FRED).assert(7, "broker", "fail", "broker unreachable", "is RabbitMQ running there?");
    let wrong = doctor_at(&site.broker.url_for(&user, "wrong-pass"), &FRED);
    wrong.assert(7, "broker", "fail", "refused the user name or password", "NANITE_BROKER_PASSWORD");
    assert!(!wrong.1.to_string().contains("wrong-pass"), "{}", wrong.1);
    let set_permissions = "rabbitmqctl set_permissions";
    doctor_at(&url, &FRED).assert(7, "broker", "fail", "refused the virtual host", set_permissions);
    site.broker.permit(&user, "^$", "^$", "^$");
    doctor_at(&url, &FRED).assert(7, "queues", "fail", "refused", set_permissions);
    doctor_at(&url, &["--token", "ctl"]).assert(7, "queues", "fail", "refused", set_permissions);
    let remote = doctor_at("amqp://192.0.2.1:1/", &FRED);
    remote.assert(7, "protection", "warn", "plain TCP shows the password", "--broker amqps://");

    site.mode("certs/agent-fred-key.pem", 0o644);
    let both = doctor_at(closed, &FRED);
    both.assert(6, "key", "fail", "mode 0644", "chmod 600");
    both.assert(6, "broker", "fail", "broker unreachable", "");
}

#[test]
fn u03_silent_agents_and_waiting_messages_are_reported() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let impatient = ["--token", "ctl", "--timeout", "500ms"];
    doctor(&site, &impatient).assert(0, "agents", "warn", "no agent has registered", "nanite agent");
    let fred = site.start(&["agent", "--token", "fred"]);
    // A process that is running but does nothing, as on a machine that hangs.
    fred.signal(Signal::SIGSTOP);
    doctor(&site, &impatient).assert(0, "agents", "warn", "no agent has registered", "nanite agent");
    fred.signal(Signal::SIGCONT);

    site.ok(&["push", "/not/offered", "--offline", "--look", "300ms"]);
    doctor(&site, &CTL).assert(0, "waiting", "warn", "1 message in mapper-offline", "nanite mapper");
}

#[test]
fn u03_policy_and_audit_log_are_checked() {
    let site = Site::new(&["agent fred"]);
    site.write("bad.toml", "nonsense = 1\n", 0o600);
    site.write("empty.toml", "", 0o600);
    site.write("rubbish.log", "{\"rubbish\": 1}\n", 0o600);
    for (option, file, code, state, message, remedy) in [
        ("--policy", "none.toml", 6, "fail", "none.toml", "make the file readable"),
        ("--policy", "bad.toml", 6, "fail", "bad.toml", "policy.md"),
        ("--policy", "empty.toml", 0, "warn", "denies everything", "nanite policy explain"),
        ("--audit", "audit.log", 0, "ok", "does not exist yet", ""),
        ("--audit", "nowhere/audit.log", 6, "fail", "does not exist", "mkdir -p nowhere"),
        ("--audit", "rubbish.log", 6, "fail", "rubbish.log", "nanite audit verify"),
    ] {
        let report = doctor(&site, &["--token", "fred", option, file]);
        report.assert(code, option.trim_start_matches('-'), state, message, remedy);
    }
    let shown = site.run(&["doctor", "--token", "fred", "--policy", "bad.toml"]).out;
    assert!(shown.contains("| ^^^^^^^^\n") && !shown.contains("\\n"), "{shown}");
}
