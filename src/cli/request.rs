//! `nanite request` and `nanite push`: send requests and pushes to agents, and show the answers.

use std::fmt;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use serde_json::json;

use super::dispatch::{DispatchArgs, Route};
use super::error::{CliError, Exit, Result};
use super::fleet::Fleet;
use super::node::WithNode;
use super::output::{counted, failure_line, or_empty_json, printable};
use super::runtime::Global;
use super::{args, output, remedy};
use crate::packet::{Failure, FailureCode, Identity, Payload};
use crate::request::{Answers, Event};

/// Send a request to agents, and show their answers.
///
/// Each command runs a short-lived mapper, which needs the certificate of a mapper. Answers go to stdout, everything else to stderr.
/// Exit codes: 0 all answered, 3 no agent offers it, 4 timed out or partly answered, 5 denied, 6 certificates or keys, 7 broker
/// unreachable.
#[derive(Debug, clap::Args)]
pub(super) struct RequestArgs {
    #[command(flatten)]
    dispatch: DispatchArgs,
    /// How long to wait for answers.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = args::duration)]
    timeout: Duration,
    /// Show intermediate results as they arrive, as `ID KEY: VALUE`; with --json one object a line, {"from": ID, "key": .., "value": ..},
    /// before the last line with the answers.
    #[arg(long)]
    pub follow: bool,
    /// One JSON object on stdout: {"results": {ID: VALUE}, "failures": {ID: {"code": .., "message": ..}}}.
    #[arg(long)]
    json: bool,
}

/// Send a push to agents: work without an answer.
///
/// When the command ends, the broker has confirmed the message: it is in the queue of each agent named on stderr, or in the queue of
/// the mappers.
#[derive(Debug, clap::Args)]
pub(super) struct PushArgs {
    #[command(flatten)]
    dispatch: DispatchArgs,
    /// One JSON object on stdout: {"sent": [ID]}; empty where a mapper selects the agents.
    #[arg(long)]
    json: bool,
}

pub(super) fn request(global: &Global, WithNode { node, args }: &WithNode<RequestArgs>) -> Result<Exit> {
    let answers = args.dispatch.run(global, node, async |route, payload| args.answers(route, payload).await);
    args.show(global, answers)
}

pub(super) fn push(global: &Global, WithNode { node, args }: &WithNode<PushArgs>) -> Result<Exit> {
    let sent = args.dispatch.run(global, node, async |mut route, payload| route.push(&args.dispatch, payload).await);
    args.show(global, sent)
}

impl RequestArgs {
    /// Sends the request in the console.
    pub(super) async fn send(&self, global: &Global, fleet: &mut Fleet) -> Result<Exit> {
        let payload = self.dispatch.console_payload(global)?;
        let answers = self.answers(Route::Direct(fleet), payload).await;
        self.show(global, answers)
    }

    async fn answers(&self, mut route: Route<'_>, payload: Payload) -> Result<(Answers, Duration)> {
        let mut events = route.request(&self.dispatch, payload, self.timeout).await?;
        let started = Instant::now();
        let mut answers = Answers::default();
        while let Some(event) = events.next().await {
            match event {
                Event::Outcome { from, result, .. } => drop(answers.outcomes.insert(from, result)),
                Event::Failed(failure) => return Err(remedy::request(&failure.into(), route.broker())),
                Event::Intermediate { from, key, value, missed, .. } if self.follow => {
                    if missed > 0 {
                        let missed = usize::try_from(missed).unwrap_or(usize::MAX);
                        output::note(&format!("{from}: {} lost", counted(missed, "intermediate result")));
                    }
                    self.show_intermediate(&from, &key, &value)?;
                }
                Event::Intermediate { .. } => {}
            }
        }
        if let [agent] = &answers.outcomes.keys().collect::<Vec<_>>()[..] {
            self.dispatch.save_round_robin(agent);
        }
        Ok((answers, started.elapsed()))
    }

