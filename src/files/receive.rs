//! Receiving files, at an agent.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use openssl::hash::{Hasher, MessageDigest};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{CONFIRM_EVERY_CHUNKS, CONFIRMED_KEY, TEMPORARY_PREFIX, is_file_name};
use crate::audit::DecisionSubject;
use crate::link::{Link, Received, acknowledge};
use crate::packet::{Failure, FailureCode, FileChunk, FileEnd, FileStart, Identity, Kind, Packet, Payload, Tag, Token};
use crate::policy::{Caller, Decision, FileTransfer, Policy};
use crate::request::ReplyTo;
use crate::serializer::Verified;

/// The most transfers that one agent receives at a time.
const MAX_TRANSFERS: usize = 16;
/// A transfer without a chunk for this long has failed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// The most packets that wait to be written; as many as the control queue delivers ahead.
const QUEUE_CAPACITY: usize = 32;
/// The default of [`FileRoot::max_bytes`]: 16 GiB.
const DEFAULT_MAX_BYTES: u64 = 16 << 30;
/// The rule that the audit log names when [`FileRoot::never_replace`] denies a file.
const NEVER_REPLACE_RULE: &str = "files-never-replace";

/// The directory where an agent receives files; see [`AgentBuilder::files`](crate::agent::AgentBuilder::files).
///
/// ```
/// use nanite::files::FileRoot;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// let files = FileRoot::new(&directory, ["photos".parse()?])?
///     .max_bytes(100 << 20)
///     .on_file(|file| println!("{} from {}", file.path.display(), file.sender));
/// # drop(files);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct FileRoot {
    root: PathBuf,
    domains: Vec<Tag>,
    max_bytes: u64,
    never_replace: bool,
    callback: Option<Callback>,
}

type Callback = Arc<dyn Fn(&ReceivedFile) + Send + Sync>;

/// A file that was received completely, with the right digest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReceivedFile {
    /// Where it is.
    pub path: PathBuf,
    /// The domain that it was sent to.
    pub domain: Tag,
    /// The mapper that sent it.
    pub sender: Identity,
    /// Its length in bytes.
    pub size: u64,
}

/// A directory cannot be used for received files.
#[derive(Debug, thiserror::Error)]
#[error("cannot receive files in {path}")]
#[non_exhaustive]
pub struct FileRootError {
    /// The directory.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl FileRoot {
    /// Receives files of these domains in this directory, which must exist. Unfinished files of an earlier process are removed from
    /// it. Blocks for a short time.
    ///
    /// # Errors
    /// [`FileRootError`] if it is not a directory, or cannot be read.
    pub fn new(root: impl AsRef<Path>, domains: impl IntoIterator<Item = Tag>) -> Result<Self, FileRootError> {
        let root = root.as_ref();
        let failed = |source| FileRootError { path: root.to_owned(), source };
        let canonical = root.canonicalize().map_err(failed)?;
        for entry in fs::read_dir(&canonical).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let domains = domains.into_iter().collect();
        Ok(Self { root: canonical, domains, max_bytes: DEFAULT_MAX_BYTES, never_replace: false, callback: None })
    }

    /// The largest file that is received, in bytes; 16 GiB by default.
    #[must_use]
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Refuses every file whose name exists in the directory already. By default a file replaces a plain file of its name, if the
    /// [policy](crate::policy::Policy::authorize_file) allows it.
    #[must_use]
    pub fn never_replace(mut self) -> Self {
        self.never_replace = true;
        self
    }

    /// Calls this for every received file, on a thread where it may block.
    #[must_use]
    pub fn on_file(mut self, callback: impl Fn(&ReceivedFile) + Send + Sync + 'static) -> Self {
        self.callback = Some(Arc::new(callback));
        self
    }

    pub(crate) fn domains(&self) -> &[Tag] {
        &self.domains
    }
}

impl fmt::Debug for FileRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRoot").field("root", &self.root).field("domains", &self.domains).finish_non_exhaustive()
    }
}

/// A handle to the task that receives files. The task ends with the last handle.
#[derive(Clone, Debug)]
pub(crate) struct FileReceiver(mpsc::Sender<Received>);

impl FileReceiver {
    /// Starts the task.
    pub fn start(link: Link, root: FileRoot, policy: Arc<dyn Policy>) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_CAPACITY);
        let directory = Directory { link, root, policy };
        tokio::spawn(async move { directory.run(receiver).await });
        Self(sender)
    }

    /// Passes a packet of a file transfer on; waits if the disk is slow.
    pub async fn handle(&self, received: Received) {
        // The task ends only after all handles are dropped.
        let _ = self.0.send(received).await;
    }
}

/// The directory with what its task uses.
struct Directory {
    link: Link,
    root: FileRoot,
    policy: Arc<dyn Policy>,
}

