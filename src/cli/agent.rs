//! `nanite agent`: a worker whose actors are programs in a directory.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::config::Config;
use super::daemon::Control;
use super::error::{CliError, Exit};
use super::text::{counted, printable};
use super::{Global, daemon, duration, guard, node, remedy, runtime, signals, size};
use crate::agent::{Actor, Agent, Handlers, ProgramActors, RunningJob, actor};
use crate::files::FileRoot;
use crate::packet::{Failure, Identity, Payload, Role, Tag};

/// How many running jobs are logged one by one.
const JOBS: usize = 256;

/// Run an agent: a worker that offers services.
///
/// With --actors-dir every executable file DIR/PREFIX/NAME is the service /PREFIX/NAME. Without it the agent offers /agent/echo,
/// which answers with what it was given, and /agent/info, which says who it is: enough to try a set-up. With --files-dir it takes
/// files, too, that `nanite send-file` sends.
///
/// After a renewal of its certificate it uses the new one without a pause; SIGHUP makes it look at once.
///
/// Of two processes of one agent the one that was started later has the place, and the earlier one ends with exit code 8.
///
/// It runs until SIGINT or SIGTERM; then it takes no new work, unregisters, and finishes what is running. A second signal stops it
/// at once. At SIGUSR1 it logs the running jobs.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    control: Option<Control>,
    #[command(flatten)]
    node: node::Args,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    guard: guard::Args,
    #[command(flatten)]
    daemon: daemon::Options,
}

impl Args {
    /// Whether the log goes into a file.
    pub(super) fn logs_to_file(&self, config: &Config) -> bool {
        self.control.is_none() && self.daemon.logs_to_file(config)
    }
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
    /// When another process of this agent runs already, end with exit code 8 instead of taking its place.
    #[arg(long)]
    give_way: bool,
    /// The directory into which files are put that mappers send.
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    files_dir: Option<PathBuf>,
    /// What files are taken of; can be given several times.
    #[arg(long = "files-domain", value_name = "D", help_heading = "Files")]
    files_domains: Option<Vec<Tag>>,
    /// The largest file that is taken, such as 100MiB [default: 16GiB].
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = "Files")]
    files_max: Option<u64>,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    if let Some(control) = &args.control {
        return control.run(global, Role::Agent);
    }
    if args.daemon.is_launch() {
        return args.daemon.launch(global);
    }
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
        give_way: args.options.give_way || file.give_way.unwrap_or(false),
        files_dir: args.options.files_dir.clone().or_else(|| file.files_dir.clone()),
        files_domains: args.options.files_domains.clone().or_else(|| file.files_domains.clone()),
        files_max: args.options.files_max.or(file.files_max),
    };
    let files = options.files()?;
    let mut process = args.daemon.begin(global, &node.identity)?;
    runtime::run(async {
        let reports = signals::Reports::take()?;
        let transport = node.connect().await?;
        let mut agent = Agent::builder(node.serializer.clone(), transport.clone());
        if let Some(rules) = guard.rules {
            agent = agent.policy(rules);
        }
        if let Some(audit) = guard.audit {
            agent = agent.audit(audit);
        }
        let services;
        (agent, services) = match &options.actors_dir {
            Some(dir) => {
                let programs = ProgramActors::open_prefixes(dir, options.actors.iter().flatten());
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
        agent = agent.give_way(options.give_way);
        if let Some(files) = files {
            agent = agent.files(files);
        }
        let agent = agent;
        let failed = |error| remedy::agent(&error, &node.broker());
        signals::run(global, async |stopped| {
            let running = agent.start().await.map_err(failed)?;
            let announcer = running.announcer();
            let reload = move || announcer.announce();
            let _follower = node.reload.clone().map(|files| files.follow(reload)).transpose()?;
            let services = counted(services, "service");
            process.ready(global, &format!("{} is ready: {services}, {}", node.identity, node.describe()))?;
            let jobs = running.jobs();
            let stop = async {
                stopped.wait().await;
                process.stopping();
            };
            reports.during(running.run_until(stop), async || log_jobs(&jobs.list())).await.map_err(failed)?;
            transport.close().await;
            global.note(&format!("{} has stopped", node.identity));
            Ok(Exit::Success)
        })
        .await
    })
}

/// Says in the log what runs now.
fn log_jobs(jobs: &[RunningJob]) {
    tracing::info!("{} running", counted(jobs.len(), "job"));
    for RunningJob { service, caller, since } in jobs.iter().take(JOBS) {
        tracing::info!("running: {service} for {caller}, since {since}");
    }
}

impl Options {
    /// Where files go, if any are taken.
    fn files(&self) -> Result<Option<FileRoot>, CliError> {
        let domains = self.files_domains.as_deref().unwrap_or_default();
        let Some(dir) = &self.files_dir else {
            return match domains {
                [] => Ok(None),
                [domain, ..] => Err(CliError::new(Exit::Usage, "it is not said where files go")
                    .help(format!("`--files-dir DIR --files-domain {domain}`"))),
            };
        };
        if domains.is_empty() {
            return Err(CliError::new(Exit::Usage, "it is not said what files are taken of")
                .help(format!("`--files-dir {} --files-domain D`; senders name the same D", dir.display())));
        }
        let mut root = FileRoot::new(dir, domains.to_vec()).map_err(|error| remedy::file_root(&error))?;
        if let Some(bytes) = self.files_max {
            root = root.largest(bytes);
        }
        Ok(Some(root.on_file(|file| {
            let path = file.path.display().to_string();
            tracing::info!("{} has sent {} ({})", file.sender, printable(&path, false), size::shown(file.size));
        })))
    }
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
