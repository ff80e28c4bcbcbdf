//! The log: on stderr, for people or as JSON lines.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::error::{CliError, Exit};

/// How to log.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// What to log: a level (error, warn, info, debug, trace) or a filter such as `nanite=debug`.
    #[arg(long, value_name = "FILTER", env = "NANITE_LOG", default_value = "warn", global = true)]
    log: String,
    /// How to log.
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    log_format: Format,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Options {
    /// Starts logging for this process.
    pub(super) fn init(&self) -> Result<(), CliError> {
        let unknown = |_| {
            CliError::new(Exit::Usage, format!("'{}' is no log filter", self.log))
                .help("give a level such as `--log info`, or a filter such as `--log nanite=debug`")
        };
        let filter = EnvFilter::try_new(&self.log).map_err(unknown)?;
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour);
        let started = match self.log_format {
            Format::Text => log.try_init(),
            Format::Json => log.json().try_init(),
        };
        started.map_err(|error| CliError::new(Exit::Failure, format!("cannot start the log: {error}")))
    }
}
