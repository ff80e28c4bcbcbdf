//! The pid file of a running node: who runs, and proof that it lives.
//!
//! A node holds a lock on its file for as long as it lives, which the system takes from a process that ends in whatever way. So
//! whether a node runs is a question to the lock; the numbers in the file only say which process it is. They are its pid, its start
//! time as in field 22 of /proc/PID/stat, when it started in seconds since the epoch, and how far it is, each on a line.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};

use crate::certs::files;
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::packet::{Identity, Role};

/// The longest file that can be one, in bytes.
const MAX: u64 = 256;
/// Somebody who only looks holds the lock for a timestamp: how often it is tried again, and after how long.
const TRIES: u32 = 20;
const AGAIN: Duration = Duration::from_millis(20);

/// How far a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Starting,
    Running,
    Stopping,
}

impl State {
    /// The state as it stands in the file: all are of the same length.
    pub(super) const fn word(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running ",
            State::Stopping => "stopping",
        }
    }
}

/// The process that a pid file names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub pid: i32,
    /// In clock ticks since the system started.
    start: u64,
    pub since: Timestamp,
    pub state: State,
}

/// What is there of a node.
#[derive(Debug)]
pub(super) enum Found {
    /// No pid file.
    Nothing,
    /// A pid file that nobody holds: its process ended without removing it. None when it is empty, or no pid file.
    Stale(Option<Named>),
    /// A node that lives.
    Alive(Named),
}

/// Why a pid file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum PidFileError {
    #[error("{identity} runs already (pid {pid})")]
    Runs { identity: Identity, pid: String },
    #[error("{path} belongs to another user, or is no plain file")]
    Foreign { path: PathBuf },
    #[error("cannot use the pid file {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The pid file of this process. Dropping it removes it.
#[derive(Debug)]
pub(super) struct PidFile {
    file: File,
    path: PathBuf,
    named: Named,
}

/// Where a node's pid file is.
pub(super) fn path(dir: &Path, identity: &Identity) -> PathBuf {
    dir.join(format!("{identity}.pid"))
}

/// The nodes of a role with pid files in a directory, sorted.
pub(super) fn nodes(dir: &Path, role: Role) -> io::Result<Vec<Identity>> {
    let files = match fs::read_dir(dir) {
        Ok(files) => files,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let node = |name: String| name.strip_suffix(".pid")?.parse::<Identity>().ok().filter(|node| node.role() == role);
    let mut nodes: Vec<Identity> =
        files.flatten().filter_map(|file| node(file.file_name().into_string().ok()?)).collect();
    nodes.sort();
    Ok(nodes)
}

impl PidFile {
    /// Makes the pid file of this process, in a directory that is made when there is none. A stale one is taken over.
    ///
    /// # Errors
    /// [`PidFileError`]: the node runs already, or the file cannot be used.
    pub(super) fn take(dir: &Path, identity: &Identity) -> Result<Self, PidFileError> {
        let path = path(dir, identity);
        let failed = |source| PidFileError::Io { path: path.clone(), source };
        files::create_directory(dir).map_err(failed)?;
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let start = start_time(pid).map_err(failed)?;
        let since = Timestamp::from_secs(SystemClock.now().as_secs());
        let mut tries = TRIES;
        let file = loop {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false);
            let mut file = open(&path, &mut options)?;
            match file.try_lock() {
                // Its last holder may have removed it after it was opened here.
                Ok(()) if is_still(&file, &path).map_err(failed)? => break file,
                Ok(()) | Err(TryLockError::WouldBlock) if tries > 0 => {
                    tries -= 1;
                    std::thread::sleep(AGAIN);
                }
                Ok(()) | Err(TryLockError::WouldBlock) => {
                    let pid = read(&mut file).map_or_else(|| "unknown".to_owned(), |named| named.pid.to_string());
                    return Err(PidFileError::Runs { identity: identity.clone(), pid });
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        };
        file.set_len(0).map_err(failed)?;
        let mut taken = Self { file, path: path.clone(), named: Named { pid, start, since, state: State::Starting } };
        taken.write(State::Starting).map_err(failed)?;
        Ok(taken)
    }

    /// Says how far the node is.
    pub(super) fn say(&mut self, state: State) {
        if let Err(error) = self.write(state) {
            tracing::warn!(path = %self.path.display(), %error, "the pid file cannot be written");
        }
    }

    /// Writes it in one piece, always of the same length: so a reader never sees half of it.
    fn write(&mut self, state: State) -> io::Result<()> {
        self.named.state = state;
        let Named { pid, start, since, state } = self.named;
        self.file.write_all_at(format!("{pid}\n{start}\n{}\n{}\n", since.as_secs(), state.word()).as_bytes(), 0)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // While the lock is held: a successor waits for it, and sees that the file is gone.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the pid file cannot be removed");
        }
    }
}

/// Looks for a node.
///
/// # Errors
/// [`PidFileError`] when its file cannot be used.
pub(super) fn look(dir: &Path, identity: &Identity) -> Result<Found, PidFileError> {
    let path = path(dir, identity);
    let mut tries = TRIES;
    loop {
        let mut file = match open(&path, &mut OpenOptions::new()) {
            Err(PidFileError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
            file => file?,
        };
        match (file.try_lock_shared(), read(&mut file)) {
            (Ok(()), named) => return Ok(Found::Stale(named)),
            (Err(TryLockError::WouldBlock), Some(named)) => return Ok(Found::Alive(named)),
            // It is being written for the first time, or its holder is in the middle of ending.
            (Err(TryLockError::WouldBlock), None) if tries > 0 => {
                tries -= 1;
                std::thread::sleep(AGAIN);
            }
            (Err(TryLockError::WouldBlock), None) => {
                let source = io::Error::new(ErrorKind::InvalidData, "it is locked, and names no process");
                return Err(PidFileError::Io { path, source });
            }
            (Err(TryLockError::Error(source)), _) => return Err(PidFileError::Io { path, source }),
        }
    }
}

/// Removes a pid file that nobody holds.
///
/// # Errors
/// [`PidFileError`] when it cannot be removed, or somebody has just taken it.
pub(super) fn remove_stale(dir: &Path, identity: &Identity) -> Result<(), PidFileError> {
    PidFile::take(dir, identity).map(drop)
}

/// The living process that a pid file names, held so that no other can take its number.
pub(super) struct Process(OwnedFd);

impl Process {
    /// Gets hold of it; none when it has ended, or its number belongs to another by now.
    pub(super) fn of(named: &Named) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(named.pid) else { return Ok(None) };
        let held = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(held) => held,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Looked at after it is held: so these are the same.
        match start_time(named.pid) {
            Ok(start) if start == named.start => Ok(Some(Self(held))),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends it a signal.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.0, signal)?)
    }

    /// Waits until it has ended; false when it has not within the limit.
    pub(super) fn wait(&self, limit: Duration) -> io::Result<bool> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        Ok(poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit))? > 0)
    }
}