impl Directory {
    async fn run(&self, mut packets: mpsc::Receiver<Received>) {
        let mut transfers: HashMap<Token, IncomingTransfer> = HashMap::new();
        let mut ticks = interval(IDLE_TIMEOUT / 4);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                packet = packets.recv() => match packet {
                    Some(received) => self.handle(&mut transfers, received).await,
                    None => return,
                },
                _ = ticks.tick() => transfers.retain(|token, transfer| {
                    let is_active = transfer.last_chunk.elapsed() < IDLE_TIMEOUT;
                    if !is_active {
                        tracing::warn!(%token, "a file transfer timed out; its temporary file is removed");
                    }
                    is_active
                }),
            }
        }
    }

    /// Handles one packet: it starts, continues or ends a transfer.
    async fn handle(&self, transfers: &mut HashMap<Token, IncomingTransfer>, received: Received) {
        let Received { inbound, acker, .. } = received;
        let (sender, signer) = (inbound.sender().cloned(), inbound.signer().cloned());
        match inbound.packet {
            Packet::FileStart(start) => {
                let token = start.token;
                let reply_to = sender
                    .as_ref()
                    .and_then(|sender| ReplyTo::to(token, sender, signer.as_ref(), start.reply_to.as_deref()));
                if let (Some(sender), Some(reply_to)) = (sender, reply_to)
                    && !transfers.contains_key(&token)
                {
                    let started = if transfers.len() >= MAX_TRANSFERS {
                        Err(Failure::new(FailureCode::Overloaded, "too many file transfers at a time"))
                    } else {
                        self.start(start, sender, signer, reply_to.clone()).await
                    };
                    match started {
                        Ok(transfer) => drop(transfers.insert(token, transfer)),
                        Err(failure) => reply_to.answer(&self.link, Err(failure)).await,
                    }
                }
            }
            Packet::FileChunk(chunk) => {
                let token = chunk.token;
                if let Some(mut transfer) = take(transfers, token, sender.as_ref()) {
                    match transfer.write(chunk).await {
                        Ok(()) => {
                            if transfer.chunks.is_multiple_of(CONFIRM_EVERY_CHUNKS) {
                                let count = Payload(transfer.chunks.into());
                                transfer.reply_to.intermediate(&self.link, CONFIRMED_KEY.into(), count, None).await;
                            }
                            transfers.insert(token, transfer);
                        }
                        Err(failure) => transfer.reply_to.answer(&self.link, Err(failure)).await,
                    }
                }
            }
            Packet::FileEnd(FileEnd { token, .. }) => {
                if let Some(transfer) = take(transfers, token, sender.as_ref()) {
                    let reply_to = transfer.reply_to.clone();
                    let finished = self.finish(transfer).await;
                    let result = finished.map(|file| Payload(serde_json::json!({ "size": file.size })));
                    reply_to.answer(&self.link, result).await;
                }
            }
            _ => {}
        }
        acknowledge(acker).await;
    }

    /// Decides about an announced file, and makes its temporary file.
    async fn start(
        &self,
        start: FileStart,
        sender: Identity,
        signer: Option<Verified>,
        reply_to: ReplyTo,
    ) -> Result<IncomingTransfer, Failure> {
        let root = &self.root;
        let domain = start.domain.as_deref().and_then(|domain| domain.parse::<Tag>().ok());
        let Some(domain) = domain.filter(|domain| root.domains.contains(domain)) else {
            return Err(denied("this agent does not receive files of this domain"));
        };
        if !is_file_name(&start.dest) {
            return Err(denied("not a plain file name"));
        }
        let (Some(size), Some(sha256)) = (start.file_size, start.sha256) else {
            return Err(denied("the length or the digest is missing"));
        };
        if size > root.max_bytes {
            return Err(denied("the file is larger than this agent allows"));
        }
        let announced = Announced { name: start.dest, domain, sender, signer, size, sha256 };
        let dest = root.root.join(&announced.name);
        let (replaces, dest) = on_disk(move || Ok((is_plain_file(&dest), dest))).await?;
        // Before other checks of the destination: a sender that is denied does not learn what is there.
        self.authorize(&announced, replaces).await?;
        let (directory, name) = (root.root.clone(), format!("{TEMPORARY_PREFIX}{}", start.token));
        let file = on_disk(move || {
            check_destination(&dest)?;
            // The whole name is given, so that a second transfer with this token fails.
            let mut builder = tempfile::Builder::new();
            builder.prefix(&name).suffix(".part").rand_bytes(0).permissions(Permissions::from_mode(0o600));
            let file = builder.tempfile_in(&directory)?;
            Ok(PartialFile { file, hasher: Hasher::new(MessageDigest::sha256())? })
        })
        .await?;
        let last_chunk = Instant::now();
        Ok(IncomingTransfer { file: Some(file), announced, replaces, reply_to, written: 0, chunks: 0, last_chunk })
    }

    /// Asks the policy about a file, and whether it may replace one. The decision is recorded.
    async fn authorize(&self, announced: &Announced, replaces: bool) -> Result<(), Failure> {
        let Announced { name, domain, sender, signer, size, .. } = announced;
        let file = FileTransfer::new(domain, name, *size).replaces(replaces);
        let mut decision = self.policy.authorize_file(&Caller::new(sender, signer.as_ref()), &file);
        if decision.allowed && replaces && self.root.never_replace {
            decision = Decision::deny("a file of this name exists").by_rule(NEVER_REPLACE_RULE);
        }
        let id = signer.as_ref().map(Verified::id);
        let subject = DecisionSubject::new(Kind::FileStart, sender).id(id).file(file);
        self.link.audit_decision(subject, &decision).await;
        if decision.allowed {
            return Ok(());
        }
        tracing::info!(%domain, ?name, size, replaces, %sender, rule = decision.rule, "file denied");
        Err(denied(decision.reason))
    }

    /// Gives a complete file its name.
    async fn finish(&self, transfer: IncomingTransfer) -> Result<ReceivedFile, Failure> {
        let IncomingTransfer { file, announced, replaces, written, .. } = transfer;
        if written != announced.size {
            return Err(Failure::new(FailureCode::Lost, "fewer bytes than announced"));
        }
        let Some(mut partial) = file else { return Err(Failure::failed("an earlier write failed")) };
        let (path, sha256) = (self.root.root.join(&announced.name), announced.sha256.clone());
        let dest = path.clone();
        let unnamed = on_disk(move || {
            if !HEXLOWER.encode(&partial.hasher.finish()?).eq_ignore_ascii_case(&sha256) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the digest is not the announced one"));
            }
            partial.file.as_file().sync_all()?;
            if replaces {
                return Ok(Some(partial.file));
            }
            match partial.file.persist_noclobber(&dest) {
                Ok(_) => Ok(None),
                Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(Some(error.file)),
                Err(error) => Err(error.error),
            }
        })
        .await?;
        if let Some(file) = unnamed {
            if !replaces {
                // The name was free when the transfer was allowed.
                self.authorize(&announced, true).await?;
            }
            let dest = path.clone();
            on_disk(move || {
                check_destination(&dest)?;
                file.persist(&dest)?;
                Ok(())
            })
            .await?;
        }
        let file = ReceivedFile { path, domain: announced.domain, sender: announced.sender, size: announced.size };
        if let Some(callback) = self.root.callback.clone() {
            let received = file.clone();
            if tokio::task::spawn_blocking(move || callback(&received)).await.is_err() {
                tracing::warn!("the callback for received files panicked");
            }
        }
        Ok(file)
    }
}

