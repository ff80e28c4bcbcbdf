//! The file format: JSON lines in a hash chain, and a file that names the last line. Written by one thread, verified by [`verify`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use openssl::sha::sha256;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// The longest line that is read back, in bytes.
const MAX_LINE_BYTES: u64 = 64 * 1024;
/// The most events written before the head file is considered again.
const MAX_BATCH: usize = 256;
/// How often the head file is written under load.
const HEAD_INTERVAL: Duration = Duration::from_secs(1);

// The reasons in gap records.
const TRUNCATED_BY_CRASH: &str = "the last line was cut by a crash";
const QUEUE_FULL: &str = "events came faster than they could be written";

/// Why an audit log cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// A file cannot be read or written.
    #[error("cannot read or write the audit log {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The existing file does not end like an audit log, so nothing is appended to it.
    #[error("{path} does not end with an audit log line: move it away and keep it as evidence")]
    Broken {
        /// The file.
        path: PathBuf,
    },
}

/// Number and hash of the last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    seq: u64,
    hash: String,
}

impl Head {
    /// The head of an empty log.
    fn empty() -> Self {
        Self { seq: 0, hash: "0".repeat(64) }
    }
}

fn head_path(log: &Path) -> PathBuf {
    with_suffix(log, "head")
}

fn rotated_path(log: &Path, n: u64) -> PathBuf {
    with_suffix(log, &n.to_string())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// The hash of a line without its line break.
fn hash(line: &[u8]) -> String {
    HEXLOWER.encode(&sha256(line))
}

/// A record of lost events.
#[derive(Serialize)]
struct GapRecord {
    verdict: &'static str,
    #[serde(rename = "why")]
    reason: &'static str,
    count: u64,
}

impl GapRecord {
    fn new(reason: &'static str, count: u64) -> Self {
        Self { verdict: "gap", reason, count }
    }
}

/// A line as it is written.
#[derive(Serialize)]
struct Line<'a, T> {
    seq: u64,
    prev: &'a str,
    #[serde(flatten)]
    event: &'a T,
}

/// The part of a line that is read back.
#[derive(Deserialize)]
struct LineLink {
    seq: u64,
    prev: String,
}

/// Appends to a log.
pub(super) struct ChainWriter {
    path: PathBuf,
    file: File,
    length: u64,
    max_file_bytes: u64,
    head: Head,
    head_written: Instant,
    /// A crash had left half a line, which was removed.
    truncated: bool,
}

impl ChainWriter {
    pub fn open(path: &Path, max_file_bytes: u64) -> Result<Self, AuditError> {
        let io_error = |source| AuditError::Io { path: path.to_owned(), source };
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path).map_err(io_error)?;
        let (last, length, truncated) = last_line(&mut file).map_err(io_error)?;
        if truncated {
            file.set_len(length).map_err(io_error)?;
        }
        let head = match last {
            Some(line) => {
                let link: LineLink =
                    serde_json::from_slice(&line).map_err(|_| AuditError::Broken { path: path.to_owned() })?;
                Head { seq: link.seq, hash: hash(&line) }
            }
            None => match fs::read(head_path(path)) {
                // The process ended right after a rotation.
                Ok(head) => serde_json::from_slice(&head).map_err(|_| AuditError::Broken { path: head_path(path) })?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Head::empty(),
                Err(error) => return Err(io_error(error)),
            },
        };
        Ok(Self { path: path.to_owned(), file, length, max_file_bytes, head, head_written: Instant::now(), truncated })
    }

    /// Writes events until the channel is closed.
    pub fn run<T: Serialize>(&mut self, mut events: mpsc::Receiver<T>, dropped: &AtomicU64, failed: &AtomicU64) {
        let (mut batch, mut recorded_drops) = (Vec::new(), 0);
        if self.truncated {
            self.write(&GapRecord::new(TRUNCATED_BY_CRASH, 1), failed);
        }
        while events.blocking_recv_many(&mut batch, MAX_BATCH) > 0 {
            self.record_drops(dropped, &mut recorded_drops, failed);
            for record in batch.drain(..) {
                self.write(&record, failed);
            }
            if events.is_empty() || self.head_written.elapsed() >= HEAD_INTERVAL {
                self.write_head();
            }
        }
        self.record_drops(dropped, &mut recorded_drops, failed);
        let _ = self.file.sync_all();
        self.write_head();
    }

    fn record_drops(&mut self, dropped: &AtomicU64, recorded: &mut u64, failed: &AtomicU64) {
        let total = dropped.load(Ordering::Relaxed);
        if total > *recorded {
            self.write(&GapRecord::new(QUEUE_FULL, total - *recorded), failed);
            *recorded = total;
        }
    }

    fn write<T: Serialize>(&mut self, event: &T, failed: &AtomicU64) {
        if let Err(error) = self.append(event) {
            // Logged once, counted always.
            if failed.fetch_add(1, Ordering::Relaxed) == 0 {
                tracing::error!(%error, path = %self.path.display(), "cannot write the audit log");
            }
        }
    }

    fn append<T: Serialize>(&mut self, event: &T) -> io::Result<()> {
        if self.length >= self.max_file_bytes {
            self.rotate()?;
        }
        let seq = self.head.seq + 1;
        let mut line = serde_json::to_vec(&Line { seq, prev: &self.head.hash, event })?;
        let hash = hash(&line);
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            // The next line must not follow half a line.
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.length += line.len() as u64;
        self.head = Head { seq, hash };
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        self.write_head();
        let mut n = 1;
        while rotated_path(&self.path, n).exists() {
            n += 1;
        }
        fs::rename(&self.path, rotated_path(&self.path, n))?;
        self.file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&self.path)?;
        self.length = 0;
        Ok(())
    }

    /// If this fails, the head is behind the log, which [`verify`] accepts; only a head that is ahead of the log is an error.
    fn write_head(&mut self) {
        self.head_written = Instant::now();
        let (path, new) = (head_path(&self.path), with_suffix(&self.path, "head.new"));
        let written = serde_json::to_vec(&self.head).map_err(io::Error::from).and_then(|head| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&head)?;
            fs::rename(&new, &path)
        });
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write the head of the audit log");
        }
    }
}

