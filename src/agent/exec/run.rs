//! One run of a program: the payload in, intermediate results and the result out, within the limits.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::permissions::ProgramRoot;
use super::process::{self, StartedProgram, StopOnDrop};
use crate::agent::actor::{Context, HandlerResult};
use crate::packet::{Failure, FailureCode, Intermediate, Payload};

const READ_BUFFER_BYTES: usize = 16 * 1024;

/// A program that may be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// DIR/PREFIX/NAME, not resolved: a program may behave differently by the name it is called with.
    pub path: PathBuf,
    /// DIR/PREFIX, its working directory.
    pub directory: PathBuf,
}

/// Limits for each run of a program.
///
/// ```
/// use std::time::Duration;
/// use nanite::agent::ProgramLimits;
///
/// let limits = ProgramLimits::new().max_stdout_bytes(64 << 10).timeout(Duration::from_secs(60));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ProgramLimits {
    max_stdout_bytes: usize,
    max_stderr_bytes: usize,
    max_line_bytes: usize,
    timeout: Option<Duration>,
    grace_period: Duration,
}

impl ProgramLimits {
    /// The defaults.
    pub fn new() -> Self {
        Self {
            max_stdout_bytes: 8 << 20,
            max_stderr_bytes: 4 << 10,
            max_line_bytes: 1 << 20,
            timeout: None,
            grace_period: Duration::from_secs(2),
        }
    }

    /// The most bytes on standard output; a program that writes more is stopped and fails. 8 MiB by default.
    #[must_use]
    pub fn max_stdout_bytes(mut self, bytes: usize) -> Self {
        self.max_stdout_bytes = bytes;
        self
    }

    /// How many of the last bytes of standard error are kept for the failure message. 4 KiB by default.
    #[must_use]
    pub fn max_stderr_bytes(mut self, bytes: usize) -> Self {
        self.max_stderr_bytes = bytes;
        self
    }

    /// The most bytes in one intermediate result, a line on descriptor 3; a program that writes more is stopped and fails. 1 MiB by
    /// default.
    #[must_use]
    pub fn max_line_bytes(mut self, bytes: usize) -> Self {
        self.max_line_bytes = bytes;
        self
    }

    /// The longest run time, besides the deadline of the request; unlimited by default.
    #[must_use]
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// The time between SIGTERM and SIGKILL. 2 s by default.
    #[must_use]
    pub fn grace_period(mut self, period: Duration) -> Self {
        self.grace_period = period;
        self
    }
}

impl Default for ProgramLimits {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs a program for a request. If the future is dropped, the program and its group are stopped in the background.
pub(super) async fn run(
    root: Arc<ProgramRoot>,
    program: Program,
    payload: Payload,
    context: Context,
    limits: ProgramLimits,
) -> HandlerResult<Payload> {
    let environment = process::environment(&context);
    // Starting a process blocks, and so do the permission checks.
    let start = move || -> HandlerResult<(StartedProgram, Vec<u8>)> {
        root.check_program(&program.path).map_err(|skipped| {
            tracing::warn!(program = ?program.path, path = ?skipped.path, reason = %skipped.reason, "program not run");
            cannot_run(&skipped.reason)
        })?;
        let mut input = payload.to_string().into_bytes();
        input.push(b'\n');
        match process::start(&program.path, &program.directory, environment) {
            Ok(started) => Ok((started, input)),
            Err(error) => {
                tracing::warn!(program = ?program.path, %error, "cannot run the program");
                Err(match error.kind() {
                    // The program itself was just checked.
                    io::ErrorKind::NotFound => cannot_run("its interpreter does not exist"),
                    _ => cannot_run(error),
                })
            }
        }
    };
    let (StartedProgram { group, stdin, stdout, stderr, intermediate }, input) = off_reactor(start).await??;
    let mut running = StopOnDrop::new(group, limits.grace_period);
    let (has_exited, exited) = watch::channel(false);
    let output_pipe = |pipe: OwnedFd| OutputPipe::new(pipe, exited.clone());
    let (stdout, stderr, intermediate) = (output_pipe(stdout)?, output_pipe(stderr)?, output_pipe(intermediate)?);
    let stdin = pipe::Sender::from_owned_fd(stdin).map_err(lost)?;
    let wait = async {
        running.exited().await.map_err(lost)?;
        has_exited.send_replace(true);
        Ok(())
    };
    let work = async {
        tokio::try_join!(
            wait,
            write_input(stdin, input, exited.clone()),
            read_all(stdout, limits.max_stdout_bytes),
            read_tail(stderr, limits.max_stderr_bytes),
            emit_lines(intermediate, limits.max_line_bytes, &context),
        )
    };
    let done = match tokio::time::timeout(limits.timeout.unwrap_or(Duration::MAX), work).await {
        Ok(done) => done,
        Err(_) => Err(Failure::new(FailureCode::TimedOut, "the program exceeded its time limit")),
    };
    match done {
        Ok(((), (), output, errors, ())) => {
            let status = running.reap().map_err(lost)?;
            if status.success() {
                off_reactor(move || parse_result(output)).await?
            } else {
                Err(exit_failure(status, &errors))
            }
        }
        Err(failure) => {
            running.stop().await;
            Err(failure)
        }
    }
}

/// Runs blocking or long work on a worker thread.
async fn off_reactor<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> HandlerResult<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Failure::new(FailureCode::Lost, "the agent is stopping"))
}

