//! Where a serializer meets a transport: the one hot path of agents, mappers, proxies and files.
//!
//! [`Link::send`] seals and publishes; a [`Subscription`] delivers and opens. Sealing and opening use the CPU for a good part of
//! a millisecond, so they run on a bounded number of worker threads; what arrives on one queue is handed on in the order of
//! arrival. What is refused is counted, logged without its content, acknowledged and gone; what another mapper may be able to open
//! goes back to it.

mod returned;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::{Semaphore, mpsc, watch};

use self::returned::{Returned, is_for_others};
use crate::audit::{Asked, AuditLog, Record};
use crate::clock::{Clock, Timestamp};
use crate::packet::{Advertise, Identity, MessageId, Packet};
use crate::policy::Decision;
use crate::serializer::{
    Audience, Channel, Class, Inbound, OpenContext, OpenError, OpenErrorKind, Outdated, Provenance, SealError,
    SealRequest, Sealed, Serializer,
};
use crate::transport::{
    Acker, Consumer, Delivery, Destination, Exchange, Outgoing, Queue, Transport, TransportError, topology,
};

/// How long a publish may take, unless the message expires sooner.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(20);
/// The lifetime of a live message.
const LIVE: Duration = Duration::from_secs(60);
/// How many refusals are logged in one second; the others are only counted.
const LOGGED_PER_SECOND: u64 = 20;
/// How long one waits for the other mappers once one has made itself known.
const OTHERS: Duration = Duration::from_millis(200);
/// How many nodes wait to be spoken to since a message of theirs was refused.
const STRAYS: usize = 64;

/// A node's end of the wire. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Link(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    identity: Identity,
    instance: u64,
    serializer: Arc<dyn Serializer>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    /// One permit for each thread that seals or opens.
    workers: Semaphore,
    refusals: Refusals,
    audit: Option<AuditLog>,
    /// Who is to be spoken to since a message of it was refused.
    strays: Option<mpsc::Sender<Stray>>,
    /// Whether this node is a mapper that takes requests of other nodes.
    serves: bool,
}

/// A node whose message was refused, and that can be helped.
#[derive(Clone, Debug)]
pub(crate) enum Stray {
    /// It claims to be this one, and is not known: nothing about it is verified.
    Unknown(Identity),
    /// A process of this node that another has taken the place of.
    Outdated(Identity, Outdated),
}

/// What is to be sent, to whom, and how.
#[derive(Clone, Debug)]
pub struct Letter {
    /// The content.
    pub packet: Packet,
    /// Who can open it.
    pub audience: Audience,
    /// How long it is valid.
    pub lifetime: Duration,
    /// Live or stored.
    pub class: Class,
    /// The message it answers.
    pub in_reply_to: Option<MessageId>,
    /// Whether it outlives a restart of the broker.
    pub persistent: bool,
}

impl Letter {
    /// A live, transient message, valid for 60 s.
    pub fn new(packet: impl Into<Packet>, audience: impl Into<Audience>) -> Self {
        Self {
            packet: packet.into(),
            audience: audience.into(),
            lifetime: LIVE,
            class: Class::Live,
            in_reply_to: None,
            persistent: false,
        }
    }

    /// The same, in answer to a message.
    #[must_use]
    pub fn in_reply_to(mut self, id: Option<MessageId>) -> Self {
        self.in_reply_to = id;
        self
    }
}

