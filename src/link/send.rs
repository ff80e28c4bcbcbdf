//! Sending: seal once, publish once or several times. Also advertising this node to the mappers, and waiting for theirs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::context::{Inner, Link};
use crate::clock::Timestamp;
use crate::packet::{Advertise, ForwardedProof, Kind, MessageId, Packet};
use crate::serializer::{Audience, Cost, MessageClass, SealError, SealRequest, Sealed};
use crate::transport::{Destination, PublishRequest, TransportError, topology};

/// How long a publish may take, unless the message expires earlier.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(20);
/// The lifetime of a live message, by default.
const LIVE_LIFETIME: Duration = Duration::from_secs(60);
/// How long to wait for further mappers after one has answered.
const FURTHER_MAPPERS_TIMEOUT: Duration = Duration::from_millis(200);

/// A packet to send, with its audience and options.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outbound {
    /// The packet.
    pub packet: Packet,
    /// The nodes that can open it.
    pub audience: Audience,
    /// How long it is valid.
    pub lifetime: Duration,
    /// Live or stored.
    pub class: MessageClass,
    /// The message that it answers.
    pub in_reply_to: Option<MessageId>,
    /// The instances of the processes that it is for, as far as they are known. For the mappers, [`Link::seal`] adds those that it knows.
    /// A process refuses a live message that does not name it and was issued less than 30 s after its start.
    pub instances: Vec<u64>,
    /// Whether it survives a restart of the broker.
    pub persistent: bool,
}

impl Outbound {
    /// A live, transient message, valid for 60 s.
    pub fn new(packet: impl Into<Packet>, audience: impl Into<Audience>) -> Self {
        Self {
            packet: packet.into(),
            audience: audience.into(),
            lifetime: LIVE_LIFETIME,
            class: MessageClass::Live,
            in_reply_to: None,
            instances: Vec::new(),
            persistent: false,
        }
    }

    /// How long it is valid.
    #[must_use]
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Live or stored.
    #[must_use]
    pub fn class(mut self, class: MessageClass) -> Self {
        self.class = class;
        self
    }

    /// Whether it survives a restart of the broker.
    #[must_use]
    pub fn persistent(mut self, persistent: bool) -> Self {
        self.persistent = persistent;
        self
    }

    /// The message that it answers.
    #[must_use]
    pub fn in_reply_to(mut self, id: Option<MessageId>) -> Self {
        self.in_reply_to = id;
        self
    }

    /// The instances of the processes that it is for. 0 is not an instance: plain formats have none.
    #[must_use]
    pub fn instances(mut self, instances: impl IntoIterator<Item = u64>) -> Self {
        self.instances = instances.into_iter().filter(|instance| *instance != 0).collect();
        self
    }

    /// About how many bytes the encoded packet has.
    pub(super) fn bytes(&self) -> usize {
        match &self.packet {
            Packet::Request(request) | Packet::Push(request) => request.payload.approximate_bytes(),
            Packet::Outcome(outcome) => {
                let proofs: usize = outcome.proofs.iter().map(ForwardedProof::length).sum();
                outcome.results.approximate_bytes() + proofs
            }
            Packet::Intermediate(part) => {
                part.value.approximate_bytes() + part.proof.as_deref().map_or(0, ForwardedProof::length)
            }
            Packet::FileChunk(chunk) => chunk.chunk.0.len(),
            _ => 0,
        }
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
    /// The runtime is shutting down.
    #[error("the runtime is shutting down")]
    Stopped,
}

/// A sealed message, to be published once or several times.
#[derive(Clone, Debug)]
pub struct SealedMessage {
    id: MessageId,
    body: Arc<[u8]>,
    expires_at: Timestamp,
    persistent: bool,
}

impl SealedMessage {
    /// The id in its header.
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// When it expires.
    pub fn expires_at(&self) -> Timestamp {
        self.expires_at
    }
}

impl Link {
    /// Seals a message and publishes it. Returns its id once the broker has confirmed it.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sealed or published.
    pub async fn send(&self, message: Outbound, to: Destination) -> Result<MessageId, SendError> {
        let sealed = self.seal(message).await?;
        self.publish(&sealed, to).await?;
        Ok(sealed.id)
    }

