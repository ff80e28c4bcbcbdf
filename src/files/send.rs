//! Sending a file, at a mapper.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;

use data_encoding::HEXLOWER;
use futures_util::future::join_all;
use openssl::hash::{Hasher, MessageDigest};

use super::{CHUNK_BYTES, CONFIRMED_KEY, MAX_UNCONFIRMED_CHUNKS, is_file_name};
use crate::link::{Link, Outbound, SealedMessage, SendError};
use crate::packet::{
    Advertise, Chunk, Failure, FailureCode, FileChunk, FileEnd, FileStart, Identity, Packet, Payload, RandomnessError,
    Tag, Token,
};
use crate::request::{Answers, Event, Events};
use crate::serializer::{Audience, SealError};
use crate::transport::{Destination, TransportError, topology};

/// How long to wait for confirmations before the receivers that lag behind are probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// A receiver that is alive but has confirmed nothing after this many probes (half a minute) has failed.
const MAX_PROBES: u32 = 15;

/// A file to send; see [`Mapper::broadcast`](crate::mapper::Mapper::broadcast).
///
/// ```
/// use nanite::files::Broadcast;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let broadcast = Broadcast::new("photos/0001.jpg", "photos".parse()?).dest("cat.jpg");
/// # drop(broadcast);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Broadcast {
    /// The file.
    pub path: PathBuf,
    /// Its domain: the agents that subscribed to it receive the file.
    pub domain: Tag,
    /// Its name at the receivers; the file's own name if `None`.
    pub dest: Option<String>,
}

impl Broadcast {
    /// Sends this file to the agents that subscribed to `domain`.
    pub fn new(path: impl Into<PathBuf>, domain: Tag) -> Self {
        Self { path: path.into(), domain, dest: None }
    }

    /// Its name at the receivers.
    #[must_use]
    pub fn dest(mut self, name: impl Into<String>) -> Self {
        self.dest = Some(name.into());
        self
    }
}

/// The progress of a broadcast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// How many bytes were sent to each receiver.
    pub sent: u64,
    /// The length of the file.
    pub size: u64,
    /// How many receivers have neither failed nor finished.
    pub receivers: usize,
}

/// Why a file was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BroadcastError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The name at the receivers is not a plain file name.
    #[error("{0:?} is not a plain file name")]
    Name(String),
    /// No live agent receives files of this domain.
    #[error("no agent receives files of {0}")]
    NoSubscribers(Tag),
    /// The mapper's state, with the agents, cannot be read.
    #[error("the mapper's state cannot be read")]
    State(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A message could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
}

impl From<RandomnessError> for BroadcastError {
    fn from(error: RandomnessError) -> Self {
        Self::Send(SealError::from(error).into())
    }
}

/// An agent that receives the file.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    pub identity: Identity,
    pub instance: u64,
}

/// A file that is being sent.
pub(crate) struct OutgoingTransfer<'a> {
    link: &'a Link,
    events: Events,
    token: Token,
    /// The receivers that have neither failed nor finished, with the number of chunks that each has confirmed.
    receivers: BTreeMap<Identity, (Receiver, u64)>,
    answers: Answers,
}

impl<'a> OutgoingTransfer<'a> {
    /// A transfer whose answers arrive as `events`.
    pub fn new(link: &'a Link, events: Events, receivers: Vec<Receiver>) -> Self {
        let token = events.request().token;
        let receivers = receivers.into_iter().map(|receiver| (receiver.identity.clone(), (receiver, 0))).collect();
        Self { link, events, token, receivers, answers: Answers::default() }
    }

    /// Sends the whole file, as fast as the slowest remaining receiver confirms.
    pub async fn run(
        mut self,
        broadcast: Broadcast,
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<Answers, BroadcastError> {
        let path = broadcast.path.clone();
        let unreadable = |source| BroadcastError::Unreadable { path: path.clone(), source };
        let dest = broadcast.dest.clone().or_else(|| Some(path.file_name()?.to_str()?.to_owned())).unwrap_or_default();
        if !is_file_name(&dest) {
            return Err(BroadcastError::Name(dest));
        }
        let (mut file, size, sha256) = on_disk(move || digest(&broadcast.path)).await.map_err(unreadable)?;
        let link = self.link;
        let plain = !link.is_secure();
        let queue = topology::process_queue_name(link.identity().as_str(), link.instance());
        let start = FileStart {
            filename: dest.clone(),
            dest,
            token: self.token,
            from: plain.then(|| link.identity().clone()),
            reply_to: plain.then_some(queue),
            domain: Some(broadcast.domain.to_string()),
            file_size: Some(size),
            sha256: Some(sha256),
        };
        self.send(start.into(), true).await?;
        let mut sent = 0;
        for sequence in 0.. {
            let (returned, chunk) = on_disk(move || next_chunk(file)).await.map_err(unreadable)?;
            file = returned;
            if chunk.is_empty() || self.receivers.is_empty() {
                break;
            }
            self.wait_for_window(sequence).await;
            sent += chunk.len() as u64;
            let packet = FileChunk { token: self.token, chunk: Chunk(chunk), sequence: Some(sequence) };
            self.send(packet.into(), false).await?;
            progress(Progress { sent, size, receivers: self.receivers.len() });
        }
        self.send(FileEnd { token: self.token, meta: serde_json::Value::Null }.into(), false).await?;
        while !self.receivers.is_empty() && self.wait_for_event(|_| true).await {}
        Ok(self.answers)
    }

    /// Seals a packet once for up to 64 receivers, and publishes it to each. A receiver that cannot be reached has failed.
    async fn send(&mut self, packet: Packet, is_first: bool) -> Result<(), BroadcastError> {
        let receivers: Vec<Receiver> = self.receivers.values().map(|(receiver, _)| receiver.clone()).collect();
        for group in receivers.chunks(Audience::MAX) {
            let audience = Audience::Many(group.iter().map(|receiver| receiver.identity.clone()).collect());
            let instances = group.iter().map(|receiver| receiver.instance);
            let sealed = self.link.seal(Outbound::new(packet.clone(), audience).instances(instances)).await?;
            if is_first {
                let (pending, request) = (self.events.pending(), self.events.request());
                group.iter().for_each(|r| pending.expect(request, &r.identity, r.instance, sealed.id()));
            }
            for (receiver, result) in join_all(group.iter().map(|receiver| self.publish(receiver, &sealed))).await {
                if let Err(error) = result {
                    self.lost(&receiver.identity, &error);
                }
            }
        }
        Ok(())
    }

    async fn publish<'r>(
        &self,
        receiver: &'r Receiver,
        sealed: &SealedMessage,
    ) -> (&'r Receiver, Result<(), SendError>) {
        let queue = topology::process_queue_name(receiver.identity.as_str(), receiver.instance);
        let published = self.link.publish(sealed, Destination::Queue(queue)).await;
        (receiver, published.map_err(SendError::from))
    }