    fn show_intermediate(&self, from: &Identity, key: &str, value: &Payload) -> Result<()> {
        if self.json {
            return output::line(&json!({"from": from, "key": key, "value": value}).to_string());
        }
        let value = one_line(value, std::io::stdout().is_terminal());
        output::line(&format!("{from} {}: {value}", printable(key, false)))
    }

    fn show(&self, global: &Global, answers: Result<(Answers, Duration)>) -> Result<Exit> {
        let (answers, elapsed) = or_empty_json(answers, self.json, &Answers::default())?;
        if self.json && self.follow {
            let line = serde_json::to_string(&answers).map_err(|error| CliError::of(Exit::Failure, &error))?;
            output::line(&line)?;
        } else if self.json {
            output::json(&answers)?;
        } else {
            values(&answers, std::io::stdout().is_terminal()).iter().try_for_each(|value| output::line(value))?;
        }
        note_failures(&answers);
        let tally = Tally::of(&answers);
        let seconds = elapsed.as_secs_f64();
        let elapsed = if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") };
        match answers.outcomes.keys().collect::<Vec<_>>()[..] {
            [only] => global.note(&format!("{tally} ({only}, {elapsed})")),
            _ => global.note(&format!("{tally} ({elapsed})")),
        }
        if tally.missing > 0 {
            let help = output::stderr_paint().cyan("help:");
            global
                .note(&format!("{help} give them more time with `--timeout`, or list the agents with `nanite agents`"));
        }
        Ok(tally.exit(&answers))
    }
}

impl PushArgs {
    /// Sends the push in the console.
    pub(super) async fn send(&self, global: &Global, fleet: &mut Fleet) -> Result<Exit> {
        let payload = self.dispatch.console_payload(global)?;
        let sent = Route::Direct(fleet).push(&self.dispatch, payload).await;
        self.show(global, sent)
    }

    fn show(&self, global: &Global, sent: Result<Vec<Identity>>) -> Result<Exit> {
        let sent = or_empty_json(sent, self.json, &json!({"sent": []}))?;
        if self.json {
            output::json(&json!({"sent": sent}))?;
        }
        if let [agent] = &sent[..] {
            self.dispatch.save_round_robin(agent);
        }
        let names: Vec<&str> = sent.iter().map(Identity::as_str).collect();
        match (names.is_empty(), self.dispatch.via_mapper) {
            (false, _) => global.note(&format!("sent to {}", names.join(", "))),
            (true, true) => global.note("sent to the mappers"),
            (true, false) => global.note("no agent offers it: it waits in the offline queue for a running mapper"),
        }
        Ok(Exit::Success)
    }
}

/// How many targets have which outcome.
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
    pub(super) fn of(answers: &Answers) -> Self {
        let mut tally = Self::default();
        for result in answers.outcomes.values() {
            *match result {
                Ok(_) => &mut tally.answered,
                Err(Failure { code: FailureCode::TimedOut | FailureCode::Lost, .. }) => &mut tally.missing,
                Err(_) => &mut tally.failed,
            } += 1;
        }
        tally
    }

    /// The exit code: success if all answered; incomplete if only some did, or if one did not answer at all; else what all failures
    /// have in common.
    pub(super) fn exit(self, answers: &Answers) -> Exit {
        if self.answered == answers.outcomes.len() {
            return Exit::Success;
        }
        if self.answered > 0 || self.missing > 0 {
            return Exit::Incomplete;
        }
        let all = |codes: &[FailureCode]| answers.failures().all(|(_, failure)| codes.contains(&failure.code));
        if all(&[FailureCode::Denied]) {
            Exit::Denied
        } else if all(&[FailureCode::NoSuchService, FailureCode::NoTarget]) {
            Exit::NotOffered
        } else {
            Exit::Failure
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered, ", self.answered)?;
        if self.failed > 0 {
            write!(f, "{} failed, ", self.failed)?;
        }
        write!(f, "{} missing", self.missing)
    }
}

/// The values: bare if there is one target, else after the name of their agent.
fn values(answers: &Answers, terminal: bool) -> Vec<String> {
    let single = answers.outcomes.len() == 1;
    let line = |(from, value): (&Identity, &Payload)| {
        if single { bare(value, terminal) } else { format!("{from}: {}", one_line(value, terminal)) }
    };
    answers.results().map(line).collect()
}

