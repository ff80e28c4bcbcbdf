//! Rules from a file: who may register what, and who may request what. What no rule allows is denied.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Deserializer, de};

use super::file::{MAX_RULES, RulesError};
use super::{Caller, Decision, Policy};
use crate::packet::{Identity, Register, Request, Role, SelectorName, Tag};

/// A text in which `*` stands for any characters, none included.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// The longest pattern, in bytes.
    pub const MAX: usize = 256;

    /// The pattern of this text; none when it is empty or longer than [`Pattern::MAX`].
    pub fn new(text: &str) -> Option<Self> {
        (1..=Self::MAX).contains(&text.len()).then(|| Self(text.to_owned()))
    }

    /// Whether a text fits. Takes at most the product of both lengths in steps.
    pub fn matches(&self, text: &str) -> bool {
        let (pattern, text) = (self.0.as_bytes(), text.as_bytes());
        let (mut at, mut next) = (0, 0);
        // Where the last star stood, and the text that it has swallowed so far.
        let mut star: Option<(usize, usize)> = None;
        while let Some(byte) = text.get(next) {
            match pattern.get(at) {
                Some(b'*') => {
                    star = Some((at, next));
                    at += 1;
                }
                Some(wanted) if wanted == byte => {
                    at += 1;
                    next += 1;
                }
                _ => {
                    let Some((place, swallowed)) = star else { return false };
                    star = Some((place, swallowed + 1));
                    (at, next) = (place + 1, swallowed + 1);
                }
            }
        }
        pattern.get(at..).unwrap_or_default().iter().all(|byte| *byte == b'*')
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// One pattern or several; an empty list is an error, since it would allow nothing or everything.
#[derive(Clone, Debug)]
struct Patterns(Vec<Pattern>);

impl Patterns {
    fn match_one(&self, text: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(text))
    }
}

impl<'de> Deserialize<'de> for Patterns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        if texts.is_empty() {
            return Err(de::Error::custom("an empty list: leave the line out, or name what is meant"));
        }
        let patterns = texts
            .iter()
            .map(|text| Pattern::new(text).ok_or_else(|| de::Error::custom("a pattern has 1 to 256 bytes")));
        Ok(Self(patterns.collect::<Result<_, _>>()?))
    }
}

/// The words for roles in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RoleName {
    Agent,
    Mapper,
}

impl RoleName {
    fn is(self, role: Role) -> bool {
        matches!((self, role), (Self::Agent, Role::Agent) | (Self::Mapper, Role::Mapper))
    }
}

/// Lets agents register.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RegisterRule {
    name: Option<String>,
    agents: Patterns,
    services: Patterns,
    #[serde(default)]
    tags: Option<Patterns>,
    #[serde(default)]
    files: Option<Patterns>,
}

/// Lets callers request.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestRule {
    name: Option<String>,
    callers: Patterns,
    #[serde(default)]
    roles: Option<Vec<RoleName>>,
    #[serde(default)]
    through: Option<Patterns>,
    services: Patterns,
    #[serde(default)]
    selectors: Option<Vec<SelectorName>>,
    #[serde(default)]
    tags: Option<Patterns>,
}

/// Rules about who may register and request what.
///
/// ```toml
/// [[register]]                       # agents may register ...
/// name = "workers"                   # (for the audit log and explanations)
/// agents = ["nanite-w*"]             # whose identity fits,
/// services = ["/work/*", "/agent/*"] # services that fit, and no others,
/// tags = ["eu", "gpu"]               # these tags; any where the line is missing
/// files = ["photos"]                 # files of these domains; none where the line is missing
///
/// [[request]]                        # callers may request ...
/// name = "operators"
/// callers = ["mapper-*", "nanite-boss"]
/// roles = ["mapper", "agent"]        # any where the line is missing
/// through = ["mapper-*"]             # at an agent: the mappers that may vouch for the caller; any where it is missing
/// services = ["/work/*"]
/// selectors = ["least_loaded", "rr"] # any where the line is missing
/// tags = ["eu"]                      # any where the line is missing
/// ```
///
/// One rule alone must allow all that is asked. What no rule allows is denied: a file without rules denies everything.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    #[serde(default)]
    register: Vec<RegisterRule>,
    #[serde(default)]
    request: Vec<RequestRule>,
}

