//! Cedar policies decide like the same rules in TOML.

use std::fs;

use nanite::packet::{Identity, Payload, Register, Request, SelectorName, Tag};
use nanite::policy::{Caller, CedarPolicy, Decision, FileTransfer, Policy, PolicyError, Rules};
use tempfile::TempDir;

use crate::harness::program::{Ended, nanite, run};

const TOML: &str = r#"
[[register]]
name = "workers"
agents = ["nanite-w*"]
services = ["/work/*", "/agent/echo"]
tags = ["eu", "gpu-*"]
files = ["photos"]

[[request]]
name = "operators"
callers = ["mapper-*", "nanite-boss"]
services = ["/work/*"]

[[request]]
name = "light"
callers = ["nanite-*"]
roles = ["agent"]
through = ["mapper-main"]
services = ["/work/light"]
selectors = ["rr"]
tags = ["eu"]

[[file]]
name = "pictures"
senders = ["mapper-desk"]
domains = ["photos"]
names = ["*.jpg"]
max_bytes = 100
replace = true

[[file]]
name = "inbox"
senders = ["mapper-*"]
domains = ["inbox"]
"#;

const CEDAR: &str = r#"
@id("workers")
permit (principal, action == Action::"register", resource) when { principal.id like "nanite-w*" };
@id("workers-services")
permit (principal, action == Action::"offer", resource is Service)
when { resource.name like "/work/*" || resource.name == "/agent/echo" };
@id("workers-tags")
permit (principal, action == Action::"offer", resource is Tag)
when { resource.name == "eu" || resource.name like "gpu-*" };
@id("workers-files")
permit (principal, action == Action::"offer", resource == Files::"photos");

@id("operators")
permit (principal, action == Action::"request", resource)
when { (principal.id like "mapper-*" || principal.id == "nanite-boss") && resource.name like "/work/*" };
@id("light")
permit (principal, action == Action::"request", resource == Service::"/work/light")
when {
    principal.role == "agent" &&
    (if context has through then context.through == "mapper-main" else true) &&
    context.selector == "rr" && ["eu"].containsAll(context.tags)
};

@id("pictures")
permit (principal == Node::"mapper-desk", action == Action::"send-file", resource == Files::"photos")
when { context.name like "*.jpg" && context.size <= 100 };
@id("inbox")
permit (principal, action == Action::"send-file", resource == Files::"inbox")
when { principal.id like "mapper-*" && !context.replaces };
"#;

fn ids(names: &[&str]) -> Vec<Identity> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn parse_all<T: std::str::FromStr<Err: std::fmt::Debug>>(texts: &[&str]) -> Vec<T> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn s08_cedar_decides_requests_like_equivalent_rules() {
    let (rules, cedar) = (Rules::from_toml(TOML).unwrap(), CedarPolicy::from_text(CEDAR).unwrap());
    let callers = ids(&["mapper-main", "mapper-other", "nanite-boss", "nanite-fred"]);
    let (mut allowed, mut denied) = (0, 0);
    for sender in &callers {
        for origin in std::iter::once(None).chain(callers.iter().map(Some)) {
            for service in ["/work/light", "/work/heavy", "/agent/echo", "/work"] {
                for selector in SelectorName::ALL {
                    for tags in [&[][..], &["eu"], &["eu", "us"]] {
                        let caller = Caller::new(sender, None).on_behalf_of(origin);
                        let mut request = Request::new(service.parse().unwrap(), Payload::default());
                        request.selector = selector;
                        request.tags = parse_all(tags);
                        let (toml, cedar) =
                            (rules.authorize_request(&caller, &request), cedar.authorize_request(&caller, &request));
                        assert_eq!(toml.allowed, cedar.allowed, "{caller:?} {request:?}: {toml:?} {cedar:?}");
                        // If both rules allow it, TOML names the first in the file, Cedar the first in order of names.
                        let names = ["light", "operators"].map(|name| Some(name.to_owned()));
                        assert!(!cedar.allowed || names.contains(&cedar.rule), "{cedar:?}");
                        *(if toml.allowed { &mut allowed } else { &mut denied }) += 1;
                    }
                }
            }
        }
    }
    assert!(allowed > 50 && denied > 50, "{allowed} {denied}");
}

#[test]
fn s08_cedar_decides_registrations_like_equivalent_rules() {
    let (rules, cedar) = (Rules::from_toml(TOML).unwrap(), CedarPolicy::from_text(CEDAR).unwrap());
    let mut allowed = 0;
    for agent in ids(&["nanite-w1", "nanite-x1"]) {
        for services in [&[][..], &["/work/a", "/agent/echo"], &["/work/a", "/root/do"]] {
            for tags in [&[][..], &["eu", "gpu-1"], &["us"]] {
                for files in [&[][..], &["photos"], &["photos", "music"]] {
                    let register = Register::new(agent.clone(), parse_all(services))
                        .with_tags(parse_all(tags))
                        .with_files(parse_all(files));
                    let caller = Caller::new(&agent, None);
                    let toml = rules.authorize_registration(&caller, &register);
                    let cedar = cedar.authorize_registration(&caller, &register);
                    assert_eq!(toml, cedar, "{register:?}");
                    allowed += usize::from(toml.allowed);
                }
            }
        }
    }
    assert_eq!(allowed, 8);
}

