//! Sending: seal once, publish to one place or several.

use std::sync::Arc;
use std::time::Duration;

use super::context::{Inner, Link};
use crate::clock::Timestamp;
use crate::packet::{MessageId, Packet};
use crate::serializer::{Audience, Cost, MessageClass, SealError, SealRequest, Sealed};
use crate::transport::{Destination, PublishRequest, TransportError};

/// How long a publish may take, unless the message expires sooner.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(20);
/// The lifetime of a live message.
const LIVE: Duration = Duration::from_secs(60);

/// What is to be sent, to whom, and how.
#[derive(Clone, Debug)]
pub struct Outbound {
    /// The content.
    pub packet: Packet,
    /// Who can open it.
    pub audience: Audience,
    /// How long it is valid.
    pub lifetime: Duration,
    /// Live or stored.
    pub class: MessageClass,
    /// The message it answers.
    pub in_reply_to: Option<MessageId>,
    /// Whether it outlives a restart of the broker.
    pub persistent: bool,
}

impl Outbound {
    /// A live, transient message, valid for 60 s.
    pub fn new(packet: impl Into<Packet>, audience: impl Into<Audience>) -> Self {
        Self {
            packet: packet.into(),
            audience: audience.into(),
            lifetime: LIVE,
            class: MessageClass::Live,
            in_reply_to: None,
            persistent: false,
        }
    }

    /// About how many bytes the content will have, as far as it is known without encoding it.
    fn bytes(&self) -> usize {
        match &self.packet {
            Packet::Request(request) | Packet::Push(request) => request.payload.about_bytes(),
            Packet::Outcome(outcome) => outcome.results.about_bytes(),
            Packet::Intermediate(part) => part.value.about_bytes(),
            Packet::FileChunk(chunk) => chunk.chunk.0.len(),
            _ => 0,
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

/// A sealed message that is ready to be published, to one place or several.
#[derive(Clone, Debug)]
pub struct SealedMessage {
    sealed_id: MessageId,
    body: Arc<[u8]>,
    expires_at: Timestamp,
    persistent: bool,
}

impl SealedMessage {
    /// The id in its header.
    pub fn id(&self) -> MessageId {
        self.sealed_id
    }
}

impl Link {
    /// Seals a message and publishes it; returns its id once the broker has confirmed it.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sealed or published.
    pub async fn send(&self, message: Outbound, to: Destination) -> Result<MessageId, SendError> {
        let ready = self.seal(message).await?;
        self.publish(&ready, to).await?;
        Ok(ready.sealed_id)
    }

    /// Seals a message.
    ///
    /// # Errors
    /// [`SendError::Seal`] when it could not be sealed.
    pub async fn seal(&self, message: Outbound) -> Result<SealedMessage, SendError> {
        let persistent = message.persistent;
        let cost = self.0.serializer.cost(message.bytes(), self.now());
        // For each of several recipients a key may have to be agreed on.
        let cost = match &message.audience {
            Audience::Mappers | Audience::Many(_) if cost == Cost::Short => Cost::Long,
            _ => cost,
        };
        let seal = move |inner: &Inner| {
            let how = SealRequest {
                audience: &message.audience,
                now: inner.clock.now(),
                lifetime: message.lifetime,
                class: message.class,
                in_reply_to: message.in_reply_to,
            };
            inner.serializer.seal(&message.packet, &how)
        };
        let Sealed { id, bytes, expires_at } = self.work(cost, seal).await.ok_or(SendError::Stopped)??;
        Ok(SealedMessage { sealed_id: id, body: bytes.into(), expires_at, persistent })
    }

    /// Publishes a sealed message.
    ///
    /// # Errors
    /// [`TransportError`] when it could not be published.
    pub async fn publish(&self, ready: &SealedMessage, to: Destination) -> Result<(), TransportError> {
        let expires_in = ready.expires_at.since(self.now()).max(Duration::from_millis(1));
        let message = PublishRequest {
            destination: to,
            body: ready.body.clone(),
            content_type: self.0.serializer.content_type().to_owned(),
            message_id: ready.sealed_id.to_string(),
            expires_in: Some(expires_in),
            persistent: ready.persistent,
        };
        self.0.transport.publish(message, PUBLISH_TIMEOUT.min(expires_in)).await
    }
}
