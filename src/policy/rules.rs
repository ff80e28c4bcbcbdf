//! Rules in a TOML file: what agents may register, what callers may request, and which files they may send. What no rule allows is denied.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, de};

use super::{Caller, Decision, FileTransfer, Policy};
use crate::packet::{Identity, Register, Request, Role, SelectorName, Tag};

/// The largest policy file, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// The most rules in one policy file.
pub(super) const MAX_RULES: usize = 4096;

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("cannot read the policy {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The text is not a valid policy.
    #[error("{0}")]
    Invalid(String),
}

/// Reads a policy file of at most [`MAX_FILE_BYTES`]. Blocks.
pub(super) fn read_file(path: &Path) -> Result<String, PolicyError> {
    let unreadable = |source| PolicyError::Unreadable { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(unreadable)?;
    let length = file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    if length as u64 > MAX_FILE_BYTES {
        return Err(PolicyError::Invalid("the file is larger than 1 MiB".into()));
    }
    Ok(text)
}

/// A pattern for names: `*` matches any number of characters.
///
/// ```
/// use nanite::policy::Pattern;
///
/// let pattern = Pattern::new("/work/*").unwrap();
/// assert!(pattern.matches("/work/light") && !pattern.matches("/other"));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// The longest pattern, in bytes.
    pub const MAX: usize = 256;

    /// Makes a pattern; `None` if the text is empty or longer than [`Pattern::MAX`].
    pub fn new(text: &str) -> Option<Self> {
        (1..=Self::MAX).contains(&text.len()).then(|| Self(text.to_owned()))
    }

    /// Whether the whole text matches. The time is bounded by the product of both lengths.
    pub fn matches(&self, text: &str) -> bool {
        let (pattern, text) = (self.0.as_bytes(), text.as_bytes());
        let (mut at, mut next) = (0, 0);
        // Positions of the last star, and of the text behind what it matches so far.
        let mut star: Option<(usize, usize)> = None;
        while let Some(byte) = text.get(next) {
            match pattern.get(at) {
                Some(b'*') => {
                    star = Some((at, next));
                    at += 1;
                }
                Some(expected) if expected == byte => {
                    at += 1;
                    next += 1;
                }
                _ => {
                    let Some((star_at, matched)) = star else { return false };
                    star = Some((star_at, matched + 1));
                    (at, next) = (star_at + 1, matched + 1);
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

const EMPTY_LIST: &str = "an empty list: leave the line out, or list what is meant";

/// The patterns of one key. An empty list is an error: it could be read as 'nothing' or as 'anything'.
#[derive(Clone, Debug)]
struct Patterns(Vec<Pattern>);

impl Patterns {
    fn any_match(&self, text: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(text))
    }
}

impl<'de> Deserialize<'de> for Patterns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        if texts.is_empty() {
            return Err(de::Error::custom(EMPTY_LIST));
        }
        let patterns = texts
            .iter()
            .map(|text| Pattern::new(text).ok_or_else(|| de::Error::custom("a pattern has 1 to 256 bytes")));
        Ok(Self(patterns.collect::<Result<_, _>>()?))
    }
}

/// A role, as written in a policy file.
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

/// What the matching agents may register.
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

/// What the matching callers may request.
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

/// Which files the matching senders may send.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    name: Option<String>,
    senders: Patterns,
    domains: Patterns,
    #[serde(default)]
    names: Option<Patterns>,
    #[serde(default)]
    max_bytes: Option<u64>,
    #[serde(default)]
    replace: bool,
}

/// A list of rules for registrations, requests and files. Rules only allow: what no rule allows is denied, so a file without rules denies
/// everything. A registration, request or file must be allowed by one rule as a whole.
///
/// ```toml
/// [[register]]
/// name = "workers"                   # for the audit log and explanations
/// agents = ["nanite-w*"]             # agents that may register
/// services = ["/work/*", "/agent/*"] # allowed services
/// tags = ["eu", "gpu"]               # allowed tags; default: any
/// files = ["photos"]                 # allowed domains of files to receive; default: none
///
/// [[request]]
/// name = "operators"
/// callers = ["mapper-*", "nanite-boss"]
/// roles = ["mapper", "agent"]        # roles of the caller; default: any
/// through = ["mapper-*"]             # at an agent: mappers that may vouch for the caller; default: any
/// services = ["/work/*"]
/// selectors = ["least_loaded", "rr"] # default: any
/// tags = ["eu"]                      # default: any
///
/// [[file]]
/// name = "pictures"
/// senders = ["mapper-desk"]          # mappers that may send files to this agent
/// domains = ["photos"]
/// names = ["*.jpg"]                  # default: any
/// max_bytes = 100000000              # default: what the agent receives at most
/// replace = true                     # whether they may replace files; default: false
/// ```
///
/// ```
/// use nanite::packet::{Identity, Payload, Request};
/// use nanite::policy::{Caller, Decision, Policy, Rules};
///
/// let rules = Rules::from_toml(r#"
///     [[request]]
///     name = "operators"
///     callers = ["mapper-*"]
///     services = ["/work/*"]
/// "#)?;
/// let mapper = Identity::mapper("desk")?;
/// let decide = |service: &str| -> Result<Decision, Box<dyn std::error::Error>> {
///     let request = Request::new(service.parse()?, Payload::default());
///     Ok(rules.authorize_request(&Caller::new(&mapper, None), &request))
/// };
/// assert_eq!(decide("/work/light")?, Decision::allow().by_rule("operators"));
/// assert_eq!(decide("/admin/stop")?, Decision::denied());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    #[serde(default)]
    register: Vec<RegisterRule>,
    #[serde(default)]
    request: Vec<RequestRule>,
    #[serde(default)]
    file: Vec<FileRule>,
}

