//! How a command ends: its exit code, and for a failure one message with what to do about it.

use std::fmt;
use std::process::ExitCode;

use super::output;
use super::text::printable;

/// The exit codes of the program. Part of its contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// Done; all answered.
    Success = 0,
    /// Anything that has no code of its own.
    Failure = 1,
    /// The arguments, the configuration or the payload are not understood.
    Usage = 2,
    /// Nobody offers the service, or the target is not there.
    NotOffered = 3,
    /// Timed out, or only some answered.
    Incomplete = 4,
    /// Denied.
    Denied = 5,
    /// Certificates or keys that cannot be used, or a message that was refused.
    Security = 6,
    /// The broker cannot be reached or refuses the connection.
    Unreachable = 7,
    /// Another process of the same agent runs in the place of this one.
    Replaced = 8,
}

impl Exit {
    /// The exit that another process of this program ended with.
    pub(super) fn of_code(code: i32) -> Self {
        use Exit as E;
        let all =
            [E::Success, E::Usage, E::NotOffered, E::Incomplete, E::Denied, E::Security, E::Unreachable, E::Replaced];
        all.into_iter().find(|exit| *exit as i32 == code).unwrap_or(E::Failure)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// A command failed: what went wrong, what to do about it, and the exit code.
#[derive(Debug)]
pub(super) struct CliError {
    exit: Exit,
    message: String,
    help: Option<String>,
    quiet: bool,
}

impl CliError {
    /// A failure with this message: lower case, one sentence, no full stop.
    pub(super) fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: message.to_string(), help: None, quiet: false }
    }

    /// A failure with the message of an error and of all that caused it.
    pub(super) fn of(exit: Exit, error: &dyn std::error::Error) -> Self {
        Self::new(exit, chain(error))
    }

    /// With what to do about it: a sentence, or a command to run.
    #[must_use]
    pub(super) fn help(mut self, remedy: impl fmt::Display) -> Self {
        self.help = Some(remedy.to_string());
        self
    }

    /// With something in front of the message: where it happened.
    #[must_use]
    pub(super) fn context(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }

    /// The reader of stdout has gone: there is nothing to say, and nobody to say it to.
    pub(super) fn broken_pipe() -> Self {
        Self { exit: Exit::Failure, message: "nobody reads the output".into(), help: None, quiet: true }
    }

    /// The exit code.
    pub(super) fn exit(&self) -> Exit {
        self.exit
    }

    /// The message, for JSON output.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// What to do about it, for JSON output.
    pub(super) fn remedy(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// Prints it to stderr; gives the exit code.
    pub(super) fn report(&self) -> ExitCode {
        if !self.quiet {
            let paint = output::stderr_paint();
            // Names and words in them can be strangers'.
            output::note(&format!("{} {}", paint.red("error:"), printable(&self.message, true)));
            if let Some(help) = &self.help {
                output::note(&format!("{} {}", paint.cyan("help:"), printable(help, true)));
            }
        }
        self.exit.into()
    }
}

/// The message of an error and of what caused it, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
