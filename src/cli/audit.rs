//! `nanite audit`: checks an audit log.

use std::path::PathBuf;

use serde_json::json;

use super::error::{CliError, Exit};
use super::output;
use super::output::counted;
use crate::audit::verify;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check that no line of a log is changed, missing or moved.
    ///
    /// The files that were put aside (FILE.1, FILE.2, ...) are checked with it. Ends with 0 when all is in its place, with 6 when it
    /// is not.
    Verify {
        /// The log.
        file: PathBuf,
        /// One JSON object on stdout.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(command: Command) -> Result<Exit, CliError> {
    let Command::Verify { file, json } = command;
    let report = verify(&file)
        .map_err(|error| CliError::of(Exit::Security, &error).context(format!("cannot read {}", file.display())))?;
    if json {
        let problem = |p: &crate::audit::Problem| json!({ "file": p.file, "line": p.line, "why": p.reason });
        output::json(&json!({
            "files": report.files,
            "lines": report.lines,
            "first": report.first_seq,
            "last_hash": report.last_hash,
            "problems": report.problems.iter().map(problem).collect::<Vec<_>>(),
        }))?;
    } else {
        let paint = output::stdout_paint();
        for problem in &report.problems {
            let place = match problem.line {
                0 => problem.file.display().to_string(),
                line => format!("{}:{line}", problem.file.display()),
            };
            output::line(&format!("{} {place}: {}", paint.red("broken"), problem.reason))?;
        }
        let lines = counted(usize::try_from(report.lines).unwrap_or(usize::MAX), "line");
        output::line(&format!("{lines} in {}, last {}", counted(report.files.len(), "file"), report.last_hash))?;
        if report.first_seq > 1 {
            output::note(&format!("it begins with line {}: what was before has been taken away", report.first_seq));
        }
    }
    Ok(if report.problems.is_empty() { Exit::Success } else { Exit::Security })
}
