//! What commands run in: the global options, the asynchronous runtime, signals, and the log, on stderr or in a file.

use std::ffi::OsString;
use std::fs::File;
use std::future::Future;
use std::io;
use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use clap::ArgAction;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::config::{Config, LogFormat};
use super::error::{CliError, Exit, Result};
use super::output;
use crate::transport::logs_secrets;

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

/// What to log, and how.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Log")]
pub(super) struct Options {
    /// Log more; each further -v raises the level by one
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "quiet")]
    verbose: u8,
    /// Log errors only, and print no notes
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// What to log: a level (error, warn, info, debug, trace) or a filter such as `nanite=debug` [also: NANITE_LOG]
    #[arg(long, value_name = "FILTER", global = true)]
    log: Option<String>,
    /// The format of the log [default: text]
    #[arg(long, value_name = "FORMAT", global = true)]
    log_format: Option<LogFormat>,
}

/// What a command logs by default, as an index into [`LEVELS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DefaultLevel {
    /// For commands that print everything else themselves.
    Error = 0,
    /// For commands that do one thing and end.
    Warn = 1,
    /// For programs that run for long.
    Info = 2,
}

/// The levels that `-v` and `-q` choose from.
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

impl Options {
    /// Starts logging for this process. `into_file`: the log goes [into a file](into_file), without colours.
    pub(super) fn init(&self, config: &Config, default: DefaultLevel, into_file: bool) -> Result<()> {
        let filter = self.filter(config, default);
        let filter = EnvFilter::try_new(&filter).map_err(|_| {
            CliError::usage(format!("'{filter}' is not a log filter"))
                .help("give a level such as `--log info`, or a filter such as `--log nanite=debug`")
        })?;
        let colour = !into_file && AutoStream::choice(&io::stderr()) != ColorChoice::Never;
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogWriter).with_ansi(colour);
        // Whatever the filter says, records that may hold a password are never logged.
        let without_secrets = filter_fn(|metadata| !logs_secrets(metadata.target()));
        let started = match self.log_format.or(config.file.log_format).unwrap_or_default() {
            LogFormat::Text => log.finish().with(without_secrets).try_init(),
            LogFormat::Json => log.json().finish().with(without_secrets).try_init(),
        };
        started.map_err(|error| CliError::new(Exit::Failure, format!("cannot start the log: {error}")))
    }

    fn filter(&self, config: &Config, default: DefaultLevel) -> String {
        // Other libraries log at `warn` at most: their details do not help users of this program. `lapin` is off, because
        // our transport logs what happens to the connection.
        let level = |index: usize| match LEVELS.get(index).unwrap_or(&"trace") {
            &"error" => "error,lapin=off".to_owned(),
            level => format!("warn,lapin=off,nanite={level}"),
        };
        if self.quiet {
            return level(0);
        }
        if self.verbose > 0 {
            return level(default as usize + usize::from(self.verbose));
        }
        let given = self.log.as_ref().or(config.environment.log.as_ref()).or(config.file.log.as_ref());
        given.cloned().unwrap_or_else(|| level(default as usize))
    }
}

/// The log file, if there is one.
static FILE: OnceLock<File> = OnceLock::new();

/// Sends the log of this process into a file that was opened for appending. Only the first call has an effect.
pub(super) fn into_file(file: File) {
    let _ = FILE.set(file);
}

/// Writes into the log file, or else to stderr.
struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match FILE.get() {
            Some(mut file) => file.write(bytes),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(options: (u8, bool, Option<&str>), environment: Option<&str>, file: Option<&str>) -> String {
        let (verbose, quiet, log) = options;
        let options = Options { verbose, quiet, log: log.map(str::to_owned), log_format: None };
        let mut config = Config::default();
        config.environment.log = environment.map(str::to_owned);
        config.file.log = file.map(str::to_owned);
        options.filter(&config, DefaultLevel::Warn)
    }

    #[test]
    fn n16_log_filter_precedence() {
        assert_eq!(filter((0, false, None), None, None), "warn,lapin=off,nanite=warn");
        assert_eq!(filter((0, false, None), None, Some("file")), "file");
        assert_eq!(filter((0, false, None), Some("environment"), Some("file")), "environment");
        assert_eq!(filter((0, false, Some("given")), Some("environment"), Some("file")), "given");
        assert_eq!(filter((2, false, Some("given")), None, None), "warn,lapin=off,nanite=debug");
        assert_eq!(filter((9, false, None), None, None), "warn,lapin=off,nanite=trace");
        assert_eq!(filter((0, true, Some("given")), None, None), "error,lapin=off");
    }
}
