//! Policies in the Cedar language decide as the same rules in TOML do.

use std::fs;

use nanite::packet::{Identity, Payload, Register, Request, SelectorName};
use nanite::policy::{Caller, CedarPolicy, Decision, Policy, Rules, RulesError};
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
"#;

fn ids(names: &[&str]) -> Vec<Identity> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn all<T: std::str::FromStr<Err: std::fmt::Debug>>(texts: &[&str]) -> Vec<T> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn s08_cedar_decides_requests_as_the_same_rules_do() {
    let (rules, cedar) = (Rules::from_toml(TOML).unwrap(), CedarPolicy::from_text(CEDAR).unwrap());
    let callers = ids(&["mapper-main", "mapper-other", "nanite-boss", "nanite-fred"]);
    let (mut allowed, mut denied) = (0, 0);
    for sender in &callers {
        for origin in std::iter::once(None).chain(callers.iter().map(Some)) {
            for service in ["/work/light", "/work/heavy", "/agent/echo", "/work"] {
                for selector in SelectorName::ALL {
                    for tags in [&[][..], &["eu"], &["eu", "us"]] {
                        let mut caller = Caller::new(sender, None);
                        caller.on_behalf_of = origin;
                        let mut request = Request::new(service.parse().unwrap(), Payload::default());
                        request.selector = selector;
                        request.tags = all(tags);
                        let (one, other) =
                            (rules.authorize_request(&caller, &request), cedar.authorize_request(&caller, &request));
                        assert_eq!(one.allowed, other.allowed, "{caller:?} {request:?}: {one:?} {other:?}");
                        // Where both rules allow it, TOML names the first in the file, Cedar the least name.
                        let named = ["light", "operators"].map(|name| Some(name.to_owned()));
                        assert!(!other.allowed || named.contains(&other.rule), "{other:?}");
                        *(if one.allowed { &mut allowed } else { &mut denied }) += 1;
                    }
                }
            }
        }
    }
    assert!(allowed > 50 && denied > 50, "{allowed} {denied}");
}

#[test]
fn s08_cedar_decides_registrations_as_the_same_rules_do() {
    let (rules, cedar) = (Rules::from_toml(TOML).unwrap(), CedarPolicy::from_text(CEDAR).unwrap());
    let mut allowed = 0;
    for agent in ids(&["nanite-w1", "nanite-x1"]) {
        for services in [&[][..], &["/work/a", "/agent/echo"], &["/work/a", "/root/do"]] {
            for tags in [&[][..], &["eu", "gpu-1"], &["us"]] {
                for files in [&[][..], &["photos"], &["photos", "music"]] {
                    let register =
                        Register::new(agent.clone(), all(services)).with_tags(all(tags)).with_files(all(files));
                    let caller = Caller::new(&agent, None);
                    let one = rules.authorize_registration(&caller, &register);
                    let other = cedar.authorize_registration(&caller, &register);
                    assert_eq!(one, other, "{register:?}");
                    allowed += usize::from(one.allowed);
                }
            }
        }
    }
    assert_eq!(allowed, 8);
}

#[test]
fn s08_cedar_denies_what_is_forbidden_or_unknown() {
    let main: Identity = "mapper-main".parse().unwrap();
    let decide = |text: &str| {
        let request = Request::new("/work/light".parse().unwrap(), Payload::default());
        CedarPolicy::from_text(text).unwrap().authorize_request(&Caller::new(&main, None), &request)
    };
    assert_eq!(decide(""), Decision::denied());
    assert!(decide("permit (principal, action, resource);").allowed);
    let forbidden = r#"permit (principal, action, resource); @id("none") forbid (principal, action, resource);"#;
    assert_eq!(decide(forbidden), Decision::denied().by("none"));
    for unclear in [
        "permit (principal, action, resource) when { principal.name == \"x\" };",
        "permit (principal, action == Action::\"delete\", resource);",
        "permit (principal == ?principal, action, resource);",
        "permit (principal, action, resource) when { resource.name > 3 };",
        "permit (principal, action == Action::\"request\", resource) when { context.target == \"nanite-a\" };",
        "@id(\"a\") permit (principal, action, resource); @id(\"a\") forbid (principal, action, resource);",
        "permit (principal, action",
    ] {
        assert!(matches!(CedarPolicy::from_text(unclear), Err(RulesError::Invalid(_))), "{unclear}");
    }
}

#[test]
fn s08_cedar_files_are_checked_and_explained_by_the_program() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("policy.cedar");
    fs::write(&file, CEDAR).unwrap();
    let nanite = |arguments: &[&str]| -> Ended { run(nanite(arguments).current_dir(dir.path())) };
    let checked = nanite(&["policy", "check", "policy.cedar"]);
    assert_eq!((checked.code(), checked.out.as_str()), (0, "policy.cedar: 6 rules\n"), "{checked:?}");
    let explain = |args: &[&str]| nanite(&[&["policy", "explain", "--policy", "policy.cedar"], args].concat());
    let allowed = explain(&["mapper-main", "/work/heavy"]);
    assert_eq!((allowed.code(), allowed.out.as_str()), (0, "allowed by the rule operators\n"), "{allowed:?}");
    let denied = explain(&["nanite-fred", "/work/light", "--through", "mapper-other", "--selector", "rr"]);
    assert_eq!((denied.code(), denied.out.as_str()), (5, "denied: no rule allows it\n"), "{denied:?}");
    fs::write(&file, "permit (principal, action, resource) when { principal.age > 3 };").unwrap();
    let unclear = nanite(&["policy", "check", "policy.cedar"]);
    assert_eq!(unclear.code(), 2, "{unclear:?}");
    assert!(unclear.err.contains("policy.cedar") && unclear.err.contains("age"), "{unclear:?}");
}
