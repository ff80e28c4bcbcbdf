//! One run of a program: the payload in, parts and the result out, within the limits.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::ProgramLimits;
use super::directory::{Directory, Program};
use super::process::{Group, Spawned, spawn};
use crate::agent::{Context, HandlerResult};
use crate::packet::{Failure, FailureCode, Intermediate, Payload};

/// What a program inherits of this process's environment, beside `LC_*`.
const INHERITED: [&str; 6] = ["PATH", "HOME", "LANG", "TZ", "TMPDIR", "USER"];
/// How much is read at a time.
const CHUNK: usize = 16 * 1024;

/// Runs a program for a request. When this is dropped, the program and its group are ended in the background.
pub(super) async fn run(
    directory: Arc<Directory>,
    program: Program,
    payload: Payload,
    context: Context,
    limits: ProgramLimits,
) -> HandlerResult<Payload> {
    let environment = environment(&context);
    // Starting a process blocks, and so do the looks at the file system before it.
    let start = move || -> HandlerResult<(Spawned, Vec<u8>)> {
        directory.check(&program.path).map_err(|skipped| {
            tracing::warn!(program = ?program.path, path = ?skipped.path, reason = %skipped.reason, "not run");
            cannot_run(&skipped.reason)
        })?;
        let mut input = payload.to_string().into_bytes();
        input.push(b'\n');
        match spawn(&program.path, &program.directory, environment) {
            Ok(spawned) => Ok((spawned, input)),
            Err(error) => {
                tracing::warn!(program = ?program.path, %error, "cannot be run");
                Err(match error.kind() {
                    // The program itself was there a moment ago.
                    io::ErrorKind::NotFound => cannot_run("its interpreter does not exist"),
                    _ => cannot_run(error),
                })
            }
        }
    };
    let (Spawned { group, stdin, stdout, stderr, parts }, input) = off_reactor(start).await??;
    let mut running = Running { group: Some(group), grace: limits.grace };
    let (has_ended, ended) = watch::channel(false);
    let source = |pipe: OwnedFd| Source::new(pipe, ended.clone());
    let (stdout, stderr, parts) = (source(stdout)?, source(stderr)?, source(parts)?);
    let stdin = pipe::Sender::from_owned_fd(stdin).map_err(lost)?;
    let work = async {
        tokio::try_join!(
            running.ended(has_ended),
            feed(stdin, input, ended.clone()),
            output(stdout, limits.stdout),
            end(stderr, limits.stderr),
            emit(parts, limits.part, &context),
        )
    };
    let done = match tokio::time::timeout(limits.run_time.unwrap_or(Duration::MAX), work).await {
        Ok(done) => done,
        Err(_) => Err(Failure::new(FailureCode::TimedOut, "the program ran longer than it may")),
    };
    match done {
        Ok(((), (), output, errors, ())) => {
            let status = running.reap()?;
            if status.success() { off_reactor(move || result(output)).await? } else { Err(failed(status, &errors)) }
        }
        Err(failure) => {
            running.stop().await;
            Err(failure)
        }
    }
}

/// Does what blocks or takes long on a thread of its own.
async fn off_reactor<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> HandlerResult<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Failure::new(FailureCode::Lost, "the agent is stopping"))
}

/// What a program is told beside the payload.
fn environment(context: &Context) -> Vec<(OsString, OsString)> {
    let inherited =
        |name: &OsString| name.to_str().is_some_and(|name| INHERITED.contains(&name) || name.starts_with("LC_"));
    let mut environment: Vec<_> = std::env::vars_os().filter(|(name, _)| inherited(name)).collect();
    let mut tell = |name: &str, value: String| environment.push((name.into(), value.into()));
    tell("NANITE_SERVICE", context.service().to_string());
    tell("NANITE_CALLER", context.caller().to_string());
    if let Some(token) = context.token() {
        tell("NANITE_TOKEN", token.to_string());
    }
    if let Some(deadline) = context.deadline() {
        tell("NANITE_DEADLINE", deadline.as_secs().to_string());
    }
    environment
}

/// A program that runs. Dropping it has its group ended in the background.
struct Running {
    group: Option<Group>,
    grace: Duration,
}

