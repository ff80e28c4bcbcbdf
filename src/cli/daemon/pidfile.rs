//! The pid file of a running node: its process, and proof that it is alive.
//!
//! A node holds a lock on its file while it is alive; the system releases it however the process ends. So the lock shows whether the
//! node is running, and the content only which process it is: the pid, the start time as in field 22 of /proc/PID/stat, the start time in
//! seconds since the epoch, and the state, each on a line.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};

use crate::certs::files;
use crate::cli::error::{CliError, Exit, Result};
use crate::cli::state_dir;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};

const MAX_FILE_BYTES: u64 = 256;
/// How often to try again while another process, which only reads the file, holds its lock for a moment.
const MAX_RETRIES: u32 = 20;
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// The state of a running node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Starting,
    Running,
    Stopping,
}

impl State {
    /// The state in the file. All have the same length.
    pub(super) const fn word(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running ",
            State::Stopping => "stopping",
        }
    }
}

/// The process in a pid file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub pid: i32,
    /// In clock ticks since the system started.
    start: u64,
    pub since: Timestamp,
    pub state: State,
}

/// Whether a node is running.
#[derive(Debug)]
pub(super) enum Running {
    /// There is no pid file.
    No,
    /// The file is not locked: its process ended without removing it. None if the file has no valid content.
    Stale(Option<Process>),
    Yes(Process),
}

/// The pid file of this process. Dropping it removes it.
#[derive(Debug)]
pub(super) struct PidFile {
    file: File,
    path: PathBuf,
    process: Process,
}

/// The directory of pid files: the one that is given, or else the user's own.
pub(super) fn directory(given: Option<&PathBuf>) -> Result<PathBuf> {
    let runtime = || {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
        runtime.map(|runtime| runtime.join("nanite"))
    };
    given.cloned().or_else(runtime).or_else(state_dir::directory).ok_or_else(|| {
        CliError::usage("no directory for pid files: neither XDG_RUNTIME_DIR nor HOME is set")
            .help("give one: `--pid-dir DIR`")
    })
}

fn path(dir: &Path, identity: &Identity) -> PathBuf {
    dir.join(format!("{identity}.pid"))
}

fn unusable(path: &Path) -> impl Fn(io::Error) -> CliError + use<> {
    let context = format!("cannot use the pid file {}", path.display());
    move |error| {
        CliError::of(Exit::Usage, &error).context(&context).help("`--pid-dir DIR` must name a writable directory")
    }
}

/// The nodes of a role with pid files in a directory, sorted.
pub(super) fn nodes(dir: &Path, role: Role) -> Result<Vec<Identity>> {
    let files = match fs::read_dir(dir) {
        Ok(files) => files,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            let failure = CliError::of(Exit::Usage, &error).context(format!("cannot read {}", dir.display()));
            return Err(failure.help("name the directory of pid files: `--pid-dir DIR`"));
        }
    };
    let node = |name: String| name.strip_suffix(".pid")?.parse::<Identity>().ok().filter(|node| node.role() == role);
    let mut nodes: Vec<Identity> =
        files.flatten().filter_map(|file| node(file.file_name().into_string().ok()?)).collect();
    nodes.sort();
    Ok(nodes)
}