/// The last complete line of a file, the length up to its end, and whether an incomplete line follows.
fn last_line(file: &mut File) -> io::Result<(Option<Vec<u8>>, u64, bool)> {
    let length = file.seek(SeekFrom::End(0))?;
    let start = length.saturating_sub(2 * MAX_LINE_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(2 * MAX_LINE_BYTES).read_to_end(&mut tail)?;
    let Some(end) = tail.iter().rposition(|byte| *byte == b'\n') else {
        return Ok((None, 0, length > 0));
    };
    let complete = tail.get(..end).unwrap_or_default();
    let line = complete.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok((Some(line.to_vec()), start + end as u64 + 1, end + 1 < tail.len()))
}

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
    let path = path.as_ref();
    let mut report = Report::default();
    report.files.extend((1..).map(|n| rotated_path(path, n)).take_while(|file| file.exists()));
    report.files.push(path.to_owned());
    let head = read_head(path, &mut report.problems)?;
    let mut last: Option<Head> = None;
    let mut head_found = head.as_ref().is_none_or(|head| head.seq == 0);
    for file in report.files.clone() {
        let mut reader = BufReader::new(File::open(&file)?);
        for number in 1.. {
            let mut line = Vec::new();
            reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
            if line.is_empty() {
                break;
            }
            let complete = line.pop_if(|byte| *byte == b'\n').is_some();
            let Some(link) = serde_json::from_slice::<LineLink>(&line).ok().filter(|_| complete) else {
                report.problems.push(Problem::new(&file, number, "not an audit log line, or incomplete"));
                continue;
            };
            match break_before(&link, last.as_ref()) {
                Some(reason) => report.problems.push(Problem::new(&file, number, reason)),
                None => report.lines += 1,
            }
            if last.is_none() {
                report.first_seq = link.seq;
            }
            let current = Head { seq: link.seq, hash: hash(&line) };
            head_found |= head.as_ref() == Some(&current);
            last = Some(current);
        }
    }
    if !head_found {
        let reason = "the last line is missing or changed: the log was truncated";
        report.problems.push(Problem::new(path, 0, reason));
    }
    report.last_hash = last.unwrap_or_else(Head::empty).hash;
    Ok(report)
}

fn read_head(log: &Path, problems: &mut Vec<Problem>) -> io::Result<Option<Head>> {
    let path = head_path(log);
    let reason = match fs::read(&path) {
        Ok(head) => match serde_json::from_slice(&head) {
            Ok(head) => return Ok(Some(head)),
            Err(_) => "not the head of an audit log",
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => "missing: truncation of the log cannot be detected",
        Err(error) => return Err(error),
    };
    problems.push(Problem::new(&path, 0, reason));
    Ok(None)
}

/// Why a line cannot follow the last one; `None` if it can.
fn break_before(link: &LineLink, last: Option<&Head>) -> Option<&'static str> {
    match last {
        None if link.seq == 1 && link.prev != Head::empty().hash => Some("the first line refers to an earlier one"),
        None => None,
        Some(last) if link.seq != last.seq + 1 => Some("does not follow the previous line: lines are missing or moved"),
        Some(last) if link.prev != last.hash => Some("the previous line was changed or replaced"),
        Some(_) => None,
    }
}