/// A pipe that the program writes to. It is read to its end or, once the program has exited, until it is empty: a process that
/// left the group may keep it open.
struct OutputPipe {
    pipe: pipe::Receiver,
    exited: watch::Receiver<bool>,
}

impl OutputPipe {
    fn new(pipe: OwnedFd, exited: watch::Receiver<bool>) -> HandlerResult<Self> {
        Ok(Self { pipe: pipe::Receiver::from_owned_fd(pipe).map_err(lost)?, exited })
    }

    /// The next bytes; none at the end.
    async fn read<'a>(&mut self, buffer: &'a mut [u8]) -> HandlerResult<&'a [u8]> {
        let read = tokio::select! {
            biased;
            read = self.pipe.read(buffer) => Some(read),
            () = has_exited(&mut self.exited) => None,
        };
        let read = match read {
            Some(read) => read,
            // Read directly: the reactor may not yet have seen what the program wrote last.
            None => {
                tokio::task::consume_budget().await;
                match rustix::io::read(&self.pipe, &mut *buffer) {
                    Err(rustix::io::Errno::WOULDBLOCK) => Ok(0),
                    read => read.map_err(Into::into),
                }
            }
        };
        Ok(buffer.get(..read.map_err(lost)?).unwrap_or_default())
    }
}

async fn has_exited(exited: &mut watch::Receiver<bool>) {
    // An error means that waiting for the exit was itself given up.
    let _ = exited.wait_for(|exited| *exited).await;
}

/// Writes the program's input. It is not a failure if the program does not read it.
async fn write_input(mut stdin: pipe::Sender, input: Vec<u8>, mut exited: watch::Receiver<bool>) -> HandlerResult<()> {
    tokio::select! {
        _ = stdin.write_all(&input) => {}
        () = has_exited(&mut exited) => {}
    }
    Ok(())
}

/// All of the program's standard output, up to the limit.
async fn read_all(mut stdout: OutputPipe, limit: usize) -> HandlerResult<Vec<u8>> {
    let mut output = Vec::new();
    let mut buffer = [0; READ_BUFFER_BYTES];
    loop {
        let read = stdout.read(&mut buffer).await?;
        if read.is_empty() {
            return Ok(output);
        }
        if output.len().saturating_add(read.len()) > limit {
            return Err(bad_answer(format!("more than {limit} bytes on its standard output")));
        }
        output.extend_from_slice(read);
    }
}

/// The last bytes of the program's standard error.
async fn read_tail(mut stderr: OutputPipe, limit: usize) -> HandlerResult<Vec<u8>> {
    let mut tail = Vec::new();
    let mut buffer = [0; READ_BUFFER_BYTES];
    loop {
        let read = stderr.read(&mut buffer).await?;
        if read.is_empty() {
            return Ok(tail);
        }
        tail.extend_from_slice(read);
        tail.drain(..tail.len().saturating_sub(limit));
    }
}

/// Sends the program's intermediate results, in order. While they wait to be sent the pipe fills, and the program waits.
async fn emit_lines(mut pipe: OutputPipe, limit: usize, context: &Context) -> HandlerResult<()> {
    let mut line = Vec::new();
    let mut buffer = [0; READ_BUFFER_BYTES];
    loop {
        let read = pipe.read(&mut buffer).await?;
        if read.is_empty() {
            return if line.is_empty() { Ok(()) } else { emit_line(&line, context).await };
        }
        for piece in read.split_inclusive(|byte| *byte == b'\n') {
            if line.len().saturating_add(piece.len()) > limit {
                return Err(bad_answer(format!("a line of more than {limit} bytes on descriptor 3")));
            }
            line.extend_from_slice(piece);
            if line.ends_with(b"\n") {
                emit_line(&line, context).await?;
                line.clear();
            }
        }
    }
}

