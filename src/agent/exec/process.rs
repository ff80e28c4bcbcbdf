//! A program as a process group: started with four pipes and nothing else of this process, and reliably ended.
//!
//! The process leads a group of its own. The group is signalled only until its leader is reaped: afterwards the process id could
//! belong to another process.

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
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::actor::Context;

/// The descriptor for intermediate results.
const INTERMEDIATE_FD: i32 = 3;
/// The environment variables that a program inherits, besides `LC_*`.
const INHERITED_VARIABLES: [&str; 6] = ["PATH", "HOME", "LANG", "TZ", "TMPDIR", "USER"];
/// Starting a program whose file is still open for writing fails: how often, and at which interval, it is retried.
const MAX_BUSY_RETRIES: usize = 50;
const BUSY_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// A started program, and our ends of its pipes.
#[derive(Debug)]
pub(super) struct StartedProgram {
    pub group: ProcessGroup,
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub intermediate: OwnedFd,
}

/// The whole environment of a program.
pub(super) fn environment(context: &Context) -> Vec<(OsString, OsString)> {
    let is_inherited = |name: &OsString| {
        name.to_str().is_some_and(|name| INHERITED_VARIABLES.contains(&name) || name.starts_with("LC_"))
    };
    let mut environment: Vec<_> = std::env::vars_os().filter(|(name, _)| is_inherited(name)).collect();
    let mut set = |name: &str, value: String| environment.push((name.into(), value.into()));
    set("NANITE_SERVICE", context.service().to_string());
    set("NANITE_CALLER", context.caller().to_string());
    if let Some(token) = context.token() {
        set("NANITE_TOKEN", token.to_string());
    }
    if let Some(deadline) = context.deadline() {
        set("NANITE_DEADLINE", deadline.as_secs().to_string());
    }
    environment
}

/// Starts a program without arguments, in `directory`, with only this environment. Blocks until it runs.
pub(super) fn start(
    program: &Path,
    directory: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> io::Result<StartedProgram> {
    let (child_stdin, stdin): (PipeReader, PipeWriter) = io::pipe()?;
    let (stdout, child_stdout) = io::pipe()?;
    let (stderr, child_stderr) = io::pipe()?;
    let (intermediate, child_intermediate) = io::pipe()?;
    let mut descriptors = vec![FdMapping { parent_fd: child_intermediate.into(), child_fd: INTERMEDIATE_FD }];
    // Descriptors that this process inherited without close-on-exec must not reach the program.
    let cannot_list = |error| io::Error::other(format!("cannot list the descriptors of this process: {error}"));
    let null = OwnedFd::from(File::open("/dev/null").map_err(cannot_list)?);
    for inheritable in inheritable_descriptors().map_err(cannot_list)? {
        descriptors.push(FdMapping { parent_fd: null.try_clone()?, child_fd: inheritable });
    }
    let mut command = Command::new(program);
    command
        .current_dir(directory)
        .env_clear()
        .envs(environment)
        .process_group(0)
        .stdin(child_stdin)
        .stdout(child_stdout)
        .stderr(child_stderr)
        .fd_mappings(descriptors)
        .map_err(io::Error::other)?;
    let mut retries = MAX_BUSY_RETRIES;
    let child = loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && retries > 0 => retries -= 1,
            child => break child?,
        }
        thread::sleep(BUSY_RETRY_INTERVAL);
    };
    Ok(StartedProgram {
        group: ProcessGroup { child, reaped: false },
        stdin: stdin.into(),
        stdout: stdout.into(),
        stderr: stderr.into(),
        intermediate: intermediate.into(),
    })
}

/// Descriptors above [`INTERMEDIATE_FD`] that a child would inherit. Those that Rust opens are close-on-exec, and not among them.
fn inheritable_descriptors() -> io::Result<Vec<i32>> {
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let mut descriptors = Vec::new();
    if !cfg!(target_os = "linux") {
        return Ok(descriptors);
    }
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A descriptor closed in the meantime cannot be read, nor inherited.
        let Ok(info) = fs::read_to_string(entry.path()) else { continue };
        let flags = info.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        if number > INTERMEDIATE_FD && flags.is_none_or(|flags| flags & CLOSE_ON_EXEC == 0) {
            descriptors.push(number);
        }
    }
    Ok(descriptors)
}

/// A process and everything it started in its group. Dropping it kills them at once.
#[derive(Debug)]
pub(super) struct ProcessGroup {
    child: Child,
    reaped: bool,
}

impl ProcessGroup {
    /// Waits until the leader has ended, without reaping it: its process id stays reserved.
    pub async fn wait(&self) -> io::Result<()> {
        // Subscribed before the first check, so that an exit in between is not missed.
        let mut child_exited = signal(SignalKind::child())?;
        while !self.has_exited()? {
            child_exited.recv().await;
        }
        Ok(())
    }

    /// Whether the leader has ended. An error means that it is no longer our child: its exit status was taken elsewhere.
    fn has_exited(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(waitid(WaitId::Pid(self.id()), options)?.is_some())
    }

    /// Kills the remaining processes of the group.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Kills the remaining processes, waits for the leader's exit, and returns its status.
    pub fn reap(&mut self) -> io::Result<ExitStatus> {
        self.kill();
        self.reaped = true;
        self.child.wait()
    }

    /// Sends SIGTERM, and SIGKILL when the leader has ended or after the grace period.
    async fn stop(mut self, grace_period: Duration) {
        self.signal(Signal::TERM);
        let _ = tokio::time::timeout(grace_period, self.wait()).await;
        self.kill();
        // A killed process may take a while to exit: wait here, not on a thread.
        if self.wait().await.is_ok() {
            let _ = self.reap();
        }
    }

    fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn signal(&self, signal: Signal) {
        if !self.reaped && self.has_exited().is_ok() {
            // It can only fail because no process is left.
            let _ = kill_process_group(self.id(), signal);
        }
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.reap();
        }
    }
}

/// Owns a running process group. Dropping it stops the group in the background, with the grace period.
pub(super) struct StopOnDrop {
    group: Option<ProcessGroup>,
    grace_period: Duration,
}

impl StopOnDrop {
    pub fn new(group: ProcessGroup, grace_period: Duration) -> Self {
        Self { group: Some(group), grace_period }
    }

    /// Waits for the program's exit, then kills what it left behind.
    pub async fn exited(&self) -> io::Result<()> {
        if let Some(group) = &self.group {
            group.wait().await?;
            group.kill();
        }
        Ok(())
    }

    /// The exit status of a program that has ended.
    pub fn reap(&mut self) -> io::Result<ExitStatus> {
        self.group.take().map_or_else(|| Err(io::ErrorKind::NotFound.into()), |mut group| group.reap())
    }

    /// Stops the group, also if this future is dropped meanwhile.
    pub async fn stop(&mut self) {
        if let Some(group) = self.group.take() {
            let _ = tokio::spawn(group.stop(self.grace_period)).await;
        }
    }
}

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        if let (Some(group), Ok(runtime)) = (self.group.take(), Handle::try_current()) {
            runtime.spawn(group.stop(self.grace_period));
        }
    }
}