/// Prints the failures on stderr, one line each.
pub(super) fn note_failures(answers: &Answers) {
    let paint = output::stderr_paint();
    for (from, failure) in answers.failures() {
        output::note(&paint.red(&failure_line(from, failure)));
    }
}

/// A text as it is, any other value as JSON. On a terminal, control characters are escaped.
fn bare(value: &Payload, terminal: bool) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if terminal { printable(&text, true).into_owned() } else { text }
}

/// The same, in one line: a text that could be mistaken for the line of another agent is shown as JSON.
fn one_line(value: &Payload, terminal: bool) -> String {
    match value.as_str() {
        Some(text) if !text.contains(char::is_control) => bare(value, terminal),
        _ if terminal => printable(&value.to_string(), false).into_owned(),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(outcomes: &[(&str, Result<serde_json::Value, FailureCode>)]) -> Answers {
        let outcome = |(name, result): &(&str, Result<serde_json::Value, FailureCode>)| {
            let result = result.clone().map(Payload).map_err(|code| Failure::new(code, "why"));
            (Identity::agent(name).unwrap(), result)
        };
        Answers { outcomes: outcomes.iter().map(outcome).collect() }
    }

    #[test]
    fn u02_exit_code_of_failures() {
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
            let answers = answers(&named);
            assert_eq!(Tally::of(&answers).exit(&answers), expected, "{named:?}");
        }
    }

    #[test]
    fn u02_tally_counts_answered_failed_and_missing() {
        use FailureCode as F;
        let all = answers(&[("a", Ok(json!(1))), ("b", Err(F::Failed)), ("c", Err(F::Lost)), ("d", Err(F::TimedOut))]);
        assert_eq!(Tally::of(&all).to_string(), "1 answered, 1 failed, 2 missing");
        assert_eq!(Tally::of(&answers(&[("a", Ok(json!(1)))])).to_string(), "1 answered, 0 missing");
    }

    #[test]
    fn u02_single_answer_is_bare_and_several_name_their_agent() {
        assert_eq!(values(&answers(&[("a", Ok(json!("text")))]), false), ["text"]);
        assert_eq!(values(&answers(&[("a", Ok(json!({"k": [1]})))]), false), [r#"{"k":[1]}"#]);
        let two = answers(&[("a", Ok(json!("text"))), ("b", Ok(json!(null)))]);
        assert_eq!(values(&two, false), ["nanite-a: text", "nanite-b: null"]);
        let one_of_two = answers(&[("a", Ok(json!("text"))), ("b", Err(FailureCode::Lost))]);
        assert_eq!(values(&one_of_two, false), ["nanite-a: text"]);
        let [(from, failure)] = one_of_two.failures().collect::<Vec<_>>()[..] else { panic!() };
        assert_eq!(failure_line(from, failure), "nanite-b: lost: why");
        assert_eq!(failure_line(from, &Failure::new(FailureCode::Denied, "Denied")), "nanite-b: denied");
    }

    #[test]
    fn u02_answers_cannot_forge_lines_or_control_terminal() {
        let forged = answers(&[("a", Ok(json!("x\nnanite-b: y"))), ("c", Ok(json!(1)))]);
        assert_eq!(values(&forged, false), [r#"nanite-a: "x\nnanite-b: y""#, "nanite-c: 1"]);
        let steering = answers(&[("a", Ok(json!("\u{1b}[2J\u{9b}1m")))]);
        assert_eq!(values(&steering, true), [r"\u{1b}[2J\u{9b}1m"]);
        assert_eq!(values(&steering, false), ["\u{1b}[2J\u{9b}1m"], "what is piped is not changed");
        let inside = answers(&[("a", Ok(json!(["\u{9b}1m\u{202e}"])))]);
        assert_eq!(values(&inside, true), [r#"["\u{9b}1m\u{202e}"]"#]);
    }
}
