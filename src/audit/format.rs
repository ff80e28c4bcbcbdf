//! The file format: JSON lines in a hash chain, gap records, and a file that names the last line; how the end of a log is read back and compared
//! with it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use openssl::sha::sha256;
use serde::{Deserialize, Serialize};

/// The longest line that is read back, in bytes.
const MAX_LINE_BYTES: u64 = 64 * 1024;

/// How every line begins.
const LINE_START: &[u8] = b"{\"seq\":";

// The reasons in gap records.
pub(super) const TRUNCATED_BY_CRASH: &str = "the last line was cut by a crash";
pub(super) const QUEUE_FULL: &str = "events came faster than they could be written";
pub(super) const LEFT_OUT: &str = "more messages were refused for this reason than are recorded";
const END_MISSING: &str = "lines at the end were missing at a start: removed, or lost in a power failure";
const END_CHANGED: &str = "lines at the end were changed before a start";
const HEAD_MISSING: &str = "the head file was missing at a start: lines at the end may have been removed";
const HEAD_INVALID: &str = "the head file was not readable at a start: lines at the end may have been removed";

/// The reasons that show that something other than this program changed the log.
pub(super) const TAMPERED: [&str; 4] = [END_MISSING, END_CHANGED, HEAD_MISSING, HEAD_INVALID];

/// Number and hash of the last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub seq: u64,
    pub hash: String,
}

impl Head {
    /// The head of an empty log.
    pub fn empty() -> Self {
        Self { seq: 0, hash: "0".repeat(64) }
    }

    /// The head of a log that ends with this line; None if it is not a line of a log.
    pub fn of(line: &[u8]) -> Option<Self> {
        let link: LineLink = serde_json::from_slice(line).ok()?;
        Some(Self { seq: link.seq, hash: hash(line) })
    }
}

/// What a head file contains.
pub(super) enum HeadFile {
    Head(Head),
    Missing,
    Invalid,
}

impl HeadFile {
    pub fn read(path: &Path) -> io::Result<Self> {
        match fs::read(path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).map_or(Self::Invalid, Self::Head)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Missing),
            Err(error) => Err(error),
        }
    }
}

pub(super) fn head_path(log: &Path) -> PathBuf {
    with_suffix(log, "head")
}

/// The rotated files of a log with their numbers, oldest first. The first ones may have been removed.
pub(super) fn rotated_files(log: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let (Some(name), Some(directory)) = (log.file_name(), log.parent()) else { return Ok(Vec::new()) };
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let found = entry?.file_name();
        let suffix = found.as_bytes().strip_prefix(name.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
        let number = suffix.and_then(|suffix| str::from_utf8(suffix).ok()?.parse::<u64>().ok());
        if let Some(n) = number.filter(|n| rotated_path(log, *n).file_name() == Some(&found)) {
            files.push((n, rotated_path(log, n)));
        }
    }
    files.sort();
    Ok(files)
}

/// All files of a log, oldest first.
pub(super) fn files(log: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = rotated_files(log)?.into_iter().map(|(_, path)| path).collect();
    // It is missing for a moment in each rotation.
    if files.is_empty() || log.exists() {
        files.push(log.to_owned());
    }
    Ok(files)
}

/// The lines of a file without their line breaks, and whether each is complete.
pub(super) fn lines(file: &Path) -> io::Result<impl Iterator<Item = io::Result<(Vec<u8>, bool)>>> {
    let mut reader = BufReader::new(File::open(file)?);
    Ok(std::iter::from_fn(move || {
        let mut line = Vec::new();
        match reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => {
                let complete = line.pop_if(|byte| *byte == b'\n').is_some();
                Some(Ok((line, complete)))
            }
            Err(error) => Some(Err(error)),
        }
    }))
}

pub(super) fn rotated_path(log: &Path, n: u64) -> PathBuf {
    with_suffix(log, &n.to_string())
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// The hash of a line without its line break.
pub(super) fn hash(line: &[u8]) -> String {
    HEXLOWER.encode(&sha256(line))
}

/// A record of lost events.
#[derive(Serialize)]
pub(super) struct GapRecord {
    pub verdict: &'static str,
    #[serde(rename = "why")]
    pub reason: &'static str,
    /// The reason of refused messages that were left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<&'static str>,
    pub count: u64,
}

impl GapRecord {
    pub fn new(reason: &'static str, count: u64) -> Self {
        Self { verdict: "gap", reason, step: None, count }
    }
}

/// A line as it is written.
#[derive(Serialize)]
pub(super) struct Line<'a, T> {
    pub seq: u64,
    pub prev: &'a str,
    #[serde(flatten)]
    pub event: &'a T,
}