/// Why a message was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// It could not be sealed.
    #[error("cannot seal the message")]
    Seal(#[from] SealError),
    /// It could not be published.
    #[error("cannot publish the message")]
    Transport(#[from] TransportError),
    /// The process is stopping.
    #[error("stopping")]
    Stopped,
}

/// Why a link cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the certificate is {certificate}'s, not {identity}'s")]
pub struct IdentityMismatch {
    /// Who the node is to be.
    pub identity: Identity,
    /// Whom the serializer signs for.
    pub certificate: Identity,
}

/// A sealed message that is ready to be published, to one place or several.
#[derive(Clone, Debug)]
pub struct Ready {
    sealed_id: MessageId,
    body: Arc<[u8]>,
    expires_at: Timestamp,
    persistent: bool,
}

impl Ready {
    /// The id in its header.
    pub fn id(&self) -> MessageId {
        self.sealed_id
    }
}

impl Link {
    /// Joins a serializer and a transport, for the node `identity`.
    ///
    /// # Errors
    /// [`IdentityMismatch`] when the serializer signs for somebody else.
    pub fn new(
        identity: Identity,
        serializer: Arc<dyn Serializer>,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, IdentityMismatch> {
        if let Some(certificate) = serializer.identity()
            && *certificate != identity
        {
            return Err(IdentityMismatch { identity, certificate: certificate.clone() });
        }
        if !serializer.is_secure() {
            tracing::warn!(%identity, format = serializer.content_type(), "messages are neither signed nor encrypted");
        }
        let instance = serializer.instance().unwrap_or_else(|| clock.now().as_micros());
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let workers = Semaphore::new(threads);
        Ok(Self(Arc::new(Inner {
            identity,
            instance,
            serializer,
            transport,
            clock,
            workers,
            refusals: Refusals::default(),
            audit: None,
            strays: None,
            serves: false,
        })))
    }

    /// The same link, and the nodes that are to be spoken to since presence messages of theirs were refused. To be asked for before
    /// the link is cloned.
    #[must_use]
    pub(crate) fn with_strays(mut self) -> (Self, Option<mpsc::Receiver<Stray>>) {
        match Arc::get_mut(&mut self.0) {
            Some(inner) => {
                let (sender, receiver) = mpsc::channel(STRAYS);
                inner.strays = Some(sender);
                (self, Some(receiver))
            }
            None => (self, None),
        }
    }

    /// The same link, for a mapper that takes requests of other nodes, or does not. To be given before the link is cloned.
    #[must_use]
    pub(crate) fn serving(mut self, serves: bool) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.serves = serves;
        }
        self
    }

    /// Whether this node is a mapper that takes requests of other nodes.
    pub(crate) fn serves(&self) -> bool {
        self.0.serves
    }

    /// The same link, with an audit log of what it opens and refuses. To be given before the link is cloned.
    #[must_use]
    pub fn with_audit(mut self, audit: Option<AuditLog>) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.audit = audit;
        }
        self
    }

    /// Records what was decided about a message that this node opened.
    pub async fn decided(&self, asked: Asked<'_>, decision: &Decision) {
        if let Some(audit) = &self.0.audit {
            audit.record(Record::decided(&self.0.identity, self.now(), &asked, decision)).await;
        }
    }

    /// Who this node is.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// The instance of this process.
    pub fn instance(&self) -> u64 {
        self.0.instance
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    /// The moment it is now.
    pub fn now(&self) -> Timestamp {
        self.0.clock.now()
    }

    /// Whether messages are signed and encrypted.
    pub fn is_secure(&self) -> bool {
        self.0.serializer.is_secure()
    }

    /// Whether this node comes to know others by what they send.
    pub fn learns_peers(&self) -> bool {
        self.0.serializer.learns_peers()
    }

    /// Makes this node known to the mappers, which answer with an advertise of theirs. It holds no secret, and needs to know nobody.
    /// Does nothing when this node learns nobody from messages.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sent: [`TransportError::Unroutable`] when no mapper runs.
    pub async fn say_hello(&self) -> Result<(), SendError> {
        if self.learns_peers() { self.call_mappers().await } else { Ok(()) }
    }

    /// The same, also when this node learns nobody from messages: the mappers answer in any case.
    ///
    /// # Errors
    /// As [`say_hello`](Self::say_hello).
    pub(crate) async fn call_mappers(&self) -> Result<(), SendError> {
        let hello = Advertise { serves: self.0.serves, ..Advertise::default() };
        let hello = Letter::new(hello, Audience::Mappers);
        self.send(hello, Destination::Exchange(Exchange(topology::REGISTRATION.into()))).await?;
        Ok(())
    }

    /// The transport.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.0.transport
    }

    /// How many messages were refused at each step since the start.
    pub fn refusals(&self) -> Vec<(OpenErrorKind, u64)> {
        self.0.refusals.counts()
    }

    /// Seals a message and publishes it; returns its id once the broker has confirmed it.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sealed or published.
    pub async fn send(&self, letter: Letter, to: Destination) -> Result<MessageId, SendError> {
        let ready = self.seal(letter).await?;
        self.publish(&ready, to).await?;
        Ok(ready.sealed_id)
    }

    /// Seals a message.
    ///
    /// # Errors
    /// [`SendError::Seal`] when it could not be sealed.
    pub async fn seal(&self, letter: Letter) -> Result<Ready, SendError> {
        let persistent = letter.persistent;
        let seal = move |inner: &Inner| {
            let how = SealRequest {
                audience: &letter.audience,
                now: inner.clock.now(),
                lifetime: letter.lifetime,
                class: letter.class,
                in_reply_to: letter.in_reply_to,
            };
            inner.serializer.seal(&letter.packet, &how)
        };
        let Sealed { id, bytes, expires_at } = self.on_worker(seal).await.ok_or(SendError::Stopped)??;
        Ok(Ready { sealed_id: id, body: bytes.into(), expires_at, persistent })
    }

    /// Publishes a sealed message.
    ///
    /// # Errors
    /// [`TransportError`] when it could not be published.
    pub async fn publish(&self, ready: &Ready, to: Destination) -> Result<(), TransportError> {
        let expires_in = ready.expires_at.since(self.now()).max(Duration::from_millis(1));
        let message = Outgoing {
            destination: to,
            body: ready.body.clone(),
            content_type: self.0.serializer.content_type().to_owned(),
            message_id: ready.sealed_id.to_string(),
            expires_in: Some(expires_in),
            persistent: ready.persistent,
        };
        self.0.transport.publish(message, PUBLISH_TIMEOUT.min(expires_in)).await
    }

    /// Consumes from a queue. At most `prefetch` messages are unacknowledged at a time.
    ///
    /// # Errors
    /// [`TransportError`] when the queue cannot be consumed.
    pub async fn subscribe(
        &self,
        queue: &Queue,
        channel: Channel,
        prefetch: u16,
    ) -> Result<Subscription, TransportError> {
        let consumer = self.0.transport.consume(queue, prefetch).await?;
        // Presence is ordered by a strictly growing sequence, which is checked while opening: one at a time.
        let parallel = match channel {
            Channel::Presence => 1,
            _ => self.0.workers.available_permits().max(1) * 2,
        };
        Ok(Subscription {
            link: self.clone(),
            consumer,
            channel,
            parallel,
            opening: FuturesOrdered::new(),
            ended: false,
            returned: Returned::default(),
        })
    }

    /// A message from the offline queue has been carried out: should it come again, it is refused.
    pub fn spent(&self, provenance: &Provenance) {
        if let Provenance::Verified(verified) = provenance {
            self.0.serializer.spent(verified, self.now());
        }
    }

    /// Whether a message from the offline queue has been carried out.
    pub fn is_spent(&self, provenance: &Provenance) -> bool {
        match provenance {
            Provenance::Verified(verified) => self.0.serializer.is_spent(verified),
            Provenance::Unverified => false,
        }
    }

    /// Runs CPU-bound work of the serializer: here when it is cheap, else on one of the workers. None when the runtime stops.
    async fn on_worker<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> T + Send + 'static) -> Option<T> {
        if self.0.serializer.is_cheap() {
            return Some(work(&self.0));
        }
        let _permit = self.0.workers.acquire().await.ok()?;
        let inner = self.0.clone();
        tokio::task::spawn_blocking(move || work(&inner)).await.ok()
    }

    async fn open(self, delivery: Delivery, channel: Channel) -> Option<Opened> {
        let Delivery { body, content_type, redelivered, acker } = delivery;
        let opened = if content_type == self.0.serializer.content_type() {
            let bytes = body.clone();
            let open =
                move |inner: &Inner| inner.serializer.open(&bytes, &OpenContext::new(channel, inner.clock.now()));
            self.on_worker(open).await?
        } else {
            Err(OpenError::new(OpenErrorKind::Unsupported, "another content type"))
        };
        match opened {
            Ok(inbound) => {
                if let Some(audit) = &self.0.audit {
                    audit.record(Record::accepted(&self.0.identity, self.now(), &inbound, channel)).await;
                }
                Some(Opened::Good(Received { inbound, redelivered, acker }))
            }
            Err(error) => {
                self.0.refusals.count(error.kind);
                self.note_stray(&error, channel);
                if is_for_others(&error, channel) {
                    return Some(Opened::ForOthers { error, body, redelivered, acker });
                }
                self.refuse(&error, channel, redelivered, acker).await;
                None
            }
        }
    }

    /// Has somebody spoken to whose message was refused, where that can help.
    fn note_stray(&self, error: &OpenError, channel: Channel) {
        let (Some(strays), Some(claimed)) = (&self.0.strays, &error.claimed) else { return };
        let stray = match (error.kind, error.outdated) {
            (OpenErrorKind::UnknownSigner, _) if channel.asks_strangers() && self.learns_peers() => {
                Stray::Unknown(claimed.clone())
            }
            (OpenErrorKind::Replayed, Some(outdated)) => Stray::Outdated(claimed.clone(), outdated),
            _ => return,
        };
        // When many wait already, this one has its turn another time.
        let _ = strays.try_send(stray);
    }

    /// Logs and acknowledges what was refused.
    async fn refuse(&self, error: &OpenError, channel: Channel, redelivered: bool, acker: Acker) {
        if let Some(audit) = &self.0.audit {
            audit.record(Record::refused(&self.0.identity, self.now(), error, channel)).await;
        }
        self.0.refusals.log(&self.0.identity, error, channel, redelivered, self.now());
        if let Err(error) = acker.ack().await {
            tracing::debug!(%error, "a refused message could not be acknowledged and will come again");
        }
    }
}

