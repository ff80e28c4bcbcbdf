//! How it looks: at most 80 columns, the same in a pipe as on a terminal but for the colours.

use std::collections::BTreeMap;

use super::facts::{Agent, Asked, Broker, Certificates, Facts, Failed, Parts, Rate, Refusal};
use super::world::{SHOUT, TEXT, WORDS};
use crate::cli::error::CliError;
use crate::cli::output::{self, Paint};
use crate::packet::Identity;

/// How wide it is.
const WIDTH: usize = 80;

/// Prints what is seen, scene by scene; or nothing, where it is printed as JSON at the end.
pub(super) struct Show {
    paint: Option<Paint>,
}

/// The mark at the end of a line.
fn mark(paint: Paint, ok: bool) -> String {
    if ok { paint.green("ok") } else { paint.red("NO") }
}

impl Show {
    pub fn new(visible: bool) -> Self {
        Self { paint: visible.then(output::stdout_paint) }
    }

    /// Prints lines that are made with colours.
    fn lines(&self, make: impl FnOnce(Paint) -> Vec<String>) -> Result<(), CliError> {
        let Some(paint) = self.paint else { return Ok(()) };
        output::line(&make(paint).join("\n"))
    }

    pub fn title(&self) -> Result<(), CliError> {
        self.lines(|paint| {
            let what = "a CA, two agents, a mapper and a broker in one process; nothing on disk";
            vec![format!("{}  {what}", paint.bold("nanite"))]
        })
    }

    pub fn certificates(&self, made: &Certificates) -> Result<(), CliError> {
        self.lines(|paint| {
            let note = format!("{} made in {:.1} ms", made.issued.len(), made.millis);
            let row = |one: &super::facts::Issued| {
                format!("   {:<14}{:<36}{:<7}until {}", one.name, one.uri, one.key, one.not_after)
            };
            heading(paint, 1, "Certificates", &note).into_iter().chain(made.issued.iter().map(row)).collect()
        })
    }

    pub fn agents(&self, agents: &[Agent], millis: f64) -> Result<(), CliError> {
        self.lines(|paint| {
            let note = format!("registered with the mapper in {millis:.1} ms");
            let row = |agent: &Agent| {
                let load = agent.load.map_or_else(|| "-".to_owned(), |load| format!("{load:.2}"));
                // All services are of one actor: its name once.
                let names: Vec<&str> =
                    agent.services.iter().filter_map(|service| service.strip_prefix("/message/")).collect();
                let tags = match agent.tags.as_slice() {
                    [] => String::new(),
                    tags => format!("  tag {}", tags.join(", ")),
                };
                format!("   {:<14}load {load}  /message/{{{}}}{tags}", agent.identity.as_str(), names.join(","))
            };
            heading(paint, 2, "Agents", &note).into_iter().chain(agents.iter().map(row)).collect()
        })
    }

    pub fn requests(&self, requests: &[Asked]) -> Result<(), CliError> {
        self.lines(|paint| {
            let asked = format!("{SHOUT} \"{TEXT}\"");
            let row = |asked: &Asked| {
                let time = format!("{:.2} ms", asked.millis);
                let who = who_answered(asked.by, &asked.answered_by);
                format!("   {:<14}{who:<49}{time:>9}  {}", asked.by, mark(paint, asked.ok))
            };
            heading(paint, 3, "Requests", &asked).into_iter().chain(requests.iter().map(row)).collect()
        })
    }

    pub fn parts_and_failures(&self, parts: &Parts, failures: &[Failed]) -> Result<(), CliError> {
        self.lines(|paint| {
            let values: Vec<&str> = parts.parts.iter().filter_map(|(_, value)| value.as_str()).collect();
            let whole = parts.result.as_str().unwrap_or_default();
            let said = format!("{}; then \"{whole}\"", values.join(" | "));
            let mut lines = heading(paint, 4, "Answers in parts, and failures", "");
            lines.push(format!("   {WORDS:<17}{said:<55}  {}", mark(paint, parts.ok)));
            for failed in failures {
                let from = failed.from.as_ref().map(|from| format!("{from}: ")).unwrap_or_default();
                let said = format!("{from}{}: {}", failed.code, failed.message);
                lines.extend(wrapped(failed.asked, &said, &mark(paint, failed.ok)));
            }
            lines
        })
    }

