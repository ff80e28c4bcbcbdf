//! The thread that writes a log: it opens the files, appends, rotates, and writes the head file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::format::{
    GapRecord, Head, HeadFile, LEFT_OUT, Line, QUEUE_FULL, TRUNCATED_BY_CRASH, compare, hash, head_path, read_end,
    rotated_files, rotated_path, with_suffix,
};
use crate::serializer::OpenErrorKind;

/// The most events written before the head file is considered again.
const MAX_BATCH: usize = 256;
/// How often the head file is written under load.
const HEAD_INTERVAL: Duration = Duration::from_secs(1);
/// How often refused messages that are left out are recorded as a number.
const LEFT_OUT_INTERVAL: Duration = Duration::from_secs(1);

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

/// What is sent to the thread that writes.
pub(super) enum Event<T> {
    Record(T),
    /// A refused message was left out: a number is to be recorded soon.
    LeftOut,
}

/// Events that are not in the log.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// The queue was full.
    pub dropped: AtomicU64,
    /// They could not be written.
    pub failed: AtomicU64,
    /// Refused messages over the limit, by reason, which are not recorded yet.
    pub left_out: [AtomicU64; OpenErrorKind::ALL.len()],
}

/// Appends to a log.
pub(super) struct ChainWriter {
    path: PathBuf,
    file: File,
    length: u64,
    max_file_bytes: u64,
    /// The most rotated files.
    keep_files: Option<usize>,
    head: Head,
    head_written: Instant,
    left_out_written: Instant,
    lost: Arc<Lost>,
}

