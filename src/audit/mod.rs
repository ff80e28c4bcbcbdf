//! The audit log: one line for every message accepted or refused, and for every policy decision, in a hash chain.
//!
//! A line is a JSON object with its number (`seq`) and the SHA-256 of the previous line (`prev`). [`verify`] finds lines that were
//! changed, removed or moved. The file `FILE.head` names the last line, so that truncation is found too: by [`verify`], and when the log
//! is opened, which records what is missing. Anyone who can write both files can forge a new history: copy the head to another machine,
//! and verify the log [with the copy](verify_with_head).
//!
//! Each accepted message and each decision has a line. Of refused messages, which anyone who reaches the broker can cause, at most 20 per
//! second are recorded for each reason; a further line has the number of those left out.
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
mod format;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use serde::Serialize;
use tokio::sync::mpsc;

use chain::{ChainWriter, Event, Lost};

use crate::clock::Timestamp;
use crate::limits::{LogDecision, LogLimit};
use crate::packet::{Identity, Kind, MessageId, Service, Tag};
use crate::policy::{Decision, FileTransfer};
use crate::serializer::{Inbound, InboundQueue, OpenError, OpenErrorKind};

pub use chain::AuditError;
pub use verify::{Problem, Report, verify, verify_with_head};

/// How many refused messages are recorded per second and reason.
const MAX_REFUSED_PER_SECOND: u64 = 20;

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
    keep_files: Option<usize>,
    queue_capacity: usize,
    overflow: Overflow,
}

impl AuditOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self { max_file_bytes: 64 << 20, keep_files: None, queue_capacity: 4096, overflow: Overflow::Block }
    }

    /// The size at which the file is renamed to `FILE.1`, `FILE.2`, ... and a new one is started; 64 MiB by default.
    #[must_use]
    pub fn max_file_bytes(mut self, bytes: u64) -> Self {
        self.max_file_bytes = bytes;
        self
    }

    /// How many renamed files are kept: when there are more, the oldest ones are removed. By default all are kept.
    #[must_use]
    pub fn keep_files(mut self, files: usize) -> Self {
        self.keep_files = Some(files);
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
    events: Option<mpsc::Sender<Event<Record>>>,
    overflow: Overflow,
    lost: Arc<Lost>,
    refusals: [LogLimit; OpenErrorKind::ALL.len()],
    writer: Option<JoinHandle<()>>,
}

impl AuditLog {
    /// Opens a log to append to, or creates it with mode 0600. Blocks briefly. If lines that `FILE.head` names are missing or changed, a
    /// line records that, and [`verify`] reports it. Half a line that a crash left is removed; that is recorded, too.
    ///
    /// # Errors
    /// [`AuditError`] if it cannot be written, or if the file does not end like an audit log.
    pub fn open(path: impl Into<PathBuf>, options: AuditOptions) -> Result<Self, AuditError> {
        let path = path.into();
        let lost = Arc::new(Lost::default());
        let mut chain = ChainWriter::open(&path, options.max_file_bytes, options.keep_files, lost.clone())?;
        let (events, received) = mpsc::channel(options.queue_capacity.max(1));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(|source| AuditError::Io { path: path.clone(), source })?;
        let writer = std::thread::Builder::new()
            .name("nanite-audit".into())
            .spawn(move || chain.run(received, &runtime))
            .map_err(|source| AuditError::Io { path, source })?;
        Ok(Self(Arc::new(Inner {
            events: Some(events),
            overflow: options.overflow,
            lost,
            refusals: OpenErrorKind::ALL.map(|_| LogLimit::new(MAX_REFUSED_PER_SECOND)),
            writer: Some(writer),
        })))
    }

    /// Records an event. If the queue is full, waits or counts the event as dropped, as [`Overflow`] says. A refused message over the limit is
    /// only counted.
    pub async fn record(&self, record: Record) {
        let limited = record.refused.and_then(|(kind, now)| {
            let (limit, left_out) = self.0.refusals.get(kind as usize).zip(self.0.lost.left_out.get(kind as usize))?;
            let decision = limit.next(now);
            (decision != LogDecision::Log).then_some((decision, left_out))
        });
        match limited {
            None if !self.send(Event::Record(record)).await => {
                self.0.lost.dropped.fetch_add(1, Ordering::Relaxed);
            }
            None => {}
            Some((decision, left_out)) => {
                left_out.fetch_add(1, Ordering::Relaxed);
                if decision == LogDecision::Suppressing {
                    // If the queue is full, the writer is awake.
                    self.send(Event::LeftOut).await;
                }
            }
        }
    }

    async fn send(&self, event: Event<Record>) -> bool {
        match (&self.0.events, self.0.overflow) {
            (Some(events), Overflow::Block) => events.send(event).await.is_ok(),
            (Some(events), Overflow::Drop) => events.try_send(event).is_ok(),
            (None, _) => false,
        }
    }

    /// How many events were dropped since the log was opened.
    pub fn dropped(&self) -> u64 {
        self.0.lost.dropped.load(Ordering::Relaxed)
    }

