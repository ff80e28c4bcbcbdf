//! `nanite console`: requests line by line, with a mapper that stays.

mod complete;
mod history;
mod input;
mod words;

use std::time::Duration;

use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::{CliError, Exit};
use super::fleet::Fleet;
use super::text::counted;
use super::way::Way;
use super::{Global, agents, kept, node, ping, push, request, runtime};
use crate::packet::Role;
use history::History;
use input::{Entered, Input};

/// How long the first agents are waited for.
const LOOK: Duration = Duration::from_secs(2);
/// The same, where nobody can type again what came too early.
const LOOK_IN_SCRIPT: Duration = Duration::from_secs(5);

/// Ask agents line by line, with history and completion.
///
/// The commands are those of the program: request, push, agents, services, ping; `help` shows them, and a line that begins with a
/// service is a request. Tab completes commands, services, agents and tags. Ctrl-C ends a running request, Ctrl-D ends the console.
/// Lines are kept for the next console, except those that begin with a blank.
///
/// Where stdin is no terminal, its lines are the commands, # begins a comment, and the exit code is that of the first command that
/// failed. The console is a mapper: it needs the certificate of one.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: node::Args,
}

/// A line of the console.
#[derive(Debug, Parser)]
#[command(multicall = true, disable_version_flag = true, override_usage = "COMMAND")]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Ask agents to do something; intermediate results are shown as they come.
    Request(request::Args),
    /// Give agents work, without an answer.
    Push(push::Args),
    /// Show the agents that are there.
    Agents(Shown),
    /// Show the services that are offered.
    Services(Shown),
    /// See whether agents live.
    Ping(ping::Args),
    /// End the console.
    #[command(visible_alias = "exit")]
    Quit,
}

#[derive(Debug, clap::Args)]
struct Shown {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let node = args.node.node(global, Role::Mapper)?;
    runtime::run(async {
        let interrupts = signal(SignalKind::interrupt())
            .map_err(|error| CliError::of(Exit::Failure, &error).context("cannot take signals"))?;
        let (note, registrations) = ping::registrations();
        let mut fleet = Fleet::start_with(&node, |mapper| mapper.on_agent(note)).await?;
        let typed = input::is_terminal();
        let agents = fleet.settle(if typed { LOOK } else { LOOK_IN_SCRIPT }, |agents| !agents.is_empty()).await?;
        let input = if typed {
            let (mapper, runtime) = (fleet.mapper.clone(), tokio::runtime::Handle::current());
            let complete = move |line: &str, cursor: usize| {
                let agents = runtime.block_on(mapper.agents()).unwrap_or_default();
                complete::candidates(line, cursor, &agents)
            };
            Input::editor(History::within(kept::directory()), Box::new(complete))
        } else {
            Input::stdin()
        };
        let there = counted(agents.len(), "agent");
        global.note(&format!("{}: {there}; `help` shows the commands, Ctrl-D ends", node.identity));
        let mut console = Console { global, way: Way::Own(fleet), registrations, interrupts, typed };
        let exit = console.run(&input).await;
        console.way.close().await;
        exit
    })
}

struct Console<'a> {
    global: &'a Global,
    way: Way,
    registrations: ping::Registrations,
    interrupts: Signal,
    /// Whether a person types.
    typed: bool,
}

/// What comes after a command.
enum Then {
    Next(Exit),
    Quit,
}

impl Console<'_> {
    async fn run(&mut self, input: &Input) -> Result<Exit, CliError> {
        let mut exit = Exit::Success;
        loop {
            let entered = if self.typed {
                input.next().await?
            } else {
                tokio::select! {
                    entered = input.next() => entered?,
                    _ = self.interrupts.recv() => return Err(interrupted()),
                }
            };
            let line = match entered {
                Entered::Line(line) => line,
                Entered::Interrupted => {
                    self.global.note("Ctrl-D ends the console");
                    continue;
                }
                Entered::End => break,
            };
            let ended = match self.command(&line).await {
                Ok(Then::Quit) => break,
                Ok(Then::Next(ended)) => ended,
                Err(error) if self.typed || error.exit() != Exit::Failure => {
                    error.report();
                    error.exit()
                }
                Err(error) => return Err(error),
            };
            if !self.typed && exit == Exit::Success {
                exit = ended;
            }
        }
        Ok(exit)
    }

    /// Does what a line says.
    async fn command(&mut self, line: &str) -> Result<Then, CliError> {
        let mut words = words::split(line);
        match words.first() {
            None => return Ok(Then::Next(Exit::Success)),
            Some(first) if first.starts_with('#') => return Ok(Then::Next(Exit::Success)),
            Some(first) if first.starts_with('/') => words.insert(0, "request".to_owned()),
            Some(_) => {}
        }
        let command = match Line::try_parse_from(&words) {
            Ok(line) => line.command,
            Err(error) => {
                // Help comes this way, too. When it cannot be printed there is nobody to tell.
                let _ = error.print();
                return Ok(Then::Next(if error.use_stderr() { Exit::Usage } else { Exit::Success }));
            }
        };
        if let Command::Quit = command {
            return Ok(Then::Quit);
        }
        // One that came while nothing ran ends nothing.
        while futures_util::FutureExt::now_or_never(self.interrupts.recv()).is_some() {}
        let Console { global, way, registrations, interrupts, .. } = self;
        tokio::select! {
            done = execute(global, way, registrations, command) => done.map(Then::Next),
            _ = interrupts.recv() => Err(interrupted()),
        }
    }
}

async fn execute(
    global: &Global,
    way: &mut Way,
    registrations: &mut ping::Registrations,
    command: Command,
) -> Result<Exit, CliError> {
    match (command, way) {
        (Command::Request(args), way) => {
            args.ask.check_in_console()?;
            request::send(global, &args.following(), way).await
        }
        (Command::Push(args), way) => {
            args.ask.check_in_console()?;
            push::send(global, &args, way).await
        }
        (Command::Agents(shown), Way::Own(fleet)) => {
            agents::show_agents(&fleet.agents().await?, shown.json).map(|()| Exit::Success)
        }
        (Command::Services(shown), Way::Own(fleet)) => {
            agents::show_services(&fleet.agents().await?, shown.json).map(|()| Exit::Success)
        }
        (Command::Ping(args), Way::Own(fleet)) => ping::send(global, &args, fleet, registrations).await,
        // The console is a mapper, and leaves before it gets here to quit.
        (Command::Agents(_) | Command::Services(_) | Command::Ping(_) | Command::Quit, _) => Ok(Exit::Success),
    }
}

fn interrupted() -> CliError {
    CliError::new(Exit::Incomplete, "interrupted: nobody waits for the answers any more")
}
