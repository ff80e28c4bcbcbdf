//! Answers as they are shown, and the exit code that they come to.

use std::collections::BTreeMap;

use super::error::Exit;
use super::text::printable;
use crate::packet::{Failure, FailureCode, Identity, Payload};
use crate::request::Answers;

/// What became of the targets, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Answered with a value.
    pub answered: usize,
    /// Answered with a failure.
    pub failed: usize,
    /// Did not answer.
    pub missing: usize,
}

impl Tally {
    /// Counts.
    pub(super) fn of(answers: &Answers) -> Self {
        let mut tally = Self::default();
        for result in answers.outcomes.values() {
            *match result {
                Ok(_) => &mut tally.answered,
                Err(failure) if is_missing(failure) => &mut tally.missing,
                Err(_) => &mut tally.failed,
            } += 1;
        }
        tally
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} answered, ", self.answered)?;
        if self.failed > 0 {
            write!(f, "{} failed, ", self.failed)?;
        }
        write!(f, "{} missing", self.missing)
    }
}

fn is_missing(failure: &Failure) -> bool {
    matches!(failure.code, FailureCode::TimedOut | FailureCode::Lost)
}

/// The exit code: success when all have answered; incomplete when only some have, or somebody did not answer at all; else what
/// all failures have in common.
pub(super) fn exit(answers: &Answers) -> Exit {
    let tally = Tally::of(answers);
    if tally.answered == answers.outcomes.len() {
        return Exit::Success;
    }
    if tally.answered > 0 || tally.missing > 0 {
        return Exit::Incomplete;
    }
    let all = |wanted: &[FailureCode]| answers.failures().all(|(_, failure)| wanted.contains(&failure.code));
    if all(&[FailureCode::Denied]) {
        Exit::Denied
    } else if all(&[FailureCode::NoSuchService, FailureCode::NoTarget]) {
        Exit::NotOffered
    } else {
        Exit::Failure
    }
}

/// The values, one after the other: of one agent bare, of several behind its name.
pub(super) fn values(answers: &Answers, terminal: bool) -> Vec<String> {
    let alone = answers.outcomes.len() == 1;
    let line = |(from, value): (&Identity, &Payload)| {
        if alone { bare(value, terminal) } else { format!("{from}: {}", in_line(value, terminal)) }
    };
    answers.results().map(line).collect()
}

/// The failures, one line each.
pub(super) fn failures(answers: &Answers) -> Vec<String> {
    answers.failures().map(|(from, failure)| printable(&format!("{from}: {failure}"), false).into_owned()).collect()
}

/// A part of an answer, in one line.
pub(super) fn part(from: &Identity, key: &str, value: &Payload, terminal: bool) -> String {
    format!("{from} {}: {}", printable(key, false), in_line(value, terminal))
}

/// A text as it is, anything else as JSON. On a terminal nothing in it can steer the terminal.
fn bare(value: &Payload, terminal: bool) -> String {
    let text = match value.as_str() {
        Some(text) => text.to_owned(),
        None => value.to_string(),
    };
    if terminal { printable(&text, true).into_owned() } else { text }
}

/// The same, in one line: a text that could be mistaken for another agent's line is written as JSON.
fn in_line(value: &Payload, terminal: bool) -> String {
    match value.as_str() {
        Some(text) if !text.contains(char::is_control) => bare(value, terminal),
        _ if terminal => printable(&value.to_string(), false).into_owned(),
        _ => value.to_string(),
    }
}

/// Values by agent, for JSON output.
pub(super) type ByAgent<T> = BTreeMap<Identity, T>;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answers(outcomes: &[(&str, Result<serde_json::Value, FailureCode>)]) -> Answers {
        let outcome = |(name, result): &(&str, Result<serde_json::Value, FailureCode>)| {
            let result = result.clone().map(Payload).map_err(|code| Failure::new(code, "why"));
            (Identity::agent(name).unwrap(), result)
        };
        Answers { outcomes: outcomes.iter().map(outcome).collect() }
    }

    #[test]
    fn u02_each_kind_of_failure_has_its_exit_code() {
        use FailureCode as F;
        let ok = || Ok(json!(1));
        for (outcomes, expected) in [
            (vec![ok()], Exit::Success),
            (vec![ok(), ok()], Exit::Success),
            (vec![ok(), Err(F::Failed)], Exit::Incomplete),
            (vec![ok(), Err(F::Denied)], Exit::Incomplete),
            (vec![Err(F::TimedOut)], Exit::Incomplete),
            (vec![Err(F::Lost)], Exit::Incomplete),
            (vec![Err(F::Denied), Err(F::TimedOut)], Exit::Incomplete),
            (vec![Err(F::Denied)], Exit::Denied),
            (vec![Err(F::Denied), Err(F::Denied)], Exit::Denied),
            (vec![Err(F::NoSuchService)], Exit::NotOffered),
            (vec![Err(F::Denied), Err(F::Failed)], Exit::Failure),
            (vec![Err(F::Failed)], Exit::Failure),
            (vec![Err(F::Other("own".into()))], Exit::Failure),
        ] {
            let names: Vec<String> = (0..outcomes.len()).map(|n| format!("a{n}")).collect();
            let named: Vec<_> = names.iter().map(String::as_str).zip(outcomes).collect();
            assert_eq!(exit(&answers(&named)), expected, "{named:?}");
        }
    }

    #[test]
    fn u02_it_is_said_how_many_answered_and_how_many_are_missing() {
        use FailureCode as F;
        let all = answers(&[("a", Ok(json!(1))), ("b", Err(F::Failed)), ("c", Err(F::Lost)), ("d", Err(F::TimedOut))]);
        assert_eq!(Tally::of(&all).to_string(), "1 answered, 1 failed, 2 missing");
        assert_eq!(Tally::of(&answers(&[("a", Ok(json!(1)))])).to_string(), "1 answered, 0 missing");
    }

    #[test]
    fn u02_one_answer_is_bare_and_several_have_names() {
        assert_eq!(values(&answers(&[("a", Ok(json!("text")))]), false), ["text"]);
        assert_eq!(values(&answers(&[("a", Ok(json!({"k": [1]})))]), false), [r#"{"k":[1]}"#]);
        let two = answers(&[("a", Ok(json!("text"))), ("b", Ok(json!(null)))]);
        assert_eq!(values(&two, false), ["nanite-a: text", "nanite-b: null"]);
        let one_of_two = answers(&[("a", Ok(json!("text"))), ("b", Err(FailureCode::Lost))]);
        assert_eq!(values(&one_of_two, false), ["nanite-a: text"]);
        assert_eq!(failures(&one_of_two), ["nanite-b: lost: why"]);
    }

    #[test]
    fn u02_no_answer_can_pass_for_anothers_or_steer_the_terminal() {
        let forged = answers(&[("a", Ok(json!("x\nnanite-b: y"))), ("c", Ok(json!(1)))]);
        assert_eq!(values(&forged, false), [r#"nanite-a: "x\nnanite-b: y""#, "nanite-c: 1"]);
        let steering = answers(&[("a", Ok(json!("\u{1b}[2J\u{9b}1m")))]);
        assert_eq!(values(&steering, true), [r"\u{1b}[2J\u{9b}1m"]);
        assert_eq!(values(&steering, false), ["\u{1b}[2J\u{9b}1m"], "what is piped is not changed");
        let inside = answers(&[("a", Ok(json!(["\u{9b}1m\u{202e}"])))]);
        assert_eq!(values(&inside, true), [r#"["\u{9b}1m\u{202e}"]"#]);
    }
}
