//! What commands run in: the global options, the asynchronous runtime, and signals.

use std::ffi::OsString;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use super::config::Config;
use super::error::{CliError, Exit, Result};
use super::output;

/// How long tasks may take to end once the command has its result.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);

/// What every command gets beside its own arguments.
pub(super) struct Global {
    pub config: Config,
    pub quiet: bool,
    /// The arguments of this process, including its name.
    pub args: Vec<OsString>,
}

impl Global {
    /// Prints a note on stderr, unless `--quiet` is given.
    pub(super) fn note(&self, text: &str) {
        if !self.quiet {
            output::note(text);
        }
    }
}

/// Runs a command that needs the asynchronous runtime; the others start faster without.
pub(super) fn run<T>(command: impl Future<Output = Result<T>>) -> Result<T> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.enable_all().build().map_err(CliError::failed(Exit::Failure, "cannot start"))?;
    let result = runtime.block_on(command);
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    result
}

/// Starts to handle a signal, instead of being ended by it.
pub(super) fn handle(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(CliError::failed(Exit::Failure, "cannot handle signals"))
}

/// Runs a program until it ends. The first SIGINT or SIGTERM completes the future that it gets; the second drops it.
pub(super) async fn until_stopped<P>(global: &Global, program: impl FnOnce(Stop) -> P) -> Result<Exit>
where
    P: Future<Output = Result<Exit>>,
{
    let (mut interrupt, mut terminate) = (handle(SignalKind::interrupt())?, handle(SignalKind::terminate())?);
    let mut next = async || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let stop = Arc::new(Notify::new());
    let signals = async {
        next().await;
        global.note("stopping: running jobs are finished; a second signal stops at once");
        stop.notify_one();
        next().await;
    };
    tokio::select! {
        result = program(Stop(stop.clone())) => result,
        () = signals => Err(CliError::new(Exit::Failure, "stopped at once: running jobs are lost")),
    }
}

/// Completes when the program is to stop.
pub(super) struct Stop(Arc<Notify>);

impl Stop {
    pub(super) async fn requested(self) {
        self.0.notified().await;
    }
}

/// Completes with `work`; calls `report` at each signal meanwhile.
pub(super) async fn reporting<T>(
    mut signals: Signal,
    work: impl Future<Output = T>,
    mut report: impl AsyncFnMut(),
) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = signals.recv() => report().await,
        }
    }
}
