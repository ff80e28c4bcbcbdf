//! A node as a system process: in the background, with a pid file and a log file, stopped by a command, and known to systemd.
//!
//! To go into the background the program starts itself again in a new session, prints what that process writes to stderr, and waits
//! until it reports on its stdout that it is ready. If the new process ends earlier, the command ends with its exit code.

mod control;
mod pidfile;

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::stdio::{dup2_stderr, dup2_stdout};

use control::Control;
use pidfile::{PidFile, State};

use super::config::Config;
use super::error::{CliError, Exit, Result};
use super::runtime::Global;
use super::{logging, state_dir};
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
    logging::into_file(copy);
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
