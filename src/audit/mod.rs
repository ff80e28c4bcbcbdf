//! The audit log: one line for every message accepted or refused, and for every policy decision, in a hash chain.
//!
//! A line is a JSON object with its number (`seq`) and the SHA-256 of the previous line (`prev`). [`verify`] finds lines that were
//! changed, removed or moved. The file `FILE.head` names the last line, so that truncation is found too. Anyone who can write both
//! files can forge a new history: keep them where the node can only append, or copy the head to another machine.
//!
//! ```
//! use nanite::audit::{AuditLog, AuditOptions, Overflow, verify};
//!
//! # let dir = tempfile::tempdir()?;
//! let path = dir.path().join("fred.audit");
//! let log = AuditLog::open(&path, AuditOptions::new().overflow(Overflow::Drop))?;
//! // agent.audit(log.clone()), mapper.audit(log)
//! drop(log); // everything is on disk now
//! assert!(verify(&path)?.problems.is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod chain;
mod record;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use tokio::sync::mpsc;

use chain::ChainWriter;

pub use chain::{AuditError, Problem, Report, verify};
pub use record::{DecisionSubject, Record, Verdict};

/// What happens to events that arrive faster than the disk can write them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overflow {
    /// The node waits: no event is lost, and the disk limits the throughput.
    #[default]
    Block,
    /// Events are dropped, and a record says how many.
    Drop,
}

/// Options of an [`AuditLog`].
///
/// ```
/// use nanite::audit::{AuditOptions, Overflow};
///
/// let options = AuditOptions::new().max_file_bytes(16 << 20).queue_capacity(1024).overflow(Overflow::Drop);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AuditOptions {
    max_file_bytes: u64,
    queue_capacity: usize,
    overflow: Overflow,
}

impl AuditOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self { max_file_bytes: 64 << 20, queue_capacity: 4096, overflow: Overflow::Block }
    }

    /// The size at which the file is renamed to `FILE.1`, `FILE.2`, ... and a new one is started; 64 MiB by default.
    #[must_use]
    pub fn max_file_bytes(mut self, bytes: u64) -> Self {
        self.max_file_bytes = bytes;
        self
    }

    /// How many events may wait to be written, at least 1; 4,096 by default.
    #[must_use]
    pub fn queue_capacity(mut self, events: usize) -> Self {
        self.queue_capacity = events;
        self
    }

    /// What happens when the queue is full; [`Overflow::Block`] by default.
    #[must_use]
    pub fn overflow(mut self, overflow: Overflow) -> Self {
        self.overflow = overflow;
        self
    }
}

impl Default for AuditOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// An open audit log, written by a thread of its own. Cloning it is cheap; dropping the last clone waits until every event is on
/// disk.
#[derive(Clone, Debug)]
pub struct AuditLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Taken on drop, which ends the writer.
    events: Option<mpsc::Sender<Record>>,
    overflow: Overflow,
    dropped: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
    writer: Option<JoinHandle<()>>,
}

impl AuditLog {
    /// Opens a log to append to, or creates it with mode 0600. Blocks briefly.
    ///
    /// # Errors
    /// [`AuditError`] if it cannot be written, or if the file does not end like an audit log.
    pub fn open(path: impl Into<PathBuf>, options: AuditOptions) -> Result<Self, AuditError> {
        let path = path.into();
        let mut chain = ChainWriter::open(&path, options.max_file_bytes)?;
        let (events, received) = mpsc::channel(options.queue_capacity.max(1));
        let (dropped, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let counters = (dropped.clone(), failed.clone());
        let writer = std::thread::Builder::new()
            .name("nanite-audit".into())
            .spawn(move || chain.run(received, &counters.0, &counters.1))
            .map_err(|source| AuditError::Io { path, source })?;
        Ok(Self(Arc::new(Inner {
            events: Some(events),
            overflow: options.overflow,
            dropped,
            failed,
            writer: Some(writer),
        })))
    }

    /// Records an event. If the queue is full, waits or counts the event as dropped, as [`Overflow`] says.
    pub async fn record(&self, record: Record) {
        let sent = match (&self.0.events, self.0.overflow) {
            (Some(events), Overflow::Block) => events.send(record).await.is_ok(),
            (Some(events), Overflow::Drop) => events.try_send(record).is_ok(),
            (None, _) => false,
        };
        if !sent {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many events were dropped since the log was opened.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// How many events could not be written to disk since the log was opened.
    pub fn failed(&self) -> u64 {
        self.0.failed.load(Ordering::Relaxed)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.events.take();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}
