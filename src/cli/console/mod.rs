//! `nanite console`: requests line by line, with one mapper, history and completion.

mod input;

use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use futures_util::FutureExt;
use input::{History, Input, Line};
use tokio::signal::unix::{Signal, SignalKind};

use super::error::{CliError, Exit, Result};
use super::fleet::Fleet;
use super::node::NodeArgs;
use super::output::{counted, printable};
use super::request::{PushArgs, RequestArgs};
use super::runtime::Global;
use super::{fleet, output, runtime, state_dir};
use crate::mapper::AgentRecord;
use crate::packet::{Role, SelectorName, Tag};

/// How long to wait for the first agents.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(2);
/// The same for scripts, which cannot repeat a command that came too early.
const SCRIPT_DISCOVERY_TIMEOUT: Duration = Duration::from_secs(5);

/// Send requests line by line, with history and completion.
///
/// The commands are those of the program: request, push, agents, services, ping; `help` lists them, and a line that begins with a
/// service is a request. Tab completes commands, services, agents and tags. Ctrl-C ends a running request, Ctrl-D ends the console.
/// Lines are saved in the history, except those that begin with a space.
///
/// If stdin is not a terminal, its lines are the commands, # begins a comment, and the exit code is that of the first command that
/// failed. The console is a mapper, and needs the certificate of a mapper.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
}

/// A command in the console.
#[derive(Debug, Parser)]
#[command(multicall = true, disable_version_flag = true, override_usage = "COMMAND")]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Send a request to agents; intermediate results are shown as they arrive.
    Request(RequestArgs),
    /// Send a push to agents: work without an answer.
    Push(PushArgs),
    /// List the registered agents.
    Agents(ListArgs),
    /// List the services that agents offer.
    Services(ListArgs),
    /// Ping agents.
    Ping(fleet::PingArgs),
    /// End the console.
    #[command(visible_alias = "exit")]
    Quit,
}

#[derive(Debug, clap::Args)]
struct ListArgs {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit> {
    let node = args.node.node(global, Role::Mapper)?;
    runtime::run(async {
        let interrupts = runtime::handle(SignalKind::interrupt())?;
        let mut fleet = Fleet::start(&node).await?;
        let interactive = input::is_terminal();
        let timeout = if interactive { DISCOVERY_TIMEOUT } else { SCRIPT_DISCOVERY_TIMEOUT };
        let (_, count) = fleet.discover(1, timeout, |_| true).await?;
        let input = if interactive {
            let (mapper, runtime) = (fleet.mapper.clone(), tokio::runtime::Handle::current());
            let complete = move |line: &str, cursor: usize| {
                let agents = runtime.block_on(mapper.agents()).unwrap_or_default();
                candidates(line, cursor, &agents)
            };
            Input::editor(History::within(state_dir::directory()), Box::new(complete))
        } else {
            Input::stdin()
        };
        let agents = counted(count, "agent");
        global.note(&format!("{}: {agents}; `help` lists the commands, Ctrl-D ends", node.identity));
        let mut console = Console { global, fleet, interrupts, interactive };
        let exit = console.run(&input).await;
        console.fleet.close().await;
        exit
    })
}

struct Console<'a> {
    global: &'a Global,
    fleet: Fleet,
    interrupts: Signal,
    interactive: bool,
}

impl Console<'_> {
    async fn run(&mut self, input: &Input) -> Result<Exit> {
        let mut exit = Exit::Success;
        loop {
            let line = if self.interactive {
                input.next().await?
            } else {
                tokio::select! {
                    line = input.next() => line?,
                    _ = self.interrupts.recv() => return Err(interrupted()),
                }
            };
            let line = match line {
                Line::Text(line) => line,
                Line::Interrupted => {
                    self.global.note("Ctrl-D ends the console");
                    continue;
                }
                Line::End => break,
            };
            let ended = match self.command(&line).await {
                Ok(Some(ended)) => ended,
                Ok(None) => break,
                Err(error) if self.interactive || error.exit() != Exit::Failure => {
                    output::report(&error);
                    error.exit()
                }
                Err(error) => return Err(error),
            };
            if !self.interactive && exit == Exit::Success {
                exit = ended;
            }
        }
        Ok(exit)
    }

    /// Runs the command in a line; none if it ends the console.
    async fn command(&mut self, line: &str) -> Result<Option<Exit>> {
        let mut words = input::split(line);
        match words.first() {
            None => return Ok(Some(Exit::Success)),
            Some(first) if first.starts_with('#') => return Ok(Some(Exit::Success)),
            Some(first) if first.starts_with('/') => words.insert(0, "request".to_owned()),
            Some(_) => {}
        }
        let command = match CommandLine::try_parse_from(&words) {
            Ok(line) => line.command,
            Err(error) => {
                // Also for help. A failure to print is ignored: there is nowhere to report it.
                let _ = error.print();
                return Ok(Some(if error.use_stderr() { Exit::Usage } else { Exit::Success }));
            }
        };
        // Interrupts from before this command do not end it.
        while self.interrupts.recv().now_or_never().is_some() {}
        let Console { global, fleet, interrupts, .. } = self;
        tokio::select! {
            exit = execute(global, fleet, command) => exit,
            _ = interrupts.recv() => Err(interrupted()),
        }
    }
}