/// Why a request is allowed or denied, rule by rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The rule.
    pub rule: String,
    /// What does not fit it; empty when it allows the request.
    pub misses: Vec<&'static str>,
}

impl Rules {
    /// Reads rules in TOML.
    ///
    /// # Errors
    /// [`RulesError::Invalid`] says what is wrong and where.
    pub fn from_toml(text: &str) -> Result<Self, RulesError> {
        let rules: Rules = toml::from_str(text).map_err(|error| RulesError::Invalid(error.to_string()))?;
        if rules.register.len() + rules.request.len() > MAX_RULES {
            return Err(RulesError::Invalid(format!("more than {MAX_RULES} rules")));
        }
        let mut names = BTreeSet::new();
        for name in rules.names() {
            if !names.insert(name.clone()) {
                return Err(RulesError::Invalid(format!("two rules are named {name:?}")));
            }
        }
        let empty = rules.request.iter().any(|rule| {
            rule.roles.as_ref().is_some_and(Vec::is_empty) || rule.selectors.as_ref().is_some_and(Vec::is_empty)
        });
        if empty {
            return Err(RulesError::Invalid("an empty list: leave the line out, or name what is meant".into()));
        }
        Ok(rules)
    }

    /// Reads rules from a file of at most 1 MiB. Blocks.
    ///
    /// # Errors
    /// [`RulesError`] says why they cannot be used; a missing file is an error, not an empty policy.
    pub fn from_file(path: &Path) -> Result<Self, RulesError> {
        Self::from_toml(&super::file::read(path)?)
    }

    /// The names of all rules; one without a name is named by its kind and place, from 1.
    pub fn names(&self) -> Vec<String> {
        let register = self.register.iter().enumerate().map(|(at, rule)| named(&rule.name, "register", at));
        let request = self.request.iter().enumerate().map(|(at, rule)| named(&rule.name, "request", at));
        register.chain(request).collect()
    }

    /// Goes through the rules for a request, in their order.
    pub fn explain(&self, caller: &Caller<'_>, request: &Request) -> Vec<Explanation> {
        let explain = |(at, rule): (usize, &RequestRule)| Explanation {
            rule: named(&rule.name, "request", at),
            misses: rule.misses(caller, request),
        };
        self.request.iter().enumerate().map(explain).collect()
    }
}

fn named(name: &Option<String>, kind: &str, at: usize) -> String {
    name.clone().unwrap_or_else(|| format!("{kind}-{}", at + 1))
}

impl RegisterRule {
    fn allows(&self, agent: &Identity, register: &Register) -> bool {
        let fit = |patterns: &Option<Patterns>, texts: &[Tag], otherwise: bool| match patterns {
            Some(patterns) => texts.iter().all(|text| patterns.match_one(text.as_str())),
            None => otherwise || texts.is_empty(),
        };
        self.agents.match_one(agent.as_str())
            && register.services.iter().all(|service| self.services.match_one(service.as_str()))
            && fit(&self.tags, &register.tags, true)
            && fit(&self.files, &register.files, false)
    }
}

impl RequestRule {
    fn misses(&self, caller: &Caller<'_>, request: &Request) -> Vec<&'static str> {
        let origin = caller.origin();
        let fits = [
            ("callers", self.callers.match_one(origin.as_str())),
            ("roles", self.roles.as_ref().is_none_or(|roles| roles.iter().any(|role| role.is(origin.role())))),
            (
                "through",
                caller.on_behalf_of.is_none()
                    || self.through.as_ref().is_none_or(|through| through.match_one(caller.identity.as_str())),
            ),
            ("services", self.services.match_one(request.service.resolved().as_str())),
            ("selectors", self.selectors.as_ref().is_none_or(|names| names.contains(&request.selector))),
            ("tags", self.tags.as_ref().is_none_or(|tags| request.tags.iter().all(|tag| tags.match_one(tag.as_str())))),
        ];
        fits.into_iter().filter(|(_, fits)| !fits).map(|(what, _)| what).collect()
    }
}

impl Policy for Rules {
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision {
        let mut rules = self.register.iter().enumerate();
        match rules.find(|(_, rule)| rule.allows(caller.identity, register)) {
            Some((at, rule)) => Decision::allow().by(named(&rule.name, "register", at)),
            None => Decision::denied(),
        }
    }

    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
        let mut rules = self.request.iter().enumerate();
        match rules.find(|(_, rule)| rule.misses(caller, request).is_empty()) {
            Some((at, rule)) => Decision::allow().by(named(&rule.name, "request", at)),
            None => Decision::denied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Payload, Status};