#[test]
fn s08_cedar_decides_files_like_equivalent_rules() {
    let (rules, cedar) = (Rules::from_toml(TOML).unwrap(), CedarPolicy::from_text(CEDAR).unwrap());
    let mut allowed = Vec::new();
    for sender in ids(&["mapper-desk", "mapper-other", "nanite-fred"]) {
        for domain in parse_all::<Tag>(&["photos", "inbox", "music"]) {
            for (name, size) in [("a.jpg", 100), ("a.jpg", 101), ("a.png", 1)] {
                for replaces in [false, true] {
                    let file = FileTransfer::new(&domain, name, size).replaces(replaces);
                    let caller = Caller::new(&sender, None);
                    let (toml, cedar) = (rules.authorize_file(&caller, &file), cedar.authorize_file(&caller, &file));
                    assert_eq!(toml, cedar, "{sender} {file:?}");
                    allowed.extend(toml.rule.filter(|_| toml.allowed));
                }
            }
        }
    }
    let count = |rule: &str| allowed.iter().filter(|name| *name == rule).count();
    assert_eq!((count("pictures"), count("inbox"), allowed.len()), (2, 6, 8));
    let inbox: Tag = "inbox".parse().unwrap();
    let (desk, file) = (&ids(&["mapper-desk"])[0], FileTransfer::new(&inbox, "x", u64::MAX));
    let open = CedarPolicy::from_text("permit (principal, action, resource);").unwrap();
    assert_eq!(open.authorize_file(&Caller::new(desk, None), &file), Decision::denied(), "beyond Cedar's numbers");
    assert!(open.authorize_file(&Caller::new(desk, None), &FileTransfer::new(&inbox, "x", 1)).allowed);
}

#[test]
fn s08_cedar_forbid_denies_and_invalid_policies_are_rejected() {
    let main: Identity = "mapper-main".parse().unwrap();
    let decide = |text: &str| {
        let request = Request::new("/work/light".parse().unwrap(), Payload::default());
        CedarPolicy::from_text(text).unwrap().authorize_request(&Caller::new(&main, None), &request)
    };
    assert_eq!(decide(""), Decision::denied());
    assert!(decide("permit (principal, action, resource);").allowed);
    let forbidden = r#"permit (principal, action, resource); @id("none") forbid (principal, action, resource);"#;
    assert_eq!(decide(forbidden), Decision::denied().by_rule("none"));
    for invalid in [
        "permit (principal, action, resource) when { principal.name == \"x\" };",
        "permit (principal, action == Action::\"delete\", resource);",
        "permit (principal == ?principal, action, resource);",
        "permit (principal, action, resource) when { resource.name > 3 };",
        "permit (principal, action == Action::\"request\", resource) when { context.target == \"nanite-a\" };",
        "@id(\"a\") permit (principal, action, resource); @id(\"a\") forbid (principal, action, resource);",
        "permit (principal, action",
    ] {
        assert!(matches!(CedarPolicy::from_text(invalid), Err(PolicyError::Invalid(_))), "{invalid}");
    }
}

#[test]
fn s08_nanite_policy_checks_and_explains_cedar_files() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("policy.cedar");
    fs::write(&file, CEDAR).unwrap();
    let nanite = |arguments: &[&str]| -> Ended { run(nanite(arguments).current_dir(dir.path())) };
    let checked = nanite(&["policy", "check", "policy.cedar"]);
    assert_eq!((checked.code(), checked.out.as_str()), (0, "policy.cedar: 8 rules\n"), "{checked:?}");
    let explain = |args: &[&str]| nanite(&[&["policy", "explain", "--policy", "policy.cedar"], args].concat());
    let allowed = explain(&["mapper-main", "/work/heavy"]);
    assert_eq!((allowed.code(), allowed.out.as_str()), (0, "allowed by the rule operators\n"), "{allowed:?}");
    let denied = explain(&["nanite-fred", "/work/light", "--through", "mapper-other", "--selector", "rr"]);
    assert_eq!((denied.code(), denied.out.as_str()), (5, "denied: no rule allows it\n"), "{denied:?}");
    fs::write(&file, "permit (principal, action, resource) when { principal.age > 3 };").unwrap();
    let invalid = nanite(&["policy", "check", "policy.cedar"]);
    assert_eq!(invalid.code(), 2, "{invalid:?}");
    assert!(invalid.err.contains("policy.cedar") && invalid.err.contains("age"), "{invalid:?}");
}
