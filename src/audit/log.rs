//! Writing the log: a thread of its own, fed by a bounded channel.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use openssl::sha::sha256;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::Record;

/// The longest line that is read back, in bytes.
pub(super) const MAX_LINE: u64 = 64 * 1024;
/// How often the head is written while there is much to do.
const HEAD_EVERY: Duration = Duration::from_secs(1);

/// What happens when events come faster than they can be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// The node waits: no event is lost, and the disk sets the pace.
    #[default]
    Block,
    /// The node goes on: events are dropped, and a record says how many.
    Drop,
}

/// How an audit log is kept.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AuditOptions {
    /// At which length, in bytes, a file is put aside as `FILE.1`, `FILE.2`, ... and a new one is begun; 64 MiB by default.
    pub rotate_at: u64,
    /// How many events wait to be written; 4,096 by default.
    pub capacity: usize,
    /// What happens when there are more.
    pub overflow: Overflow,
}

impl Default for AuditOptions {
    fn default() -> Self {
        Self { rotate_at: 64 << 20, capacity: 4096, overflow: Overflow::Block }
    }
}

/// Why an audit log cannot be kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// A file cannot be read or written.
    #[error("cannot keep the audit log {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The log that is there does not end as a log ends: it is not continued.
    #[error("{path} does not end with a line of an audit log: move it away, and keep it as evidence")]
    Broken {
        /// Which file.
        path: PathBuf,
    },
}

