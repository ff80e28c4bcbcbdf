//! Policy files: rules for registrations and files, roles and limits, and `nanite policy`, which checks and explains rules.

use std::fs;

use nanite::packet::{Identity, Payload, Register, Request, Service, Tag};
use nanite::policy::{Caller, Decision, FileTransfer, Pattern, Policy, PolicyError, Rules};
use tempfile::TempDir;

use crate::harness::pki::{agent, mapper};
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

const REGISTER: &str = r#"
[[register]]
name = "workers"
agents = ["nanite-w*"]
services = ["/work/*", "/agent/echo"]
tags = ["eu", "gpu-*"]
files = ["photos"]
"#;

fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

fn register(agent: &str, services: &[&str], tags: &[&str], files: &[&str]) -> Register {
    let services: Vec<Service> = services.iter().map(|s| s.parse().unwrap()).collect();
    let tag = |text: &&str| -> Tag { text.parse().unwrap() };
    Register::new(id(agent), services)
        .with_tags(tags.iter().map(tag).collect::<Vec<_>>())
        .with_files(files.iter().map(tag).collect::<Vec<_>>())
}

#[test]
fn s08_registration_must_be_allowed_by_a_single_rule() {
    let rules = Rules::from_toml(REGISTER).unwrap();
    let decide = |register: &Register| rules.authorize_registration(&Caller::new(&register.identity, None), register);
    let good = register("nanite-w1", &["/work/a", "/agent/echo"], &["eu", "gpu-1"], &["photos"]);
    assert_eq!(decide(&good), Decision::allow().by_rule("workers"));
    assert_eq!(decide(&register("nanite-w1", &[], &[], &[])), Decision::allow().by_rule("workers"), "an unregister");
    for bad in [
        register("nanite-x1", &["/work/a"], &[], &[]),
        register("nanite-w1", &["/work/a", "/root/do"], &[], &[]),
        register("nanite-w1", &["/work/a"], &["us"], &[]),
        register("nanite-w1", &["/work/a"], &[], &["music"]),
    ] {
        assert_eq!(decide(&bad), Decision::denied(), "{bad:?}");
    }
}

#[test]
fn s08_file_rules_match_sender_domain_name_size_and_replacement() {
    let text = r#"
        [[file]]
        name = "pictures"
        senders = ["mapper-desk"]
        domains = ["photos"]
        names = ["*.jpg"]
        max_bytes = 100

        [[file]]
        senders = ["mapper-*"]
        domains = ["drop-*"]
        replace = true
    "#;
    let rules = Rules::from_toml(text).unwrap();
    assert_eq!(rules.names(), ["pictures", "file-2"]);
    let decide = |sender: &str, domain: &str, name: &str, size: u64, replaces: bool| {
        let (sender, domain): (Identity, Tag) = (id(sender), domain.parse().unwrap());
        let file = FileTransfer::new(&domain, name, size).replaces(replaces);
        rules.authorize_file(&Caller::new(&sender, None), &file)
    };
    assert_eq!(decide("mapper-desk", "photos", "a.jpg", 100, false), Decision::allow().by_rule("pictures"));
    assert_eq!(decide("mapper-other", "drop-1", "x", 1 << 40, true), Decision::allow().by_rule("file-2"));
    for (sender, domain, name, size, replaces) in [
        ("mapper-other", "photos", "a.jpg", 100, false),
        ("mapper-desk", "music", "a.jpg", 100, false),
        ("mapper-desk", "photos", "a.png", 100, false),
        ("mapper-desk", "photos", "a.jpg", 101, false),
        ("mapper-desk", "photos", "a.jpg", 100, true),
    ] {
        let decision = decide(sender, domain, name, size, replaces);
        assert_eq!(decision, Decision::denied(), "{sender} {domain} {name} {size} {replaces}");
    }
    for invalid in [
        "[[file]]\nsenders = [\"*\"]",
        "[[file]]\ndomains = [\"*\"]",
        "[[file]]\nsenders = [\"*\"]\ndomains = []",
        "[[file]]\nsenders = [\"*\"]\ndomains = [\"*\"]\nnames = []",
        "[[file]]\nsenders = [\"*\"]\ndomains = [\"*\"]\nmax_bytes = -1",
        "[[file]]\nsenders = [\"*\"]\ndomains = [\"*\"]\nreplaces = true",
    ] {
        assert!(matches!(Rules::from_toml(invalid), Err(PolicyError::Invalid(_))), "{invalid}");
    }
}