fn open(path: &Path, options: &mut OpenOptions) -> Result<File, PidFileError> {
    let failed = |source| PidFileError::Io { path: path.to_owned(), source };
    // Neither through a link nor waiting for the other end of a pipe.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = options.read(true).mode(0o644).custom_flags(flags).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    // Whoever writes it says which process gets a signal.
    if !metadata.is_file() || ![0, geteuid().as_raw()].contains(&metadata.uid()) {
        return Err(PidFileError::Foreign { path: path.to_owned() });
    }
    Ok(file)
}

fn is_still(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((opened.dev(), opened.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn read(file: &mut File) -> Option<Named> {
    let mut text = String::new();
    file.take(MAX).read_to_string(&mut text).ok()?;
    let mut lines = text.lines();
    let pid = lines.next()?.parse().ok().filter(|pid| *pid > 0)?;
    let start = lines.next()?.parse().ok()?;
    let since = Timestamp::from_secs(lines.next()?.parse().ok()?);
    let word = lines.next()?;
    let states = [State::Starting, State::Running, State::Stopping];
    let state = states.into_iter().find(|state| state.word() == word)?;
    Some(Named { pid, start, since, state })
}

/// When a process started, in clock ticks since the system did.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the program, in parentheses, may hold anything; field 3 follows it.
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
    fn n18_who_holds_the_file_lives_and_who_does_not_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        let dir = &dir.path().join("run");
        assert!(matches!(look(dir, &fred()), Ok(Found::Nothing)));
        assert!(nodes(dir, Role::Agent).unwrap().is_empty());
        let mut taken = PidFile::take(dir, &fred()).unwrap();
        let Ok(Found::Alive(named)) = look(dir, &fred()) else { panic!() };
        assert_eq!((named.pid, named.state), (std::process::id().cast_signed(), State::Starting));
        taken.say(State::Running);
        assert!(matches!(look(dir, &fred()), Ok(Found::Alive(Named { state: State::Running, .. }))));
        let error = PidFile::take(dir, &fred()).unwrap_err();
        assert_eq!(error.to_string(), format!("nanite-fred runs already (pid {})", std::process::id()));
        assert_eq!(nodes(dir, Role::Agent).unwrap(), [fred()]);
        assert!(nodes(dir, Role::Mapper).unwrap().is_empty());
        let content = fs::read(&taken.path).unwrap();
        drop(taken);
        assert!(matches!(look(dir, &fred()), Ok(Found::Nothing)), "it is removed");

        fs::write(path(dir, &fred()), content).unwrap();
        let Ok(Found::Stale(Some(stale))) = look(dir, &fred()) else { panic!() };
        assert_eq!(stale.pid, std::process::id().cast_signed(), "that this process lives proves nothing");
        drop(PidFile::take(dir, &fred()).unwrap());
        fs::write(path(dir, &fred()), "rubbish").unwrap();
        assert!(matches!(look(dir, &fred()), Ok(Found::Stale(None))));
        remove_stale(dir, &fred()).unwrap();
        assert!(matches!(look(dir, &fred()), Ok(Found::Nothing)));
    }

    #[test]
    fn n18_a_number_that_another_process_has_by_now_gets_no_signal() {
        let mut named = Named {
            pid: std::process::id().cast_signed(),
            start: start_time(std::process::id().cast_signed()).unwrap(),
            since: Timestamp::from_secs(0),
            state: State::Running,
        };
        assert!(Process::of(&named).unwrap().is_some());
        named.start += 1;
        assert!(Process::of(&named).unwrap().is_none());
        named.pid = i32::MAX;
        assert!(Process::of(&named).unwrap().is_none());
    }

    #[test]
    fn n18_neither_links_nor_other_peoples_files_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, path(dir.path(), &fred())).unwrap();
        assert!(matches!(PidFile::take(dir.path(), &fred()), Err(PidFileError::Io { .. })));
        assert!(matches!(look(dir.path(), &fred()), Err(PidFileError::Io { .. })));
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        fs::remove_file(path(dir.path(), &fred())).unwrap();
        fs::create_dir(path(dir.path(), &fred())).unwrap();
        assert!(matches!(look(dir.path(), &fred()), Err(PidFileError::Foreign { .. })));
    }
}