    /// How many events could not be written to disk since the log was opened.
    pub fn failed(&self) -> u64 {
        self.0.lost.failed.load(Ordering::Relaxed)
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

/// What happened to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// It was opened.
    Accepted,
    /// It was refused while being opened.
    Refused,
    /// The policy allowed it.
    Allowed,
    /// The policy denied it.
    Denied,
}

/// One event, as it is written. It contains nothing of a payload.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    at: String,
    node: Identity,
    verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<Identity>,
    /// Whether `from` was verified.
    verified: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<MessageId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<&'static str>,
    /// The step of opening that refused the message.
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<&'static str>,
    #[serde(rename = "why", skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<Service>,
    #[serde(skip_serializing_if = "Option::is_none")]
    on_behalf_of: Option<Identity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<FileRecord>,
    /// The reason and the time of a refusal, by which it is limited.
    #[serde(skip)]
    refused: Option<(OpenErrorKind, Timestamp)>,
}

/// The file that a decision was about.
#[derive(Clone, Debug, Serialize)]
struct FileRecord {
    domain: Tag,
    name: String,
    size: u64,
    replaces: bool,
}

impl From<FileTransfer<'_>> for FileRecord {
    fn from(file: FileTransfer<'_>) -> Self {
        let FileTransfer { domain, name, size, replaces } = file;
        Self { domain: domain.clone(), name: name.to_owned(), size, replaces }
    }
}

impl Record {
    fn new(node: &Identity, now: Timestamp, verdict: Verdict) -> Self {
        Self {
            at: now.to_string(),
            node: node.clone(),
            verdict,
            kind: None,
            from: None,
            verified: false,
            id: None,
            channel: None,
            step: None,
            reason: None,
            service: None,
            on_behalf_of: None,
            rule: None,
            file: None,
            refused: None,
        }
    }

    /// A message that `node` opened.
    pub fn accepted(node: &Identity, now: Timestamp, inbound: &Inbound, queue: InboundQueue) -> Self {
        Self {
            kind: Some(inbound.packet.kind().as_str()),
            from: inbound.sender().cloned(),
            verified: inbound.signer().is_some(),
            id: inbound.signer().map(|signer| signer.id()),
            channel: Some(queue.as_str()),
            ..Self::new(node, now, Verdict::Accepted)
        }
    }

    /// A message that `node` refused to open.
    pub fn refused(node: &Identity, now: Timestamp, error: &OpenError, queue: InboundQueue) -> Self {
        Self {
            from: error.claimed.clone(),
            channel: Some(queue.as_str()),
            step: Some(error.kind.as_str()),
            reason: Some(error.why.to_string()),
            refused: Some((error.kind, now)),
            ..Self::new(node, now, Verdict::Refused)
        }
    }

    /// A policy decision of `node`.
    ///
    /// ```
    /// use nanite::audit::{DecisionSubject, Record};
    /// use nanite::clock::{Clock, SystemClock};
    /// use nanite::packet::{Identity, Kind, Service};
    /// use nanite::policy::Decision;
    ///
    /// let (fred, desk) = (Identity::agent("fred")?, Identity::mapper("desk")?);
    /// let service: Service = "/work/light".parse()?;
    /// let subject = DecisionSubject::new(Kind::Request, &desk).service(&service);
    /// let record = Record::decided(&fred, SystemClock.now(), &subject, &Decision::denied());
    /// assert_eq!(serde_json::to_value(record)?["verdict"], "denied");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn decided(node: &Identity, now: Timestamp, subject: &DecisionSubject<'_>, decision: &Decision) -> Self {
        let verdict = if decision.allowed { Verdict::Allowed } else { Verdict::Denied };
        Self {
            kind: Some(subject.kind.as_str()),
            from: Some(subject.from.clone()),
            verified: subject.id.is_some(),
            id: subject.id,
            service: subject.service.cloned(),
            on_behalf_of: subject.on_behalf_of.cloned(),
            reason: (!decision.allowed).then(|| decision.reason.clone()),
            rule: decision.rule.clone(),
            file: subject.file.map(FileRecord::from),
            ..Self::new(node, now, verdict)
        }
    }
}

/// The message that a policy decided about.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DecisionSubject<'a> {
    /// The kind of message.
    pub kind: Kind,
    /// Its sender.
    pub from: &'a Identity,
    /// Its id; `None` if it was not signed.
    pub id: Option<MessageId>,
    /// The requested service.
    pub service: Option<&'a Service>,
    /// The node that the sender acts for.
    pub on_behalf_of: Option<&'a Identity>,
    /// The file that is sent.
    pub file: Option<FileTransfer<'a>>,
}

impl<'a> DecisionSubject<'a> {
    /// An unsigned message of this kind and sender.
    pub fn new(kind: Kind, from: &'a Identity) -> Self {
        Self { kind, from, id: None, service: None, on_behalf_of: None, file: None }
    }

    /// Sets the id of a signed message.
    #[must_use]
    pub fn id(mut self, id: impl Into<Option<MessageId>>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the requested service.
    #[must_use]
    pub fn service(mut self, service: impl Into<Option<&'a Service>>) -> Self {
        self.service = service.into();
        self
    }

    /// Sets the node that the sender acts for.
    #[must_use]
    pub fn on_behalf_of(mut self, origin: impl Into<Option<&'a Identity>>) -> Self {
        self.on_behalf_of = origin.into();
        self
    }

    /// Sets the file that is sent.
    #[must_use]
    pub fn file(mut self, file: impl Into<Option<FileTransfer<'a>>>) -> Self {
        self.file = file.into();
        self
    }
}