impl ChainWriter {
    /// Opens a log. What is wrong with its end is recorded in it: a node that had crashed must be able to start, and an operator must be
    /// able to see what happened.
    pub fn open(
        path: &Path,
        max_file_bytes: u64,
        keep_files: Option<usize>,
        lost: Arc<Lost>,
    ) -> Result<Self, AuditError> {
        let io_error = |source| AuditError::Io { path: path.to_owned(), source };
        // First the head, then the log: another process may write both, and the head is never ahead of the log.
        let head_file = HeadFile::read(&head_path(path)).map_err(io_error)?;
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path).map_err(io_error)?;
        let broken = |path: &Path| AuditError::Broken { path: path.to_owned() };
        let end = read_end(&mut file).map_err(io_error)?.ok_or_else(|| broken(path))?;
        if end.cut {
            file.set_len(end.length).map_err(io_error)?;
        }
        let last = match &end.line {
            Some(line) => Some(Head::of(line).ok_or_else(|| broken(path))?),
            None => match rotated_files(path).map_err(io_error)?.pop() {
                // The process ended right after a rotation.
                Some((_, rotated)) => {
                    let end = File::open(&rotated).and_then(|mut file| read_end(&mut file)).map_err(io_error)?;
                    let line = end.and_then(|end| end.line).ok_or_else(|| broken(&rotated))?;
                    Some(Head::of(&line).ok_or_else(|| broken(&rotated))?)
                }
                None => None,
            },
        };
        let (head, tampered) = compare(path, head_file, last).map_err(io_error)?;
        let (length, now) = (end.length, Instant::now());
        let path = path.to_owned();
        let mut writer = Self {
            path,
            file,
            length,
            max_file_bytes,
            keep_files,
            head,
            head_written: now,
            left_out_written: now,
            lost,
        };
        let cut = end.cut.then(|| GapRecord::new(TRUNCATED_BY_CRASH, 1));
        for gap in cut.iter().chain(&tampered) {
            writer.append(gap).map_err(|source| AuditError::Io { path: writer.path.clone(), source })?;
        }
        if let Some(gap) = tampered {
            tracing::error!(path = %writer.path.display(), count = gap.count, "audit log: {}", gap.reason);
        }
        // A log without a head file would look like one whose head file was removed.
        writer.try_write_head().map_err(|source| AuditError::Io { path: head_path(&writer.path), source })?;
        Ok(writer)
    }

    /// Writes events until the channel is closed. The runtime is the timer of this thread.
    pub fn run<T: Serialize>(&mut self, mut events: mpsc::Receiver<Event<T>>, runtime: &Runtime) {
        let (mut batch, mut recorded_drops, mut left_out) = (Vec::new(), 0, false);
        loop {
            let receive = events.recv_many(&mut batch, MAX_BATCH);
            let is_closed = if left_out {
                runtime.block_on(async { tokio::time::timeout(LEFT_OUT_INTERVAL, receive).await }) == Ok(0)
            } else {
                runtime.block_on(receive) == 0
            };
            if is_closed {
                break;
            }
            self.record_drops(&mut recorded_drops);
            for event in batch.drain(..) {
                match event {
                    Event::Record(record) => self.write(&record),
                    Event::LeftOut => left_out = true,
                }
            }
            if self.left_out_written.elapsed() >= LEFT_OUT_INTERVAL {
                // Again after an interval, until there is nothing more.
                left_out = self.record_left_out();
            }
            if events.is_empty() || self.head_written.elapsed() >= HEAD_INTERVAL {
                self.write_head();
            }
        }
        self.record_drops(&mut recorded_drops);
        self.record_left_out();
        let _ = self.file.sync_all();
        self.write_head();
    }

    /// Records how many refused messages were left out since the last time, for each reason; returns whether there were any.
    fn record_left_out(&mut self) -> bool {
        self.left_out_written = Instant::now();
        let lost = self.lost.clone();
        let mut any = false;
        for (kind, left_out) in OpenErrorKind::ALL.iter().zip(&lost.left_out) {
            let count = left_out.swap(0, Ordering::Relaxed);
            if count > 0 {
                any = true;
                self.write(&GapRecord { step: Some(kind.as_str()), ..GapRecord::new(LEFT_OUT, count) });
            }
        }
        any
    }

    fn record_drops(&mut self, recorded: &mut u64) {
        let total = self.lost.dropped.load(Ordering::Relaxed);
        if total > *recorded {
            self.write(&GapRecord::new(QUEUE_FULL, total - *recorded));
            *recorded = total;
        }
    }

    fn write<T: Serialize>(&mut self, event: &T) {
        if let Err(error) = self.append(event) {
            // Logged once, counted always.
            if self.lost.failed.fetch_add(1, Ordering::Relaxed) == 0 {
                tracing::error!(%error, path = %self.path.display(), "cannot write the audit log");
            }
        }
    }

    fn append<T: Serialize>(&mut self, event: &T) -> io::Result<()> {
        if self.length >= self.max_file_bytes {
            self.rotate()?;
        }
        let seq = self.head.seq.saturating_add(1);
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
        let mut rotated = rotated_files(&self.path)?;
        let n = rotated.last().map_or(0, |(n, _)| *n);
        let n = n.checked_add(1).ok_or_else(|| io::Error::other("a rotated file has the highest number"))?;
        fs::rename(&self.path, rotated_path(&self.path, n))?;
        self.file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&self.path)?;
        self.length = 0;
        rotated.push((n, rotated_path(&self.path, n)));
        let old = self.keep_files.map_or(0, |keep| rotated.len().saturating_sub(keep));
        for (_, file) in rotated.iter().take(old) {
            if let Err(error) = fs::remove_file(file) {
                tracing::warn!(%error, file = %file.display(), "cannot remove an old file of the audit log");
            }
        }
        Ok(())
    }

    fn try_write_head(&mut self) -> io::Result<()> {
        self.head_written = Instant::now();
        let (path, new) = (head_path(&self.path), with_suffix(&self.path, "head.new"));
        let head = serde_json::to_vec(&self.head)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&head)?;
        fs::rename(&new, &path)
    }

    /// If this fails, the head is behind the log, which is not an error; only a head that is ahead of the log is one.
    fn write_head(&mut self) {
        if let Err(error) = self.try_write_head() {
            tracing::warn!(%error, "cannot write the head of the audit log");
        }
    }
}