/// What became of a delivery that was not refused.
enum Opened {
    Good(Received),
    /// It cannot be opened here, but perhaps by another mapper.
    ForOthers {
        error: OpenError,
        body: Arc<[u8]>,
        redelivered: bool,
        acker: Acker,
    },
}

type Opening = Pin<Box<dyn Future<Output = Option<Opened>> + Send>>;

/// A stream of opened messages from one queue, in the order in which they arrived.
pub struct Subscription {
    link: Link,
    consumer: Consumer,
    channel: Channel,
    /// How many are being opened at a time.
    parallel: usize,
    opening: FuturesOrdered<Opening>,
    ended: bool,
    returned: Returned,
}

impl Subscription {
    /// The next message that was not refused; `None` when the transport was closed. Cancel safe.
    pub async fn next(&mut self) -> Option<Received> {
        loop {
            tokio::select! {
                biased;
                Some(opened) = self.opening.next(), if !self.opening.is_empty() => match opened {
                    Some(Opened::Good(received)) => return Some(received),
                    Some(Opened::ForOthers { error, body, redelivered, acker }) => {
                        let (channel, now) = (self.channel, self.link.now());
                        if let Err(acker) = self.returned.take(&error, channel, &body, acker, now) {
                            // A task of its own: this call can be dropped at any moment.
                            let link = self.link.clone();
                            tokio::spawn(async move { link.refuse(&error, channel, redelivered, acker).await });
                        }
                    }
                    None => {}
                },
                delivery = self.consumer.next(), if !self.ended && self.opening.len() < self.parallel => match delivery {
                    Some(delivery) => {
                        let open = self.link.clone().open(delivery, self.channel);
                        if self.parallel > 1 && !self.link.0.serializer.is_cheap() {
                            // A task of its own: it goes on while the caller is busy with the message before it.
                            let task = tokio::spawn(open);
                            self.opening.push_back(Box::pin(async move { task.await.ok().flatten() }));
                        } else {
                            self.opening.push_back(Box::pin(open));
                        }
                    }
                    None => self.ended = true,
                },
                else => return None,
            }
        }
    }
}

