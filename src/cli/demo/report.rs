//! The results of the demonstration: as JSON, and as text of at most 80 columns.

use std::collections::BTreeMap;
use std::time::Instant;

use indicatif::HumanCount;
use serde::{Serialize, Serializer};

use crate::cli::output::stdout_paint;
use crate::packet::{Identity, Payload};
use crate::serializer::OpenErrorKind;

const WIDTH: usize = 80;
/// The width of a wrapped text between its name and its mark.
const TEXT_WIDTH: usize = 55;

#[derive(Default, Serialize)]
pub(super) struct Report {
    /// Whether all results are as expected.
    pub ok: bool,
    /// The unexpected results.
    problems: Vec<String>,
    pub certificates: Certificates,
    pub agents: Vec<AgentInfo>,
    pub requests: Vec<Selection>,
    pub parts: PartialAnswers,
    pub failures: Vec<FailedRequest>,
    pub broker: BrokerView,
    pub refusals: Vec<Refusal>,
    pub rates: Vec<Rates>,
    seconds: f64,
}

#[derive(Default, Serialize)]
pub(super) struct Certificates {
    pub issued: Vec<IssuedCertificate>,
    pub millis: f64,
}

#[derive(Serialize)]
pub(super) struct IssuedCertificate {
    pub name: String,
    pub uri: String,
    pub key: &'static str,
    pub not_after: String,
}

#[derive(Serialize)]
pub(super) struct AgentInfo {
    pub identity: Identity,
    pub load: Option<f64>,
    pub services: Vec<String>,
    pub tags: Vec<String>,
}

/// The results of one way to select agents.
#[derive(Default, Serialize)]
pub(super) struct Selection {
    pub by: &'static str,
    pub requests: usize,
    /// In the order of the answers.
    pub answered_by: Vec<Identity>,
    /// The last answer of each agent.
    pub results: BTreeMap<Identity, Payload>,
    /// Mean time of a request.
    pub millis: f64,
    pub ok: bool,
}

#[derive(Default, Serialize)]
pub(super) struct PartialAnswers {
    pub service: &'static str,
    /// Key and value of each, in order.
    pub parts: Vec<(String, Payload)>,
    pub result: Payload,
    pub ok: bool,
}

/// A request that is meant to fail.
#[derive(Serialize)]
pub(super) struct FailedRequest {
    pub asked: &'static str,
    /// None if no agent received it.
    pub from: Option<Identity>,
    pub code: String,
    pub message: String,
    pub ok: bool,
}

/// The messages that the broker carried, and what can be read in them.
#[derive(Default, Serialize)]
pub(super) struct BrokerView {
    pub messages: usize,
    pub bytes: usize,
    pub smallest: usize,
    pub largest: usize,
    pub searched: Vec<SearchedWord>,
    /// How many occurrences of secret words were found.
    pub plaintext_found: usize,
}

#[derive(Serialize)]
pub(super) struct SearchedWord {
    pub what: &'static str,
    pub word: &'static str,
    /// Whether only sender and recipient may know it.
    pub secret: bool,
    pub found: usize,
    /// How many of the same messages contain it in plain text, which shows that the search works.
    pub found_when_plain: usize,
}

/// An attack, and how it ended.
#[derive(Serialize)]
pub(super) struct Refusal {
    pub attack: &'static str,
    pub how: &'static str,
    pub at: Identity,
    #[serde(serialize_with = "kind_name")]
    pub expected: OpenErrorKind,
    /// None if it was not refused.
    #[serde(serialize_with = "kind_name")]
    pub refused: Option<OpenErrorKind>,
    pub handler_ran: bool,
}

fn kind_name<S: Serializer>(
    kind: &(impl Into<Option<OpenErrorKind>> + Clone),
    serializer: S,
) -> Result<S::Ok, S::Error> {
    kind.clone().into().map(OpenErrorKind::as_str).serialize(serializer)
}

