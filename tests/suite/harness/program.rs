//! The `nanite` program as users run it: a process with arguments, output and an exit code.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::WAIT_TIMEOUT;

/// The program with these arguments and none of the caller's `NANITE_` settings.
pub fn nanite<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nanite"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("NANITE_")) {
        command.env_remove(name);
    }
    command.env("NO_COLOR", "1").stdin(Stdio::null()).args(arguments);
    command
}

/// The exit status and the output of a program that has ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// The exit code; panics when a signal ended the program.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }
}

/// A running program; it is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    out: Output,
    err: Output,
}

#[derive(Debug)]
struct Output {
    text: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Output {
    fn of(source: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let all = Arc::clone(&text);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(source).split(b'\n').map_while(Result::ok) {
                let mut all = all.lock().unwrap();
                all.push_str(&String::from_utf8_lossy(&line));
                all.push('\n');
            }
        });
        Self { text, reader }
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    /// Whether everything was read: the program has ended, and everything that has inherited its output.
    fn is_complete(&self) -> bool {
        self.reader.is_finished()
    }
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = Output::of(child.stdout.take().unwrap());
        let err = Output::of(child.stderr.take().unwrap());
        Self { child, out, err }
    }

    /// Its standard input, if the command has a pipe for it.
    pub fn input(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its output so far: standard output and standard error.
    pub fn output(&self) -> (String, String) {
        (self.out.text(), self.err.text())
    }

    /// Waits until standard output or standard error contains this text.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            // In this order: what it has printed before its end is read after it.
            let ended = self.child.try_wait().unwrap().filter(|_| self.out.is_complete() && self.err.is_complete());
            let (out, err) = self.output();
            if out.contains(text) || err.contains(text) {
                return;
            }
            assert!(ended.is_none(), "ended ({ended:?}) without printing {text:?}:\n{out}\n{err}");
            assert!(Instant::now() < deadline, "did not print {text:?} within {WAIT_TIMEOUT:?}:\n{out}\n{err}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Waits until it ends.
    pub fn wait(mut self) -> Ended {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        let status = loop {
            let ended = self.child.try_wait().unwrap();
            if let Some(status) = ended.filter(|_| self.out.is_complete() && self.err.is_complete()) {
                break status;
            }
            assert!(Instant::now() < deadline, "did not end within {WAIT_TIMEOUT:?}: {:?}", self.output());
            std::thread::sleep(Duration::from_millis(5));
        };
        let (out, err) = self.output();
        Ended { status, out, err }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ended {
    Running::start(command).wait()
}
