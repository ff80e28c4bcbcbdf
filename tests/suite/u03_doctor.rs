//! `nanite doctor`: one thing is broken at a time, and the line that says so is looked for, with what mends it.

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

const PATIENT: [&str; 2] = ["--timeout", "30s"];

/// What the doctor says of a node: the exit code and its findings.
fn doctor(site: &Site, options: &[&str]) -> (i32, Value) {
    let arguments = ["doctor", "--json"].into_iter().chain(options.iter().copied());
    parsed(&run(&mut site.nanite(arguments)))
}

fn parsed(ended: &Ended) -> (i32, Value) {
    let report: Value = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    assert_eq!(report["ok"], ended.code() == 0, "{report}");
    (ended.code(), report)
}

/// The findings of one check.
fn of<'a>(report: &'a Value, check: &str) -> Vec<&'a Value> {
    report["checks"].as_array().unwrap().iter().filter(|finding| finding["check"] == check).collect()
}

/// The exit code is this, and a finding of this check says this and knows this remedy.
fn assert_says(got: &(i32, Value), code: i32, check: &str, state: &str, message: &str, remedy: &str) {
    let (exit, report) = got;
    let contains = |value: &Value, part: &str| value.as_str().unwrap_or_default().contains(part);
    let said = of(report, check).iter().any(|finding| {
        finding["state"] == state && contains(&finding["message"], message) && contains(&finding["remedy"], remedy)
    });
    assert!(
        said && *exit == code,
        "no {check} {state} {message:?} {remedy:?} with exit code {code} in {exit}: {report:#}"
    );
}

const FRED: [&str; 2] = ["--token", "fred"];

#[test]
fn u03_a_sound_system_has_no_failure() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let _fred = site.start(&["agent", "--token", "fred"]);
    let mapper = doctor(&site, &["--token", "ctl", PATIENT[0], PATIENT[1]]);
    assert_eq!((mapper.0, &mapper.1["node"]), (0, &"mapper-ctl".into()), "{:#}", mapper.1);
    for check in ["directory", "ca", "clock", "key", "certificate", "chain", "expiry", "protection", "broker", "queues"]
    {
        assert_says(&mapper, 0, check, "ok", "", "");
    }
    assert_says(&mapper, 0, "agents", "ok", "1 agent here", "");
    assert_says(&mapper, 0, "round trip", "ok", "nanite-fred answers within", "");
    assert_says(&mapper, 0, "ca key", "warn", "ca-key.pem is on this machine", "keep it where certificates are issued");
    let agent = doctor(&site, &FRED);
    assert_eq!((agent.0, &agent.1["node"]), (0, &"nanite-fred".into()), "{:#}", agent.1);
    assert_says(&agent, 0, "round trip", "ok", "through the broker and back", "");
    let shown = site.run(&["doctor", "--token", "fred"]);
    assert_eq!(shown.code(), 0);
    assert!(shown.out.contains("ok    chain         leads to the CA\n"), "{}", shown.out);
    assert!(shown.err.contains("0 failures, 1 warning"), "{}", shown.err);
}

