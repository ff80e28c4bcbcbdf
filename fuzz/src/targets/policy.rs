//! Any text as a policy: nothing panics, what no rule allows is denied, and the decisions are those of a second, plainer evaluation.

use std::sync::LazyLock;

use nanite::packet::{Identity, Payload, Register, Request, SelectorName, Tag};
use nanite::policy::{Caller, Pattern, Policy, Rules};
use toml::{Table, Value};

/// Somebody who asks: who sends, for whom, and what.
struct Ask {
    sender: Identity,
    on_behalf_of: Option<Identity>,
    request: Request,
}

static ASKS: LazyLock<Vec<Ask>> = LazyLock::new(asks);
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
    let table: Table = toml::from_str(text).expect("rules in what is no TOML");
    let names = rules.names();
    for register in REGISTERS.iter() {
        let decision = rules.authorize_registration(&Caller::new(&register.identity, None), register);
        let wanted = list(&table, "register").iter().any(|rule| registers_by(rule, register));
        assert_eq!(decision.allowed, wanted, "{register:?}");
        assert!(decision.rule.is_none_or(|rule| names.contains(&rule)));
    }
    for ask in ASKS.iter() {
        let mut caller = Caller::new(&ask.sender, None);
        caller.on_behalf_of = ask.on_behalf_of.as_ref();
        let decision = rules.authorize_request(&caller, &ask.request);
        let wanted = list(&table, "request").iter().any(|rule| requests_by(rule, ask));
        assert_eq!(decision.allowed, wanted, "{:?} by {:?}", ask.request, caller.origin());
        let explained = rules.explain(&caller, &ask.request);
        let first = explained.into_iter().find(|one| one.misses.is_empty()).map(|one| one.rule);
        assert_eq!(decision.rule, first, "another rule decides than is explained");
        assert_eq!(decision.allowed, decision.rule.is_some());
        assert!(!names.is_empty() || !decision.allowed, "allowed by no rule");
    }
}

/// The rules of this kind.
fn list<'a>(table: &'a Table, kind: &str) -> &'a [Value] {
    table.get(kind).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Whether a text fits one of the patterns of a rule's line; none where there is no such line.
fn line(rule: &Value, key: &str, text: &str) -> Option<bool> {
    let patterns = rule.get(key)?.as_array().unwrap();
    Some(patterns.iter().any(|pattern| glob(pattern.as_str().unwrap(), text)))
}

fn every(rule: &Value, key: &str, texts: &[Tag], otherwise: bool) -> bool {
    match rule.get(key) {
        None => otherwise || texts.is_empty(),
        Some(_) => texts.iter().all(|text| line(rule, key, text.as_str()) == Some(true)),
    }
}

fn registers_by(rule: &Value, register: &Register) -> bool {
    line(rule, "agents", register.identity.as_str()) == Some(true)
        && register.services.iter().all(|service| line(rule, "services", service.as_str()) == Some(true))
        && every(rule, "tags", &register.tags, true)
        && every(rule, "files", &register.files, false)
}

fn requests_by(rule: &Value, ask: &Ask) -> bool {
    let origin = ask.on_behalf_of.as_ref().unwrap_or(&ask.sender);
    let service = match ask.request.service.as_str() {
        one if one.matches('/').count() == 1 => format!("{one}/index"),
        several => several.to_owned(),
    };
    line(rule, "callers", origin.as_str()) == Some(true)
        && line(rule, "roles", origin.role().as_str()).unwrap_or(true)
        && (ask.on_behalf_of.is_none() || line(rule, "through", ask.sender.as_str()).unwrap_or(true))
        && line(rule, "services", &service) == Some(true)
        && line(rule, "selectors", ask.request.selector.as_str()).unwrap_or(true)
        && every(rule, "tags", &ask.request.tags, true)
}

/// Whether a text fits a pattern, in the plainest way: which beginnings of the pattern fit which beginnings of the text.
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

fn asks() -> Vec<Ask> {
    let mut asks = Vec::new();
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
            asks.push(Ask { sender: sender.parse().unwrap(), on_behalf_of, request });
        }
    }
    asks
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
