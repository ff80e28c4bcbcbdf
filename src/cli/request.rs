//! `nanite request`: asks agents, and shows what they answer.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use serde_json::json;

use super::answers::{self, Tally};
use super::error::{CliError, Exit};
use super::text::counted;
use super::way::Way;
use super::{Global, ask, duration, node, output, remedy, runtime};
use crate::packet::{Identity, Payload, Role};
use crate::request::{Answers, Event};

/// Ask agents to do something, and show what they answer.
///
/// The command is a mapper for a short time: it needs the certificate of one. Answers go to stdout, everything else to stderr. Exit
/// codes: 0 all answered, 3 nobody offers it, 4 timed out or partly answered, 5 denied, 6 certificates or keys, 7 broker
/// unreachable.
#[derive(Debug, clap::Args)]
pub(super) struct Command {
    #[command(flatten)]
    args: Args,
    #[command(flatten)]
    node: node::Args,
}

/// What is asked, and how the answers are shown.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    #[command(flatten)]
    pub ask: ask::Args,
    /// How long the answers may take.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration::parse)]
    timeout: Duration,
    /// Show intermediate results as they come, as `ID KEY: VALUE`; with --json one object a line, {"from": ID, "key": .., "value": ..},
    /// before the last line with the answers.
    #[arg(long)]
    follow: bool,
    /// One JSON object on stdout: {"results": {ID: VALUE}, "failures": {ID: {"code": .., "message": ..}}}.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, command: &Command) -> Result<Exit, CliError> {
    let Command { args, node } = command;
    let node = node.node(global, Role::Mapper)?;
    let payload = args.ask.payload(global)?;
    runtime::run(async {
        let mut way = Way::open(&node, &args.ask).await?;
        let asked = ask(args, &mut way, payload).await;
        way.close().await;
        answered(global, args, asked)
    })
}

/// Asks on a way that stays open, and shows the answers.
///
/// # Errors
/// [`CliError`] when nobody was asked.
pub(super) async fn send(global: &Global, args: &Args, way: &mut Way) -> Result<Exit, CliError> {
    let payload = args.ask.payload(global)?;
    let asked = ask(args, way, payload).await;
    answered(global, args, asked)
}

impl Args {
    /// The same, with intermediate results.
    pub(super) fn following(self) -> Self {
        Self { follow: true, ..self }
    }
}

fn answered(global: &Global, args: &Args, asked: Result<(Answers, Duration), CliError>) -> Result<Exit, CliError> {
    match asked {
        Ok((answers, took)) => show(global, args, &answers, took),
        Err(error) => {
            if args.json && error.exit() == Exit::NotOffered {
                output::json(&Answers::default())?;
            }
            Err(error)
        }
    }
}

async fn ask(args: &Args, way: &mut Way, payload: Payload) -> Result<(Answers, Duration), CliError> {
    let mut events = way.request(&args.ask, payload, args.timeout).await?;
    let started = Instant::now();
    let mut answers = Answers::default();
    while let Some(event) = events.next().await {
        match event {
            Event::Outcome { from, result } => drop(answers.outcomes.insert(from, result)),
            Event::Failed(failure) => return Err(remedy::request(&failure.into(), way.broker())),
            Event::Intermediate { from, key, value, missed } if args.follow => {
                if missed > 0 {
                    output::note(&format!(
                        "{from}: {} missing here",
                        counted(usize::try_from(missed).unwrap_or(usize::MAX), "part")
                    ));
                }
                part(args, &from, &key, &value)?;
            }
            Event::Intermediate { .. } => {}
        }
    }
    if let [agent] = &answers.outcomes.keys().collect::<Vec<_>>()[..] {
        args.ask.took_turn(agent);
    }
    Ok((answers, started.elapsed()))
}

/// Shows a part of an answer.
fn part(args: &Args, from: &Identity, key: &str, value: &Payload) -> Result<(), CliError> {
    if args.json {
        let part = json!({"from": from, "key": key, "value": value});
        return output::line(&part.to_string());
    }
    output::line(&answers::part(from, key, value, std::io::stdout().is_terminal()))
}

fn show(global: &Global, args: &Args, answers: &Answers, took: Duration) -> Result<Exit, CliError> {
    if args.json && args.follow {
        let line = serde_json::to_string(answers).map_err(|error| CliError::of(Exit::Failure, &error))?;
        output::line(&line)?;
    } else if args.json {
        output::json(answers)?;
    } else {
        for value in answers::values(answers, std::io::stdout().is_terminal()) {
            output::line(&value)?;
        }
    }
    let paint = output::stderr_paint();
    for failure in answers::failures(answers) {
        output::note(&paint.red(&failure));
    }
    let tally = Tally::of(answers);
    let took = if took < Duration::from_secs(1) {
        format!("{:.1} ms", took.as_secs_f64() * 1e3)
    } else {
        format!("{:.2} s", took.as_secs_f64())
    };
    match answers.outcomes.keys().next() {
        Some(only) if answers.outcomes.len() == 1 => global.note(&format!("{tally} ({only}, {took})")),
        _ => global.note(&format!("{tally} ({took})")),
    }
    if tally.missing > 0 {
        let help = "give them more time with `--timeout`, or see who is there with `nanite agents`";
        global.note(&format!("{} {help}", paint.cyan("help:")));
    }
    Ok(answers::exit(answers))
}
