//! Going into the background: the program starts itself anew, in a session of its own, and waits until that process is ready.
//!
//! Until then what the new process says on stderr is shown by the one that was started, which ends with the same exit code when the
//! new one ends early. The new process says that it is ready on its stdout; nobody to hear it means that whoever started it has
//! given up, and it ends.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use rustix::stdio::{dup2_stderr, dup2_stdout};

use crate::cli::error::{CliError, Exit};

/// What asks for the background.
const ASKED: &str = "--daemonize";
/// What tells the new process that it is in the background.
const TOLD: &str = "--daemonized";
/// What the new process says when it is ready.
const READY: &str = "ready\n";

/// Starts this program again with the same arguments, and waits until it is ready.
///
/// # Errors
/// [`CliError`] when it cannot be started, or a signal ended it. When it ended by itself it has said why.
pub(super) fn launch(args: &[OsString]) -> Result<Exit, CliError> {
    let failed = |error: io::Error| CliError::of(Exit::Failure, &error).context("cannot go into the background");
    let (name, args) = args.split_first().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).args(args.iter().map(|arg| if arg == ASKED { OsStr::new(TOLD) } else { arg }));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let (Some(out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed(io::ErrorKind::BrokenPipe.into()));
    };
    let relay = std::thread::spawn(move || io::copy(&mut err, &mut io::stderr()));
    let mut said = String::new();
    BufReader::new(out.take(64)).read_line(&mut said).map_err(failed)?;
    if said == READY {
        // It has let go of this stderr before it said so.
        let _ = relay.join();
        return Ok(Exit::Success);
    }
    let ended = child.wait().map_err(failed)?;
    let _ = relay.join();
    match (ended.code(), ended.signal()) {
        (Some(code), _) => Ok(Exit::of_code(code)),
        (None, signal) => {
            let signal = signal.map_or_else(String::new, |signal| format!(" by signal {signal}"));
            Err(CliError::new(Exit::Failure, format!("it was ended{signal} before it was ready")))
        }
    }
}

/// Leaves the session of whoever started this process: what ends the terminal does not end it.
pub(super) fn leave_session() -> Result<(), CliError> {
    let failed = |error| CliError::of(Exit::Failure, &error).context("cannot leave the session");
    rustix::process::setsid().map(drop).map_err(failed)
}

/// Lets go of what the process was started with, and says that it is ready. From here on stderr goes to the log, or nowhere.
///
/// # Errors
/// [`CliError`] when nobody hears it.
pub(super) fn ready(log: Option<&File>) -> Result<(), CliError> {
    let failed = |error: io::Error| CliError::of(Exit::Failure, &error).context("whoever started this has gone");
    let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    dup2_stderr(log.unwrap_or(&null)).map_err(|error| failed(error.into()))?;
    let mut out = io::stdout();
    out.write_all(READY.as_bytes()).and_then(|()| out.flush()).map_err(failed)?;
    dup2_stdout(&null).map_err(|error| failed(error.into()))
}