impl Running {
    /// Waits for the end of the program, ends what it left behind, and tells those who read its pipes.
    async fn ended(&self, has_ended: watch::Sender<bool>) -> HandlerResult<()> {
        if let Some(group) = &self.group {
            group.ended().await.map_err(lost)?;
            group.kill();
        }
        has_ended.send_replace(true);
        Ok(())
    }

    /// The exit status of a program that has ended.
    fn reap(&mut self) -> HandlerResult<ExitStatus> {
        let group = self.group.take();
        group.map_or_else(|| Err(io::ErrorKind::NotFound.into()), |mut group| group.reap()).map_err(lost)
    }

    async fn stop(&mut self) {
        // Taken only when it is done: dropped meanwhile, it is ended in the background.
        if let Some(group) = self.group.take() {
            let stopping = tokio::spawn(group.stop(self.grace));
            let _ = stopping.await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let (Some(group), Ok(runtime)) = (self.group.take(), Handle::try_current()) {
            runtime.spawn(group.stop(self.grace));
        }
    }
}

/// A pipe that a program writes. It is read until its end, or, once the program has ended, until it is empty: somebody may
/// have left the group and keep it open.
struct Source {
    pipe: pipe::Receiver,
    ended: watch::Receiver<bool>,
}

impl Source {
    fn new(pipe: OwnedFd, ended: watch::Receiver<bool>) -> HandlerResult<Self> {
        Ok(Self { pipe: pipe::Receiver::from_owned_fd(pipe).map_err(lost)?, ended })
    }

    /// The next bytes; none at the end.
    async fn read<'a>(&mut self, chunk: &'a mut [u8]) -> HandlerResult<&'a [u8]> {
        let read = tokio::select! {
            biased;
            read = self.pipe.read(chunk) => Some(read),
            () = has_ended(&mut self.ended) => None,
        };
        let read = match read {
            Some(read) => read,
            // Past the reactor, which may not have been told yet of what the program wrote last.
            None => {
                tokio::task::consume_budget().await;
                match rustix::io::read(&self.pipe, &mut *chunk) {
                    Err(rustix::io::Errno::WOULDBLOCK) => Ok(0),
                    read => read.map_err(Into::into),
                }
            }
        };
        Ok(chunk.get(..read.map_err(lost)?).unwrap_or_default())
    }
}

async fn has_ended(ended: &mut watch::Receiver<bool>) {
    // An error means that the waiting for the end has itself been given up.
    let _ = ended.wait_for(|ended| *ended).await;
}

/// Gives the program its input. One that does not read it is no failure.
async fn feed(mut stdin: pipe::Sender, input: Vec<u8>, mut ended: watch::Receiver<bool>) -> HandlerResult<()> {
    tokio::select! {
        _ = stdin.write_all(&input) => {}
        () = has_ended(&mut ended) => {}
    }
    Ok(())
}

/// All of a program's standard output, up to the limit.
async fn output(mut stdout: Source, limit: usize) -> HandlerResult<Vec<u8>> {
    let mut output = Vec::new();
    let mut chunk = [0; CHUNK];
    loop {
        let read = stdout.read(&mut chunk).await?;
        if read.is_empty() {
            return Ok(output);
        }
        if output.len().saturating_add(read.len()) > limit {
            return Err(bad_answer(format!("more than {limit} bytes on its standard output")));
        }
        output.extend_from_slice(read);
    }
}

/// The end of what a program writes to its standard error.
async fn end(mut stderr: Source, limit: usize) -> HandlerResult<Vec<u8>> {
    let mut end = Vec::new();
    let mut chunk = [0; CHUNK];
    loop {
        let read = stderr.read(&mut chunk).await?;
        if read.is_empty() {
            return Ok(end);
        }
        end.extend_from_slice(read);
        end.drain(..end.len().saturating_sub(limit));
    }
}

/// Sends a program's intermediate results, in order. While they are on their way the pipe fills, and the program waits.
async fn emit(mut parts: Source, limit: usize, context: &Context) -> HandlerResult<()> {
    let mut line = Vec::new();
    let mut chunk = [0; CHUNK];
    loop {
        let read = parts.read(&mut chunk).await?;
        if read.is_empty() {
            return if line.is_empty() { Ok(()) } else { part(&line, context).await };
        }
        for piece in read.split_inclusive(|byte| *byte == b'\n') {
            if line.len().saturating_add(piece.len()) > limit {
                return Err(bad_answer(format!("a line of more than {limit} bytes on descriptor 3")));
            }
            line.extend_from_slice(piece);
            if line.ends_with(b"\n") {
                part(&line, context).await?;
                line.clear();
            }
        }
    }
}

