//! Verifying a log: every line, its place in the chain, and the head file.

use std::io;
use std::path::{Path, PathBuf};

use super::format::{Head, HeadFile, LineLink, TAMPERED, files, hash, head_path, lines};

/// A defect found by [`verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; 0 for the file as a whole.
    pub line: u64,
    /// What is wrong.
    pub reason: String,
}

impl Problem {
    fn new(file: &Path, line: u64, reason: &str) -> Self {
        Self { file: file.to_owned(), line, reason: reason.to_owned() }
    }
}

/// The result of [`verify`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The files of the log, oldest first.
    pub files: Vec<PathBuf>,
    /// How many lines are intact and in order.
    pub lines: u64,
    /// The number of the first line: more than 1 if the oldest files were removed.
    pub first_seq: u64,
    /// The hash of the last line.
    pub last_hash: String,
    /// The defects, in order. After a break, verification continues from the next line.
    pub problems: Vec<Problem>,
}

/// Verifies a log with all its rotated files (`FILE.1`, `FILE.2`, ...). Reads every line; blocks.
///
/// # Errors
/// If a file cannot be read.
pub fn verify(path: impl AsRef<Path>) -> io::Result<Report> {
    verify_files(path.as_ref(), None)
}

/// As [`verify`]; also, the line that `head` names must be in the log. `head` is a copy of the file `FILE.head` that was kept where the
/// node cannot write: it finds truncation even if the head file beside the log was changed.
///
/// # Errors
/// If a file cannot be read.
pub fn verify_with_head(path: impl AsRef<Path>, head: impl AsRef<Path>) -> io::Result<Report> {
    verify_files(path.as_ref(), Some(head.as_ref()))
}

fn verify_files(path: &Path, copy: Option<&Path>) -> io::Result<Report> {
    let mut report = Report::default();
    // Before the lines: a running node writes both.
    let mut expected = Vec::new();
    for file in [Some(head_path(path)).as_deref(), copy].into_iter().flatten() {
        expected.extend(read_head(file, &mut report.problems)?.map(|head| (file.to_owned(), head)));
    }
    expected.retain(|(_, head)| head.seq > 0);
    report.files = files(path)?;
    let mut last: Option<Head> = None;
    for file in report.files.clone() {
        for (number, line) in (1..).zip(lines(&file)?) {
            let (line, complete) = line?;
            let Some(link) = serde_json::from_slice::<LineLink>(&line).ok().filter(|_| complete) else {
                report.problems.push(Problem::new(&file, number, "not an audit log line, or incomplete"));
                continue;
            };
            match tampering(&link).or_else(|| link.break_before(last.as_ref())) {
                Some(reason) => report.problems.push(Problem::new(&file, number, reason)),
                None => report.lines += 1,
            }
            if last.is_none() {
                report.first_seq = link.seq;
            }
            let current = Head { seq: link.seq, hash: hash(&line) };
            expected.retain(|(_, head)| *head != current);
            last = Some(current);
        }
    }
    for (file, _) in expected {
        let reason = "the line that it names is missing or changed: the log was truncated";
        report.problems.push(Problem::new(&file, 0, reason));
    }
    report.last_hash = last.unwrap_or_else(Head::empty).hash;
    Ok(report)
}

fn read_head(path: &Path, problems: &mut Vec<Problem>) -> io::Result<Option<Head>> {
    let reason = match HeadFile::read(path)? {
        HeadFile::Head(head) => return Ok(Some(head)),
        HeadFile::Missing => "missing: truncation of the log cannot be detected",
        HeadFile::Invalid => "not the head of an audit log",
    };
    problems.push(Problem::new(path, 0, reason));
    Ok(None)
}

/// What the node itself recorded at a start, if it found that the log had been changed.
fn tampering(link: &LineLink) -> Option<&'static str> {
    let why = link.why.as_deref().filter(|_| link.verdict.as_deref() == Some("gap"))?;
    TAMPERED.into_iter().find(|reason| *reason == why)
}