/// Why one rule allows a request or does not.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Explanation {
    /// The name of the rule.
    pub rule: String,
    /// The keys of the rule that do not match; empty if the rule allows the request.
    pub mismatches: Vec<&'static str>,
}

impl Rules {
    /// Reads rules in TOML.
    ///
    /// # Errors
    /// [`PolicyError::Invalid`] with the mistake and its line.
    pub fn from_toml(text: &str) -> Result<Self, PolicyError> {
        let rules: Rules = toml::from_str(text).map_err(|error| PolicyError::Invalid(error.to_string()))?;
        if rules.register.len() + rules.request.len() + rules.file.len() > MAX_RULES {
            return Err(PolicyError::Invalid(format!("more than {MAX_RULES} rules")));
        }
        let mut names = BTreeSet::new();
        for name in rules.names() {
            if !names.insert(name.clone()) {
                return Err(PolicyError::Invalid(format!("two rules have the name {name:?}")));
            }
        }
        let empty = rules.request.iter().any(|rule| {
            rule.roles.as_ref().is_some_and(Vec::is_empty) || rule.selectors.as_ref().is_some_and(Vec::is_empty)
        });
        if empty {
            return Err(PolicyError::Invalid(EMPTY_LIST.into()));
        }
        Ok(rules)
    }

    /// Reads rules from a TOML file of at most 1 MiB. Blocks.
    ///
    /// # Errors
    /// [`PolicyError`]; a missing file is an error, not an empty policy.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, PolicyError> {
        Self::from_toml(&read_file(path.as_ref())?)
    }

    /// The names of all rules. A rule without a name is called by its kind and number, such as `request-1`.
    pub fn names(&self) -> Vec<String> {
        let register = self.register.iter().enumerate().map(|(at, rule)| rule_name(&rule.name, "register", at));
        let request = self.request.iter().enumerate().map(|(at, rule)| rule_name(&rule.name, "request", at));
        let file = self.file.iter().enumerate().map(|(at, rule)| rule_name(&rule.name, "file", at));
        register.chain(request).chain(file).collect()
    }

    /// Explains for each request rule, in order, whether it allows a request.
    ///
    /// ```
    /// # use nanite::packet::{Identity, Payload, Request};
    /// # use nanite::policy::{Caller, Rules};
    /// let rules = Rules::from_toml("[[request]]\ncallers = [\"mapper-*\"]\nservices = [\"/work/*\"]")?;
    /// let fred = Identity::agent("fred")?;
    /// let explained = rules.explain(&Caller::new(&fred, None), &Request::new("/work/light".parse()?, Payload::default()));
    /// assert_eq!((explained[0].rule.as_str(), explained[0].mismatches.as_slice()), ("request-1", &["callers"][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn explain(&self, caller: &Caller<'_>, request: &Request) -> Vec<Explanation> {
        let explain = |(at, rule): (usize, &RequestRule)| Explanation {
            rule: rule_name(&rule.name, "request", at),
            mismatches: rule.mismatches(caller, request),
        };
        self.request.iter().enumerate().map(explain).collect()
    }
}

fn rule_name(name: &Option<String>, kind: &str, at: usize) -> String {
    name.clone().unwrap_or_else(|| format!("{kind}-{}", at + 1))
}

impl RegisterRule {
    fn allows(&self, agent: &Identity, register: &Register) -> bool {
        let all_match = |patterns: &Option<Patterns>, tags: &[Tag], default: bool| match patterns {
            Some(patterns) => tags.iter().all(|tag| patterns.any_match(tag.as_str())),
            None => default || tags.is_empty(),
        };
        self.agents.any_match(agent.as_str())
            && register.services.iter().all(|service| self.services.any_match(service.as_str()))
            && all_match(&self.tags, &register.tags, true)
            && all_match(&self.files, &register.files, false)
    }
}

impl FileRule {
    fn allows(&self, sender: &Identity, file: &FileTransfer<'_>) -> bool {
        self.senders.any_match(sender.as_str())
            && self.domains.any_match(file.domain.as_str())
            && self.names.as_ref().is_none_or(|names| names.any_match(file.name))
            && self.max_bytes.is_none_or(|limit| file.size <= limit)
            && (self.replace || !file.replaces)
    }
}