/// A line of descriptor 3.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    key: Option<String>,
    value: Payload,
}

async fn part(line: &[u8], context: &Context) -> HandlerResult<()> {
    if line.trim_ascii().is_empty() {
        return Ok(());
    }
    let part: Part = serde_json::from_slice(line).map_err(|error| {
        bad_answer(format!("a line on descriptor 3 that is not {{\"key\":..,\"value\":..}}: {error}"))
    })?;
    context.emit(part.key.unwrap_or_else(|| Intermediate::DEFAULT_KEY.to_owned()), part.value).await
}

/// The result that an output stands for: null where there is none, JSON where it parses, else the text without its last line
/// break.
fn result(output: Vec<u8>) -> HandlerResult<Payload> {
    let text = String::from_utf8(output).map_err(|_| bad_answer("a standard output that is not UTF-8"))?;
    if text.is_empty() {
        return Ok(Payload::default());
    }
    Ok(Payload::from_text(text.strip_suffix('\n').unwrap_or(&text)))
}

fn failed(status: ExitStatus, errors: &[u8]) -> Failure {
    let how = match status.code() {
        Some(code) => format!("exit code {code}"),
        None => format!("ended by {status}"),
    };
    // A failure's message keeps its beginning, and here the end is what matters.
    let said = readable_end(errors, Failure::MAX_MESSAGE.saturating_sub(how.len() + 2));
    Failure::failed(if said.is_empty() { how } else { format!("{how}: {said}") })
}

/// The end of a program's words, at most `limit` bytes, without what could steer a terminal.
fn readable_end(bytes: &[u8], limit: usize) -> String {
    let text: String = String::from_utf8_lossy(bytes)
        .trim()
        .chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect();
    let begin = text.len().saturating_sub(limit);
    let begin = (begin..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text.get(begin..).unwrap_or_default().to_owned()
}

fn cannot_run(why: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("the program cannot be run: {why}"))
}

fn bad_answer(what: impl std::fmt::Display) -> Failure {
    Failure::new(FailureCode::BadAnswer, format!("the program wrote {what}"))
}

