//! `nanite send-file`: sends a file to every agent that receives files of its domain.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::error::{CliError, Exit, Result};
use super::fleet::{self, DiscoveryArgs, Fleet, listed};
use super::node::{NodeArgs, WithOption};
use super::output::or_empty_json;
use super::output::{counted, printable};
use super::request::{Tally, note_failures};
use super::runtime::Global;
use super::{args, output, remedy};
use crate::files::Broadcast;
use crate::mapper::AgentRecord;
use crate::packet::Tag;
use crate::request::Answers;

/// How often the progress bar is drawn, per second.
const PROGRESS_HZ: u8 = 10;

/// Send a file to every agent that receives files of a domain.
///
/// Agents receive files with `nanite agent --files-dir DIR --files-domain D`. The command runs a short-lived mapper, which needs the
/// certificate of a mapper. It ends when every receiver has confirmed the whole file, with the right SHA-256, or has failed. The
/// receivers that have it are on stdout, everything else on stderr. Exit codes: 0 all have it, 3 no agent receives it, 4 only some have
/// it, or one did not answer, 5 denied, 6 certificates or keys, 7 broker unreachable.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    node: NodeArgs,
    /// The domain of the file: the agents that receive files of this domain get it.
    #[arg(long, value_name = "D", help_heading = "Agents")]
    domain: Tag,
    #[command(flatten)]
    discovery: DiscoveryArgs,
    /// Its name at the receivers: a file name without directories [default: its own].
    #[arg(long, value_name = "NAME")]
    dest: Option<String>,
    /// One JSON object on stdout: {"results": {ID: {"size": N}}, "failures": {ID: {"code": .., "message": ..}}}.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit> {
    let length = file_length(&args.file)?;
    let sent = fleet::run(global, &args.node, async |fleet| {
        let started = Instant::now();
        Ok((args.send(global, fleet, length).await?, started.elapsed()))
    });
    let (answers, elapsed) = or_empty_json(sent, args.json, &Answers::default())?;
    args.show(global, &answers, length, elapsed)
}

/// The length of a regular file.
fn file_length(file: &Path) -> Result<u64> {
    let shown = file.display();
    match std::fs::metadata(file) {
        Ok(metadata) if metadata.is_file() => Ok(metadata.len()),
        Ok(_) => Err(CliError::usage(format!("{shown} is not a regular file"))
            .help("send one file at a time; pack a directory first, for example with `tar`")),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(CliError::usage(format!("there is no file {shown}"))),
        Err(error) => Err(CliError::of(Exit::Usage, &error).context(shown)),
    }
}

impl Args {
    async fn send(&self, global: &Global, fleet: &mut Fleet, length: u64) -> Result<Answers> {
        let DiscoveryArgs { at_least, look } = self.discovery;
        let receives = |agent: &AgentRecord| agent.files.binary_search(&self.domain).is_ok();
        match fleet.discover(at_least, look, receives).await? {
            (agents, 0) => return Err(self.no_receiver(&agents, fleet)),
            (_, count) if count < at_least => {
                let receivers = counted(count, "agent");
                let message = format!("files of {} are received by {receivers}, not {at_least}", self.domain);
                return Err(fleet.not_offered(message, "list the agents with `nanite agents`"));
            }
            _ => {}
        }
        let broadcast = Broadcast::new(&self.file, self.domain.clone());
        let broadcast = broadcast.with_option(self.dest.as_ref(), Broadcast::dest);
        let bar = progress_bar(global, &self.file, length);
        let answers = fleet.mapper.broadcast(broadcast, |progress| {
            bar.set_length(progress.size);
            bar.set_position(progress.sent);
        });
        let answers = answers.await;
        bar.finish_and_clear();
        answers.map_err(|error| remedy::broadcast(&error, &fleet.broker))
    }

    fn no_receiver(&self, agents: &[Arc<AgentRecord>], fleet: &Fleet) -> CliError {
        let mut domains: Vec<&str> = agents.iter().flat_map(|agent| &agent.files).map(Tag::as_str).collect();
        domains.sort_unstable();
        domains.dedup();
        let start = format!("start one with `nanite agent --files-dir DIR --files-domain {}`", self.domain);
        let help = match (agents.is_empty(), domains.is_empty()) {
            (true, _) => format!("no agent is registered: {start}"),
            (false, true) => start,
            (false, false) => format!("available domains: {}", listed(domains)),
        };
        fleet.not_offered(format!("no agent receives files of {}", self.domain), &help)
    }

    fn show(&self, global: &Global, answers: &Answers, length: u64, elapsed: Duration) -> Result<Exit> {
        if self.json {
            output::json(answers)?;
        } else {
            answers.results().try_for_each(|(agent, _)| output::line(agent.as_str()))?;
        }
        note_failures(answers);
        let tally = Tally::of(answers);
        let have = if tally.answered == 1 { "has" } else { "have" };
        global.note(&format!(
            "{} {have} it, {} without it ({}, {:.1} s)",
            counted(tally.answered, "agent"),
            tally.failed + tally.missing,
            args::display_size(length),
            elapsed.as_secs_f64()
        ));
        Ok(tally.exit(answers))
    }
}

/// A progress bar on stderr, if it is a terminal.
fn progress_bar(global: &Global, file: &Path, length: u64) -> ProgressBar {
    let target =
        if global.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(PROGRESS_HZ) };
    let bar = ProgressBar::with_draw_target(Some(length), target);
    if let Ok(style) = ProgressStyle::with_template(
        "{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
    ) {
        bar.set_style(style.progress_chars("=> "));
    }
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    bar.with_message(printable(&name, false).into_owned())
}
