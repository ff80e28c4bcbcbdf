//! `nanite inspect` with messages that `nanite seal` has created, valid and damaged.

use std::sync::Arc;
use std::time::Duration;

use nanite::certs::{CertificateDirectory, DirectoryCertificateStore};
use nanite::clock::{Clock, SystemClock, Timestamp};
use nanite::packet::{Identity, Payload, Request, Token};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, SealRequest, Serializer};
use serde_json::Value;

use crate::harness::program::{Ended, run};
use crate::harness::site::Offline;

fn site() -> Offline {
    Offline::new(&["agent fred", "agent bob", "mapper ctl"])
}

/// A request from ctl to fred.
fn sealed(site: &Offline, payload: &str) -> Vec<u8> {
    let arguments = ["seal", "/simple/echo", payload, "--to", "fred", "--certs", "certs", "--token", "ctl"];
    let output = site.nanite(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// Runs `nanite inspect` on these bytes.
fn inspected(site: &Offline, bytes: &[u8], options: &[&str]) -> Ended {
    std::fs::write(site.path("message"), bytes).unwrap();
    let ended = run(&mut site.nanite(["inspect", "message"].into_iter().chain(options.iter().copied())));
    assert!(!ended.err.contains("panicked"), "{ended:?}");
    ended
}

fn as_json(site: &Offline, bytes: &[u8], options: &[&str]) -> (i32, Value) {
    let options: Vec<_> = options.iter().copied().chain(["--json"]).collect();
    let ended = inspected(site, bytes, &options);
    (ended.code(), serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}")))
}

const FRED: [&str; 4] = ["--certs", "certs", "--token", "fred"];

fn assert_refused(report: &(i32, Value), step: u64, kind: &str) {
    let refused = &report.1["verdict"]["refused"];
    assert_eq!((report.0, refused["step"].as_u64(), &refused["kind"]), (6, Some(step), &kind.into()), "{report:?}");
    assert_eq!(report.1["verdict"]["accepted"], false);
    assert!(refused["remedy"].as_str().unwrap().len() > 20, "{report:?}");
}

#[test]
fn u04_without_certificates_only_unverified_claims_are_shown() {
    let site = site();
    let message = sealed(&site, "secret-payload");
    let (code, report) = as_json(&site, &message, &[]);
    assert_eq!((code, &report["verdict"], &report["opened"]), (0, &Value::Null, &Value::Null));
    let claims = &report["claims"];
    assert_eq!((&claims["verified"], &claims["encrypted"]), (&false.into(), &true.into()));
    assert_eq!((&claims["from"], &claims["to"][0]), (&"mapper-ctl".into(), &"nanite-fred".into()));
    assert_eq!((&claims["kind"], &claims["class"]), (&"request".into(), &"live".into()));
    assert_eq!((&claims["codec"], &claims["recipients"][0]["suite"]), (&"msgpack".into(), &"P-256".into()));
    assert_eq!(claims["recipients"].as_array().unwrap().len(), 1);
    assert_eq!(report["bytes"], message.len());
    let shown = inspected(&site, &message, &[]);
    assert!(shown.out.contains("NOT VERIFIED") && shown.err.contains("nothing of this is verified"), "{shown:?}");
    assert!(!shown.out.contains("secret-payload") && !shown.out.contains("ACCEPTED"), "{shown:?}");
}

#[test]
fn u04_recipient_accepts_and_opens_it_repeatedly() {
    let site = site();
    let message = sealed(&site, r#"{"a": 1}"#);
    for _ in 0..2 {
        let (code, report) = as_json(&site, &message, &FRED);
        assert_eq!((code, &report["verdict"]["accepted"]), (0, &true.into()), "{report}");
        assert_eq!(
            (&report["verdict"]["node"], &report["verdict"]["channel"]),
            (&"nanite-fred".into(), &"agent-inbox".into())
        );
        assert_eq!(report["opened"]["signer"], "mapper-ctl");
        assert!(report["opened"]["packet"].to_string().contains(r#"{"a":1}"#), "{report}");
        assert_eq!(report["claims"]["recipients"][0]["of"], "nanite-fred");
        assert_eq!(report["claims"]["signer"]["of"], "mapper-ctl");
    }
    let shown = inspected(&site, &message, &FRED).out;
    assert!(shown.contains("ACCEPTED by nanite-fred in agent-inbox"), "{shown}");
    assert!(shown.contains("signed by mapper-ctl, VERIFIED"), "{shown}");
    let steps = shown.lines().filter(|line| line.ends_with("  passed")).count();
    assert_eq!(steps, 12, "{shown}");
}

#[test]
fn u04_refusal_names_its_step_and_remedy() {
    let site = site();
    let message = sealed(&site, "hidden");
    let bob = as_json(&site, &message, &["--certs", "certs", "--token", "bob"]);
    assert_refused(&bob, 4, "WrongDestination");
    let moved = as_json(&site, &message, &["--certs", "certs", "--token", "fred", "--channel", "agent-control"]);
    assert_refused(&moved, 4, "WrongDestination");
    let mut changed = message.clone();
    *changed.last_mut().unwrap() ^= 1;
    let changed = as_json(&site, &changed, &FRED);
    assert_refused(&changed, 8, "BadSignature");
    assert_eq!((&changed.1["opened"], &changed.1["claims"]["from"]), (&Value::Null, &"mapper-ctl".into()));
    let other = site.path("other");
    std::fs::create_dir(&other).unwrap();
    for file in ["ca.pem", "agent-fred.pem", "agent-fred-key.pem"] {
        std::fs::copy(site.path("certs").join(file), other.join(file)).unwrap();
    }
    let unknown = inspected(&site, &message, &["--certs", "other", "--token", "fred"]);
    assert_eq!(unknown.code(), 6);
    let lines: Vec<_> = unknown.out.lines().collect();
    let step =
        lines.iter().position(|line| line.contains(" 6 UnknownSigner     REFUSED: no certificate of mapper-ctl"));
    let step = step.unwrap_or_else(|| panic!("{unknown:?}"));
    assert!(lines[step - 1].ends_with("passed") && lines[step + 1].ends_with("not reached"), "{unknown:?}");
    assert!(unknown.out.contains("help: put its sender's certificate into"), "{unknown:?}");
    let no_certificate = inspected(&site, &message, &["--certs", "certs", "--token", "carol"]);
    assert_eq!(no_certificate.code(), 6);
    assert!(
        no_certificate.out.contains("NOT VERIFIED") && no_certificate.err.contains("nanite certs issue agent carol"),
        "{no_certificate:?}"
    );
}

/// A request from ctl to fred that was issued at this time.
fn sealed_at(site: &Offline, at: Timestamp) -> Vec<u8> {
    let directory = CertificateDirectory::new(site.path("certs"));
    let now = SystemClock.now();
    let credentials = directory.credentials(&Identity::mapper("ctl").unwrap(), None, now).unwrap();
    let store = DirectoryCertificateStore::open(directory.path(), now).unwrap();
    let trust = store.trust().unwrap();
    let ctl = SecureSerializer::builder(credentials, Arc::new(store), trust).started_at(at).build().unwrap();
    let mut request = Request::new("/simple/echo".parse().unwrap(), Payload::default());
    request.from = Some(Identity::mapper("ctl").unwrap());
    request.token = Some(Token::random().unwrap());
    let audience = Audience::One(Identity::agent("fred").unwrap());
    ctl.seal(&request.into(), &SealRequest::new(&audience, at)).unwrap().bytes.to_vec()
}

#[test]
fn u04_message_that_was_valid_when_issued_is_recognized() {
    let site = site();
    // Within the validity of the certificates, which are backdated a little.
    let (code, report) =
        as_json(&site, &sealed_at(&site, SystemClock.now().saturating_sub(Duration::from_secs(90))), &FRED);
    assert_refused(&(code, report.clone()), 5, "NotFresh");
    assert_eq!(report["at_issue"]["accepted"], true, "{report}");
    assert_eq!(report["opened"]["signer"], "mapper-ctl");
    let early = sealed_at(&site, SystemClock.now().saturating_add(Duration::from_secs(600)));
    let report = as_json(&site, &early, &FRED);
    assert_refused(&report, 5, "NotFresh");
    assert!(report.1["verdict"]["refused"]["why"].as_str().unwrap().contains("future"), "{report:?}");
}

#[test]
fn u04_arbitrary_bytes_are_refused() {
    let site = site();
    let message = sealed(&site, "x");
    let mut bad: Vec<Vec<u8>> =
        vec![Vec::new(), b"\n".to_vec(), vec![0x30; 70_000], vec![0xff; 9], b"{\"a\": 1}".to_vec()];
    bad.extend((1..message.len()).step_by(message.len() / 8).map(|length| message[..length].to_vec()));
    bad.push([message.as_slice(), &[0]].concat());
    for bytes in &bad {
        assert_refused(&as_json(&site, bytes, &[]), 2, "Malformed");
    }
    assert_refused(&as_json(&site, &vec![0x30; 17 * 1024 * 1024], &FRED), 1, "TooLarge");
    for at in (0..message.len()).step_by(message.len() / 24) {
        let mut changed = message.clone();
        changed[at] ^= 0x10;
        let ended = inspected(&site, &changed, &FRED);
        assert_eq!(ended.code(), 6, "byte {at}: {ended:?}");
    }
    let missing = run(&mut site.nanite(["inspect", "none"]));
    assert_eq!(missing.code(), 2, "{missing:?}");
}

#[test]
fn u04_terminal_control_characters_are_escaped() {
    let site = site();
    let message = sealed(&site, "\u{1b}[2J\u{9b}31m\u{202e}\u{7}");
    for options in [FRED.to_vec(), [FRED.as_slice(), &["--json"]].concat()] {
        let shown = inspected(&site, &message, &options);
        assert_eq!(shown.code(), 0, "{shown:?}");
        assert!(!shown.out.contains(['\u{1b}', '\u{9b}', '\u{202e}', '\u{7}']), "{shown:?}");
        assert!(shown.out.contains("31m"), "{shown:?}");
    }
}