impl Subscription {
    /// How many messages of the offline queue this mapper keeps that it cannot open itself. They go back when this is dropped.
    pub(crate) fn kept_for_others(&self) -> usize {
        self.returned.kept()
    }
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription").field("channel", &self.channel).finish_non_exhaustive()
    }
}

/// A message that was opened, and the means to acknowledge it.
#[derive(Debug)]
pub struct Received {
    /// The message.
    pub inbound: Inbound,
    /// Whether the broker may have delivered it before.
    pub redelivered: bool,
    /// Settles it.
    pub acker: Acker,
}

impl Received {
    /// Acknowledges the message and hands out its content. That the broker cannot be told is logged: it comes again, and is
    /// recognised then.
    pub async fn accept(self) -> Inbound {
        acknowledge(self.acker).await;
        self.inbound
    }
}

/// Waits until a mapper has made itself known and a moment has passed in which others could, or until `limit` has passed: what is
/// sealed for the mappers is for those that are known. `advertised` counts them.
pub(crate) async fn mappers_known(mut advertised: watch::Receiver<u64>, limit: Duration) {
    let heard = async {
        if advertised.wait_for(|heard| *heard > 0).await.is_ok() {
            while matches!(tokio::time::timeout(OTHERS, advertised.changed()).await, Ok(Ok(()))) {}
        }
    };
    if tokio::time::timeout(limit, heard).await.is_err() {
        tracing::debug!("no mapper has made itself known");
    }
}