/// Runs a command; none if it ends the console.
async fn execute(global: &Global, fleet: &mut Fleet, command: Command) -> Result<Option<Exit>> {
    let exit = match command {
        Command::Request(mut args) => {
            args.follow = true;
            args.send(global, fleet).await?
        }
        Command::Push(args) => args.send(global, fleet).await?,
        Command::Agents(args) => {
            fleet::show_agents(&fleet.agents().await?, args.json)?;
            Exit::Success
        }
        Command::Services(args) => {
            fleet::show_services(&fleet.agents().await?, args.json)?;
            Exit::Success
        }
        Command::Ping(args) => args.run(global, fleet).await?,
        Command::Quit => return Ok(None),
    };
    Ok(Some(exit))
}

fn interrupted() -> CliError {
    CliError::new(Exit::Incomplete, "interrupted: further answers are ignored")
}

const COMMANDS: [&str; 7] = ["agents", "help", "ping", "push", "quit", "request", "services"];
const OPTIONS: [&str; 7] = ["--json", "--offline", "--persistent", "--selector", "--tag", "--target", "--timeout"];

/// Where the word at the cursor begins, and how it can be completed, sorted.
fn candidates(line: &str, cursor: usize, agents: &[Arc<AgentRecord>]) -> (usize, Vec<String>) {
    let before = line.get(..cursor).unwrap_or(line);
    let start = before.rfind(char::is_whitespace).map_or(0, |space| space + 1);
    let (earlier, word) = before.split_at_checked(start).unwrap_or(("", before));
    let earlier: Vec<&str> = earlier.split_whitespace().collect();
    let mut all = match earlier.as_slice() {
        [] if word.starts_with('/') => services(agents),
        [] | ["help", ..] => COMMANDS.map(str::to_owned).to_vec(),
        [.., "--target"] => names(agents),
        [.., "--selector"] => SelectorName::ALL.map(|name| name.as_str().to_owned()).to_vec(),
        [.., "--tag"] => tags(agents),
        ["ping"] => names(agents).into_iter().chain(["all".to_owned()]).collect(),
        ["request" | "push", ..] if word.starts_with('-') => OPTIONS.map(str::to_owned).to_vec(),
        [first, ..] if first.starts_with('/') && word.starts_with('-') => OPTIONS.map(str::to_owned).to_vec(),
        ["request" | "push"] => services(agents),
        _ => Vec::new(),
    };
    all.retain(|candidate| candidate.starts_with(word));
    all.sort();
    all.dedup();
    (start, all)
}

fn services(agents: &[Arc<AgentRecord>]) -> Vec<String> {
    agents.iter().flat_map(|agent| &agent.services).map(ToString::to_string).collect()
}

fn names(agents: &[Arc<AgentRecord>]) -> Vec<String> {
    agents.iter().map(|agent| agent.identity.name().to_owned()).collect()
}

/// The tags that are one printable word: agents choose them.
fn tags(agents: &[Arc<AgentRecord>]) -> Vec<String> {
    let tags = agents.iter().flat_map(|agent| &agent.tags).map(Tag::as_str);
    let is_word = |tag: &&str| printable(tag, false) == *tag && !tag.contains(char::is_whitespace);
    tags.filter(is_word).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::packet::{Identity, Register, Status};

    fn agent(name: &str, services: &[&str], tags: &[&str]) -> Arc<AgentRecord> {
        let register = Register {
            identity: Identity::agent(name).unwrap(),
            services: services.iter().map(|service| service.parse().unwrap()).collect(),
            status: Status::default(),
            tags: tags.iter().map(|tag| tag.parse().unwrap()).collect(),
            files: Vec::new(),
            instance: None,
        };
        Arc::new(AgentRecord::new(register, 0, Timestamp::from_secs(0), None))
    }

    #[test]
    fn n21_completion_candidates() {
        let agents = [
            agent("fred", &["/simple/echo", "/simple/time"], &["big", "two words", "evil\u{202e}gpj"]),
            agent("frida", &["/simple/echo"], &["big"]),
        ];
        let offered = |line: &str| candidates(line, line.len(), &agents).1;
        assert_eq!(offered("r"), ["request"]);
        assert_eq!(offered("").len(), COMMANDS.len());
        assert_eq!(offered("help se"), ["services"]);
        assert_eq!(offered("request /si"), ["/simple/echo", "/simple/time"]);
        assert_eq!(offered("push /simple/t"), ["/simple/time"]);
        assert_eq!(offered("/simple/e"), ["/simple/echo"]);
        assert_eq!(offered("request /simple/echo --target fr"), ["fred", "frida"]);
        assert_eq!(offered("ping fri"), ["frida"]);
        assert_eq!(offered("ping a"), ["all"]);
        assert_eq!(offered("request /a/b --tag "), ["big"], "what is not one harmless word is not offered");
        assert_eq!(offered("/a/b x --selector r"), ["random", "rr"]);
        assert_eq!(offered("request /a/b --t"), ["--tag", "--target", "--timeout"]);
        assert!(offered("request /a/b x").is_empty() && offered("nonsense x").is_empty());
        assert_eq!(candidates("request /si more", 11, &agents).0, 8, "the word at the cursor");
        assert!(candidates("ü", 1, &agents).1.is_empty(), "a cursor within a character");
    }
}