/// A line on descriptor 3.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IntermediateLine {
    key: Option<String>,
    value: Payload,
}

async fn emit_line(line: &[u8], context: &Context) -> HandlerResult<()> {
    if line.trim_ascii().is_empty() {
        return Ok(());
    }
    let line: IntermediateLine = serde_json::from_slice(line).map_err(|error| {
        bad_answer(format!("a line on descriptor 3 that is not {{\"key\":..,\"value\":..}}: {error}"))
    })?;
    context.emit(line.key.unwrap_or_else(|| Intermediate::DEFAULT_KEY.to_owned()), line.value).await
}

/// The result of a program: null for no output, JSON if it parses, else the text without its last line break.
fn parse_result(output: Vec<u8>) -> HandlerResult<Payload> {
    let text = String::from_utf8(output).map_err(|_| bad_answer("a standard output that is not UTF-8"))?;
    if text.is_empty() {
        return Ok(Payload::default());
    }
    Ok(Payload::from_text(text.strip_suffix('\n').unwrap_or(&text)))
}

fn exit_failure(status: ExitStatus, errors: &[u8]) -> Failure {
    let status = match status.code() {
        Some(code) => format!("exit code {code}"),
        None => format!("ended by {status}"),
    };
    // A failure message is cut at its end, but the end of standard error matters most.
    let errors = printable_tail(errors, Failure::MAX_MESSAGE_BYTES.saturating_sub(status.len() + 2));
    Failure::failed(if errors.is_empty() { status } else { format!("{status}: {errors}") })
}

/// The last `limit` bytes of a text, without characters that could control a terminal.
fn printable_tail(bytes: &[u8], limit: usize) -> String {
    let text: String = String::from_utf8_lossy(bytes)
        .trim()
        .chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    let start = text.len().saturating_sub(limit);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text.get(start..).unwrap_or_default().to_owned()
}

fn cannot_run(reason: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("the program cannot be run: {reason}"))
}

fn bad_answer(output: impl std::fmt::Display) -> Failure {
    Failure::new(FailureCode::BadAnswer, format!("the program wrote {output}"))
}

