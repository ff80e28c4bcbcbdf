//! Policy and audit by the program: rules are checked and explained, and an agent follows them.

use std::fs;

use tempfile::TempDir;

use crate::harness::program::{Ended, run};

fn nanite(arguments: &[&str]) -> Ended {
    run(&mut crate::harness::program::nanite(arguments))
}

const RULES: &str = r#"
[[request]]
name = "operators"
callers = ["mapper-*"]
services = ["/work/*"]

[[request]]
name = "light"
callers = ["nanite-*"]
through = ["mapper-main"]
services = ["/work/light"]
selectors = ["rr"]
"#;

#[test]
fn s08_rules_are_checked_and_explained() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("policy.toml");
    fs::write(&file, RULES).unwrap();
    let file = file.to_str().unwrap();
    let checked = nanite(&["policy", "check", file]);
    assert_eq!((checked.code(), checked.out.trim_end().ends_with(": 2 rules")), (0, true), "{checked:?}");
    let explain = |args: &[&str]| nanite(&[&["policy", "explain", "--policy", file], args].concat());
    let allowed = explain(&["mapper-m1", "/work/heavy"]);
    assert_eq!(allowed.code(), 0, "{allowed:?}");
    assert_eq!(allowed.out.lines().next(), Some("allowed by the rule operators"));
    let denied = explain(&["nanite-fred", "/work/light", "--through", "mapper-other"]);
    assert_eq!(denied.code(), 5, "{denied:?}");
    assert_eq!(denied.out.lines().next(), Some("denied: no rule allows it"));
    assert!(denied.out.contains("light  does not match: through, selectors"), "{denied:?}");
    assert_eq!(explain(&["nanite-fred", "/work/light", "--through", "mapper-main", "--selector", "rr"]).code(), 0);
}

#[test]
fn s08_an_unclear_or_missing_policy_stops_the_node() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("policy.toml");
    fs::write(&file, "[[request]]\ncallers = []\nservices = [\"*\"]\n").unwrap();
    let unclear = nanite(&["policy", "check", file.to_str().unwrap()]);
    assert_eq!(unclear.code(), 2, "{unclear:?}");
    assert!(unclear.err.contains("an empty list"), "{unclear:?}");
    let missing = dir.path().join("none.toml");
    let missing = nanite(&["policy", "check", missing.to_str().unwrap()]);
    assert_eq!(missing.code(), 2, "{missing:?}");
    assert!(missing.err.contains("cannot read the policy"), "{missing:?}");
}

#[test]
fn s09_a_log_is_verified_by_the_program() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("audit.log");
    let path = file.to_str().unwrap();
    assert_eq!(nanite(&["audit", "verify", path]).code(), 6, "there is none");
    let line = r#"{"seq":2,"prev":"00","verdict":"refused"}"#;
    fs::write(&file, format!("{line}\n{line}\n")).unwrap();
    let broken = nanite(&["audit", "verify", path, "--json"]);
    assert_eq!(broken.code(), 6, "{broken:?}");
    let report: serde_json::Value = serde_json::from_str(&broken.out).unwrap();
    assert_eq!(report["problems"].as_array().unwrap().len(), 2, "{report}");
}