/// An audit log that is being written. Cloning it is cheap; what was recorded is on disk when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct AuditLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    events: Mutex<Option<mpsc::Sender<Record>>>,
    overflow: Overflow,
    dropped: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl AuditLog {
    /// Opens a log, or begins it. Blocks for a short time.
    ///
    /// # Errors
    /// [`AuditError`] when it cannot be written, or when what is there is no log.
    pub fn open(path: impl Into<PathBuf>, options: AuditOptions) -> Result<Self, AuditError> {
        let path = path.into();
        let mut chain = Chain::open(&path, options.rotate_at)?;
        let (events, received) = mpsc::channel(options.capacity.max(1));
        let (dropped, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let counters = (dropped.clone(), failed.clone());
        let writer = std::thread::Builder::new()
            .name("nanite-audit".into())
            .spawn(move || chain.run(received, &counters.0, &counters.1))
            .map_err(|source| AuditError::Io { path, source })?;
        Ok(Self(Arc::new(Inner {
            events: Mutex::new(Some(events)),
            overflow: options.overflow,
            dropped,
            failed,
            writer: Mutex::new(Some(writer)),
        })))
    }

    /// Records an event. Waits, or counts it as dropped, when too many wait to be written.
    pub async fn record(&self, record: Record) {
        let events = self.0.events.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sent = match (events, self.0.overflow) {
            (Some(events), Overflow::Block) => events.send(record).await.is_ok(),
            (Some(events), Overflow::Drop) => events.try_send(record).is_ok(),
            (None, _) => false,
        };
        if !sent {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many events were dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// How many events could not be written since the start, because the disk refused.
    pub fn failed(&self) -> u64 {
        self.0.failed.load(Ordering::Relaxed)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.events.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = writer.join();
        }
    }
}

/// The last line of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub seq: u64,
    pub hash: String,
}

impl Head {
    /// Before the first line.
    pub fn start() -> Self {
        Self { seq: 0, hash: "0".repeat(64) }
    }
}

/// Where the head of a log stands.
pub(super) fn head_path(log: &Path) -> PathBuf {
    with_suffix(log, "head")
}

/// The log's file that was put aside as number `n`.
pub(super) fn rotated_path(log: &Path, n: u64) -> PathBuf {
    with_suffix(log, &n.to_string())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// The digest of a line, without its end.
pub(super) fn digest(line: &[u8]) -> String {
    sha256(line).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A line that says what is not in the log.
#[derive(Serialize)]
struct Gap {
    verdict: &'static str,
    why: &'static str,
    count: u64,
}

/// A line as it is written.
#[derive(Serialize)]
struct Line<'a, T> {
    seq: u64,
    prev: &'a str,
    #[serde(flatten)]
    event: &'a T,
}

/// What is read back of a line.
#[derive(Deserialize)]
pub(super) struct Link {
    pub seq: u64,
    pub prev: String,
}

/// The end of the chain, where it goes on.
struct Chain {
    path: PathBuf,
    file: File,
    length: u64,
    rotate_at: u64,
    head: Head,
    head_written: Instant,
    /// The last line was cut by a crash, and is gone.
    cut: bool,
}

impl Chain {
    fn open(path: &Path, rotate_at: u64) -> Result<Self, AuditError> {
        let failed = |source| AuditError::Io { path: path.to_owned(), source };
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path).map_err(failed)?;
        let (last, length, cut) = last_line(&mut file).map_err(failed)?;
        if cut {
            file.set_len(length).map_err(failed)?;
        }
        let head = match last {
            Some(line) => {
                let link: Link =
                    serde_json::from_slice(&line).map_err(|_| AuditError::Broken { path: path.to_owned() })?;
                Head { seq: link.seq, hash: digest(&line) }
            }
            None => match fs::read(head_path(path)) {
                // The file before it was put aside just before the end.
                Ok(head) => serde_json::from_slice(&head).map_err(|_| AuditError::Broken { path: head_path(path) })?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Head::start(),
                Err(error) => return Err(failed(error)),
            },
        };
        Ok(Self { path: path.to_owned(), file, length, rotate_at, head, head_written: Instant::now(), cut })
    }

    fn run(&mut self, mut events: mpsc::Receiver<Record>, dropped: &AtomicU64, failed: &AtomicU64) {
        let (mut batch, mut told) = (Vec::new(), 0);
        if self.cut {
            self.note(&gap("the last line was cut by a crash", 1), failed);
        }
        while events.blocking_recv_many(&mut batch, 256) > 0 {
            let lost = dropped.load(Ordering::Relaxed);
            if lost > told {
                self.note(&gap("events came faster than they could be written", lost - told), failed);
                told = lost;
            }
            for record in batch.drain(..) {
                self.note(&record, failed);
            }
            if events.is_empty() || self.head_written.elapsed() >= HEAD_EVERY {
                self.write_head();
            }
        }
        let lost = dropped.load(Ordering::Relaxed);
        if lost > told {
            self.note(&gap("events came faster than they could be written", lost - told), failed);
        }
        let _ = self.file.sync_all();
        self.write_head();
    }

    fn note<T: Serialize>(&mut self, event: &T, failed: &AtomicU64) {
        if let Err(error) = self.append(event) {
            // Said once, counted always.
            if failed.fetch_add(1, Ordering::Relaxed) == 0 {
                tracing::error!(%error, path = %self.path.display(), "the audit log cannot be written");
            }
        }
    }

    fn append<T: Serialize>(&mut self, event: &T) -> io::Result<()> {
        if self.length >= self.rotate_at {
            self.rotate()?;
        }
        let seq = self.head.seq + 1;
        let mut line = serde_json::to_vec(&Line { seq, prev: &self.head.hash, event })?;
        let hash = digest(&line);
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            // Half a line must not stand before the next one.
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

    /// A head that could not be written is behind the log, which is no fault: only one that is ahead of it is.
    fn write_head(&mut self) {
        self.head_written = Instant::now();
        let (path, new) = (head_path(&self.path), with_suffix(&self.path, "head.new"));
        let written = serde_json::to_vec(&self.head).map_err(io::Error::from).and_then(|head| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&head)?;
            fs::rename(&new, &path)
        });
        if let Err(error) = written {
            tracing::warn!(%error, "the head of the audit log cannot be written");
        }
    }
}

fn gap(why: &'static str, count: u64) -> Gap {
    Gap { verdict: "gap", why, count }
}

/// The last whole line of a file, the length of what is whole, and whether there is more behind it.
fn last_line(file: &mut File) -> io::Result<(Option<Vec<u8>>, u64, bool)> {
    let length = file.seek(SeekFrom::End(0))?;
    let start = length.saturating_sub(2 * MAX_LINE);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(2 * MAX_LINE).read_to_end(&mut tail)?;
    let Some(end) = tail.iter().rposition(|byte| *byte == b'\n') else {
        return Ok((None, 0, length > 0));
    };
    let whole = tail.get(..end).unwrap_or_default();
    let line = whole.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok((Some(line.to_vec()), start + end as u64 + 1, end + 1 < tail.len()))
}