#[test]
fn u03_what_is_wrong_with_the_files_is_said_and_the_rest_is_checked_all_the_same() {
    let site = Site::new(&["agent fred", "agent bob"]);
    let certs = |name: &str| site.path(&format!("certs/{name}"));
    let look = || doctor(&site, &FRED);
    let copy = |from: &str, to: &str| std::fs::copy(certs(from), certs(to)).map(|_| ()).unwrap();
    std::fs::create_dir(site.path("aside")).unwrap();
    let kept = |name: &str| site.path(&format!("aside/{name}"));
    for name in ["agent-fred.pem", "agent-fred-key.pem", "ca.pem"] {
        std::fs::copy(certs(name), kept(name)).unwrap();
    }
    let mend = || {
        for name in ["agent-fred.pem", "agent-fred-key.pem", "ca.pem"] {
            std::fs::copy(kept(name), certs(name)).unwrap();
        }
        site.mode("certs/agent-fred-key.pem", 0o600);
    };

    site.mode("certs/agent-fred-key.pem", 0o640);
    let wide = look();
    assert_says(&wide, 6, "key", "fail", "mode 0640", "chmod 600 ");
    assert_says(&wide, 6, "broker", "ok", "takes the user", "");
    mend();
    std::fs::remove_file(certs("agent-fred-key.pem")).unwrap();
    assert_says(&look(), 6, "key", "fail", "there is no key for nanite-fred", "nanite certs issue agent fred");
    mend();
    std::fs::remove_file(certs("agent-fred.pem")).unwrap();
    assert_says(
        &look(),
        6,
        "certificate",
        "fail",
        "there is no certificate for nanite-fred",
        "nanite certs issue agent fred",
    );
    mend();
    copy("agent-bob-key.pem", "agent-fred-key.pem");
    assert_says(&look(), 6, "certificate", "fail", "is not the key of", "nanite certs issue agent fred");
    mend();
    copy("agent-bob.pem", "agent-fred.pem");
    assert_says(
        &look(),
        6,
        "certificate",
        "fail",
        "holds the certificate of nanite-bob",
        "name the file after nanite-bob",
    );
    mend();
    std::fs::write(certs("agent-fred.pem"), "rubbish").unwrap();
    assert_says(&look(), 6, "certificate", "fail", "agent-fred.pem", "nanite certs issue agent fred");
    mend();
    std::fs::remove_file(certs("ca.pem")).unwrap();
    assert_says(&look(), 6, "ca", "fail", "there is no CA certificate", "copy ca.pem");
    mend();
    site.ok(&["certs", "init", "--dir", "others"]);
    std::fs::copy(site.path("others/ca.pem"), certs("ca.pem")).unwrap();
    assert_says(&look(), 6, "chain", "fail", "not issued by a known CA", "add its CA to ca.pem");
    mend();
    site.mode("certs", 0o777);
    assert_says(&look(), 6, "directory", "fail", "mode 0777", "chmod go-w certs");
    site.mode("certs", 0o700);
    site.mode("certs/ca-key.pem", 0o644);
    assert_says(&look(), 6, "ca key", "fail", "mode 0644", "chmod 600 ");
    site.mode("certs/ca-key.pem", 0o600);
    std::fs::write(certs("agent-carol.pem"), "rubbish").unwrap();
    assert_says(&look(), 0, "peers", "warn", "agent-carol.pem", "nanite certs verify");
    std::fs::remove_file(certs("agent-carol.pem")).unwrap();

    let nobody = doctor(&site, &["--token", "nobody"]);
    assert_says(
        &nobody,
        6,
        "identity",
        "fail",
        "nothing for an agent or mapper nobody",
        "nanite certs issue agent nobody",
    );
    assert_says(&doctor(&site, &[]), 2, "identity", "fail", "nanite-bob, nanite-fred", "--token NAME");
    let nowhere = doctor(&site, &["--certs", "nowhere"]);
    assert_says(&nowhere, 6, "identity", "fail", "no directory nowhere", "nanite certs init --dir nowhere");
    let unsaid = run(&mut site.bare(["doctor"]));
    assert_eq!(unsaid.code(), 2, "{unsaid:?}");
    assert!(unsaid.err.contains("--certs DIR"), "{unsaid:?}");
    assert_eq!(look().0, 0, "all is mended");
}

/// Writes the certificates of a CA and of fred that began at one moment, fred's valid for so long.
fn written(site: &Site, began: Timestamp, ca_for: Duration, fred_for: Duration) {
    let ca = CertificateAuthority::create("example.org", KeyType::P256, ca_for, began).unwrap();
    let fred = ca.issue(&Identity::agent("fred").unwrap(), KeyType::P256, fred_for, began).unwrap();
    let directory = CertificateDirectory::new(site.path("certs"));
    std::fs::write(directory.ca_path(), ca.certificate().to_pem().unwrap()).unwrap();
    let identity = Identity::agent("fred").unwrap();
    std::fs::write(directory.certificate_path(&identity).unwrap(), fred.certificate().to_pem()).unwrap();
    let pem = PrivateKey::to_pem(fred.key()).unwrap();
    std::fs::write(directory.key_path(&identity).unwrap(), &*pem).unwrap();
    site.mode("certs/agent-fred-key.pem", 0o600);
}

const DAY: Duration = Duration::from_secs(86_400);

#[test]
fn u03_time_runs_out_for_certificates_lists_and_clocks() {
    let site = Site::new(&["agent fred"]);
    let now = SystemClock.now();
    let ago = |days: u32| now.saturating_sub(DAY * days);
    written(&site, ago(29), DAY * 300, DAY * 30);
    assert_says(
        &doctor(&site, &FRED),
        0,
        "expiry",
        "warn",
        "the certificate expires at 20",
        "nanite certs renew agent fred",
    );
    written(&site, ago(31), DAY * 300, DAY * 30);
    assert_says(&doctor(&site, &FRED), 6, "certificate", "fail", "expired at 20", "nanite certs issue agent fred");
    written(&site, ago(10), DAY * 30, DAY * 20);
    assert_says(&doctor(&site, &FRED), 0, "ca", "warn", "expires at 20", "nanite certs init");
    written(&site, ago(40), DAY * 30, DAY * 20);
    assert_says(&doctor(&site, &FRED), 6, "ca", "fail", "expired at 20", "nanite certs init");
    written(&site, now.saturating_add(DAY), DAY * 30, DAY * 20);
    assert_says(&doctor(&site, &FRED), 6, "clock", "fail", "before the CA was made", "timedatectl");

    written(&site, ago(1), DAY * 300, DAY * 20);
    assert_says(&doctor(&site, &FRED), 0, "revocation", "ok", "nothing is checked for revocation", "");
    let ca = Forge::ca("lists").valid(ago(2), now.saturating_add(DAY)).set(Nid::NAME_CONSTRAINTS, "").self_signed();
    for (until, state, says) in [
        (now.saturating_sub(Duration::from_secs(60)), "fail", "out of date since"),
        (now.saturating_add(Duration::from_secs(3600)), "warn", "and everybody is refused then"),
        (now.saturating_add(DAY * 3), "ok", "current until"),
    ] {
        std::fs::write(site.path("certs/crl.pem"), ca.crl(&[], ago(1), until).to_pem().unwrap()).unwrap();
        let got = doctor(&site, &FRED);
        // The list is another CA's: so the chain fails in any case.
        assert_says(&got, 6, "chain", "fail", "no revocation list of its issuer", "nanite certs crl");
        assert_says(&got, 6, "revocation", state, says, if state == "ok" { "" } else { "nanite certs crl" });
    }
    std::fs::write(site.path("certs/crl.pem"), "rubbish").unwrap();
    assert_says(&doctor(&site, &FRED), 6, "revocation", "fail", "no revocation list in PEM", "nanite certs crl");
}