fn lost(error: io::Error) -> Failure {
    Failure::new(FailureCode::Lost, format!("lost the program: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;
    use tokio::runtime::Runtime;
    use tokio::sync::mpsc;

    use super::super::permissions::tests::{program_dir, write};
    use super::*;
    use crate::agent::actor::{IntermediateResult, RequestContext};
    use crate::clock::{Clock, SystemClock};
    use crate::link::Link;
    use crate::packet::Identity;
    use crate::proxy::MapperProxy;
    use crate::serializer::PlainSerializer;
    use crate::transport::MemoryBroker;

    /// A directory with one program.
    struct TestProgram {
        root: Arc<ProgramRoot>,
        program: Program,
        _dir: TempDir,
    }

    impl TestProgram {
        fn new(text: &str) -> Self {
            let dir = program_dir();
            let path = write(&dir, "a/b", text, 0o755);
            let program = Program { directory: path.parent().unwrap().to_owned(), path };
            Self { root: Arc::new(ProgramRoot::open(dir.path()).unwrap()), program, _dir: dir }
        }

        /// A run, and a channel of capacity 1 for its intermediate results.
        fn run(
            &self,
            limits: ProgramLimits,
        ) -> (impl Future<Output = HandlerResult<Payload>> + Send + use<>, mpsc::Receiver<IntermediateResult>) {
            let (intermediates, emitted) = mpsc::channel(1);
            let (agent, broker) = (Identity::agent("a").unwrap(), MemoryBroker::new());
            let link = Link::builder(PlainSerializer::json(agent), broker.connect()).build();
            let context = Context::new(RequestContext {
                service: "/a/b".parse().unwrap(),
                token: None,
                tags: Vec::new(),
                sender: Identity::mapper("m1").unwrap(),
                signer: None,
                on_behalf_of: None,
                deadline: None,
                started_at: SystemClock.now(),
                intermediates: Some(intermediates),
                proxy: MapperProxy::of_agent(link),
            });
            (run(self.root.clone(), self.program.clone(), Payload::default(), context, limits), emitted)
        }
    }

    /// How long a test waits for something that must happen.
    const TIMEOUT: Duration = Duration::from_secs(60);

    async fn receive_pid(emitted: &mut mpsc::Receiver<IntermediateResult>) -> u32 {
        tokio::time::timeout(TIMEOUT, emitted.recv()).await.unwrap().unwrap().value.parse().unwrap()
    }

    fn is_alive(pid: u32) -> bool {
        fs::exists(format!("/proc/{pid}")).unwrap()
    }

    async fn wait_until_ended(pid: u32) {
        let ended = async {
            while is_alive(pid) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        assert!(tokio::time::timeout(TIMEOUT, ended).await.is_ok(), "process {pid} still runs");
    }

    /// Whether a process sleeps: the shell that runs a program sleeps only while a pipe is full.
    fn sleeps(pid: u32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().rsplit_once(") ").unwrap().1.starts_with('S')
    }

    /// A program that only SIGKILL ends. It emits its process id.
    const IGNORES_SIGTERM: &str =
        "#!/bin/sh\ntrap '' TERM\necho \"{\\\"value\\\":$$}\" >&3\nwhile :; do sleep 1000; done\n";

    #[tokio::test]
    async fn n17_cancelled_run_is_killed_and_reaped() {
        let program = TestProgram::new(IGNORES_SIGTERM);
        let (run, mut emitted) = program.run(ProgramLimits::new().grace_period(Duration::ZERO));
        let run = tokio::spawn(run);
        let pid = receive_pid(&mut emitted).await;
        assert!(is_alive(pid));
        run.abort();
        assert!(run.await.unwrap_err().is_cancelled());
        wait_until_ended(pid).await;
    }

    #[tokio::test]
    async fn n17_sigterm_lets_a_program_clean_up() {
        let program = TestProgram::new(
            "#!/bin/sh\ntrap 'touch tidy; exit' TERM\necho \"{\\\"value\\\":$$}\" >&3\nsleep 1000 & wait\n",
        );
        let (run, mut emitted) = program.run(ProgramLimits::new().grace_period(Duration::MAX));
        let run = tokio::spawn(run);
        let pid = receive_pid(&mut emitted).await;
        run.abort();
        wait_until_ended(pid).await;
        assert!(program.program.directory.join("tidy").exists());
    }

    #[test]
    fn n17_dropped_runtime_leaves_no_process_behind() {
        let program = TestProgram::new(IGNORES_SIGTERM);
        // However long the grace period: nothing would be left to end it.
        let (run, mut emitted) = program.run(ProgramLimits::new().grace_period(Duration::MAX));
        let runtime = Runtime::new().unwrap();
        let pid = runtime.block_on(async {
            tokio::spawn(run);
            receive_pid(&mut emitted).await
        });
        drop(runtime);
        assert!(!is_alive(pid));
    }

    #[tokio::test]
    async fn n17_unread_intermediate_results_block_the_program() {
        // Each line fills a pipe.
        let program = TestProgram::new(
            "#!/bin/sh
            echo \"{\\\"value\\\":$$}\" >&3
            while :; do printf '{\"value\":1}%65536s\\n' ' ' >&3; echo >> progress; done\n",
        );
        let (run, mut emitted) = program.run(ProgramLimits::new().grace_period(Duration::ZERO));
        let run = tokio::spawn(run);
        let pid = receive_pid(&mut emitted).await;
        let written = || fs::read(program.program.directory.join("progress")).unwrap_or_default().len();
        // Nothing is received any more. The program is blocked when it sleeps while this runtime, which reads the pipe, has nothing
        // to do, after at most four lines: in the channel, to be emitted next, being read, and in the pipe.
        let blocked = async {
            let (mut lines, mut unchanged) = (0, 0);
            while unchanged < 100 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                unchanged = if written() == lines && sleeps(pid) { unchanged + 1 } else { 0 };
                lines = written();
                assert!(lines <= 4, "{lines} lines were read though none is received");
            }
        };
        assert!(tokio::time::timeout(TIMEOUT, blocked).await.is_ok(), "the program is not blocked");
        assert!(is_alive(pid));
        run.abort();
        wait_until_ended(pid).await;
    }

    #[test]
    fn stderr_tail_is_truncated_and_cannot_control_a_terminal() {
        assert_eq!(printable_tail("ab\u{1b}[0m\tc\r\n".as_bytes(), 100), "ab\u{fffd}[0m\tc");
        assert_eq!(printable_tail("ääää".as_bytes(), 5), "ää");
        assert_eq!(printable_tail(b"\xa4 x", 100), "\u{fffd} x");
        assert_eq!(printable_tail(b" \n ", 100), "");
    }
}
