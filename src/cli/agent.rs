//! `nanite agent`: a worker whose actors are programs in a directory.

use std::time::Instant;

use serde_json::json;
use tokio::signal::unix::SignalKind;

use super::args::display_size;
use super::daemon::DaemonArgs;
use super::error::{CliError, Exit, Result};
use super::node::{NodeArgs, PolicyArgs, WithOption};
use super::options::AgentOptions;
use super::output::{counted, printable};
use super::remedy;
use super::runtime::{self, Global};
use crate::agent::{Actor, AgentBuilder, Handlers, ProgramActors, RunningJob, actor};
use crate::files::FileRoot;
use crate::packet::{Failure, Identity, Payload, Role};

/// How many running jobs are logged one by one.
const MAX_LOGGED_JOBS: usize = 256;

/// Run an agent: a worker that offers services.
///
/// With --actors-dir every executable file DIR/PREFIX/NAME is the service /PREFIX/NAME. Without it the agent offers /agent/echo,
/// which returns its payload, and /agent/info, which describes the agent: enough to try a set-up. With --files-dir it also receives
/// files that `nanite send-file` sends.
///
/// When its certificate is renewed, it uses the new one without a restart; SIGHUP makes it check at once.
///
/// Of two processes of one agent the newest wins; the older one ends with exit code 8.
///
/// It runs until SIGINT or SIGTERM; then it accepts no new requests, unregisters, and finishes its running jobs. A second signal stops
/// it at once. At SIGUSR1 it logs the running jobs.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    options: AgentOptions,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit> {
    if let Some(exit) = args.daemon.control(global, Role::Agent)? {
        return Ok(exit);
    }
    let node = args.node.node(global, Role::Agent)?;
    let (policy, audit) = (args.policy.policy(global)?, args.policy.audit(global)?);
    let options = args.options.or(&global.config.file.agent);
    let files = file_root(&options)?;
    let mut process = args.daemon.begin(global, &node.identity)?;
    runtime::run(async {
        let report_signals = runtime::handle(SignalKind::user_defined1())?;
        let connection = node.connect().await?;
        let agent = connection
            .agent()
            .with_option(policy, AgentBuilder::policy)
            .with_option(audit, AgentBuilder::audit)
            .with_option(options.ping_time, AgentBuilder::ping_time)
            .with_option(options.concurrency, AgentBuilder::concurrency)
            .with_option(options.prefetch, AgentBuilder::prefetch)
            .with_option(options.drain, AgentBuilder::drain)
            .with_option(files, AgentBuilder::files)
            .give_way(options.give_way);
        let agent = options.tags.into_iter().flatten().fold(agent, AgentBuilder::tag);
        let (agent, services) = match &options.actors_dir {
            Some(dir) => {
                let programs = ProgramActors::open_prefixes(dir, options.actors.iter().flatten());
                let programs = programs.map_err(|error| remedy::programs(&error))?;
                let services = programs.services().len();
                (agent.actor(programs), services)
            }
            None => {
                let actor = trial_actor(&node.identity);
                let services = actor.services().len();
                (agent.actor(actor), services)
            }
        };
        let failed = |error| remedy::agent(&error, &node.broker());
        runtime::until_stopped(global, async |stop| {
            let running = agent.start().await.map_err(failed)?;
            let announcer = running.announcer();
            let _watcher = node.secure.clone().map(|node| node.watch(move || announcer.announce())).transpose()?;
            let services = counted(services, "service");
            process.ready(global, &format!("{} is ready: {services}, {}", node.identity, node.describe()))?;
            let jobs = running.jobs();
            let stop = async {
                stop.requested().await;
                process.stopping();
            };
            let work = running.run_until(stop);
            runtime::reporting(report_signals, work, async || log_jobs(&jobs.list())).await.map_err(failed)?;
            connection.close().await;
            global.note(&format!("{} has stopped", node.identity));
            Ok(Exit::Success)
        })
        .await
    })
}

fn log_jobs(jobs: &[RunningJob]) {
    tracing::info!("{} running", counted(jobs.len(), "job"));
    for RunningJob { service, caller, since } in jobs.iter().take(MAX_LOGGED_JOBS) {
        tracing::info!("running: {service} for {caller}, since {since}");
    }
}

/// Where received files are stored, if any are to be received.
fn file_root(options: &AgentOptions) -> Result<Option<FileRoot>> {
    let domains = options.files_domains.as_deref().unwrap_or_default();
    let (dir, domains) = match (&options.files_dir, domains) {
        (None, []) => return Ok(None),
        (None, [domain, ..]) => {
            return Err(CliError::usage("`--files-domain` requires `--files-dir`")
                .help(format!("`--files-dir DIR --files-domain {domain}`")));
        }
        (Some(dir), []) => {
            return Err(CliError::usage("`--files-dir` requires `--files-domain`")
                .help(format!("`--files-dir {} --files-domain D`; senders give the same D", dir.display())));
        }
        (Some(dir), domains) => (dir, domains.to_vec()),
    };
    let root = FileRoot::new(dir, domains).map_err(|error| remedy::file_root(&error))?;
    let root = if options.files_never_replace { root.never_replace() } else { root };
    Ok(Some(root.with_option(options.files_max, FileRoot::max_bytes).on_file(|file| {
        let path = file.path.display().to_string();
        tracing::info!("received {} from {} ({})", printable(&path, false), file.sender, display_size(file.size));
    })))
}

/// What an agent without programs offers.
fn trial_actor(identity: &Identity) -> Handlers {
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
