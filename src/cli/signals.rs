//! SIGINT and SIGTERM: the first asks a program to stop, the second stops it at once. SIGUSR1: it says what it does.

use std::future::Future;
use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use super::Global;
use super::error::{CliError, Exit};

/// Runs `program` with a future that ends at the first signal. At the second the program is dropped.
///
/// # Errors
/// That of the program; [`CliError`] at the second signal.
pub(super) async fn run<P>(global: &Global, program: impl FnOnce(Stopped) -> P) -> Result<Exit, CliError>
where
    P: Future<Output = Result<Exit, CliError>>,
{
    let failed = |error: std::io::Error| CliError::of(Exit::Failure, &error).context("cannot take signals");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let stop = Arc::new(Notify::new());
    let signals = async {
        next(&mut interrupt, &mut terminate).await;
        global.note("stopping: running jobs are finished; a second signal stops at once");
        stop.notify_one();
        next(&mut interrupt, &mut terminate).await;
    };
    tokio::select! {
        result = program(Stopped(stop.clone())) => result,
        () = signals => Err(CliError::new(Exit::Failure, "stopped at once: what was running is lost")),
    }
}

/// SIGUSR1, from when it was made: before that the signal would end the program.
pub(super) struct Reports(Signal);

impl Reports {
    /// Takes the signal.
    ///
    /// # Errors
    /// [`CliError`] when that cannot be done.
    pub(super) fn take() -> Result<Self, CliError> {
        let taken = signal(SignalKind::user_defined1());
        taken.map(Self).map_err(|error| CliError::of(Exit::Failure, &error).context("cannot take signals"))
    }

    /// Does the work, and reports at every signal meanwhile.
    pub(super) async fn during<T>(mut self, work: impl Future<Output = T>, mut report: impl AsyncFnMut()) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = self.0.recv() => report().await,
            }
        }
    }
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Ends when the program is to stop.
pub(super) struct Stopped(Arc<Notify>);

impl Stopped {
    /// Waits for it.
    pub(super) async fn wait(self) {
        self.0.notified().await;
    }
}
