//! Receiving files, at an agent.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openssl::hash::{Hasher, MessageDigest};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{CONFIRM_EVERY, CONFIRMED, TEMPORARY, is_file_name};
use crate::link::{Link, Received, acknowledge};
use crate::packet::{Failure, FailureCode, FileChunk, FileEnd, FileStart, Identity, Packet, Payload, Tag, Token};
use crate::request::ReplyTo;

/// How many transfers one agent takes at a time.
const TRANSFERS: usize = 16;
/// After how long without a chunk a transfer is given up.
const IDLE: Duration = Duration::from_secs(60);
/// How many packets wait to be written; as many as the control queue hands out.
const QUEUED: usize = 32;

/// Where an agent puts the files that it takes.
#[derive(Clone)]
pub struct FileRoot {
    root: PathBuf,
    domains: Vec<Tag>,
    largest: u64,
    callback: Option<Callback>,
}

type Callback = Arc<dyn Fn(&ReceivedFile) + Send + Sync>;

/// A file that has arrived, whole and with the right digest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReceivedFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it is about.
    pub domain: Tag,
    /// Who sent it.
    pub sender: Identity,
    /// Its length in bytes.
    pub size: u64,
}

/// Why a directory cannot take files.
#[derive(Debug, thiserror::Error)]
#[error("{path} cannot take files")]
pub struct FileRootError {
    /// Which directory.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl FileRoot {
    /// Takes files of some domains into this directory, which must exist. What an earlier process left unfinished in it is
    /// removed. Blocks for a short time.
    ///
    /// # Errors
    /// [`FileRootError`] when it is no directory, or cannot be read.
    pub fn new(root: &Path, domains: impl IntoIterator<Item = Tag>) -> Result<Self, FileRootError> {
        let failed = |source| FileRootError { path: root.to_owned(), source };
        let canonical = root.canonicalize().map_err(failed)?;
        for entry in fs::read_dir(&canonical).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let domains = domains.into_iter().collect();
        Ok(Self { root: canonical, domains, largest: 16 << 30, callback: None })
    }

    /// The largest file that is taken, in bytes; 16 GiB by default.
    #[must_use]
    pub fn largest(mut self, bytes: u64) -> Self {
        self.largest = bytes;
        self
    }

    /// Has this called with every file that has arrived, on a thread that may block.
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

/// Where an agent's control loop puts what belongs to files. It ends with its last sender.
#[derive(Clone, Debug)]
pub(crate) struct FileBox(mpsc::Sender<Received>);

impl FileBox {
    /// Starts to take files.
    pub fn start(link: Link, root: FileRoot) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUED);
        tokio::spawn(run(link, root, receiver));
        Self(sender)
    }

    /// Puts a packet in; waits while the disk is slow.
    pub async fn put(&self, received: Received) {
        // The task ends only when all senders are gone.
        let _ = self.0.send(received).await;
    }
}

async fn run(link: Link, root: FileRoot, mut packets: mpsc::Receiver<Received>) {
    let mut transfers: HashMap<Token, Transfer> = HashMap::new();
    let mut ticks = interval(IDLE / 4);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            incoming = packets.recv() => match incoming {
                Some(received) => take(&link, &root, &mut transfers, received).await,
                None => return,
            },
            _ = ticks.tick() => transfers.retain(|token, transfer| {
                let lives = transfer.heard.elapsed() < IDLE;
                if !lives {
                    tracing::warn!(%token, "a file stopped coming: nothing of it is kept");
                }
                lives
            }),
        }
    }
}

/// One packet: begins, continues or ends a transfer.
async fn take(link: &Link, root: &FileRoot, transfers: &mut HashMap<Token, Transfer>, received: Received) {
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
                let begun = if transfers.len() >= TRANSFERS {
                    Err(Failure::new(FailureCode::Busy, "too many transfers at a time"))
                } else {
                    Transfer::begin(root, start, sender, reply_to.clone()).await
                };
                match begun {
                    Ok(transfer) => drop(transfers.insert(token, transfer)),
                    Err(failure) => reply_to.answer(link, Err(failure)).await,
                }
            }
        }
        Packet::FileChunk(chunk) => {
            let token = chunk.token;
            if let Some(mut transfer) = transfers.remove(&token).filter(|transfer| transfer.is_from(sender.as_ref())) {
                match transfer.write(chunk).await {
                    Ok(()) => {
                        if transfer.chunks.is_multiple_of(CONFIRM_EVERY) {
                            let count = Payload(transfer.chunks.into());
                            transfer.reply_to.intermediate(link, CONFIRMED.into(), count, None).await;
                        }
                        transfers.insert(token, transfer);
                    }
                    Err(failure) => transfer.reply_to.answer(link, Err(failure)).await,
                }
            }
        }
        Packet::FileEnd(FileEnd { token, .. }) => {
            if let Some(transfer) = transfers.remove(&token).filter(|transfer| transfer.is_from(sender.as_ref())) {
                let reply_to = transfer.reply_to.clone();
                let finished = transfer.finish(root).await;
                let result = finished.map(|file| Payload(serde_json::json!({ "size": file.size })));
                reply_to.answer(link, result).await;
            }
        }
        _ => {}
    }
    acknowledge(acker).await;
}

