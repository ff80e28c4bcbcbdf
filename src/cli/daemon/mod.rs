//! Nodes as processes of the system: in the background, with pid and log files, stopped and looked at by commands, and known to
//! systemd.

mod control;
mod launch;
mod notify;
mod pidfile;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

pub(super) use control::Control;
use pidfile::{PidFile, PidFileError, State};

use super::config::Config;
use super::error::{CliError, Exit};
use super::{Global, kept, logging};
use crate::certs::files;
use crate::packet::Identity;

/// Whether a node runs in the background, and what it leaves for others to find it.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Daemon")]
#[group(skip)]
pub(super) struct Options {
    /// Run in the background: the command ends when the node is ready, or says why it cannot be.
    #[arg(long)]
    daemonize: bool,
    /// This process is the one in the background.
    #[arg(long, hide = true, conflicts_with = "daemonize")]
    daemonized: bool,
    /// Where its pid file is, for `stop` and `status`; with --daemonize there always is one [also: `pid-dir` in nanite.toml; default:
    /// $XDG_RUNTIME_DIR/nanite, or ~/.local/state/nanite].
    #[arg(long, value_name = "DIR")]
    pid_dir: Option<PathBuf>,
    /// Log into the file DIR/ID.log instead of stderr [also: `log-dir` in nanite.toml].
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
}

/// This process, as others see it. Dropping it removes its pid file.
pub(super) struct Process {
    pid_file: Option<PidFile>,
    log: Option<File>,
    daemonized: bool,
}

impl Options {
    /// Whether this process is only to start the one in the background.
    pub(super) fn is_launch(&self) -> bool {
        self.daemonize
    }

    /// Starts the process in the background, and waits until it is ready.
    ///
    /// # Errors
    /// [`CliError`] when it cannot be started.
    pub(super) fn launch(&self, global: &Global) -> Result<Exit, CliError> {
        launch::launch(&global.args)
    }

    /// Whether the log goes into a file.
    pub(super) fn logs_to_file(&self, config: &Config) -> bool {
        self.log_dir(config).is_some()
    }

    fn log_dir<'a>(&'a self, config: &'a Config) -> Option<&'a Path> {
        self.log_dir.as_deref().or(config.file.log_dir.as_deref())
    }

    /// Makes this process what the options say: leaves the session, opens the log, takes the pid file. Before anything that others
    /// could see, so that a second node of the same name changes nothing.
    ///
    /// # Errors
    /// [`CliError`] when the node runs already, or a file cannot be used.
    pub(super) fn begin(&self, global: &Global, identity: &Identity) -> Result<Process, CliError> {
        if self.daemonized {
            launch::leave_session()?;
        }
        let given = self.pid_dir.as_ref().or(global.config.file.pid_dir.as_ref());
        let pid_file = match given {
            None if !self.daemonized => None,
            _ => {
                let dir = pid_dir(given)?;
                Some(PidFile::take(&dir, identity).map_err(|error| unusable(&error, &dir))?)
            }
        };
        let log = match self.log_dir(&global.config) {
            None => None,
            Some(dir) => {
                let path = dir.join(format!("{identity}.log"));
                let log = open_log(dir, &path).map_err(|error| {
                    CliError::of(Exit::Usage, &error)
                        .context(format!("cannot log into {}", path.display()))
                        .help("`--log-dir DIR` names a directory that can be written")
                })?;
                let copy = log.try_clone().map_err(|error| CliError::of(Exit::Failure, &error))?;
                logging::into_file(copy);
                global.note(&format!("logging into {}", path.display()));
                Some(log)
            }
        };
        Ok(Process { pid_file, log, daemonized: self.daemonized })
    }
}

impl Process {
    /// The node is ready: tells whoever waits for it, with words for people.
    ///
    /// # Errors
    /// [`CliError`] when this process was to go into the background, and nobody waits for it any more.
    pub(super) fn ready(&mut self, global: &Global, words: &str) -> Result<(), CliError> {
        if self.log.is_some() {
            tracing::info!("{words}");
        }
        global.note(words);
        if let Some(file) = &mut self.pid_file {
            file.say(State::Running);
        }
        notify::notify(&format!("READY=1\nMAINPID={}\nSTATUS={words}", std::process::id()));
        if self.daemonized {
            global.note(&format!("in the background: pid {}", std::process::id()));
            launch::ready(self.log.as_ref())?;
        }
        Ok(())
    }

    /// The node is asked to stop.
    pub(super) fn stopping(&mut self) {
        if let Some(file) = &mut self.pid_file {
            file.say(State::Stopping);
        }
        notify::notify("STOPPING=1");
    }
}

/// Where pid files are: where it is said, or else where the user's own are.
fn pid_dir(given: Option<&PathBuf>) -> Result<PathBuf, CliError> {
    let runtime = || {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
        runtime.map(|runtime| runtime.join("nanite"))
    };
    given.cloned().or_else(runtime).or_else(kept::directory).ok_or_else(|| {
        CliError::new(Exit::Usage, "it is not said where pid files are: neither XDG_RUNTIME_DIR nor HOME is set")
            .help("say it: `--pid-dir DIR`")
    })
}

fn unusable(error: &PidFileError, dir: &Path) -> CliError {
    let failure = |exit| CliError::of(exit, error);
    match error {
        PidFileError::Runs { identity, .. } => failure(Exit::Failure).help(format!(
            "stop it with `nanite {} stop --token {} --pid-dir {}`, or give this one another name",
            identity.role(),
            identity.name(),
            dir.display()
        )),
        PidFileError::Foreign { .. } => failure(Exit::Denied).help("give a directory of your own: `--pid-dir DIR`"),
        PidFileError::Io { .. } => failure(Exit::Usage).help("`--pid-dir DIR` names a directory that can be written"),
    }
}

/// Opens a log at its end, for its owner only, and not through a link.
fn open_log(dir: &Path, path: &Path) -> std::io::Result<File> {
    files::create_directory(dir)?;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().append(true).create(true).mode(files::SECRET).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(std::io::Error::other("not a plain file")) }
}
