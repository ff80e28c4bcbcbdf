//! Sending a file, at a mapper.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::join_all;
use openssl::hash::{Hasher, MessageDigest};

use super::receive::hex;
use super::{CHUNK, CONFIRMED, WINDOW, is_file_name};
use crate::link::{Link, Outbound, SealedMessage, SendError};
use crate::packet::{
    Advertise, Chunk, Failure, FailureCode, FileChunk, FileEnd, FileStart, Identity, Packet, RandomnessError, Tag,
    Token,
};
use crate::request::{Answers, Event, Events};
use crate::serializer::{Audience, SealError};
use crate::transport::{Destination, TransportError, topology};

/// How long a receiver may take to confirm what it got before it is asked whether it is still there.
const SILENT: Duration = Duration::from_secs(2);
/// How often it is asked: one that lives, and confirms nothing all the same, is left behind after half a minute.
const ASKED: u32 = 15;

/// A file to send; see [`Mapper::broadcast`](crate::mapper::Mapper::broadcast).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Broadcast {
    /// The file.
    pub path: PathBuf,
    /// What it is about: the agents that subscribed to this get it.
    pub domain: Tag,
    /// Its name at the receivers; the file's own by default.
    pub dest: Option<String>,
}

impl Broadcast {
    /// This file, for those who subscribed to `domain`.
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

/// How far a broadcast is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// How many bytes every receiver has been sent.
    pub sent: u64,
    /// The length of the file.
    pub size: u64,
    /// How many receivers still take it.
    pub receivers: usize,
}

/// Why a file was sent to nobody.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BroadcastError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The name is not one plain file name.
    #[error("{0:?} is not one plain file name")]
    Name(String),
    /// No living agent takes files of this domain.
    #[error("no agent takes files of {0}")]
    NobodySubscribed(Tag),
    /// What is known of agents cannot be read.
    #[error("what is known of agents cannot be read")]
    State(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
}

impl From<RandomnessError> for BroadcastError {
    fn from(error: RandomnessError) -> Self {
        Self::Send(SealError::from(error).into())
    }
}

/// An agent that gets the file.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    pub identity: Identity,
    pub instance: u64,
}

/// A file on its way.
pub(crate) struct Transfer<'a> {
    link: &'a Link,
    events: Events,
    token: Token,
    /// Who still takes it, and how many chunks each has confirmed.
    receivers: BTreeMap<Identity, (Receiver, u64)>,
    answers: Answers,
}

impl<'a> Transfer<'a> {
    /// A transfer whose answers come by `events`.
    pub fn new(link: &'a Link, events: Events, receivers: Vec<Receiver>) -> Self {
        let token = events.request().token;
        let receivers = receivers.into_iter().map(|receiver| (receiver.identity.clone(), (receiver, 0))).collect();
        Self { link, events, token, receivers, answers: Answers::default() }
    }

