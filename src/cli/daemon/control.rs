//! `nanite agent stop|status` and `nanite mapper stop|status`: by pid files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde::Serialize;

use super::pidfile::{self, Found, Named, Process, State};
use super::{pid_dir, unusable};
use crate::cli::error::{CliError, Exit};
use crate::cli::{Global, duration, node, output, table};
use crate::packet::{Identity, Role};

/// What to do with a node that runs.
#[derive(Debug, clap::Subcommand)]
pub(in crate::cli) enum Control {
    /// Stop a node that has a pid file, and wait until it has ended.
    ///
    /// It finishes its running jobs, up to its own limit. Exit codes: 0 it has ended, 3 it does not run, 4 it has not ended in time, 5
    /// it belongs to another user.
    Stop(Stop),
    /// See whether nodes with pid files run.
    ///
    /// Exit codes: 0 all run, 3 one does not, or there is none.
    Status(Status),
}

/// Which node.
#[derive(Debug, clap::Args)]
#[group(skip)]
struct Which {
    /// Its name [also: NANITE_TOKEN, nanite.toml; default: those of which there is a pid file].
    #[arg(long, value_name = "NAME")]
    token: Option<String>,
    /// Where its pid file is [also: `pid-dir` in nanite.toml; default: $XDG_RUNTIME_DIR/nanite, or ~/.local/state/nanite].
    #[arg(long, value_name = "DIR")]
    pid_dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Stop {
    #[command(flatten)]
    which: Which,
    /// How long to wait until it has ended.
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = duration::parse)]
    timeout: Duration,
    /// Do not let it finish what is running.
    #[arg(long)]
    now: bool,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Status {
    #[command(flatten)]
    which: Which,
    /// One JSON object on stdout: {"nodes": [{"identity": .., "state": .., "pid": .., "since": ..}]}.
    #[arg(long)]
    json: bool,
}

impl Control {
    /// Does it.
    ///
    /// # Errors
    /// [`CliError`] with what is wrong.
    pub(in crate::cli) fn run(&self, global: &Global, role: Role) -> Result<Exit, CliError> {
        match self {
            Control::Stop(args) => stop(global, args, role),
            Control::Status(args) => status(global, args, role),
        }
    }
}

impl Which {
    fn dir(&self, global: &Global) -> Result<PathBuf, CliError> {
        pid_dir(self.pid_dir.as_ref().or(global.config.file.pid_dir.as_ref()))
    }

    /// The nodes that are meant.
    fn nodes(&self, global: &Global, role: Role, dir: &Path) -> Result<Vec<Identity>, CliError> {
        let config = &global.config;
        let section = match role {
            Role::Agent => config.file.agent.token.as_deref(),
            Role::Mapper => config.file.mapper.token.as_deref(),
        };
        match config.token(self.token.as_deref(), section) {
            Some(name) => Ok(vec![node::identity(role, &name)?]),
            None => pidfile::nodes(dir, role).map_err(|error| {
                CliError::of(Exit::Usage, &error)
                    .context(format!("cannot read {}", dir.display()))
                    .help("name the directory of pid files: `--pid-dir DIR`")
            }),
        }
    }
}

fn stop(global: &Global, args: &Stop, role: Role) -> Result<Exit, CliError> {
    let dir = args.which.dir(global)?;
    let nodes = args.which.nodes(global, role, &dir)?;
    let [identity] = nodes.as_slice() else {
        let names: Vec<&str> = nodes.iter().map(Identity::name).collect();
        return Err(match nodes.first() {
            None => CliError::new(Exit::NotOffered, format!("no {role} has a pid file in {}", dir.display()))
                .help(format!("`--pid-dir DIR` names the directory that `nanite {role}` was given")),
            Some(first) => CliError::new(Exit::Usage, format!("which {role}? There are several: {}", names.join(", ")))
                .help(format!("choose one: `--token {}`", first.name())),
        });
    };
    let found = pidfile::look(&dir, identity).map_err(|error| unusable(&error, &dir))?;
    let not_running = |why: &str| CliError::new(Exit::NotOffered, format!("{identity} does not run{why}"));
    let named = match found {
        Found::Alive(named) => named,
        Found::Nothing => return Err(not_running(&format!(": it has no pid file in {}", dir.display()))),
        Found::Stale(named) => {
            pidfile::remove_stale(&dir, identity).map_err(|error| unusable(&error, &dir))?;
            let it = named.map_or_else(|| "it".to_owned(), |named| format!("pid {}", named.pid));
            return Err(not_running(&format!(": {it} had ended without removing its pid file, which is removed now")));
        }
    };
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            CliError::new(Exit::Denied, format!("{identity} (pid {}) belongs to another user", named.pid))
                .help("ask its owner, or root, to stop it")
        }
        _ => CliError::of(Exit::Failure, &error).context(format!("cannot stop {identity}")),
    };
    let Some(process) = Process::of(&named).map_err(failed)? else {
        return Err(not_running(" any more"));
    };
    if args.now {
        // Two signals stop it at once; of different kinds, since two of one kind can melt into one.
        process.signal(Signal::TERM).and_then(|()| process.signal(Signal::INT)).map_err(failed)?;
    } else if named.state != State::Stopping {
        // A second signal would stop it at once.
        process.signal(Signal::TERM).map_err(failed)?;
    }
    if !process.wait(args.timeout).map_err(failed)? {
        return Err(CliError::new(Exit::Incomplete, format!("{identity} (pid {}) has not ended yet", named.pid))
            .help("it finishes its running jobs: wait longer with `--timeout`, or stop it at once with `--now`"));
    }
    global.note(&format!("{identity} has ended"));
    Ok(Exit::Success)
}

#[derive(Serialize)]
struct Node {
    identity: Identity,
    state: &'static str,
    pid: Option<i32>,
    since: Option<String>,
}

#[derive(Serialize)]
struct Nodes {
    nodes: Vec<Node>,
}

fn status(global: &Global, args: &Status, role: Role) -> Result<Exit, CliError> {
    let dir = args.which.dir(global)?;
    let mut nodes = Vec::new();
    for identity in args.which.nodes(global, role, &dir)? {
        let found = pidfile::look(&dir, &identity).map_err(|error| unusable(&error, &dir))?;
        nodes.push(node_of(identity, &found));
    }
    let all_run = !nodes.is_empty() && nodes.iter().all(|node| node.pid.is_some());
    if args.json {
        output::json(&Nodes { nodes })?;
    } else if nodes.is_empty() {
        global.note(&format!("no {role} has a pid file in {}", dir.display()));
    } else {
        let rows: Vec<[String; 4]> = nodes
            .into_iter()
            .map(|Node { identity, state, pid, since }| {
                let pid = pid.map(|pid| pid.to_string()).unwrap_or_default();
                [identity.to_string(), state.to_owned(), pid, since.unwrap_or_default()]
            })
            .collect();
        table::print(["NODE", "STATE", "PID", "SINCE"], &rows)?;
    }
    Ok(if all_run { Exit::Success } else { Exit::NotOffered })
}

fn node_of(identity: Identity, found: &Found) -> Node {
    match found {
        Found::Alive(Named { pid, since, state, .. }) => {
            Node { identity, state: state.word().trim_end(), pid: Some(*pid), since: Some(since.to_string()) }
        }
        Found::Stale(_) => Node { identity, state: "stale", pid: None, since: None },
        Found::Nothing => Node { identity, state: "stopped", pid: None, since: None },
    }
}
