//! The result of a check: how it is printed, and the exit code of all results.

use serde::Serialize;

use crate::cli::error::{CliError, Exit, Result};
use crate::cli::output;
use crate::cli::output::printable;

/// Aligns further lines of a message, and the remedy, with the first line.
const INDENT: &str = "                    ";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    Ok,
    Warn,
    Fail,
    /// Not possible, because another check failed.
    Skip,
}

#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub check: &'static str,
    pub state: State,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
    #[serde(skip)]
    exit: Exit,
}

impl Finding {
    pub(super) fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, state: State::Ok, message: message.into(), remedy: None, exit: Exit::Success }
    }

    pub(super) fn warn(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Warn, remedy: Some(remedy.into()), ..Self::ok(check, message) }
    }

    pub(super) fn fail(check: &'static str, error: &CliError) -> Self {
        let remedy = error.remedy().map(str::to_owned);
        Self { state: State::Fail, remedy, exit: error.exit(), ..Self::ok(check, error.message()) }
    }

    /// A failure of certificates, keys or rules.
    pub(super) fn insecure(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Fail, exit: Exit::Security, ..Self::warn(check, message, remedy) }
    }

    pub(super) fn skip(check: &'static str, reason: &str) -> Self {
        Self { state: State::Skip, ..Self::ok(check, format!("not checked: {reason}")) }
    }

    pub(super) fn print(&self) -> Result<()> {
        let paint = output::stdout_paint();
        let mark = match self.state {
            State::Ok => paint.green("ok  "),
            State::Warn => paint.yellow("warn"),
            State::Fail => paint.red("FAIL"),
            State::Skip => paint.dim("skip"),
        };
        let indented = |text: &str| printable(text.trim_end(), true).replace('\n', &format!("\n{INDENT}"));
        output::line(&format!("{mark}  {:<12}  {}", self.check, indented(&self.message)))?;
        match &self.remedy {
            Some(remedy) => output::line(&format!("{INDENT}{} {}", paint.cyan("help:"), indented(remedy))),
            None => Ok(()),
        }
    }
}

/// The exit code: failures of security come first, then those of the broker, then others.
pub(super) fn exit_code(findings: &[Finding]) -> Exit {
    let failures = || findings.iter().filter(|finding| finding.state == State::Fail).map(|finding| finding.exit);
    let first = |exit| failures().find(|other| *other == exit);
    first(Exit::Security).or_else(|| first(Exit::Unreachable)).or_else(|| failures().next()).unwrap_or(Exit::Success)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u03_exit_code_is_security_before_broker_before_others() {
        let failure = |exit| Finding::fail("x", &CliError::new(exit, "y"));
        let warning = || Finding::warn("x", "y", "z");
        assert_eq!(exit_code(&[warning(), Finding::ok("x", "y")]), Exit::Success);
        assert_eq!(exit_code(&[failure(Exit::Incomplete), failure(Exit::Unreachable)]), Exit::Unreachable);
        assert_eq!(exit_code(&[failure(Exit::Unreachable), failure(Exit::Security)]), Exit::Security);
        assert_eq!(exit_code(&[failure(Exit::Usage), warning()]), Exit::Usage);
    }
}