fn denied(reason: impl Into<String>) -> Failure {
    Failure::new(FailureCode::Denied, reason)
}

/// Takes out a transfer to continue it. A packet of another sender does not change it; a packet in a plain format has no sender.
fn take(
    transfers: &mut HashMap<Token, IncomingTransfer>,
    token: Token,
    sender: Option<&Identity>,
) -> Option<IncomingTransfer> {
    let transfer = transfers.get(&token)?;
    sender.is_none_or(|sender| *sender == transfer.announced.sender).then(|| transfers.remove(&token))?
}

/// What the sender said of a file.
struct Announced {
    name: String,
    domain: Tag,
    sender: Identity,
    signer: Option<Verified>,
    size: u64,
    sha256: String,
}

/// A file that is being received. If it is dropped before it is complete, its temporary file is removed.
struct IncomingTransfer {
    /// `None` while a thread writes to it, and after a failed write.
    file: Option<PartialFile>,
    announced: Announced,
    /// Whether it was allowed to replace a file.
    replaces: bool,
    reply_to: ReplyTo,
    written: u64,
    chunks: u64,
    last_chunk: Instant,
}

/// An unfinished file, removed when it is dropped, with the digest of its content.
struct PartialFile {
    file: NamedTempFile,
    hasher: Hasher,
}

impl IncomingTransfer {
    async fn write(&mut self, chunk: FileChunk) -> Result<(), Failure> {
        if chunk.sequence != Some(self.chunks) {
            return Err(Failure::new(FailureCode::Lost, "a chunk is missing"));
        }
        let bytes = chunk.chunk.0;
        let written = self.written.saturating_add(bytes.len() as u64);
        if written > self.announced.size {
            return Err(Failure::new(FailureCode::BadPayload, "more bytes than announced"));
        }
        let Some(mut partial) = self.file.take() else {
            return Err(Failure::failed("an earlier write failed"));
        };
        self.file = Some(
            on_disk(move || {
                partial.file.write_all(&bytes)?;
                partial.hasher.update(&bytes)?;
                Ok(partial)
            })
            .await?,
        );
        self.written = written;
        self.chunks += 1;
        self.last_chunk = Instant::now();
        Ok(())
    }
}

fn is_plain_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file())
}

/// Only a plain file may be replaced.
fn check_destination(dest: &Path) -> io::Result<()> {
    match fs::symlink_metadata(dest) {
        Ok(found) if found.is_file() => Ok(()),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "the destination exists and is not a plain file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Does work that may block. An error is logged, and only its kind is sent to the sender of the file.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot write a received file");
            Err(Failure::failed(format!("the file cannot be written: {}", error.kind())))
        }
        Err(_) => Err(Failure::failed("the agent is stopping")),
    }
}
