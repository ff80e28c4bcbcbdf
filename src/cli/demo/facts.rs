//! What was seen, as it is printed with `--json`, and whether it is as it should be.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::packet::{Identity, Payload};
use crate::serializer::OpenErrorKind;

/// Everything that was seen.
#[derive(Debug, Default, Serialize)]
pub(super) struct Facts {
    /// Whether all of it is as it should be.
    pub ok: bool,
    /// What is not.
    pub problems: Vec<String>,
    pub certificates: Certificates,
    pub agents: Vec<Agent>,
    pub requests: Vec<Asked>,
    pub parts: Parts,
    pub failures: Vec<Failed>,
    pub broker: Broker,
    pub refusals: Vec<Refusal>,
    pub rates: Vec<Rates>,
    pub seconds: f64,
}

/// The certificates that were made.
#[derive(Debug, Default, Serialize)]
pub(super) struct Certificates {
    pub issued: Vec<Issued>,
    pub millis: f64,
}

/// One certificate.
#[derive(Debug, Serialize)]
pub(super) struct Issued {
    pub name: String,
    pub uri: String,
    pub key: &'static str,
    pub not_after: String,
}

/// What the mapper knows of an agent.
#[derive(Debug, Serialize)]
pub(super) struct Agent {
    pub identity: Identity,
    pub load: Option<f64>,
    pub services: Vec<String>,
    pub tags: Vec<String>,
}

/// What one way of choosing agents gave.
#[derive(Debug, Serialize)]
pub(super) struct Asked {
    /// The selector, or what else chose.
    pub by: &'static str,
    /// How many requests were sent.
    pub requests: usize,
    /// Who answered, in order.
    pub answered_by: Vec<Identity>,
    /// The last answer of each.
    pub results: BTreeMap<Identity, Payload>,
    /// The mean time of a request.
    pub millis: f64,
    /// Whether the agents that should have answered did, with the right answer.
    pub ok: bool,
}

/// A request that was answered in parts.
#[derive(Debug, Default, Serialize)]
pub(super) struct Parts {
    pub service: &'static str,
    /// Key and value of each part, in order.
    pub parts: Vec<(String, Payload)>,
    pub result: Payload,
    pub ok: bool,
}

/// A request that failed as it should.
#[derive(Debug, Serialize)]
pub(super) struct Failed {
    /// What was asked.
    pub asked: &'static str,
    /// Who said that it failed; none when no agent got it.
    pub from: Option<Identity>,
    pub code: String,
    pub message: String,
    pub ok: bool,
}

/// What the broker carried for one pass of all requests, and what can be read in it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Broker {
    pub messages: usize,
    pub bytes: usize,
    pub smallest: usize,
    pub largest: usize,
    pub searched: Vec<Searched>,
    /// How many of the secret words were found, in all.
    pub plaintext_found: usize,
}

/// How often a word is in the messages.
#[derive(Debug, Serialize)]
pub(super) struct Searched {
    pub what: &'static str,
    pub word: &'static str,
    /// Whether nobody but sender and recipient may know it.
    pub secret: bool,
    pub found: usize,
    /// How often it is in the same messages, sent plain: it shows that the search finds what is there.
    pub found_when_plain: usize,
}

/// A message that was put into an agent's queue, and what became of it.
#[derive(Debug, Serialize)]
pub(super) struct Refusal {
    pub attack: &'static str,
    pub how: &'static str,
    pub at: Identity,
    #[serde(serialize_with = "kind")]
    pub expected: Option<OpenErrorKind>,
    /// By which step it was refused; none when it was not.
    #[serde(serialize_with = "kind")]
    pub refused: Option<OpenErrorKind>,
    /// Whether a handler ran.
    pub handler_ran: bool,
}

fn kind<S: Serializer>(kind: &Option<OpenErrorKind>, serializer: S) -> Result<S::Ok, S::Error> {
    kind.map(OpenErrorKind::as_str).serialize(serializer)
}

impl Refusal {
    pub fn is_ok(&self) -> bool {
        self.refused == self.expected && !self.handler_ran
    }
}

/// How fast one format is.
#[derive(Debug, Serialize)]
pub(super) struct Rates {
    pub of: &'static str,
    pub at: Vec<Rate>,
}

/// How many requests were answered in how long.
#[derive(Debug, Serialize)]
pub(super) struct Rate {
    pub in_flight: usize,
    pub round_trips: u64,
    pub failed: u64,
    pub seconds: f64,
    pub per_second: f64,
}

impl Facts {
    /// Notes what is not as it should be.
    pub fn judge(&mut self) {
        let mut problems = Vec::new();
        for asked in self.requests.iter().filter(|asked| !asked.ok) {
            problems.push(format!("{}: answered by {:?}: {:?}", asked.by, asked.answered_by, asked.results));
        }
        if !self.parts.ok {
            problems.push(format!("{}: {:?}, then {}", self.parts.service, self.parts.parts, self.parts.result));
        }
        for failed in self.failures.iter().filter(|failed| !failed.ok) {
            problems.push(format!("{}: {}: {}", failed.asked, failed.code, failed.message));
        }
        for searched in &self.broker.searched {
            if searched.secret && searched.found > 0 {
                problems.push(format!("the broker can read the {} '{}'", searched.what, searched.word));
            }
            if searched.found_when_plain == 0 {
                problems.push(format!("the search does not find '{}' where it is", searched.word));
            }
        }
        for refusal in self.refusals.iter().filter(|refusal| !refusal.is_ok()) {
            let Refusal { attack, refused, expected, handler_ran, .. } = refusal;
            let name = |kind: &Option<OpenErrorKind>| kind.map_or("not refused", OpenErrorKind::as_str);
            let ran = if *handler_ran { ", and a handler ran" } else { "" };
            problems.push(format!("{attack}: {}, where {} is right{ran}", name(refused), name(expected)));
        }
        for rate in self.rates.iter().flat_map(|rates| &rates.at) {
            if rate.failed > 0 || rate.round_trips == 0 {
                problems.push(format!("{} of {} requests failed", rate.failed, rate.round_trips + rate.failed));
            }
        }
        self.ok = problems.is_empty();
        self.problems = problems;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Facts of which the search alone has something to say.
    fn facts(found: usize, found_when_plain: usize, refusal: Refusal) -> Facts {
        let word = Searched { what: "payload", word: "secret", secret: true, found, found_when_plain };
        let mut facts = Facts {
            parts: Parts { ok: true, ..Parts::default() },
            broker: Broker { searched: vec![word], ..Broker::default() },
            refusals: vec![refusal],
            ..Facts::default()
        };
        facts.judge();
        facts
    }

    fn refusal(refused: Option<OpenErrorKind>, handler_ran: bool) -> Refusal {
        let at = Identity::agent("ada").unwrap();
        Refusal { attack: "forged", how: "", at, expected: Some(OpenErrorKind::UnknownSigner), refused, handler_ran }
    }

    #[test]
    fn u01_what_is_not_as_it_should_be_is_a_problem() {
        let good = || refusal(Some(OpenErrorKind::UnknownSigner), false);
        assert!(facts(0, 1, good()).ok);
        assert_eq!(facts(1, 1, good()).problems, ["the broker can read the payload 'secret'"]);
        assert_eq!(facts(0, 0, good()).problems, ["the search does not find 'secret' where it is"]);
        for bad in [refusal(None, false), refusal(Some(OpenErrorKind::BadBody), false)] {
            assert!(!facts(0, 1, bad).ok);
        }
        assert!(!facts(0, 1, refusal(Some(OpenErrorKind::UnknownSigner), true)).ok, "refused, but a handler ran");
    }
}