impl PidFile {
    /// Creates the pid file of this process, and its directory if needed. A stale file is taken over.
    pub(super) fn take(dir: &Path, identity: &Identity) -> Result<Self> {
        let path = path(dir, identity);
        let failed = unusable(&path);
        files::create_directory(dir).map_err(&failed)?;
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let start = start_time(pid).map_err(&failed)?;
        let since = Timestamp::from_secs(SystemClock.now().as_secs());
        let mut retries = MAX_RETRIES;
        let file = loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(files::PUBLIC);
            let mut file = state_dir::open(&path, &mut options).map_err(&failed)?;
            check(&file, &path)?;
            let locked = match file.try_lock() {
                // Its last holder may have removed it after it was opened here.
                Ok(()) => is_still(&file, &path).map_err(&failed)?,
                Err(TryLockError::WouldBlock) => false,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            };
            match retries.checked_sub(1) {
                _ if locked => break file,
                Some(left) => retries = left,
                None => return Err(already_running(dir, identity, read(&mut file))),
            }
            std::thread::sleep(RETRY_INTERVAL);
        };
        file.set_len(0).map_err(&failed)?;
        let process = Process { pid, start, since, state: State::Starting };
        let taken = Self { file, path, process };
        taken.write().map_err(&failed)?;
        Ok(taken)
    }

    /// Changes the state in the file.
    pub(super) fn set(&mut self, state: State) {
        self.process.state = state;
        if let Err(error) = self.write() {
            tracing::warn!(path = %self.path.display(), %error, "failed to write the pid file");
        }
    }

    /// Writes the file with one call, always with the same length, so that readers never see part of it.
    fn write(&self) -> io::Result<()> {
        let Process { pid, start, since, state } = self.process;
        self.file.write_all_at(format!("{pid}\n{start}\n{}\n{}\n", since.as_secs(), state.word()).as_bytes(), 0)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // The lock is still held: a successor waits for it, and sees that the file is gone.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "failed to remove the pid file");
        }
    }
}

fn already_running(dir: &Path, identity: &Identity, process: Option<Process>) -> CliError {
    let pid = process.map_or_else(|| "unknown".to_owned(), |process| process.pid.to_string());
    let (role, name, dir) = (identity.role(), identity.name(), dir.display());
    CliError::new(Exit::Failure, format!("{identity} is already running (pid {pid})")).help(format!(
        "stop it with `nanite {role} stop --token {name} --pid-dir {dir}`, or give this one another name"
    ))
}

/// Whether a node is running.
pub(super) fn find(dir: &Path, identity: &Identity) -> Result<Running> {
    let path = path(dir, identity);
    for _ in 0..=MAX_RETRIES {
        let mut file = match state_dir::open(&path, OpenOptions::new().read(true)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Running::No),
            file => file.map_err(unusable(&path))?,
        };
        check(&file, &path)?;
        match (file.try_lock_shared(), read(&mut file)) {
            (Ok(()), process) => return Ok(Running::Stale(process)),
            (Err(TryLockError::WouldBlock), Some(process)) => return Ok(Running::Yes(process)),
            // It is being written for the first time, or its holder is ending.
            (Err(TryLockError::WouldBlock), None) => std::thread::sleep(RETRY_INTERVAL),
            (Err(TryLockError::Error(error)), _) => return Err(unusable(&path)(error)),
        }
    }
    Err(unusable(&path)(io::Error::new(ErrorKind::InvalidData, "it is locked, but names no process")))
}

impl Process {
    /// A handle on the process; none if it has ended, or if its pid now belongs to another process.
    pub(super) fn open(&self) -> io::Result<Option<ProcessHandle>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Checked while the handle is open, so that the pid cannot be reused in between.
        match start_time(self.pid) {
            Ok(start) if start == self.start => Ok(Some(ProcessHandle(handle))),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A process whose pid cannot be reused while this exists.
pub(super) struct ProcessHandle(OwnedFd);

impl ProcessHandle {
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.0, signal)?)
    }

    /// Waits until it has ended; false if it has not within the limit.
    pub(super) fn wait(&self, limit: Duration) -> io::Result<bool> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        Ok(poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit))? > 0)
    }
}

/// Refuses the files of other users: the file decides which process gets a signal.
fn check(file: &File, path: &Path) -> Result<()> {
    let metadata = file.metadata().map_err(unusable(path))?;
    if metadata.is_file() && [0, geteuid().as_raw()].contains(&metadata.uid()) {
        return Ok(());
    }
    let message = format!("{} belongs to another user, or is not a regular file", path.display());
    Err(CliError::new(Exit::Denied, message).help("give a directory of your own: `--pid-dir DIR`"))
}