#[derive(Serialize)]
pub(super) struct Rates {
    pub of: &'static str,
    pub at: Vec<Rate>,
}

#[derive(Default, Serialize)]
pub(super) struct Rate {
    pub in_flight: usize,
    pub round_trips: u64,
    pub failed: u64,
    pub seconds: f64,
    pub per_second: f64,
}

pub(super) fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

impl Report {
    /// Collects the unexpected results.
    pub(super) fn finish(&mut self, start: Instant) {
        self.seconds = start.elapsed().as_secs_f64();
        let mut problems = Vec::new();
        for Selection { by, answered_by, results, .. } in self.requests.iter().filter(|selection| !selection.ok) {
            problems.push(format!("{by}: answered by {answered_by:?}: {results:?}"));
        }
        if !self.parts.ok {
            problems.push(format!("{}: {:?}, then {}", self.parts.service, self.parts.parts, self.parts.result));
        }
        for FailedRequest { asked, code, message, .. } in self.failures.iter().filter(|failed| !failed.ok) {
            problems.push(format!("{asked}: {code}: {message}"));
        }
        for SearchedWord { what, word, secret, found, found_when_plain } in &self.broker.searched {
            if *secret && *found > 0 {
                problems.push(format!("the broker can read the {what} '{word}'"));
            }
            if *found_when_plain == 0 {
                problems.push(format!("the search does not find '{word}' in plain messages"));
            }
        }
        for refusal in self.refusals.iter().filter(|refusal| !refusal.is_ok()) {
            let Refusal { attack, refused, expected, handler_ran, .. } = refusal;
            let refused = refused.map_or("not refused", OpenErrorKind::as_str);
            let handler = if *handler_ran { ", and a handler was called" } else { "" };
            problems.push(format!("{attack}: {refused}, expected {}{handler}", expected.as_str()));
        }
        for Rate { failed, round_trips, .. } in self.rates.iter().flat_map(|rates| &rates.at).filter(|at| !at.is_ok()) {
            problems.push(format!("{failed} of {} requests failed", round_trips + failed));
        }
        self.ok = problems.is_empty();
        self.problems = problems;
    }

    pub(super) fn agent_lines(&self, millis: f64) -> Vec<String> {
        let row = |agent: &AgentInfo| {
            let load = agent.load.map_or_else(|| "-".to_owned(), |load| format!("{load:.2}"));
            // All services are of one actor: its name once.
            let names: Vec<&str> = agent.services.iter().filter_map(|name| name.strip_prefix("/message/")).collect();
            let tags = if agent.tags.is_empty() { String::new() } else { format!("  tag {}", agent.tags.join(", ")) };
            format!("   {:<14}load {load}  /message/{{{}}}{tags}", agent.identity.as_str(), names.join(","))
        };
        section(2, "Agents", &format!("registered with the mapper in {millis:.1} ms"), self.agents.iter().map(row))
    }

    pub(super) fn request_lines(&self, request: &str) -> Vec<String> {
        let row = |selection: &Selection| {
            let (by, agents, time) = (selection.by, selection.agents(), format!("{:.2} ms", selection.millis));
            format!("   {by:<14}{agents:<49}{time:>9}  {}", mark(selection.ok))
        };
        section(3, "Requests", request, self.requests.iter().map(row))
    }

    pub(super) fn parts_and_failure_lines(&self) -> Vec<String> {
        let values: Vec<&str> = self.parts.parts.iter().filter_map(|(_, value)| value.as_str()).collect();
        let parts = format!("{}; then \"{}\"", values.join(" | "), self.parts.result.as_str().unwrap_or_default());
        let mut rows = wrapped(self.parts.service, &parts, self.parts.ok);
        for FailedRequest { asked, from, code, message, ok } in &self.failures {
            let from = from.as_ref().map(|from| format!("{from}: ")).unwrap_or_default();
            rows.extend(wrapped(asked, &format!("{from}{code}: {message}"), *ok));
        }
        section(4, "Partial answers, and failures", "", rows)
    }

