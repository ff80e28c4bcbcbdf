//! Any text as a policy: nothing panics, what no rule allows is denied, and the decisions equal those of a second, simpler evaluation.

use std::sync::LazyLock;

use nanite::packet::{Identity, Payload, Register, Request, SelectorName, Tag};
use nanite::policy::{Caller, Pattern, Policy, Rules};
use toml::{Table, Value};

/// A request to decide on: its sender, the caller if another node, and the request.
struct Case {
    sender: Identity,
    on_behalf_of: Option<Identity>,
    request: Request,
}

static CASES: LazyLock<Vec<Case>> = LazyLock::new(cases);
static REGISTERS: LazyLock<Vec<Register>> = LazyLock::new(registers);

/// The target.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some((pattern, text)) = text.split_once('\n') {
        let fits = Pattern::new(pattern).is_some_and(|pattern| pattern.matches(text));
        assert!(!fits || glob(pattern, text), "{pattern:?} {text:?}");
        assert!(fits || !(1..=Pattern::MAX).contains(&pattern.len()) || !glob(pattern, text), "{pattern:?} {text:?}");
    }
    let Ok(rules) = Rules::from_toml(text) else { return };
    let table: Table = toml::from_str(text).expect("rules from invalid TOML");
    let names = rules.names();
    for register in REGISTERS.iter() {
        let decision = rules.authorize_registration(&Caller::new(&register.identity, None), register);
        let wanted = list(&table, "register").iter().any(|rule| allows_registration(rule, register));
        assert_eq!(decision.allowed, wanted, "{register:?}");
        assert!(decision.rule.is_none_or(|rule| names.contains(&rule)));
    }
    for case in CASES.iter() {
        let mut caller = Caller::new(&case.sender, None);
        caller.on_behalf_of = case.on_behalf_of.as_ref();
        let decision = rules.authorize_request(&caller, &case.request);
        let wanted = list(&table, "request").iter().any(|rule| allows_request(rule, case));
        assert_eq!(decision.allowed, wanted, "{:?} by {:?}", case.request, caller.origin());
        let explained = rules.explain(&caller, &case.request);
        let first = explained
            .into_iter()
            .find(|explanation| explanation.mismatches.is_empty())
            .map(|explanation| explanation.rule);
        assert_eq!(decision.rule, first, "the explanation names another rule");
        assert_eq!(decision.allowed, decision.rule.is_some());
        assert!(!names.is_empty() || !decision.allowed, "allowed without rules");
    }
}

/// The rules of this kind.
fn list<'a>(table: &'a Table, kind: &str) -> &'a [Value] {
    table.get(kind).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Whether a text matches one of the patterns of a rule's key; nothing if the rule does not have the key.
fn matches_key(rule: &Value, key: &str, text: &str) -> Option<bool> {
    let patterns = rule.get(key)?.as_array().unwrap();
    Some(patterns.iter().any(|pattern| glob(pattern.as_str().unwrap(), text)))
}

fn matches_all(rule: &Value, key: &str, texts: &[Tag], otherwise: bool) -> bool {
    match rule.get(key) {
        None => otherwise || texts.is_empty(),
        Some(_) => texts.iter().all(|text| matches_key(rule, key, text.as_str()) == Some(true)),
    }
}

fn allows_registration(rule: &Value, register: &Register) -> bool {
    matches_key(rule, "agents", register.identity.as_str()) == Some(true)
        && register.services.iter().all(|service| matches_key(rule, "services", service.as_str()) == Some(true))
        && matches_all(rule, "tags", &register.tags, true)
        && matches_all(rule, "files", &register.files, false)
}

fn allows_request(rule: &Value, case: &Case) -> bool {
    let origin = case.on_behalf_of.as_ref().unwrap_or(&case.sender);
    let service = match case.request.service.as_str() {
        prefix if prefix.matches('/').count() == 1 => format!("{prefix}/index"),
        service => service.to_owned(),
    };
    matches_key(rule, "callers", origin.as_str()) == Some(true)
        && matches_key(rule, "roles", origin.role().as_str()).unwrap_or(true)
        && (case.on_behalf_of.is_none() || matches_key(rule, "through", case.sender.as_str()).unwrap_or(true))
        && matches_key(rule, "services", &service) == Some(true)
        && matches_key(rule, "selectors", case.request.selector.as_str()).unwrap_or(true)
        && matches_all(rule, "tags", &case.request.tags, true)
}

/// Whether a text matches a pattern, by dynamic programming over the prefixes of both.
fn glob(pattern: &str, text: &str) -> bool {
    let mut fits = vec![false; text.len() + 1];
    fits[0] = true;
    for wanted in pattern.bytes() {
        let before = fits.clone();
        for end in 0..=text.len() {
            fits[end] = match wanted {
                b'*' => before[..=end].contains(&true),
                byte => end > 0 && before[end - 1] && text.as_bytes()[end - 1] == byte,
            };
        }
    }
    fits[text.len()]
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (sender, on_behalf_of) in [
        ("mapper-main", None),
        ("mapper-other", None),
        ("mapper-main", Some("nanite-fred")),
        ("mapper-other", Some("nanite-w1")),
        ("nanite-fred", None),
    ] {
        for (service, selector, tags) in [
            ("/jobs/light", SelectorName::RoundRobin, &["eu"][..]),
            ("/jobs/heavy", SelectorName::LeastLoaded, &[]),
            ("/jobs", SelectorName::All, &["eu", "gpu"]),
        ] {
            let mut request = Request::new(service.parse().unwrap(), Payload::default());
            request.selector = selector;
            request.tags = tags.iter().map(|tag| tag.parse().unwrap()).collect();
            let on_behalf_of = on_behalf_of.map(|name: &str| name.parse().unwrap());
            cases.push(Case { sender: sender.parse().unwrap(), on_behalf_of, request });
        }
    }
    cases
}

fn registers() -> Vec<Register> {
    let tags_of = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<Tag>>();
    let mut all = Vec::new();
    for identity in ["nanite-w1", "nanite-fred"] {
        for (services, tags, files) in [
            (&["/jobs/light", "/agent/echo"][..], &["eu"][..], &[][..]),
            (&["/jobs/heavy"], &[], &["photos"]),
            (&[], &[], &[]),
        ] {
            all.push(
                Register::new(identity.parse().unwrap(), services.iter().map(|service| service.parse().unwrap()))
                    .with_tags(tags_of(tags))
                    .with_files(tags_of(files)),
            );
        }
    }
    all
}