    const FILE: &str = r#"
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
        callers = ["nanite-*"]
        roles = ["agent"]
        through = ["mapper-main"]
        services = ["/work/light"]
        selectors = ["rr"]
        tags = ["eu"]
    "#;

    fn id(text: &str) -> Identity {
        text.parse().unwrap()
    }

    fn request(service: &str) -> Request {
        Request::new(service.parse().unwrap(), Payload::default())
    }

    fn register(agent: &str, services: &[&str], tags: &[&str], files: &[&str]) -> Register {
        Register {
            identity: id(agent),
            services: services.iter().map(|s| s.parse().unwrap()).collect(),
            status: Status::default(),
            tags: tags.iter().map(|t| t.parse().unwrap()).collect(),
            files: files.iter().map(|t| t.parse().unwrap()).collect(),
            instance: None,
        }
    }

    #[test]
    fn s08_patterns_match_whole_texts() {
        for (pattern, text, fits) in [
            ("/work/*", "/work/light", true),
            ("/work/*", "/works/light", false),
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("nanite-w", "nanite-w1", false),
            ("*a*a*a*b", &"a".repeat(200), false),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().matches(text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn s08_one_rule_must_allow_all_that_is_registered() {
        let rules = Rules::from_toml(FILE).unwrap();
        let decide =
            |register: &Register| rules.authorize_registration(&Caller::new(&register.identity, None), register);
        let good = register("nanite-w1", &["/work/a", "/agent/echo"], &["eu", "gpu-1"], &["photos"]);
        assert_eq!(decide(&good), Decision::allow().by("workers"));
        assert_eq!(decide(&register("nanite-w1", &[], &[], &[])), Decision::allow().by("workers"), "an unregister");
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
    fn s08_requests_are_allowed_by_caller_service_selector_and_tags() {
        let rules = Rules::from_toml(FILE).unwrap();
        let main = id("mapper-main");
        assert_eq!(
            rules.authorize_request(&Caller::new(&main, None), &request("/work/heavy")),
            Decision::allow().by("operators")
        );
        assert_eq!(rules.authorize_request(&Caller::new(&main, None), &request("/agent/echo")), Decision::denied());
        let fred = id("nanite-fred");
        let by = |mapper| Caller { on_behalf_of: Some(&fred), ..Caller::new(mapper, None) };
        let mut light = request("/work/light");
        assert_eq!(rules.authorize_request(&by(&main), &light), Decision::denied(), "another selector");
        light.selector = SelectorName::RoundRobin;
        light.tags = vec!["eu".parse().unwrap()];
        assert_eq!(rules.authorize_request(&by(&main), &light), Decision::allow().by("request-2"));
        let other = id("mapper-other");
        assert_eq!(rules.authorize_request(&by(&other), &light), Decision::denied());
        light.tags.push("us".parse().unwrap());
        let explained = rules.explain(&by(&main), &light);
        assert_eq!(explained[0], Explanation { rule: "operators".into(), misses: vec!["callers"] });
        assert_eq!(explained[1], Explanation { rule: "request-2".into(), misses: vec!["tags"] });
    }

    #[test]
    fn s08_a_file_that_says_nothing_denies_and_one_that_is_unclear_is_refused() {
        let empty = Rules::from_toml("").unwrap();
        let main = id("mapper-main");
        assert_eq!(empty.authorize_request(&Caller::new(&main, None), &request("/a/b")), Decision::denied());
        for unclear in [
            "[[request]]\ncallers = [\"*\"]",
            "[[request]]\ncallers = []\nservices = [\"*\"]",
            "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\nselectors = []",
            "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\nselectors = [\"system\"]",
            "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\nservice = [\"/x\"]",
            "[[allow]]\ncallers = [\"*\"]",
            "[[request]]\nname = \"a\"\ncallers = [\"*\"]\nservices = [\"*\"]\n[[register]]\nname = \"a\"\nagents = [\"*\"]\nservices = [\"*\"]",
        ] {
            assert!(matches!(Rules::from_toml(unclear), Err(RulesError::Invalid(_))), "{unclear}");
        }
        assert!(matches!(Rules::from_file(Path::new("/nowhere/policy.toml")), Err(RulesError::Unreadable { .. })));
    }
}
