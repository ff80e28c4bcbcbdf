//! `nanite agent stop|status` and `nanite mapper stop|status`: by pid files.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use serde::Serialize;

use super::pidfile::{self, PidFile, Running, State};
use crate::cli::error::{CliError, Exit, Result};
use crate::cli::runtime::Global;
use crate::cli::{args, identity, output};
use crate::packet::{Identity, Role};

/// Commands for a running node.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Control {
    /// Stop a node that has a pid file, and wait until it has ended.
    ///
    /// It finishes its running jobs, up to its own limit. Exit codes: 0 it has ended, 3 it is not running, 4 it has not ended in time, 5
    /// it belongs to another user.
    Stop(Stop),
    /// Show whether nodes with pid files are running.
    ///
    /// Exit codes: 0 all are running, 3 one is not, or there is none.
    Status(Status),
}

/// The node, by its pid file.
#[derive(Debug, clap::Args)]
struct Target {
    /// Its name [also: NANITE_TOKEN, nanite.toml; default: all with a pid file].
    #[arg(long, value_name = "NAME")]
    token: Option<String>,
    /// The directory of its pid file [also: `pid-dir` in nanite.toml; default: $XDG_RUNTIME_DIR/nanite, or ~/.local/state/nanite].
    #[arg(long, value_name = "DIR")]
    pid_dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Stop {
    #[command(flatten)]
    target: Target,
    /// How long to wait until it has ended.
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = args::duration)]
    timeout: Duration,
    /// Do not let it finish its running jobs.
    #[arg(long)]
    now: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    #[command(flatten)]
    target: Target,
    /// One JSON object on stdout: {"nodes": [{"identity": .., "state": .., "pid": .., "since": ..}]}.
    #[arg(long)]
    json: bool,
}

impl Control {
    pub(super) fn run(&self, global: &Global, role: Role) -> Result<Exit> {
        match self {
            Control::Stop(args) => args.run(global, role),
            Control::Status(args) => args.run(global, role),
        }
    }
}

impl Target {
    /// The directory of pid files, and the nodes.
    fn find(&self, global: &Global, role: Role) -> Result<(PathBuf, Vec<Identity>)> {
        let config = &global.config;
        let dir = pidfile::directory(self.pid_dir.as_ref().or(config.file.pid_dir.as_ref()))?;
        let nodes = match config.token(self.token.as_deref(), role) {
            Some(name) => vec![identity::named(role, &name)?],
            None => pidfile::nodes(&dir, role)?,
        };
        Ok((dir, nodes))
    }
}

impl Stop {
    fn run(&self, global: &Global, role: Role) -> Result<Exit> {
        let (dir, nodes) = self.target.find(global, role)?;
        let shown = dir.display();
        let identity = match nodes.as_slice() {
            [identity] => identity,
            [] => {
                return Err(CliError::new(Exit::NotOffered, format!("no {role} has a pid file in {shown}"))
                    .help(format!("give the directory of `nanite {role}`: `--pid-dir DIR`")));
            }
            [first, ..] => {
                let names: Vec<&str> = nodes.iter().map(Identity::name).collect();
                let message = format!("which {role}? There are several: {}", names.join(", "));
                return Err(CliError::usage(message).help(format!("choose one: `--token {}`", first.name())));
            }
        };
        let not_running = |why: String| CliError::new(Exit::NotOffered, format!("{identity} is not running{why}"));
        let process = match pidfile::find(&dir, identity)? {
            Running::Yes(process) => process,
            Running::No => return Err(not_running(format!(": it has no pid file in {shown}"))),
            Running::Stale(process) => {
                // Taking the file over and dropping it removes it.
                drop(PidFile::take(&dir, identity)?);
                let it = process.map_or_else(|| "it".to_owned(), |process| format!("pid {}", process.pid));
                return Err(not_running(format!(": {it} ended without removing its pid file, which is removed now")));
            }
        };
        let pid = process.pid;
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::PermissionDenied => {
                CliError::new(Exit::Denied, format!("{identity} (pid {pid}) belongs to another user"))
                    .help("ask its owner, or root, to stop it")
            }
            _ => CliError::of(Exit::Failure, &error).context(format!("cannot stop {identity}")),
        };
        let Some(handle) = process.open().map_err(failed)? else {
            return Err(not_running(" any more".to_owned()));
        };
        if self.now {
            // Two signals stop it at once. They are of different kinds, because two of one kind may be merged.
            handle.signal(Signal::TERM).and_then(|()| handle.signal(Signal::INT)).map_err(failed)?;
        } else if process.state != State::Stopping {
            // Not when it is stopping: the second signal would stop it at once.
            handle.signal(Signal::TERM).map_err(failed)?;
        }
        if !handle.wait(self.timeout).map_err(failed)? {
            return Err(CliError::new(Exit::Incomplete, format!("{identity} (pid {pid}) has not ended yet"))
                .help("it finishes its running jobs: wait longer with `--timeout`, or stop it at once with `--now`"));
        }
        global.note(&format!("{identity} has ended"));
        Ok(Exit::Success)
    }
}

#[derive(Serialize)]
struct Node {
    identity: Identity,
    state: &'static str,
    pid: Option<i32>,
    since: Option<String>,
}

impl Status {
    fn run(&self, global: &Global, role: Role) -> Result<Exit> {
        let (dir, identities) = self.target.find(global, role)?;
        let mut nodes = Vec::new();
        for identity in identities {
            let (state, process) = match pidfile::find(&dir, &identity)? {
                Running::Yes(process) => (process.state.word().trim_end(), Some(process)),
                Running::Stale(_) => ("stale", None),
                Running::No => ("stopped", None),
            };
            let since = process.map(|process| process.since.to_string());
            nodes.push(Node { identity, state, pid: process.map(|process| process.pid), since });
        }
        let all_run = !nodes.is_empty() && nodes.iter().all(|node| node.pid.is_some());
        if self.json {
            output::json(&BTreeMap::from([("nodes", nodes)]))?;
        } else if nodes.is_empty() {
            global.note(&format!("no {role} has a pid file in {}", dir.display()));
        } else {
            let row = |node: &Node| {
                let pid = node.pid.map(|pid| pid.to_string()).unwrap_or_default();
                [node.identity.to_string(), node.state.to_owned(), pid, node.since.clone().unwrap_or_default()]
            };
            let rows: Vec<_> = nodes.iter().map(row).collect();
            output::table(["NODE", "STATE", "PID", "SINCE"], &rows)?;
        }
        Ok(if all_run { Exit::Success } else { Exit::NotOffered })
    }
}
