//! PlainSerializer messages: a codec and nothing else. Anybody can read, forge and replay them.

use std::sync::Arc;

use super::{
    Codec, Cost, Inbound, Json, OpenContext, OpenError, OpenErrorKind, SealError, SealRequest, Sealed, Serializer,
};
use crate::clock::Timestamp;
use crate::packet::{Identity, MessageId, Packet};

/// PlainSerializer messages in the format of a [`Codec`]: no signature, no encryption, no protection of any kind.
#[derive(Debug)]
pub struct PlainSerializer {
    identity: Identity,
    codec: Arc<dyn Codec>,
}

impl PlainSerializer {
    /// Plain messages of this node, in this codec.
    pub fn new(identity: Identity, codec: impl Codec + 'static) -> Self {
        Self { identity, codec: Arc::new(codec) }
    }

    /// Plain JSON, as the original wrote it.
    pub fn json(identity: Identity) -> Self {
        Self::new(identity, Json)
    }
}

impl Serializer for PlainSerializer {
    fn content_type(&self) -> &str {
        self.codec.content_type()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn seal(&self, packet: &Packet, request: &SealRequest<'_>) -> Result<Sealed, SealError> {
        let bytes = self.codec.encode(packet)?;
        let limit = packet.kind().max_bytes();
        if bytes.len() > limit {
            return Err(SealError::TooLarge(bytes.len(), limit));
        }
        Ok(Sealed { id: MessageId::random()?, bytes, expires_at: request.now.saturating_add(request.lifetime) })
    }

    fn open(&self, bytes: &[u8], context: &OpenContext) -> Result<Inbound, OpenError> {
        let limit = context.queue.max_bytes();
        if bytes.len() > limit {
            return Err(OpenError::new(OpenErrorKind::TooLarge, format!("{} bytes, at most {limit}", bytes.len())));
        }
        let packet = self.codec.decode(bytes).map_err(|e| OpenError::new(OpenErrorKind::BadBody, e.to_string()))?;
        let kind = packet.kind();
        if bytes.len() > kind.max_bytes() {
            return Err(OpenError::new(OpenErrorKind::TooLarge, format!("{} bytes of {}", bytes.len(), kind.as_str())));
        }
        if !context.queue.accepts(kind) {
            return Err(OpenError::new(OpenErrorKind::WrongDestination, format!("no place for a {}", kind.as_str())));
        }
        Ok(Inbound::unverified(packet))
    }

    fn cost(&self, _bytes: usize, _now: Timestamp) -> Cost {
        Cost::Trivial
    }
}
