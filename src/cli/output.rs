//! Writing to the terminal: colours only where somebody sees them, and no panic when the reader has gone.

use std::io::{ErrorKind, IsTerminal, Write};

use super::error::{CliError, Exit};
use super::text::escaped_json;

/// Prints text and a line end on stdout.
pub(super) fn line(text: &str) -> Result<(), CliError> {
    write(format!("{text}\n").as_bytes())
}

/// Prints a value as indented JSON on stdout. Nothing in it steers a terminal.
pub(super) fn json<T: serde::Serialize>(value: &T) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::of(Exit::Failure, &error))?;
    line(&escaped_json(&text))
}

/// Prints a value as JSON if `json` is set, and with `print` if not.
pub(super) fn json_or<T: serde::Serialize>(
    json: bool,
    value: &T,
    print: impl FnOnce(&T) -> Result<(), CliError>,
) -> Result<(), CliError> {
    if json { self::json(value) } else { print(value) }
}

/// Writes bytes to stdout.
pub(super) fn write(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(CliError::broken_pipe()),
        Err(error) => Err(CliError::of(Exit::Failure, &error).context("cannot write to stdout")),
    }
}

/// Prints a line on stderr. When that cannot be done there is nobody to tell.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints a question on stderr, and no line end.
#[cfg(feature = "admin")]
pub(super) fn prompt(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = write!(stderr, "{text}").and_then(|()| stderr.flush());
}

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint(bool);

/// Colours for stdout, when it is a terminal and NO_COLOR is not set.
pub(super) fn stdout_paint() -> Paint {
    Paint(wanted() && std::io::stdout().is_terminal())
}

/// Colours for stderr, when it is a terminal and NO_COLOR is not set.
pub(super) fn stderr_paint() -> Paint {
    Paint(wanted() && std::io::stderr().is_terminal())
}

fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(super) fn red(self, text: &str) -> String {
        self.with("1;31", text)
    }

    pub(super) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(super) fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    pub(super) fn cyan(self, text: &str) -> String {
        self.with("1;36", text)
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }
}