/// The part of a line that is read back.
#[derive(Deserialize)]
pub(super) struct LineLink {
    pub seq: u64,
    pub prev: String,
    pub verdict: Option<String>,
    pub why: Option<String>,
}

impl LineLink {
    /// Why this line cannot follow the last one; `None` if it can.
    pub fn break_before(&self, last: Option<&Head>) -> Option<&'static str> {
        match last {
            None if self.seq == 1 && self.prev != Head::empty().hash => Some("the first line refers to an earlier one"),
            None => None,
            Some(last) if self.seq != last.seq.saturating_add(1) => {
                Some("does not follow the previous line: lines are missing or moved")
            }
            Some(last) if self.prev != last.hash => Some("the previous line was changed or replaced"),
            Some(_) => None,
        }
    }
}

/// The end of a log file.
pub(super) struct FileEnd {
    /// The last complete line.
    pub line: Option<Vec<u8>>,
    /// The length up to its end.
    pub length: u64,
    /// Whether half a line follows, which a crash left.
    pub cut: bool,
}

/// The end of a file; None if it does not end like a log.
pub(super) fn read_end(file: &mut File) -> io::Result<Option<FileEnd>> {
    let length = file.seek(SeekFrom::End(0))?;
    let start = length.saturating_sub(2 * MAX_LINE_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(2 * MAX_LINE_BYTES).read_to_end(&mut tail)?;
    let end = tail.iter().rposition(|byte| *byte == b'\n');
    let half = tail.get(end.map_or(0, |end| end + 1)..).unwrap_or_default();
    let is_line = half.starts_with(LINE_START) || LINE_START.starts_with(half);
    if !is_line || (end.is_none() && start > 0) {
        return Ok(None);
    }
    let complete = end.and_then(|end| tail.get(..end));
    let line = complete.and_then(|lines| lines.rsplit(|byte| *byte == b'\n').next()).map(<[u8]>::to_vec);
    Ok(Some(FileEnd { line, length: length - half.len() as u64, cut: !half.is_empty() }))
}

/// Compares the end of a log with its head file. Returns the line that the log continues after, and a record of what is wrong. When lines
/// are missing, the log continues after the line that the head names: the missing lines remain visible, and fit in if they are found.
pub(super) fn compare(path: &Path, head_file: HeadFile, last: Option<Head>) -> io::Result<(Head, Option<GapRecord>)> {
    let is_new = last.is_none();
    let last = last.unwrap_or_else(Head::empty);
    let head = match head_file {
        HeadFile::Missing if is_new => return Ok((last, None)),
        HeadFile::Missing => return Ok((last, Some(GapRecord::new(HEAD_MISSING, 0)))),
        HeadFile::Invalid => return Ok((last, Some(GapRecord::new(HEAD_INVALID, 0)))),
        HeadFile::Head(head) => head,
    };
    Ok(match head.seq.checked_sub(last.seq) {
        Some(0) if head == last => (last, None),
        Some(0) => (head, Some(GapRecord::new(END_CHANGED, 0))),
        Some(missing) => (head, Some(GapRecord::new(END_MISSING, missing))),
        // A crash came between a line and the head.
        None if follows(path, &head, &last)? => (last, None),
        None => (last, Some(GapRecord::new(END_CHANGED, 0))),
    })
}

/// Whether the log has the lines from `head` to `last` in one chain.
fn follows(path: &Path, head: &Head, last: &Head) -> io::Result<bool> {
    let mut recent = Vec::new();
    for file in files(path)?.into_iter().rev() {
        let first = lines(&file)?.next().transpose()?.and_then(|(line, _)| Head::of(&line));
        recent.push(file);
        if first.is_some_and(|first| first.seq <= head.seq.saturating_add(1)) {
            break;
        }
    }
    let mut current = head.clone();
    for file in recent.into_iter().rev() {
        for line in lines(&file)? {
            let (line, _) = line?;
            let Ok(link) = serde_json::from_slice::<LineLink>(&line) else { continue };
            if link.seq > head.seq {
                if link.break_before(Some(&current)).is_some() {
                    return Ok(false);
                }
                current = Head { seq: link.seq, hash: hash(&line) };
            }
        }
    }
    Ok(current == *last)
}
