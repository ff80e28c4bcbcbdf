//! `nanite send-file`: gives a file to every agent that takes files of its domain.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::answers::{self, Tally};
use super::ask::{listed, with_refusals};
use super::error::{CliError, Exit};
use super::fleet::Fleet;
use super::text::{counted, printable};
use super::{Global, duration, node, output, remedy, runtime, size};
use crate::files::Broadcast;
use crate::mapper::AgentRecord;
use crate::packet::{Identity, Payload, Role, Tag};
use crate::request::Answers;

/// How often the progress bar is drawn, a second.
const DRAWN: u8 = 10;

/// Send a file to every agent that takes files of a domain.
///
/// Agents take files with `nanite agent --files-dir DIR --files-domain D`. The command is a mapper for a short time: it needs the
/// certificate of one. It ends when every receiver has said that it has the whole file, with the right SHA-256, or has failed. Who
/// has it is on stdout, everything else on stderr. Exit codes: 0 all have it, 3 nobody takes it, 4 only some have it, or somebody
/// did not answer, 5 denied, 6 certificates or keys, 7 broker unreachable.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    node: node::Args,
    /// What the file is about: the agents that take files of this domain get it.
    #[arg(long, value_name = "D", help_heading = "Whom")]
    domain: Tag,
    /// How many agents have to take it before it is sent.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Whom")]
    at_least: usize,
    /// How long to look for agents that take it.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration::parse, help_heading = "Whom")]
    look: Duration,
    /// Its name at the receivers: one plain file name [default: its own].
    #[arg(long, value_name = "NAME")]
    dest: Option<String>,
    /// One JSON object on stdout: {"results": {ID: {"size": N}}, "failures": {ID: {"code": .., "message": ..}}}.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let length = check(&args.file)?;
    let node = args.node.node(global, Role::Mapper)?;
    runtime::run(async {
        let mut fleet = Fleet::start(&node).await?;
        let started = Instant::now();
        let sent = send(global, args, &mut fleet, length).await;
        fleet.close().await;
        match sent {
            Ok(answers) => show(global, args, &answers, length, started.elapsed()),
            Err(error) => {
                if args.json && error.exit() == Exit::NotOffered {
                    output::json(&Answers::default())?;
                }
                Err(error)
            }
        }
    })
}

/// Whether it is a file, before anybody is asked; its length.
fn check(file: &Path) -> Result<u64, CliError> {
    let shown = file.display();
    match std::fs::metadata(file) {
        Ok(found) if found.is_file() => Ok(found.len()),
        Ok(_) => Err(CliError::new(Exit::Usage, format!("{shown} is not a plain file"))
            .help("send one file at a time; pack a directory first, for example with `tar`")),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(CliError::new(Exit::Usage, format!("there is no file {shown}")))
        }
        Err(error) => Err(CliError::of(Exit::Usage, &error).context(shown)),
    }
}

async fn send(global: &Global, args: &Args, fleet: &mut Fleet, length: u64) -> Result<Answers, CliError> {
    let takes = |agent: &AgentRecord| agent.files.binary_search(&args.domain).is_ok();
    let taking = |agents: &[std::sync::Arc<AgentRecord>]| agents.iter().filter(|agent| takes(agent)).count();
    let agents = fleet.settle(args.look, |agents| taking(agents) >= args.at_least.max(1)).await?;
    match taking(&agents) {
        0 => return Err(nobody(args, &agents, fleet)),
        few if few < args.at_least => {
            let what = format!("{}, not {}", counted(few, "agent"), args.at_least);
            let failure = CliError::new(Exit::NotOffered, format!("files of {} are taken by {what}", args.domain));
            return Err(with_refusals(failure, fleet, "see who is there with `nanite agents`"));
        }
        _ => {}
    }
    let mut broadcast = Broadcast::new(&args.file, args.domain.clone());
    if let Some(name) = &args.dest {
        broadcast = broadcast.dest(name);
    }
    let bar = bar(global, &args.file, length);
    let answers = fleet
        .mapper
        .broadcast(broadcast, |progress| {
            bar.set_length(progress.size);
            bar.set_position(progress.sent);
        })
        .await;
    bar.finish_and_clear();
    answers.map_err(|error| remedy::broadcast(&error, fleet.broker()))
}

/// A progress bar, which only a terminal shows.
fn bar(global: &Global, file: &Path, length: u64) -> ProgressBar {
    let target = if global.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(DRAWN) };
    let bar = ProgressBar::with_draw_target(Some(length), target);
    if let Ok(style) = ProgressStyle::with_template(
        "{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    ) {
        bar.set_style(style.progress_chars("=> "));
    }
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    bar.with_message(printable(&name, false).into_owned())
}

/// Why nobody gets it.
fn nobody(args: &Args, agents: &[std::sync::Arc<AgentRecord>], fleet: &Fleet) -> CliError {
    let failure = CliError::new(Exit::NotOffered, format!("no agent receives files of {}", args.domain));
    let mut domains: Vec<&str> = agents.iter().flat_map(|agent| &agent.files).map(Tag::as_str).collect();
    domains.sort_unstable();
    domains.dedup();
    let start = format!("start one with `nanite agent --files-dir DIR --files-domain {}`", args.domain);
    let help = match (agents.is_empty(), domains.is_empty()) {
        (true, _) => format!("no agent is there: {start}"),
        (false, true) => start,
        (false, false) => format!("files are taken of {}", listed(domains.into_iter())),
    };
    with_refusals(failure, fleet, &help)
}

fn show(global: &Global, args: &Args, answers: &Answers, length: u64, took: Duration) -> Result<Exit, CliError> {
    if args.json {
        output::json(answers)?;
    } else {
        let has = |(agent, _): (&Identity, &Payload)| output::line(agent.as_str());
        answers.results().try_for_each(has)?;
    }
    let paint = output::stderr_paint();
    for failure in answers::failures(answers) {
        output::note(&paint.red(&failure));
    }
    let Tally { answered, failed, missing } = Tally::of(answers);
    let have = if answered == 1 { "has" } else { "have" };
    let seconds = took.as_secs_f64();
    global.note(&format!(
        "{} {have} it, {} without it ({}, {seconds:.1} s)",
        counted(answered, "agent"),
        failed + missing,
        size::shown(length)
    ));
    Ok(answers::exit(answers))
}
