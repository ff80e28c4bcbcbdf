//! A node as a system process: in the background, with a pid file and a log file, stopped by a command, and known to systemd.
//!
//! To go into the background the program starts itself again in a new session, prints what that process writes to stderr, and waits
//! until it is ready. `stop` and `status` find nodes by their pid files.

mod pidfile;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pidfile::{PidFile, Running, State};
use rustix::process::Signal;
use rustix::stdio::{dup2_stderr, dup2_stdout};
use serde::Serialize;

use super::config::Config;
use super::error::{CliError, Exit, Result};
use super::runtime::Global;
use super::{args, node, output, runtime, state_dir};
use crate::certs::files;
use crate::packet::{Identity, Role};

const DAEMONIZE: &str = "--daemonize";
/// Tells the new process that it is in the background.
const DAEMONIZED: &str = "--daemonized";
/// What the new process reports when it is ready.
const READY: &str = "ready\n";

/// How to run as a system process; and the commands that control such processes.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Daemon")]
pub(super) struct DaemonArgs {
    #[command(subcommand)]
    control: Option<Control>,
    /// Run in the background: the command ends when the node is ready, or with the error that stopped it.
    #[arg(long)]
    daemonize: bool,
    /// This process is in the background.
    #[arg(long, hide = true, conflicts_with = "daemonize")]
    daemonized: bool,
    /// The directory of its pid file, for `stop` and `status`; with --daemonize there always is one [also: `pid-dir` in nanite.toml;
    /// default: $XDG_RUNTIME_DIR/nanite, or ~/.local/state/nanite].
    #[arg(long, value_name = "DIR")]
    pid_dir: Option<PathBuf>,
    /// Log into the file DIR/ID.log instead of stderr [also: `log-dir` in nanite.toml].
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
}

/// This process, as other processes see it. Dropping it removes its pid file.
pub(super) struct Process {
    pid_file: Option<PidFile>,
    log: Option<File>,
    daemonized: bool,
}

impl DaemonArgs {
    /// Does what this process does instead of running a node itself, if anything: `stop`, `status`, or `--daemonize`.
    pub(super) fn control(&self, global: &Global, role: Role) -> Result<Option<Exit>> {
        match &self.control {
            Some(control) => control.run(global, role).map(Some),
            None if self.daemonize => launch(&global.args).map(Some),
            None => Ok(None),
        }
    }

    /// The directory for the log file, if the log goes into a file.
    pub(super) fn log_dir<'a>(&'a self, config: &'a Config) -> Option<&'a Path> {
        let dir = self.log_dir.as_deref().or(config.file.log_dir.as_deref());
        dir.filter(|_| self.control.is_none())
    }

    /// Leaves the session, takes the pid file and opens the log. To be called before other nodes can see this one, so that a second
    /// process of the same node changes nothing.
    pub(super) fn begin(&self, global: &Global, identity: &Identity) -> Result<Process> {
        if self.daemonized {
            // The end of the terminal must not end this process.
            rustix::process::setsid().map_err(CliError::failed(Exit::Failure, "cannot leave the session"))?;
        }
        let given = self.pid_dir.as_ref().or(global.config.file.pid_dir.as_ref());
        let pid_file = match given {
            None if !self.daemonized => None,
            _ => Some(PidFile::take(&pidfile::directory(given)?, identity)?),
        };
        let log = self.log_dir(&global.config).map(|dir| open_log(global, dir, identity)).transpose()?;
        Ok(Process { pid_file, log, daemonized: self.daemonized })
    }
}

impl Process {
    /// Reports that the node is ready: in the log, on stderr, to systemd, and to the process that waits for it.
    pub(super) fn ready(&mut self, global: &Global, message: &str) -> Result<()> {
        if self.log.is_some() {
            tracing::info!("{message}");
        }
        global.note(message);
        let pid = std::process::id();
        self.set_state(State::Running, &format!("READY=1\nMAINPID={pid}\nSTATUS={message}"));
        if !self.daemonized {
            return Ok(());
        }
        global.note(&format!("in the background: pid {pid}"));
        self.detach().map_err(CliError::failed(Exit::Failure, "the process that started this one has ended"))
    }

    /// Reports that the node is stopping.
    pub(super) fn stopping(&mut self) {
        self.set_state(State::Stopping, "STOPPING=1");
    }

    /// Writes the state into the pid file, and sends `notification` to systemd if it waits for one (units of `Type=notify`).
    fn set_state(&mut self, state: State, notification: &str) {
        if let Some(file) = &mut self.pid_file {
            file.set(state);
        }
        let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else { return };
        if let Err(error) = notify(&socket, notification) {
            tracing::warn!(%error, "failed to notify systemd");
        }
    }

    /// Reports to the process that waits, and closes its stdout and stderr. From here on stderr goes to the log, or nowhere.
    fn detach(&self) -> io::Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stderr(self.log.as_ref().unwrap_or(&null))?;
        let mut out = io::stdout();
        out.write_all(READY.as_bytes())?;
        out.flush()?;
        Ok(dup2_stdout(&null)?)
    }
}

/// Starts this program again in the background, with the same arguments, and waits until it is ready.
fn launch(args: &[OsString]) -> Result<Exit> {
    let failed = CliError::failed(Exit::Failure, "cannot go into the background");
    let (name, args) = args.split_first().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).args(args.iter().map(|arg| if arg == DAEMONIZE { OsStr::new(DAEMONIZED) } else { arg }));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(&failed)?;
    let (Some(out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed(io::ErrorKind::BrokenPipe.into()));
    };
    let relay = std::thread::spawn(move || io::copy(&mut err, &mut io::stderr()));
    let mut report = String::new();
    BufReader::new(out.take(64)).read_line(&mut report).map_err(&failed)?;
    if report == READY {
        // It has closed this stderr before.
        let _ = relay.join();
        return Ok(Exit::Success);
    }
    let ended = child.wait().map_err(&failed)?;
    let _ = relay.join();
    ended.code().map(Exit::of_code).ok_or_else(|| {
        let signal = ended.signal().map_or_else(String::new, |signal| format!(" {signal}"));
        CliError::new(Exit::Failure, format!("the new process was ended by signal{signal} before it was ready"))
    })
}

/// Sends the log into a file that only its owner can read, without following links.
fn open_log(global: &Global, dir: &Path, identity: &Identity) -> Result<File> {
    let path = dir.join(format!("{identity}.log"));
    let open = || {
        files::create_directory(dir)?;
        let file = state_dir::open(&path, OpenOptions::new().append(true).create(true).mode(files::SECRET))?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok((file.try_clone()?, file))
    };
    let (file, copy) = open().map_err(|error: io::Error| {
        CliError::of(Exit::Usage, &error)
            .context(format!("cannot log into {}", path.display()))
            .help("`--log-dir DIR` must name a writable directory")
    })?;
    runtime::into_file(copy);
    global.note(&format!("logging into {}", path.display()));
    Ok(file)
}

/// Sends to a socket of sd_notify(3): a file, or an abstract address after `@`.
fn notify(socket: &OsStr, notification: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(notification.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n18_notify_socket_is_file_or_abstract_address() {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("nanite-test-{}", std::process::id());
        let path = dir.path().join("notify");
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (bound, socket) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into()),
        ] {
            notify(&socket, "READY=1").unwrap();
            let mut buffer = [0; 64];
            let length = bound.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
        }
        assert!(notify(OsStr::new("/none/there"), "READY=1").is_err());
    }
}

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
            Some(name) => vec![node::named(role, &name)?],
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