impl RequestRule {
    fn mismatches(&self, caller: &Caller<'_>, request: &Request) -> Vec<&'static str> {
        let origin = caller.origin();
        let matches = [
            ("callers", self.callers.any_match(origin.as_str())),
            ("roles", self.roles.as_ref().is_none_or(|roles| roles.iter().any(|role| role.is(origin.role())))),
            (
                "through",
                caller.on_behalf_of.is_none()
                    || self.through.as_ref().is_none_or(|through| through.any_match(caller.identity.as_str())),
            ),
            ("services", self.services.any_match(request.service.resolved().as_str())),
            ("selectors", self.selectors.as_ref().is_none_or(|names| names.contains(&request.selector))),
            ("tags", self.tags.as_ref().is_none_or(|tags| request.tags.iter().all(|tag| tags.any_match(tag.as_str())))),
        ];
        matches.into_iter().filter(|(_, matches)| !matches).map(|(key, _)| key).collect()
    }
}

impl Policy for Rules {
    fn authorize_registration(&self, caller: &Caller<'_>, register: &Register) -> Decision {
        let mut rules = self.register.iter().enumerate();
        match rules.find(|(_, rule)| rule.allows(caller.identity, register)) {
            Some((at, rule)) => Decision::allow().by_rule(rule_name(&rule.name, "register", at)),
            None => Decision::denied(),
        }
    }

    fn authorize_request(&self, caller: &Caller<'_>, request: &Request) -> Decision {
        let mut rules = self.request.iter().enumerate();
        match rules.find(|(_, rule)| rule.mismatches(caller, request).is_empty()) {
            Some((at, rule)) => Decision::allow().by_rule(rule_name(&rule.name, "request", at)),
            None => Decision::denied(),
        }
    }

    fn authorize_file(&self, sender: &Caller<'_>, file: &FileTransfer<'_>) -> Decision {
        let mut rules = self.file.iter().enumerate();
        match rules.find(|(_, rule)| rule.allows(sender.identity, file)) {
            Some((at, rule)) => Decision::allow().by_rule(rule_name(&rule.name, "file", at)),
            None => Decision::denied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Payload;

    const FILE: &str = r#"
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

    #[test]
    fn s08_patterns_match_the_whole_text() {
        for (pattern, text, matches) in [
            ("/work/*", "/work/light", true),
            ("/work/*", "/works/light", false),
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("nanite-w", "nanite-w1", false),
            ("*a*a*a*b", &"a".repeat(200), false),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().matches(text), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn s08_request_rules_match_caller_service_selector_and_tags() {
        let rules = Rules::from_toml(FILE).unwrap();
        let main = id("mapper-main");
        assert_eq!(
            rules.authorize_request(&Caller::new(&main, None), &request("/work/heavy")),
            Decision::allow().by_rule("operators")
        );
        assert_eq!(rules.authorize_request(&Caller::new(&main, None), &request("/agent/echo")), Decision::denied());
        let fred = id("nanite-fred");
        let by = |mapper| Caller::new(mapper, None).on_behalf_of(&fred);
        let mut light = request("/work/light");
        assert_eq!(rules.authorize_request(&by(&main), &light), Decision::denied(), "another selector");
        light.selector = SelectorName::RoundRobin;
        light.tags = vec!["eu".parse().unwrap()];
        assert_eq!(rules.authorize_request(&by(&main), &light), Decision::allow().by_rule("request-2"));
        let other = id("mapper-other");
        assert_eq!(rules.authorize_request(&by(&other), &light), Decision::denied());
        light.tags.push("us".parse().unwrap());
        let explained = rules.explain(&by(&main), &light);
        assert_eq!(explained[0], Explanation { rule: "operators".into(), mismatches: vec!["callers"] });
        assert_eq!(explained[1], Explanation { rule: "request-2".into(), mismatches: vec!["tags"] });
    }

    #[test]
    fn s08_empty_policy_denies_all_and_invalid_policy_is_rejected() {
        let empty = Rules::from_toml("").unwrap();
        let main = id("mapper-main");
        assert_eq!(empty.authorize_request(&Caller::new(&main, None), &request("/a/b")), Decision::denied());
        for invalid in [
            "[[request]]\ncallers = [\"*\"]",
            "[[request]]\ncallers = []\nservices = [\"*\"]",
            "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\nselectors = []",
            "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\nselectors = [\"system\"]",
            "[[request]]\ncallers = [\"*\"]\nservices = [\"*\"]\nservice = [\"/x\"]",
            "[[allow]]\ncallers = [\"*\"]",
            "[[request]]\nname = \"a\"\ncallers = [\"*\"]\nservices = [\"*\"]\n[[register]]\nname = \"a\"\nagents = [\"*\"]\nservices = [\"*\"]",
        ] {
            assert!(matches!(Rules::from_toml(invalid), Err(PolicyError::Invalid(_))), "{invalid}");
        }
        assert!(matches!(Rules::from_file("/nowhere/policy.toml"), Err(PolicyError::Unreadable { .. })));
    }
}
