//! Exit codes, and the error type of all commands: a message, a remedy and an exit code. How they are printed is in `output`.

use std::fmt;
use std::process::ExitCode;

/// The exit codes of the program. Part of its contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// Done; all answered.
    Success = 0,
    /// Any failure without a code of its own.
    Failure = 1,
    /// Invalid arguments, configuration or payload.
    Usage = 2,
    /// No agent offers the service, or the target is not running.
    NotOffered = 3,
    /// Timed out, or only some answered.
    Incomplete = 4,
    /// Denied.
    Denied = 5,
    /// Unusable certificates or keys, or a refused message.
    Security = 6,
    /// The broker is unreachable or refuses the connection.
    Unreachable = 7,
    /// Replaced by a newer process of the same agent.
    Replaced = 8,
}

impl Exit {
    /// The exit of another process of this program.
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

/// What commands return.
pub(super) type Result<T, E = CliError> = std::result::Result<T, E>;

/// Why a command failed, what to do about it, and the exit code.
#[derive(Debug)]
pub(super) struct CliError {
    exit: Exit,
    message: String,
    help: Option<String>,
    silent: bool,
}

impl CliError {
    /// An error with this message: lower case, one sentence, no full stop.
    pub(super) fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: message.to_string(), help: None, silent: false }
    }

    /// The arguments, the configuration or the payload are invalid.
    pub(super) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// An error with the message of `error` and of its sources.
    pub(super) fn of(exit: Exit, error: &dyn std::error::Error) -> Self {
        Self::new(exit, chain(error))
    }

    /// For `map_err`: an error with the message of its argument, after `context`.
    pub(super) fn failed<E: std::error::Error>(exit: Exit, context: impl fmt::Display) -> impl Fn(E) -> Self {
        move |error| Self::of(exit, &error).context(&context)
    }

    /// The reader of stdout is gone. Nothing is printed about it.
    pub(super) fn broken_pipe() -> Self {
        Self { silent: true, ..Self::new(Exit::Failure, "stdout is closed") }
    }

    /// Adds the remedy: a sentence, or a command to run.
    #[must_use]
    pub(super) fn help(mut self, remedy: impl fmt::Display) -> Self {
        self.help = Some(remedy.to_string());
        self
    }

    /// Puts the place of the failure in front of the message.
    #[must_use]
    pub(super) fn context(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }

    pub(super) fn exit(&self) -> Exit {
        self.exit
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn remedy(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// Whether nothing is to be printed.
    pub(super) fn is_silent(&self) -> bool {
        self.silent
    }
}

/// The message of an error and of its sources, in one line. A source that the message repeats is left out.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