    /// Waits until every receiver has confirmed enough chunks that chunk number `sequence` may be sent.
    async fn wait_for_window(&mut self, sequence: u64) {
        let lags = |confirmed: u64| sequence >= confirmed + MAX_UNCONFIRMED_CHUNKS;
        while self.receivers.values().any(|(_, confirmed)| lags(*confirmed)) && self.wait_for_event(lags).await {}
    }

    /// Handles the next event. While there is none, the receivers that lag are probed, and fail in the end. `lags` is given the number
    /// of chunks that a receiver has confirmed. Returns false if no more events can arrive.
    async fn wait_for_event(&mut self, lags: impl Fn(u64) -> bool) -> bool {
        for _ in 0..MAX_PROBES {
            match tokio::time::timeout(PROBE_INTERVAL, self.events.next()).await {
                Ok(Some(event)) => {
                    self.handle(event);
                    return true;
                }
                Ok(None) => return false,
                Err(_) => self.probe(&lags).await,
            }
            if self.lagging(&lags).is_empty() {
                return true;
            }
        }
        for receiver in self.lagging(&lags) {
            self.fail(&receiver.identity, Failure::new(FailureCode::TimedOut, "it stopped confirming chunks"));
        }
        true
    }

    /// Asks the receivers that lag to register. If the queue of one is gone, its process is, too.
    async fn probe(&mut self, lags: impl Fn(u64) -> bool) {
        for receiver in self.lagging(lags) {
            let target = Some(receiver.identity.clone());
            let audience = Audience::One(receiver.identity.clone());
            let message = Outbound::new(Advertise { target, ..Advertise::default() }, audience);
            let message = message.instances([receiver.instance]);
            let queue = topology::process_queue_name(receiver.identity.as_str(), receiver.instance);
            if let Err(error @ SendError::Transport(TransportError::Unroutable(_))) =
                self.link.send(message, Destination::Queue(queue)).await
            {
                self.lost(&receiver.identity, &error);
            }
        }
    }

    fn lagging(&self, lags: impl Fn(u64) -> bool) -> Vec<Receiver> {
        let lagging = self.receivers.values().filter(|(_, confirmed)| lags(*confirmed));
        lagging.map(|(receiver, _)| receiver.clone()).collect()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Intermediate { from, key, value, .. } if key == CONFIRMED_KEY => {
                if let (Some((_, confirmed)), Some(count)) = (self.receivers.get_mut(&from), value.as_u64()) {
                    *confirmed = count.max(*confirmed);
                }
            }
            Event::Outcome { from, result, .. } => self.finish(from, result),
            Event::Intermediate { .. } | Event::Failed(_) => {}
        }
    }

    fn lost(&mut self, identity: &Identity, error: &SendError) {
        self.fail(identity, Failure::new(FailureCode::Lost, format!("not sent: {error}")));
    }

    fn fail(&mut self, identity: &Identity, failure: Failure) {
        self.events.pending().forget(self.events.request(), identity);
        self.finish(identity.clone(), Err(failure));
    }

    fn finish(&mut self, identity: Identity, result: Result<Payload, Failure>) {
        self.receivers.remove(&identity);
        self.answers.outcomes.insert(identity, result);
    }
}

/// Opens a file, and reads it once for its length and digest.
fn digest(path: &Path) -> io::Result<(File, u64, String)> {
    let mut file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
    }
    let (mut hasher, mut size, mut buffer) = (Hasher::new(MessageDigest::sha256())?, 0, vec![0; CHUNK_BYTES]);
    loop {
        let count = file.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
        hasher.update(bytes)?;
        size += count as u64;
    }
    file.rewind()?;
    Ok((file, size, HEXLOWER.encode(&hasher.finish()?)))
}

/// The next chunk; empty at the end.
fn next_chunk(file: File) -> io::Result<(File, Vec<u8>)> {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    (&file).take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
    Ok((file, chunk))
}

async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(io::Error::other("stopping")))
}
