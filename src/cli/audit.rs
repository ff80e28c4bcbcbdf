//! `nanite audit`: verifies an audit log.

use std::path::PathBuf;

use serde_json::json;

use super::error::{CliError, Exit};
use super::output;
use super::output::counted;
use crate::audit::{Problem, verify};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check that no line of a log was changed, removed or moved.
    ///
    /// Rotated files (FILE.1, FILE.2, ...) are included. Exit codes: 0 the log is intact, 6 it is not.
    Verify {
        /// The log.
        file: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(command: Command) -> Result<Exit, CliError> {
    let Command::Verify { file, json } = command;
    let report = verify(&file)
        .map_err(|error| CliError::of(Exit::Security, &error).context(format!("cannot read {}", file.display())))?;
    if json {
        let problem = |problem: &Problem| json!({ "file": problem.file, "line": problem.line, "why": problem.reason });
        output::json(&json!({
            "files": report.files,
            "lines": report.lines,
            "first": report.first_seq,
            "last_hash": report.last_hash,
            "problems": report.problems.iter().map(problem).collect::<Vec<_>>(),
        }))?;
    } else {
        for Problem { file, line, reason, .. } in &report.problems {
            let line = if *line == 0 { String::new() } else { format!(":{line}") };
            output::line(&format!("{} {}{line}: {reason}", output::stdout_paint().red("broken"), file.display()))?;
        }
        let lines = counted(usize::try_from(report.lines).unwrap_or(usize::MAX), "line");
        output::line(&format!("{lines} in {}, last {}", counted(report.files.len(), "file"), report.last_hash))?;
        if report.first_seq > 1 {
            output::note(&format!("the first line is number {}: older lines were removed", report.first_seq));
        }
    }
    Ok(if report.problems.is_empty() { Exit::Success } else { Exit::Security })
}