#[test]
fn u03_what_is_wrong_at_the_broker_is_said() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let at = |url: &str, options: &[&str]| {
        let arguments = ["doctor", "--json"].into_iter().chain(options.iter().copied());
        parsed(&run(site.nanite(arguments).env("NANITE_BROKER", url)))
    };
    let user = site.broker.add_user("pass");
    let closed = at("amqp://guest:guest@127.0.0.1:1/", &FRED);
    assert_says(&closed, 7, "broker", "fail", "broker unreachable", "is RabbitMQ running there?");
    let wrong = at(&site.broker.url_for(&user, "wrong-pass"), &FRED);
    assert_says(&wrong, 7, "broker", "fail", "refused the user name or password", "NANITE_BROKER_PASSWORD");
    assert!(!wrong.1.to_string().contains("wrong-pass"), "{}", wrong.1);
    let outside = at(&site.broker.url_for(&user, "pass"), &FRED);
    assert_says(&outside, 7, "broker", "fail", "refused the virtual host", "rabbitmqctl set_permissions");
    site.broker.permit(&user, "^$", "^$", "^$");
    let powerless = at(&site.broker.url_for(&user, "pass"), &FRED);
    assert_says(&powerless, 7, "queues", "fail", "refused", "rabbitmqctl set_permissions");
    let mapper = at(&site.broker.url_for(&user, "pass"), &["--token", "ctl"]);
    assert_says(&mapper, 7, "queues", "fail", "refused", "rabbitmqctl set_permissions");
    let far = at("amqp://192.0.2.1:1/", &FRED);
    assert_says(&far, 7, "protection", "warn", "plain TCP shows the password", "--broker amqps://");

    site.mode("certs/agent-fred-key.pem", 0o644);
    let both = at("amqp://guest:guest@127.0.0.1:1/", &FRED);
    assert_says(&both, 6, "key", "fail", "mode 0644", "chmod 600");
    assert_says(&both, 6, "broker", "fail", "broker unreachable", "");
}

#[test]
fn u03_who_is_silent_and_what_waits_is_said() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    let alone = doctor(&site, &["--token", "ctl", "--timeout", "500ms"]);
    assert_says(&alone, 0, "agents", "warn", "none has registered", "nanite agent");
    let fred = site.start(&["agent", "--token", "fred"]);
    // One that runs and does nothing, as on a machine that hangs.
    fred.signal(Signal::SIGSTOP);
    let silent = doctor(&site, &["--token", "ctl", "--timeout", "500ms"]);
    assert_says(&silent, 0, "agents", "warn", "none has registered", "nanite agent");
    fred.signal(Signal::SIGCONT);

    site.ok(&["push", "/nobody/offers", "--offline", "--look", "300ms"]);
    let waiting = doctor(&site, &["--token", "ctl", PATIENT[0], PATIENT[1]]);
    assert_says(&waiting, 0, "waiting", "warn", "1 message in mapper-offline", "nanite mapper");
}

#[test]
fn u03_rules_and_the_audit_log_are_looked_at() {
    let site = Site::new(&["agent fred"]);
    let with = |options: &[&str]| doctor(&site, &[&FRED, options].concat());
    assert_says(&with(&["--policy", "none.toml"]), 6, "policy", "fail", "none.toml", "make the file readable");
    site.write("bad.toml", "nonsense = 1\n", 0o600);
    assert_says(&with(&["--policy", "bad.toml"]), 6, "policy", "fail", "bad.toml", "policy.md");
    site.write("empty.toml", "", 0o600);
    assert_says(&with(&["--policy", "empty.toml"]), 0, "policy", "warn", "denies everything", "nanite policy explain");
    assert_says(&with(&["--audit", "audit.log"]), 0, "audit", "ok", "not there yet", "");
    assert_says(&with(&["--audit", "nowhere/audit.log"]), 6, "audit", "fail", "is not there", "mkdir -p nowhere");
    site.write("audit.log", "{\"rubbish\": 1}\n", 0o600);
    assert_says(&with(&["--audit", "audit.log"]), 6, "audit", "fail", "audit.log", "nanite audit verify");
}
