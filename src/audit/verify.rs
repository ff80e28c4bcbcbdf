//! Checking a log: every line in its place, none missing at the end.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::log::{Head, Link, MAX_LINE, digest, head_path, rotated_path};

/// What is wrong with a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// In which file.
    pub file: PathBuf,
    /// In which line, from 1; 0 when the file as a whole is meant.
    pub line: u64,
    /// What is wrong.
    pub why: String,
}

/// What a log holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The files, oldest first.
    pub files: Vec<PathBuf>,
    /// How many lines are in their place.
    pub lines: u64,
    /// The number of the first line: more than 1 when the oldest files were taken away.
    pub first: u64,
    /// The digest of the last line.
    pub last_hash: String,
    /// What is wrong, in order. After a break the checking goes on from the line behind it.
    pub problems: Vec<Problem>,
}

/// Checks a log with all the files that were put aside. Reads every line; blocks.
///
/// # Errors
/// When a file cannot be read.
pub fn verify(path: &Path) -> io::Result<Report> {
    let mut report = Report::default();
    report.files.extend((1..).map(|n| rotated_path(path, n)).take_while(|file| file.exists()));
    report.files.push(path.to_owned());
    let head = match fs::read(head_path(path)) {
        Ok(head) => Some(head),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let head = match head.as_deref().map(serde_json::from_slice::<Head>) {
        Some(Ok(head)) => Some(head),
        Some(Err(_)) => {
            report.problems.push(problem(&head_path(path), 0, "it is no head of a log"));
            None
        }
        None => {
            report.problems.push(problem(&head_path(path), 0, "it is missing: a cut at the end cannot be seen"));
            None
        }
    };
    let mut last: Option<Head> = None;
    let mut head_seen = head.as_ref().is_none_or(|head| head.seq == 0);
    for file in report.files.clone() {
        let mut reader = BufReader::new(File::open(&file)?);
        for number in 1.. {
            let mut line = Vec::new();
            reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
            if line.is_empty() {
                break;
            }
            let whole = line.pop_if(|byte| *byte == b'\n').is_some();
            let link = serde_json::from_slice::<Link>(&line).ok().filter(|_| whole);
            let Some(link) = link else {
                report.problems.push(problem(&file, number, "it is no line of a log, or not whole"));
                continue;
            };
            let why = match &last {
                None if link.seq == 1 && link.prev != Head::start().hash => Some("the first line follows another"),
                None => None,
                Some(last) if link.seq != last.seq + 1 => {
                    Some("it does not follow the line before it: lines are missing or moved")
                }
                Some(last) if link.prev != last.hash => Some("the line before it is not the one it was written behind"),
                Some(_) => None,
            };
            match why {
                Some(why) => report.problems.push(problem(&file, number, why)),
                None => report.lines += 1,
            }
            if last.is_none() {
                report.first = link.seq;
            }
            let this = Head { seq: link.seq, hash: digest(&line) };
            head_seen |= head.as_ref() == Some(&this);
            last = Some(this);
        }
    }
    if !head_seen {
        report.problems.push(problem(
            path,
            0,
            "the last line that was written is missing or changed: the log was cut at its end",
        ));
    }
    report.last_hash = last.unwrap_or_else(Head::start).hash;
    Ok(report)
}

fn problem(file: &Path, line: u64, why: &str) -> Problem {
    Problem { file: file.to_owned(), line, why: why.to_owned() }
}
