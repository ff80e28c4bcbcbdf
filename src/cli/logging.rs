//! The log: on stderr or in a file, for people or as JSON lines.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use clap::ArgAction;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::config::Config;
use super::error::{CliError, Exit};
use crate::transport::logs_secrets;

/// How to log.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Log")]
pub(super) struct Options {
    /// Say more: once for the next level, and so on
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "quiet")]
    verbose: u8,
    /// Say errors only, and no notes
    #[arg(short, long, global = true)]
    quiet: bool,
    /// What to log: a level (error, warn, info, debug, trace) or a filter such as `nanite=debug` [also: NANITE_LOG]
    #[arg(long, value_name = "FILTER", global = true)]
    log: Option<String>,
    /// How to log [default: text]
    #[arg(long, value_name = "FORMAT", global = true)]
    log_format: Option<Format>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Format {
    /// Lines for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// How much a command logs when nobody says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Usual {
    /// What went wrong: for commands that show everything else themselves.
    Errors,
    /// What needs somebody to look: for commands that do one thing and end.
    Warnings,
    /// What happens: for programs that run for long.
    Events,
}

/// The levels that `-v` and `-q` go through.
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

impl Options {
    /// Whether notes are unwanted.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Starts logging for this process; `into_file` says that it will go [there](into_file), where colours are of no use.
    pub(super) fn init(&self, config: &Config, default: Usual, into_file: bool) -> Result<(), CliError> {
        let filter = self.filter(config, default);
        let unknown = |_| {
            CliError::new(Exit::Usage, format!("'{filter}' is no log filter"))
                .help("give a level such as `--log info`, or a filter such as `--log nanite=debug`")
        };
        let filter = EnvFilter::try_new(&filter).map_err(unknown)?;
        let colour =
            !into_file && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Sink).with_ansi(colour);
        // No filter makes heard what would give a password away.
        let guard = filter_fn(|about| !logs_secrets(about.target()));
        let started = match self.log_format.or(config.file.log_format).unwrap_or_default() {
            Format::Text => log.finish().with(guard).try_init(),
            Format::Json => log.json().finish().with(guard).try_init(),
        };
        started.map_err(|error| CliError::new(Exit::Failure, format!("cannot start the log: {error}")))
    }

    fn filter(&self, config: &Config, default: Usual) -> String {
        let at = match default {
            Usual::Errors => 0,
            Usual::Warnings => 1,
            Usual::Events => 2,
        };
        // Other libraries say what needs attention only: how they work is of no use to a user of this program. What happens to the
        // connection is said by ours, once and in one voice.
        let of_ours = |at: usize| match LEVELS.get(at).unwrap_or(&"trace") {
            &"error" => "error,lapin=off".to_owned(),
            level => format!("warn,lapin=off,nanite={level}"),
        };
        if self.quiet {
            return of_ours(0);
        }
        if self.verbose > 0 {
            return of_ours(at + usize::from(self.verbose));
        }
        let given = self.log.as_ref().or(config.environment.log.as_ref()).or(config.file.log.as_ref());
        given.cloned().unwrap_or_else(|| of_ours(at))
    }
}

/// The file that the log goes into, where there is one.
static FILE: OnceLock<File> = OnceLock::new();

/// From now on the log of this process goes into a file, which was opened to append. Once in its life.
pub(super) fn into_file(file: File) {
    // A second one is not what anybody asked for: the first stays.
    let _ = FILE.set(file);
}

/// Where the log goes: the file, or else stderr.
struct Sink;

impl Write for Sink {
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
        options.filter(&config, Usual::Warnings)
    }

    #[test]
    fn n16_the_later_layer_says_what_is_logged() {
        assert_eq!(filter((0, false, None), None, None), "warn,lapin=off,nanite=warn");
        assert_eq!(filter((0, false, None), None, Some("file")), "file");
        assert_eq!(filter((0, false, None), Some("environment"), Some("file")), "environment");
        assert_eq!(filter((0, false, Some("given")), Some("environment"), Some("file")), "given");
        assert_eq!(filter((2, false, Some("given")), None, None), "warn,lapin=off,nanite=debug");
        assert_eq!(filter((9, false, None), None, None), "warn,lapin=off,nanite=trace");
        assert_eq!(filter((0, true, Some("given")), None, None), "error,lapin=off");
    }
}