fn is_still(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((opened.dev(), opened.ino()) == (found.dev(), found.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn read(file: &mut File) -> Option<Process> {
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).ok()?;
    let mut lines = text.lines();
    let pid = lines.next()?.parse().ok().filter(|pid| *pid > 0)?;
    let start = lines.next()?.parse().ok()?;
    let since = Timestamp::from_secs(lines.next()?.parse().ok()?);
    let word = lines.next()?;
    let states = [State::Starting, State::Running, State::Stopping];
    let state = states.into_iter().find(|state| state.word() == word)?;
    Some(Process { pid, start, since, state })
}

/// The start time of a process, in clock ticks since the system started.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the program, in parentheses, may contain anything; field 3 follows it.
    let start = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19)?.parse().ok());
    start.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "no start time in /proc/PID/stat"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn fred() -> Identity {
        Identity::agent("fred").unwrap()
    }

    #[test]
    fn n18_locked_pid_file_is_alive_and_unlocked_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        let dir = &dir.path().join("run");
        assert!(matches!(find(dir, &fred()), Ok(Running::No)));
        assert!(nodes(dir, Role::Agent).unwrap().is_empty());
        let mut taken = PidFile::take(dir, &fred()).unwrap();
        let Ok(Running::Yes(process)) = find(dir, &fred()) else { panic!() };
        assert_eq!((process.pid, process.state), (std::process::id().cast_signed(), State::Starting));
        taken.set(State::Running);
        assert!(matches!(find(dir, &fred()), Ok(Running::Yes(Process { state: State::Running, .. }))));
        let error = PidFile::take(dir, &fred()).unwrap_err();
        assert_eq!(error.message(), format!("nanite-fred is already running (pid {})", std::process::id()));
        assert_eq!(nodes(dir, Role::Agent).unwrap(), [fred()]);
        assert!(nodes(dir, Role::Mapper).unwrap().is_empty());
        let content = fs::read(&taken.path).unwrap();
        drop(taken);
        assert!(matches!(find(dir, &fred()), Ok(Running::No)), "it is removed");

        fs::write(path(dir, &fred()), content).unwrap();
        let Ok(Running::Stale(Some(stale))) = find(dir, &fred()) else { panic!() };
        assert_eq!(stale.pid, std::process::id().cast_signed(), "that this process lives proves nothing");
        drop(PidFile::take(dir, &fred()).unwrap());
        fs::write(path(dir, &fred()), "rubbish").unwrap();
        assert!(matches!(find(dir, &fred()), Ok(Running::Stale(None))));
        drop(PidFile::take(dir, &fred()).unwrap());
        assert!(matches!(find(dir, &fred()), Ok(Running::No)));
    }

    #[test]
    fn n18_reused_pid_gets_no_signal() {
        let mut process = Process {
            pid: std::process::id().cast_signed(),
            start: start_time(std::process::id().cast_signed()).unwrap(),
            since: Timestamp::from_secs(0),
            state: State::Running,
        };
        assert!(process.open().unwrap().is_some());
        process.start += 1;
        assert!(process.open().unwrap().is_none());
        process.pid = i32::MAX;
        assert!(process.open().unwrap().is_none());
    }

    #[test]
    fn n18_pid_file_rejects_symlinks_and_directories() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, path(dir.path(), &fred())).unwrap();
        assert_eq!(PidFile::take(dir.path(), &fred()).unwrap_err().exit(), Exit::Usage);
        assert_eq!(find(dir.path(), &fred()).unwrap_err().exit(), Exit::Usage);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        fs::remove_file(path(dir.path(), &fred())).unwrap();
        fs::create_dir(path(dir.path(), &fred())).unwrap();
        assert_eq!(find(dir.path(), &fred()).unwrap_err().exit(), Exit::Denied);
    }
}