    /// Seals a message.
    ///
    /// # Errors
    /// [`SendError::Seal`] when it could not be sealed.
    pub async fn seal(&self, mut message: Outbound) -> Result<SealedMessage, SendError> {
        let kind = message.packet.kind();
        if message.audience == Audience::Mappers
            && message.class == MessageClass::Live
            && matches!(kind, Kind::Register | Kind::Request | Kind::Push)
        {
            let known = self.0.mappers.recent(self.now());
            message.instances.extend(known);
            message.instances.truncate(Audience::MAX);
        }
        let persistent = message.persistent;
        let cost = self.0.serializer.cost(message.bytes(), self.now());
        // Each recipient may need a key agreement.
        let cost = match &message.audience {
            Audience::Mappers | Audience::Many(_) if cost == Cost::Short => Cost::Long,
            _ => cost,
        };
        let seal = move |inner: &Inner| {
            let request = SealRequest {
                audience: &message.audience,
                now: inner.clock.now(),
                lifetime: message.lifetime,
                class: message.class,
                in_reply_to: message.in_reply_to,
                instances: &message.instances,
            };
            inner.serializer.seal(&message.packet, &request)
        };
        let Sealed { id, bytes, expires_at } = self.work(cost, seal).await.ok_or(SendError::Stopped)??;
        Ok(SealedMessage { id, body: bytes.into(), expires_at, persistent })
    }

    /// Publishes a sealed message.
    ///
    /// # Errors
    /// [`TransportError`] when it could not be published.
    pub async fn publish(&self, message: &SealedMessage, to: Destination) -> Result<(), TransportError> {
        let expires_in = message.expires_at.since(self.now()).max(Duration::from_millis(1));
        let request = PublishRequest::new(to, message.body.clone())
            .content_type(self.0.serializer.content_type())
            .message_id(message.id.to_string())
            .expires_in(expires_in)
            .persistent(message.persistent);
        self.0.transport.publish(request, PUBLISH_TIMEOUT.min(expires_in)).await
    }
}

impl Link {
    /// Advertises this node to the mappers, which answer with an advertise of their own. It contains no secret and needs no known peer.
    /// Does nothing when this node does not learn peers from messages.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sent: [`Unroutable`](crate::transport::TransportError::Unroutable) when no mapper runs.
    pub async fn announce_to_mappers(&self) -> Result<(), SendError> {
        if self.learns_peers() { self.advertise_to_mappers().await } else { Ok(()) }
    }

    /// Advertises this node to the mappers, also when it does not learn peers from messages: the mappers answer in any case.
    ///
    /// # Errors
    /// As [`announce_to_mappers`](Self::announce_to_mappers).
    pub(crate) async fn advertise_to_mappers(&self) -> Result<(), SendError> {
        let advertise = Advertise { serves_requests: self.serves_requests(), ..Advertise::default() };
        let registration = Destination::exchange(topology::REGISTRATION);
        self.send(Outbound::new(advertise, Audience::Mappers), registration).await?;
        Ok(())
    }
}

/// Waits until a mapper has advertised itself and others have had a moment to do so, at most until `limit` has passed: messages to the
/// mappers are encrypted for the known ones. `advertised` counts the advertises received.
pub(crate) async fn wait_for_mappers(mut advertised: watch::Receiver<u64>, limit: Duration) {
    let heard = async {
        if advertised.wait_for(|count| *count > 0).await.is_ok() {
            while matches!(tokio::time::timeout(FURTHER_MAPPERS_TIMEOUT, advertised.changed()).await, Ok(Ok(()))) {}
        }
    };
    if tokio::time::timeout(limit, heard).await.is_err() {
        tracing::debug!("no mapper has advertised itself");
    }
}