#[test]
fn s08_nanite_policy_checks_and_explains_rules() {
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
fn s08_invalid_or_missing_policy_is_a_usage_error() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("policy.toml");
    fs::write(&file, "[[request]]\ncallers = []\nservices = [\"*\"]\n").unwrap();
    let invalid = nanite(&["policy", "check", file.to_str().unwrap()]);
    assert_eq!(invalid.code(), 2, "{invalid:?}");
    assert!(invalid.err.contains("an empty list"), "{invalid:?}");
    let missing = dir.path().join("none.toml");
    let missing = nanite(&["policy", "check", missing.to_str().unwrap()]);
    assert_eq!(missing.code(), 2, "{missing:?}");
    assert!(missing.err.contains("cannot read the policy"), "{missing:?}");
}

#[test]
fn s08_request_rule_is_for_its_roles_only() {
    let (desk, boss) = (mapper("desk"), agent("boss"));
    let asks = Request::new("/work/light".parse().unwrap(), Payload::default());
    for (roles, mapper_may, agent_may) in [
        ("", true, true),
        ("roles = [\"mapper\"]", true, false),
        ("roles = [\"agent\"]", false, true),
        ("roles = [\"agent\", \"mapper\"]", true, true),
    ] {
        let rules = format!("[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\n{roles}");
        let rules = Rules::from_toml(&rules).unwrap();
        // The role that counts is that of the caller, not that of the mapper which passes the request on.
        let through = Caller::new(&desk, None).on_behalf_of(&boss);
        for (caller, may) in
            [(Caller::new(&desk, None), mapper_may), (Caller::new(&boss, None), agent_may), (through, agent_may)]
        {
            let expected = if may { Decision::allow().by_rule("request-1") } else { Decision::denied() };
            assert_eq!(rules.authorize_request(&caller, &asks), expected, "{roles:?} {caller:?}");
            let mismatches: &[&str] = if may { &[] } else { &["roles"] };
            assert_eq!(rules.explain(&caller, &asks)[0].mismatches, mismatches, "{roles:?} {caller:?}");
        }
    }
    let empty = "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\nroles = []";
    assert!(matches!(Rules::from_toml(empty), Err(PolicyError::Invalid(why)) if why.contains("an empty list")));
}

#[test]
fn s08_policy_is_limited_in_rules_patterns_and_length() {
    let rule = |kind: &str, who: &str| format!("[[{kind}]]\n{who} = [\"*\"]\nservices = [\"*\"]\n");
    let (register, request) = (rule("register", "agents"), rule("request", "callers"));
    for (registers, requests) in [(4096, 0), (0, 4096), (4096 / 2, 4096 / 2)] {
        let most = register.repeat(registers) + &request.repeat(requests);
        assert_eq!(Rules::from_toml(&most).unwrap().names().len(), 4096);
        for one_more in [&register, &request] {
            let refused = Rules::from_toml(&(most.clone() + one_more));
            let told = matches!(&refused, Err(PolicyError::Invalid(why)) if why == "more than 4096 rules");
            assert!(told, "{:?}", refused.map(|rules| rules.names().len()));
        }
    }
    assert!(Pattern::new(&"a".repeat(256)).is_some());
    assert!(Pattern::new(&"a".repeat(257)).is_none() && Pattern::new("").is_none());
    // The longest file is read to its end.
    let file = tempfile::NamedTempFile::new().unwrap();
    let length = 1024 * 1024;
    let comment = format!("#{}\n", "x".repeat(length - request.len() - 2));
    std::fs::write(file.path(), comment.clone() + &request).unwrap();
    assert_eq!(Rules::from_file(file.path()).unwrap().names(), ["request-1"]);
    std::fs::write(file.path(), comment + &request + "\n").unwrap();
    let refused = Rules::from_file(file.path());
    assert!(matches!(&refused, Err(PolicyError::Invalid(why)) if why.contains("larger than 1 MiB")), "{refused:?}");
}