    pub(super) fn refusal_lines(&self) -> Vec<String> {
        let row = |refusal: &Refusal| {
            let (kind, ok) = (refusal.refused.map_or("ACCEPTED", OpenErrorKind::as_str), refusal.is_ok());
            let kind = format!("{kind:<16}");
            let kind = if ok { stdout_paint().cyan(&kind) } else { stdout_paint().red(&kind) };
            format!("   {:<14}{:<42}{kind}  {}", refusal.attack, refusal.how, mark(ok))
        };
        section(6, "Refused", "sent to agents' queues; no handler may be called", self.refusals.iter().map(row))
    }

    pub(super) fn summary(&self) -> Vec<String> {
        let paint = stdout_paint();
        let mut lines = vec![String::new()];
        if self.ok {
            lines.push(paint.green(&format!("Everything as expected, in {:.1} s.", self.seconds)));
        } else {
            lines.push(paint.red(&format!("Not as expected, after {:.1} s:", self.seconds)));
            lines.extend(self.problems.iter().map(|problem| format!("   {problem}")));
        }
        lines
    }
}

impl Certificates {
    pub(super) fn lines(&self) -> Vec<String> {
        let row = |certificate: &IssuedCertificate| {
            let IssuedCertificate { name, uri, key, not_after } = certificate;
            format!("   {name:<14}{uri:<36}{key:<7}until {not_after}")
        };
        let note = format!("{} issued in {:.1} ms", self.issued.len(), self.millis);
        section(1, "Certificates", &note, self.issued.iter().map(row))
    }
}

impl Selection {
    /// The agents in the order of their answers, or their number of answers if it is always the same agent or chance decides.
    fn agents(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for agent in &self.answered_by {
            *counts.entry(agent.as_str()).or_default() += 1;
        }
        if self.by == "random" || (counts.len() == 1 && self.answered_by.len() > 1) {
            return counts.iter().map(|(agent, count)| format!("{count} x {agent}")).collect::<Vec<_>>().join(", ");
        }
        self.answered_by.iter().map(Identity::as_str).collect::<Vec<_>>().join(", ")
    }
}

impl BrokerView {
    pub(super) fn lines(&self) -> Vec<String> {
        let paint = stdout_paint();
        let Self { messages, bytes, smallest, largest, .. } = self;
        let note = format!("{messages} messages of {smallest} to {largest} bytes, {:.1} KiB", *bytes as f64 / 1024.0);
        let heading = format!("   {:<38}{:>16}{:>18}", "messages with", "signed, sealed", "the same, plain");
        let row = |word: &SearchedWord| {
            // A name is not encrypted, and shows that the search works.
            let ok = word.secret == (word.found == 0) && word.found_when_plain > 0;
            let found = format!("{:>16}", word.found);
            let found = match word.secret {
                true if word.found == 0 => paint.green(&found),
                true => paint.red(&found),
                false => found,
            };
            let what = format!("{:<9}{}", word.what, word.word);
            format!("   {what:<38}{found}{:>18}  {}", word.found_when_plain, mark(ok))
        };
        let footer = "   The broker has to see sender, recipients, time and size of each message.";
        let rows = std::iter::once(paint.dim(&heading)).chain(self.searched.iter().map(row));
        section(5, "What the broker saw", &note, rows.chain([paint.dim(footer)]))
    }
}

impl Refusal {
    fn is_ok(&self) -> bool {
        self.refused == Some(self.expected) && !self.handler_ran
    }
}

impl Rate {
    fn is_ok(&self) -> bool {
        self.failed == 0 && self.round_trips > 0
    }
}

impl Rates {
    pub(super) fn lines(&self) -> Vec<String> {
        let columns =
            self.at.iter().map(|rate| format!("{:>29}", HumanCount(rate.per_second.round() as u64).to_string()));
        let columns = stdout_paint().bold(&columns.collect::<String>());
        vec![format!("   {:<14}{columns}  {}", self.of, mark(self.at.iter().all(Rate::is_ok)))]
    }
}

