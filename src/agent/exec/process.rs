//! One process and its group: started with four pipes and nothing else of ours, and surely ended.
//!
//! The process leads a group of its own. The group is only ever signalled while its leader is not reaped, so that its number
//! cannot have become somebody else's.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::signal::unix::{SignalKind, signal};

/// The descriptor that takes intermediate results.
const PARTS: i32 = 3;
/// How often, and how long apart, a program is tried that somebody is just writing.
const BUSY_TRIES: usize = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// A process that was started, and our ends of its pipes.
#[derive(Debug)]
pub(super) struct Spawned {
    pub group: Group,
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub parts: OwnedFd,
}

/// Starts a program without arguments, in `directory`, with this environment and no other. Blocks until it runs.
pub(super) fn spawn(
    program: &Path,
    directory: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> io::Result<Spawned> {
    let (stdin, ours_in): (PipeReader, PipeWriter) = io::pipe()?;
    let (ours_out, stdout) = io::pipe()?;
    let (ours_err, stderr) = io::pipe()?;
    let (ours_parts, parts) = io::pipe()?;
    let mut descriptors = vec![FdMapping { parent_fd: parts.into(), child_fd: PARTS }];
    // What this process was started with and does not close by itself must not reach the program.
    let unknown = |error| io::Error::other(format!("the descriptors of this process cannot be listed: {error}"));
    let null = OwnedFd::from(File::open("/dev/null").map_err(unknown)?);
    for stray in unverified_peers().map_err(unknown)? {
        descriptors.push(FdMapping { parent_fd: null.try_clone()?, child_fd: stray });
    }
    let mut command = Command::new(program);
    command
        .current_dir(directory)
        .env_clear()
        .envs(environment)
        .process_group(0)
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .fd_mappings(descriptors)
        .map_err(io::Error::other)?;
    let mut tries = BUSY_TRIES;
    let child = loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries > 0 => tries -= 1,
            child => break child?,
        }
        thread::sleep(BUSY_PAUSE);
    };
    Ok(Spawned {
        group: Group { child, reaped: false },
        stdin: ours_in.into(),
        stdout: ours_out.into(),
        stderr: ours_err.into(),
        parts: ours_parts.into(),
    })
}

/// The descriptors of this process, above [`PARTS`], that a program it starts would inherit. What Rust opens is not among them.
fn unverified_peers() -> io::Result<Vec<i32>> {
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let mut unverified_peers = Vec::new();
    if !cfg!(target_os = "linux") {
        return Ok(unverified_peers);
    }
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // One that is closed meanwhile cannot be read any more, and is inherited no more.
        let Ok(info) = fs::read_to_string(entry.path()) else { continue };
        let flags = info.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        if number > PARTS && flags.is_none_or(|flags| flags & CLOSE_ON_EXEC == 0) {
            unverified_peers.push(number);
        }
    }
    Ok(unverified_peers)
}

/// A process and all that it started in its group. Dropping it kills them at once.
#[derive(Debug)]
pub(super) struct Group {
    child: Child,
    reaped: bool,
}

impl Group {
    /// Waits until the leader has ended, without taking its exit status: its number stays taken.
    pub async fn ended(&self) -> io::Result<()> {
        // DecisionSubject for before looking, so that an end in between is not missed.
        let mut child_ended = signal(SignalKind::child())?;
        while !self.has_ended()? {
            child_ended.recv().await;
        }
        Ok(())
    }

    /// Whether the leader has ended. An error means that it is no child of ours any more: somebody else took its exit status.
    fn has_ended(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(self.id()), options)?.is_some())
    }

    /// Kills what is left of the group.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Kills what is left of the group, and takes the leader's exit status. Waits for the leader's end.
    pub fn reap(&mut self) -> io::Result<ExitStatus> {
        self.kill();
        self.reaped = true;
        self.child.wait()
    }

    /// Asks the group to end, and kills what is left of it when its leader has ended or the grace is over.
    pub async fn stop(mut self, grace: Duration) {
        self.signal(Signal::TERM);
        let _ = tokio::time::timeout(grace, self.ended()).await;
        self.kill();
        // Even killed, a process may take a while to go: this does not wait for it on a thread.
        if self.ended().await.is_ok() {
            let _ = self.reap();
        }
    }

    fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn signal(&self, signal: Signal) {
        if !self.reaped && self.has_ended().is_ok() {
            // The only failure there can be is that nobody is left.
            let _ = kill_process_group(self.id(), signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.reap();
        }
    }
}