/// A file that is coming. Dropped before it is whole, it leaves nothing.
struct Transfer {
    /// None while a thread writes to it.
    file: Option<Part>,
    dest: PathBuf,
    domain: Tag,
    sender: Identity,
    reply_to: ReplyTo,
    size: u64,
    sha256: String,
    written: u64,
    chunks: u64,
    heard: Instant,
}

/// An unfinished file, with the digest of what is in it; removed when it is dropped before it is kept.
struct Part {
    file: File,
    hasher: Hasher,
    path: PathBuf,
    kept: bool,
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Transfer {
    async fn begin(root: &FileRoot, start: FileStart, sender: Identity, reply_to: ReplyTo) -> Result<Self, Failure> {
        let refuse = |why: &str| Err(Failure::new(FailureCode::Denied, why));
        let domain = start.domain.as_deref().and_then(|domain| domain.parse::<Tag>().ok());
        let Some(domain) = domain.filter(|domain| root.domains.contains(domain)) else {
            return refuse("files of this domain are not taken here");
        };
        if !is_file_name(&start.dest) {
            return refuse("the name is not one plain file name");
        }
        let (Some(size), Some(sha256)) = (start.file_size, start.sha256) else {
            return refuse("the length and the digest are missing");
        };
        if size > root.largest {
            return refuse("the file is larger than is taken here");
        }
        let dest = root.root.join(&start.dest);
        let path = root.root.join(format!("{TEMPORARY}{}.part", start.token));
        let (dest, part) = on_disk(move || {
            check_destination(&dest)?;
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            let mut part = Part { file, hasher: Hasher::new(MessageDigest::sha256())?, path, kept: false };
            part.file.flush()?;
            Ok((dest, part))
        })
        .await?;
        let heard = Instant::now();
        Ok(Self { file: Some(part), dest, domain, sender, reply_to, size, sha256, written: 0, chunks: 0, heard })
    }

    /// Whether a packet is from whoever began the transfer; a plain one cannot say.
    fn is_from(&self, sender: Option<&Identity>) -> bool {
        sender.is_none_or(|sender| *sender == self.sender)
    }

    async fn write(&mut self, chunk: FileChunk) -> Result<(), Failure> {
        if chunk.sequence != Some(self.chunks) {
            return Err(Failure::new(FailureCode::Lost, "a chunk is missing"));
        }
        let bytes = chunk.chunk.0;
        let written = self.written.saturating_add(bytes.len() as u64);
        if written > self.size {
            return Err(Failure::new(FailureCode::BadPayload, "more bytes than were announced"));
        }
        let Some(mut part) = self.file.take() else {
            return Err(Failure::failed("an earlier write failed"));
        };
        self.file = Some(
            on_disk(move || {
                part.file.write_all(&bytes)?;
                part.hasher.update(&bytes)?;
                Ok(part)
            })
            .await?,
        );
        self.written = written;
        self.chunks += 1;
        self.heard = Instant::now();
        Ok(())
    }

    async fn finish(self, root: &FileRoot) -> Result<ReceivedFile, Failure> {
        if self.written != self.size {
            return Err(Failure::new(FailureCode::Lost, "fewer bytes than were announced"));
        }
        let Some(part) = self.file else { return Err(Failure::failed("an earlier write failed")) };
        let (dest, announced) = (self.dest, self.sha256);
        let path = on_disk(move || {
            // The whole of it, not field by field: its end depends on what is set here.
            let mut part = part;
            let digest = part.hasher.finish()?;
            if !hex(&digest).eq_ignore_ascii_case(&announced) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the digest is not the announced one"));
            }
            part.file.sync_all()?;
            check_destination(&dest)?;
            fs::rename(&part.path, &dest)?;
            part.kept = true;
            Ok(dest)
        })
        .await?;
        let file = ReceivedFile { path, domain: self.domain, sender: self.sender, size: self.size };
        if let Some(callback) = root.callback.clone() {
            let told = file.clone();
            if tokio::task::spawn_blocking(move || callback(&told)).await.is_err() {
                tracing::warn!("the callback for files panicked");
            }
        }
        Ok(file)
    }
}

/// What may be replaced: a plain file, or nothing.
fn check_destination(dest: &Path) -> io::Result<()> {
    match fs::symlink_metadata(dest) {
        Ok(found) if found.is_file() => Ok(()),
        Ok(_) => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no plain file stands in its place"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Does something that may block. What the system says of it goes to the log, and only its kind to the sender.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => {
            tracing::warn!(%error, "a file cannot be written");
            Err(Failure::failed(format!("the file cannot be written: {}", error.kind())))
        }
        Err(_) => Err(Failure::failed("the agent is stopping")),
    }
}

/// Bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