    /// Sends the whole file, as fast as the slowest receiver that still takes it.
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
            let (back, chunk) = on_disk(move || next_chunk(file)).await.map_err(unreadable)?;
            file = back;
            if chunk.is_empty() || self.receivers.is_empty() {
                break;
            }
            self.wait_for_room(sequence).await;
            sent += chunk.len() as u64;
            let packet = FileChunk { token: self.token, chunk: Chunk(chunk), sequence: Some(sequence) };
            self.send(packet.into(), false).await?;
            progress(Progress { sent, size, receivers: self.receivers.len() });
        }
        self.send(FileEnd { token: self.token, meta: serde_json::Value::Null }.into(), false).await?;
        while !self.receivers.is_empty() && self.hear(|_| true).await {}
        Ok(self.answers)
    }

    /// Seals a packet once for up to 64 receivers, and gives it to each. Who cannot be reached is left behind.
    async fn send(&mut self, packet: Packet, first: bool) -> Result<(), BroadcastError> {
        let receivers: Vec<Receiver> = self.receivers.values().map(|(receiver, _)| receiver.clone()).collect();
        for group in receivers.chunks(Audience::MAX) {
            let audience = Audience::Many(group.iter().map(|receiver| receiver.identity.clone()).collect());
            let ready = self.link.seal(Outbound::new(packet.clone(), audience)).await?;
            if first {
                let (jobs, job) = (self.events.pending(), self.events.request());
                group.iter().for_each(|r| jobs.expect(job, &r.identity, r.instance, ready.id()));
            }
            for (receiver, error) in join_all(group.iter().map(|receiver| self.publish(receiver, &ready))).await {
                if let Some(error) = error {
                    self.lost(&receiver.identity, &error);
                }
            }
        }
        Ok(())
    }

    async fn publish<'r>(&self, receiver: &'r Receiver, ready: &SealedMessage) -> (&'r Receiver, Option<SendError>) {
        let queue = topology::process_queue_name(receiver.identity.as_str(), receiver.instance);
        let published = self.link.publish(ready, Destination::Queue(queue)).await;
        (receiver, published.err().map(SendError::from))
    }

    /// Waits until every receiver has confirmed enough to be sent chunk number `sequence`.
    async fn wait_for_room(&mut self, sequence: u64) {
        let behind = |confirmed: u64| sequence >= confirmed + WINDOW;
        while self.receivers.values().any(|(_, confirmed)| behind(*confirmed)) && self.hear(behind).await {}
    }

    /// Takes in what is heard next. While nothing is, those that are `behind` are asked whether they are still there; in the end
    /// they are left behind. False when nothing more can be heard.
    async fn hear(&mut self, behind: impl Fn(u64) -> bool) -> bool {
        for _ in 0..ASKED {
            match tokio::time::timeout(SILENT, self.events.next()).await {
                Ok(Some(event)) => {
                    self.note(event);
                    return true;
                }
                Ok(None) => return false,
                Err(_) => self.ask(&behind).await,
            }
            if self.behind(&behind).is_empty() {
                return true;
            }
        }
        for receiver in self.behind(&behind) {
            self.end(&receiver.identity, Err(Failure::new(FailureCode::TimedOut, "it stopped confirming")));
        }
        true
    }

    /// Asks the receivers that are `behind` to register: whose queue is gone is gone.
    async fn ask(&mut self, behind: impl Fn(u64) -> bool) {
        for receiver in self.behind(behind) {
            let target = Some(receiver.identity.clone());
            let message =
                Outbound::new(Advertise { target, ..Advertise::default() }, Audience::One(receiver.identity.clone()));
            let queue = topology::process_queue_name(receiver.identity.as_str(), receiver.instance);
            if let Err(error @ SendError::Transport(TransportError::Unroutable(_))) =
                self.link.send(message, Destination::Queue(queue)).await
            {
                self.lost(&receiver.identity, &error);
            }
        }
    }

    fn behind(&self, behind: impl Fn(u64) -> bool) -> Vec<Receiver> {
        let behind = self.receivers.values().filter(|(_, confirmed)| behind(*confirmed));
        behind.map(|(receiver, _)| receiver.clone()).collect()
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Intermediate { from, key, value, .. } if key == CONFIRMED => {
                if let (Some((_, confirmed)), Some(count)) = (self.receivers.get_mut(&from), value.as_u64()) {
                    *confirmed = count.max(*confirmed);
                }
            }
            Event::Outcome { from, result } => {
                self.receivers.remove(&from);
                self.answers.outcomes.insert(from, result);
            }
            Event::Intermediate { .. } | Event::Failed(_) => {}
        }
    }

    fn lost(&mut self, identity: &Identity, error: &SendError) {
        self.end(identity, Err(Failure::new(FailureCode::Lost, format!("not sent: {error}"))));
    }

    fn end(&mut self, identity: &Identity, result: Result<crate::packet::Payload, Failure>) {
        self.events.pending().forget(self.events.request(), identity);
        self.receivers.remove(identity);
        self.answers.outcomes.insert(identity.clone(), result);
    }
}

/// Opens a file, and reads it once for its length and digest.
fn digest(path: &Path) -> io::Result<(File, u64, String)> {
    let mut file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
    }
    let (mut hasher, mut size, mut buffer) = (Hasher::new(MessageDigest::sha256())?, 0, vec![0; CHUNK]);
    loop {
        let count = file.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
        hasher.update(bytes)?;
        size += count as u64;
    }
    file.rewind()?;
    Ok((file, size, hex(&hasher.finish()?)))
}

/// The next chunk; empty at the end.
fn next_chunk(file: File) -> io::Result<(File, Vec<u8>)> {
    let mut chunk = Vec::with_capacity(CHUNK);
    (&file).take(CHUNK as u64).read_to_end(&mut chunk)?;
    Ok((file, chunk))
}

async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(io::Error::other("stopping")))
}