/// Acknowledges; a failure means that the message comes again, and is recognised then.
pub async fn acknowledge(acker: Acker) {
    if let Err(error) = acker.ack().await {
        tracing::debug!(%error, "a message could not be acknowledged and will come again");
    }
}

/// Counts and logs what was refused.
#[derive(Debug, Default)]
struct Refusals {
    by_kind: [AtomicU64; OpenErrorKind::ALL.len()],
    second: AtomicU64,
    in_second: AtomicU64,
}

impl Refusals {
    fn count(&self, kind: OpenErrorKind) {
        if let Some(count) = self.by_kind.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn log(&self, identity: &Identity, error: &OpenError, channel: Channel, redelivered: bool, now: Timestamp) {
        if redelivered && error.kind == OpenErrorKind::Replayed {
            tracing::debug!(%identity, "a redelivered message was already seen");
            return;
        }
        if self.second.swap(now.as_secs(), Ordering::Relaxed) != now.as_secs() {
            self.in_second.store(0, Ordering::Relaxed);
        }
        match self.in_second.fetch_add(1, Ordering::Relaxed) {
            LOGGED_PER_SECOND => tracing::warn!(%identity, "more messages refused in this second: counted, not logged"),
            n if n < LOGGED_PER_SECOND => tracing::warn!(
                %identity,
                kind = %error.kind,
                why = %error.why,
                claimed = error.claimed.as_ref().map(tracing::field::display),
                ?channel,
                "message refused"
            ),
            _ => {}
        }
    }

    fn counts(&self) -> Vec<(OpenErrorKind, u64)> {
        OpenErrorKind::ALL.into_iter().zip(&self.by_kind).map(|(kind, n)| (kind, n.load(Ordering::Relaxed))).collect()
    }
}
