//! `nanite agent`: a worker whose actors are programs in a directory.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::error::{CliError, Exit};
use super::text::counted;
use super::{Global, duration, guard, node, remedy, runtime, signals};
use crate::agent::{Actor, Agent, Handlers, ProgramActors, actor};
use crate::packet::{Failure, Identity, Payload, Role, Tag};

/// Run an agent: a worker that offers services.
///
/// With --actors-dir every executable file DIR/PREFIX/NAME is the service /PREFIX/NAME. Without it the agent offers /agent/echo,
/// which answers with what it was given, and /agent/info, which says who it is: enough to try a set-up.
///
/// It runs until SIGINT or SIGTERM; then it takes no new work, unregisters, and finishes what is running. A second signal stops it
/// at once.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: node::Args,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    guard: guard::Args,
}

/// What nanite.toml can say under [agent].
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Agent")]
#[group(skip)]
struct Options {
    /// The directory of programs: DIR/PREFIX/NAME is the service /PREFIX/NAME.
    #[arg(long, value_name = "DIR")]
    actors_dir: Option<PathBuf>,
    /// Only these PREFIXes of the directory.
    #[arg(long, value_name = "PREFIX,..", value_delimiter = ',', requires = "actors_dir")]
    actors: Option<Vec<String>>,
    /// A tag that requests can ask for; can be given several times.
    #[arg(long = "tag", value_name = "TAG")]
    tags: Option<Vec<Tag>>,
    /// How often to say that the agent lives [default: 15s].
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    ping_time: Option<Duration>,
    /// How many jobs run at a time; 1: strictly one after the other [default: 16].
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// How many requests the broker hands out ahead [default: twice the concurrency].
    #[arg(long, value_name = "N")]
    prefetch: Option<u16>,
    /// How long running jobs may take when the agent is stopped [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    drain: Option<Duration>,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let node = args.node.node(global, Role::Agent)?;
    let guard = args.guard.guard(global)?;
    let file = &global.config.file.agent;
    let options = Options {
        actors_dir: args.options.actors_dir.clone().or_else(|| file.actors_dir.clone()),
        actors: args.options.actors.clone().or_else(|| file.actors.clone()),
        tags: args.options.tags.clone().or_else(|| file.tags.clone()),
        ping_time: args.options.ping_time.or(file.ping_time),
        concurrency: args.options.concurrency.or(file.concurrency),
        prefetch: args.options.prefetch.or(file.prefetch),
        drain: args.options.drain.or(file.drain),
    };
    runtime::run(async {
        let transport = node.connect().await?;
        let mut agent = Agent::builder(node.identity.clone(), node.serializer.clone(), transport.clone());
        if let Some(rules) = guard.rules {
            agent = agent.policy(rules);
        }
        if let Some(audit) = guard.audit {
            agent = agent.audit(audit);
        }
        let services;
        (agent, services) = match &options.actors_dir {
            Some(dir) => {
                let programs = ProgramActors::open(dir, options.actors.clone().unwrap_or_default());
                let programs = programs.map_err(|error| remedy::programs(&error))?;
                let services = programs.services().len();
                (agent.actor(programs), services)
            }
            None => {
                let trial = trial(&node.identity);
                let services = trial.services().len();
                (agent.actor(trial), services)
            }
        };
        for tag in options.tags.iter().flatten() {
            agent = agent.tag(tag.clone());
        }
        if let Some(every) = options.ping_time {
            agent = agent.ping_time(every);
        }
        if let Some(jobs) = options.concurrency {
            agent = agent.concurrency(jobs);
        }
        if let Some(messages) = options.prefetch {
            agent = agent.prefetch(messages);
        }
        if let Some(limit) = options.drain {
            agent = agent.drain(limit);
        }
        let agent = agent.build().map_err(|error| remedy::build(&error))?;
        let failed = |error| remedy::agent(&error, &node.broker());
        signals::run(global, async |stopped| {
            let running = agent.start().await.map_err(failed)?;
            let services = counted(services, "service");
            global.note(&format!("{} is ready: {services}, {}", node.identity, node.describe()));
            running.stop_after(stopped.wait()).await.map_err(failed)?;
            transport.close().await;
            global.note(&format!("{} has stopped", node.identity));
            Ok(Exit::Success)
        })
        .await
    })
}

/// What an agent without programs offers.
fn trial(identity: &Identity) -> Handlers {
    let (identity, started) = (identity.clone(), Instant::now());
    let info = move |_: Payload| {
        let info = json!({
            "identity": identity,
            "version": env!("CARGO_PKG_VERSION"),
            "running_for_seconds": started.elapsed().as_secs(),
        });
        std::future::ready(Ok::<_, Failure>(info))
    };
    actor("agent").expose("echo", async |payload: Payload| Ok::<_, Failure>(payload)).expose("info", info)
}