fn lost(error: io::Error) -> Failure {
    Failure::new(FailureCode::Lost, format!("the program was lost: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use tempfile::TempDir;
    use tokio::runtime::Runtime;
    use tokio::sync::mpsc;

    use super::*;
    use crate::agent::context::{Emitted, Inner};
    use crate::clock::{Clock, SystemClock};
    use crate::link::Link;
    use crate::packet::Identity;
    use crate::proxy::MapperProxy;
    use crate::serializer::PlainSerializer;
    use crate::transport::MemoryBroker;

    /// A program alone in its directory.
    struct One {
        directory: Arc<Directory>,
        program: Program,
        _dir: TempDir,
    }

    impl One {
        fn new(text: &str) -> Self {
            let dir = TempDir::new().unwrap();
            let prefix = dir.path().join("a");
            fs::create_dir(&prefix).unwrap();
            fs::write(prefix.join("b"), text).unwrap();
            for path in [dir.path(), &prefix, &prefix.join("b")] {
                fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
            }
            let directory = Directory::open(dir.path(), Vec::new()).unwrap();
            let program = directory.scan().programs.into_values().next().unwrap();
            Self { directory: Arc::new(directory), program, _dir: dir }
        }

        /// Begins a run; what it emits waits in a queue of one.
        fn begin(
            &self,
            limits: ProgramLimits,
        ) -> (impl Future<Output = HandlerResult<Payload>> + Send + use<>, mpsc::Receiver<Emitted>) {
            let (emitter, emitted) = mpsc::channel(1);
            let (agent, broker) = (Identity::agent("a").unwrap(), MemoryBroker::new());
            let link = Link::builder(PlainSerializer::json(agent), broker.connect()).build();
            let context = Context::new(Inner {
                service: "/a/b".parse().unwrap(),
                token: None,
                tags: Vec::new(),
                sender: Identity::mapper("m1").unwrap(),
                signer: None,
                on_behalf_of: None,
                deadline: None,
                now: SystemClock.now(),
                emitter: Some(emitter),
                proxy: MapperProxy::of_agent(link),
            });
            (run(self.directory.clone(), self.program.clone(), Payload::default(), context, limits), emitted)
        }
    }

    async fn number(emitted: &mut mpsc::Receiver<Emitted>) -> u32 {
        emitted.recv().await.unwrap().value.parse().unwrap()
    }

    fn alive(pid: u32) -> bool {
        fs::exists(format!("/proc/{pid}")).unwrap()
    }

    /// A program that ends only by SIGKILL, and tells its process id.
    const STUBBORN: &str = "#!/bin/sh\ntrap '' TERM\necho \"{\\\"value\\\":$$}\" >&3\nwhile :; do sleep 1000; done\n";

    #[tokio::test]
    async fn n17_a_run_that_is_cancelled_is_ended_and_reaped() {
        let one = One::new(STUBBORN);
        let (run, mut emitted) = one.begin(ProgramLimits { grace: Duration::ZERO, ..ProgramLimits::default() });
        let run = tokio::spawn(run);
        let pid = number(&mut emitted).await;
        assert!(alive(pid));
        run.abort();
        assert!(run.await.unwrap_err().is_cancelled());
        while alive(pid) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn n17_a_program_that_is_asked_to_end_can_tidy_up() {
        let one =
            One::new("#!/bin/sh\ntrap 'touch tidy; exit' TERM\necho \"{\\\"value\\\":$$}\" >&3\nsleep 1000 & wait\n");
        let (run, mut emitted) = one.begin(ProgramLimits { grace: Duration::MAX, ..ProgramLimits::default() });
        let run = tokio::spawn(run);
        let pid = number(&mut emitted).await;
        run.abort();
        while alive(pid) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(one.program.directory.join("tidy").exists());
    }

    #[test]
    fn n17_a_runtime_that_is_dropped_leaves_no_program_behind() {
        let one = One::new(STUBBORN);
        // However long the grace: nobody would be left to end it.
        let (run, mut emitted) = one.begin(ProgramLimits { grace: Duration::MAX, ..ProgramLimits::default() });
        let runtime = Runtime::new().unwrap();
        let pid = runtime.block_on(async {
            tokio::spawn(run);
            number(&mut emitted).await
        });
        drop(runtime);
        assert!(!alive(pid));
    }

    #[tokio::test]
    async fn n17_a_program_waits_while_its_intermediate_results_do() {
        // Each line is as long as a pipe is deep.
        let one = One::new(
            "#!/bin/sh
            echo \"{\\\"value\\\":$$}\" >&3
            while :; do printf '{\"value\":1}%65536s\\n' ' ' >&3; echo >> progress; done\n",
        );
        let (run, mut emitted) = one.begin(ProgramLimits { grace: Duration::ZERO, ..ProgramLimits::default() });
        let run = tokio::spawn(run);
        let pid = number(&mut emitted).await;
        let written = || fs::read(one.program.directory.join("progress")).unwrap_or_default().len();
        // Nobody takes more. Once it has written nothing for many looks, it waits: for the one in the queue, the one to be
        // emitted next, the one that is being read, and the one in the pipe.
        let (mut before, mut looks) = (0, 0);
        while looks < 100 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            looks = if written() == before { looks + 1 } else { 0 };
            before = written();
            assert!(before <= 4, "{before} lines were taken though nobody wants them");
        }
        assert!(alive(pid));
        run.abort();
        while alive(pid) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn the_end_of_standard_error_is_cut_to_fit_and_cannot_steer_a_terminal() {
        assert_eq!(readable_end("ab\u{1b}[0m\tc\r\n".as_bytes(), 100), "ab\u{fffd}[0m\tc");
        assert_eq!(readable_end("ääää".as_bytes(), 5), "ää");
        assert_eq!(readable_end(b"\xa4 x", 100), "\u{fffd} x");
        assert_eq!(readable_end(b" \n ", 100), "");
    }
}