    pub fn broker(&self, broker: &Broker) -> Result<(), CliError> {
        self.lines(|paint| {
            let Broker { messages, bytes, smallest, largest, .. } = broker;
            let note =
                format!("{messages} messages of {smallest} to {largest} bytes, {:.1} KiB", *bytes as f64 / 1024.0);
            let mut lines = heading(paint, 5, "What the broker saw", &note);
            let head = format!("   {:<38}{:>16}{:>18}", "messages with", "signed, sealed", "the same, plain");
            lines.push(paint.dim(&head));
            for word in &broker.searched {
                let what = format!("{:<9}{}", word.what, word.word);
                // A name is in the clear, and its search shows that the search works.
                let ok = if word.secret { word.found == 0 } else { word.found > 0 } && word.found_when_plain > 0;
                let found = format!("{:>16}", word.found);
                let found = match word.secret {
                    true if word.found == 0 => paint.green(&found),
                    true => paint.red(&found),
                    false => found,
                };
                lines.push(format!("   {what:<38}{found}{:>18}  {}", word.found_when_plain, mark(paint, ok)));
            }
            lines.push(paint.dim("   Who talks to whom, when, and how much, is what the broker has to know."));
            lines
        })
    }

    pub fn refusals(&self, refusals: &[Refusal]) -> Result<(), CliError> {
        self.lines(|paint| {
            let note = "put into agents' queues; no handler may run";
            let row = |refusal: &Refusal| {
                let kind = refusal.refused.map_or("ACCEPTED", |kind| kind.as_str());
                let kind = format!("{kind:<16}");
                let ok = refusal.is_ok();
                let kind = if ok { paint.cyan(&kind) } else { paint.red(&kind) };
                format!("   {:<14}{:<42}{kind}  {}", refusal.attack, refusal.how, mark(paint, ok))
            };
            heading(paint, 6, "Refused", note).into_iter().chain(refusals.iter().map(row)).collect()
        })
    }

    pub fn rates_begin(&self) -> Result<(), CliError> {
        self.lines(|paint| {
            let mut lines = heading(paint, 7, "Round trips per second", "half a second each");
            let columns = super::rates::IN_FLIGHT.map(|n| format!("{:>29}", format!("{n} in flight")));
            lines.push(paint.dim(&format!("   {:<14}{}", "", columns.concat())));
            lines
        })
    }

    pub fn rates(&self, of: &str, rates: &[Rate]) -> Result<(), CliError> {
        self.lines(|paint| {
            let columns: String =
                rates.iter().map(|rate| format!("{:>29}", thousands(rate.per_second.round() as u64))).collect();
            let ok = rates.iter().all(|rate| rate.failed == 0 && rate.round_trips > 0);
            vec![format!("   {of:<14}{}  {}", paint.bold(&columns), mark(paint, ok))]
        })
    }

    pub fn end(&self, facts: &Facts) -> Result<(), CliError> {
        self.lines(|paint| {
            let took = format!("{:.1} s", facts.seconds);
            if facts.ok {
                return vec![String::new(), paint.green(&format!("All is as it should be, in {took}."))];
            }
            let mut lines = vec![String::new(), paint.red(&format!("Not as it should be, after {took}:"))];
            lines.extend(facts.problems.iter().map(|problem| format!("   {problem}")));
            lines
        })
    }
}

/// An empty line, then a number, a title and, at the right end, a note.
fn heading(paint: Paint, number: usize, title: &str, note: &str) -> Vec<String> {
    let room = WIDTH.saturating_sub(3 + title.len());
    let note = if note.is_empty() { String::new() } else { paint.dim(&format!("{note:>room$}")) };
    vec![String::new(), format!("{}  {}{note}", paint.dim(&number.to_string()), paint.bold(title))]
}

/// A name, what is said of it in lines that fit, and the mark behind the last.
fn wrapped(name: &str, said: &str, mark: &str) -> Vec<String> {
    const ROOM: usize = 55;
    let mut rows = vec![String::new()];
    for word in said.split(' ') {
        let Some(row) = rows.last_mut() else { break };
        if !row.is_empty() && row.len() + 1 + word.len() > ROOM {
            rows.push(word.to_owned());
        } else {
            if !row.is_empty() {
                row.push(' ');
            }
            row.push_str(word);
        }
    }
    let last = rows.len() - 1;
    rows.into_iter()
        .enumerate()
        .map(|(at, row)| {
            let name = if at == 0 { name } else { "" };
            if at == last { format!("   {name:<17}{row:<ROOM$}  {mark}") } else { format!("   {name:<17}{row}") }
        })
        .collect()
}

/// Who answered: in their order, or how often each where it is always the same one, or chance decides.
fn who_answered(by: &str, from: &[Identity]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for one in from {
        *counts.entry(one.as_str()).or_default() += 1;
    }
    if by == "random" || (counts.len() == 1 && from.len() > 1) {
        return counts.iter().map(|(one, count)| format!("{count} x {one}")).collect::<Vec<_>>().join(", ");
    }
    from.iter().map(Identity::as_str).collect::<Vec<_>>().join(", ")
}

/// A number with commas.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u01_numbers_and_long_texts_are_easy_to_read() {
        let numbers = [0, 7, 999, 1000, 1_234_567].map(thousands);
        assert_eq!(numbers, ["0", "7", "999", "1,000", "1,234,567"]);
        let lines = wrapped("name", &"word ".repeat(20), "ok");
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{lines:?}");
    }
}