pub(super) fn title() -> Vec<String> {
    let title = stdout_paint().bold("nanite");
    vec![format!("{title}  a CA, two agents, a mapper and a broker in one process; nothing on disk")]
}

pub(super) fn rates_heading(in_flight: &[usize]) -> Vec<String> {
    let columns: String = in_flight.iter().map(|count| format!("{:>29}", format!("{count} in flight"))).collect();
    let columns = stdout_paint().dim(&format!("   {:<14}{columns}", ""));
    section(7, "Round trips per second", "half a second each", [columns])
}

/// An empty line, a number and a title with a note at the right margin, and rows.
fn section(number: usize, title: &str, note: &str, rows: impl IntoIterator<Item = String>) -> Vec<String> {
    let paint = stdout_paint();
    let room = WIDTH.saturating_sub(3 + title.len());
    let note = if note.is_empty() { String::new() } else { paint.dim(&format!("{note:>room$}")) };
    let heading = format!("{}  {}{note}", paint.dim(&number.to_string()), paint.bold(title));
    [String::new(), heading].into_iter().chain(rows).collect()
}

/// A name, a text in lines that fit, and a mark after the last.
fn wrapped(name: &str, text: &str, ok: bool) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + 1 + word.len() <= TEXT_WIDTH => *line = format!("{line} {word}"),
            _ => lines.push(word.to_owned()),
        }
    }
    let last = lines.pop().unwrap_or_default();
    let mut names = std::iter::once(name).chain(std::iter::repeat(""));
    let mut rows: Vec<String> =
        lines.iter().map(|line| format!("   {:<17}{line}", names.next().unwrap_or_default())).collect();
    rows.push(format!("   {:<17}{last:<TEXT_WIDTH$}  {}", names.next().unwrap_or_default(), mark(ok)));
    rows
}

fn mark(ok: bool) -> String {
    if ok { stdout_paint().green("ok") } else { stdout_paint().red("NO") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report where only the search and one attack may have unexpected results.
    fn problems(
        found: usize,
        found_when_plain: usize,
        refused: Option<OpenErrorKind>,
        handler_ran: bool,
    ) -> Vec<String> {
        let word = SearchedWord { what: "payload", word: "secret", secret: true, found, found_when_plain };
        let (at, expected) = (Identity::agent("ada").unwrap(), OpenErrorKind::UnknownSigner);
        let mut report = Report {
            parts: PartialAnswers { ok: true, ..PartialAnswers::default() },
            broker: BrokerView { searched: vec![word], ..BrokerView::default() },
            refusals: vec![Refusal { attack: "forged", how: "", at, expected, refused, handler_ran }],
            ..Report::default()
        };
        report.finish(Instant::now());
        assert_eq!(report.ok, report.problems.is_empty());
        report.problems
    }

    #[test]
    fn u01_unexpected_results_are_problems() {
        let expected = Some(OpenErrorKind::UnknownSigner);
        assert_eq!(problems(0, 1, expected, false), [""; 0]);
        assert_eq!(problems(1, 1, expected, false), ["the broker can read the payload 'secret'"]);
        assert_eq!(problems(0, 0, expected, false), ["the search does not find 'secret' in plain messages"]);
        for (refused, handler_ran) in [(None, false), (Some(OpenErrorKind::BadBody), false), (expected, true)] {
            assert_eq!(problems(0, 1, refused, handler_ran).len(), 1, "{refused:?} {handler_ran}");
        }
    }

    #[test]
    fn u01_long_texts_are_wrapped_and_large_numbers_grouped() {
        assert_eq!([0, 999, 1_234_567].map(|number| HumanCount(number).to_string()), ["0", "999", "1,234,567"]);
        let rows = wrapped("name", &"word ".repeat(20), true);
        assert_eq!(rows.len(), 2);
        assert!(rows.iter().all(|row| row.len() <= WIDTH), "{rows:?}");
    }
}
