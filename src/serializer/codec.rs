//! Formats without protection: codecs, which are packets as JSON, MessagePack or YAML, and plain messages, which are a codec and nothing
//! else. Anybody can read, forge and replay plain messages.

use std::fmt;
use std::sync::Arc;

use super::budget::{self, Rejected};
use super::{
    CodecError, Cost, Inbound, OpenContext, OpenError, OpenErrorKind, SealError, SealRequest, Sealed, Serializer,
};
use crate::clock::Timestamp;
use crate::packet::{Identity, MessageId, Packet};

/// Turns packets into bytes and back, without protection: the inside of a secure envelope, or a plain message.
///
/// `decode` gets bytes that may come from anybody: it must not panic, must refuse what it does not understand, and must bound the memory
/// of what it returns (the codecs here: [`MAX_DECODED_BYTES`](super::MAX_DECODED_BYTES)). Neither may block.
pub trait Codec: fmt::Debug + Send + Sync {
    /// The name in a secure header: 1 to 32 bytes of `a-z`, `0-9`, `.`, `-`.
    fn name(&self) -> &'static str;

    /// The content type of a plain message.
    fn content_type(&self) -> &'static str;

    /// Encodes a packet.
    ///
    /// # Errors
    /// When the packet cannot be expressed, or its values take more memory than `decode` accepts.
    fn encode(&self, packet: &Packet) -> Result<Vec<u8>, CodecError>;

    /// Decodes a packet; trailing bytes are an error.
    ///
    /// # Errors
    /// When the bytes are no packet.
    fn decode(&self, bytes: &[u8]) -> Result<Packet, CodecError>;
}

/// JSON, in the original's packet format.
#[derive(Clone, Copy, Debug, Default)]
pub struct Json;

impl Codec for Json {
    fn name(&self) -> &'static str {
        "json"
    }

    fn content_type(&self) -> &'static str {
        "application/vnd.nanite.json"
    }

    fn encode(&self, packet: &Packet) -> Result<Vec<u8>, CodecError> {
        let bytes = serde_json::to_vec(packet).map_err(|e| json_error(&e))?;
        budget::check_json(&bytes).map_err(|rejected| over_budget("json", rejected))?;
        Ok(bytes)
    }

    fn decode(&self, bytes: &[u8]) -> Result<Packet, CodecError> {
        budget::check_json(bytes).map_err(|rejected| over_budget("json", rejected))?;
        serde_json::from_slice(bytes).map_err(|e| json_error(&e))
    }
}

/// Says where and what kind, never the content.
fn json_error(error: &serde_json::Error) -> CodecError {
    CodecError::new(
        "json",
        format_args!("{:?} error at line {} column {}", error.classify(), error.line(), error.column()),
    )
}

/// What the budget of decoded values rejects.
fn over_budget(codec: &'static str, rejected: Rejected) -> CodecError {
    match rejected {
        Rejected::TooLarge => CodecError::new(codec, "the values would take too much memory"),
        Rejected::Malformed => CodecError::new(codec, "no packet"),
    }
}

/// MessagePack: compact, and carries bytes as they are. It takes the place of the original's Marshal.
#[cfg(feature = "msgpack")]
#[derive(Clone, Copy, Debug, Default)]
pub struct MsgPack;

#[cfg(feature = "msgpack")]
impl Codec for MsgPack {
    fn name(&self) -> &'static str {
        "msgpack"
    }

    fn content_type(&self) -> &'static str {
        "application/vnd.nanite.msgpack"
    }

    fn encode(&self, packet: &Packet) -> Result<Vec<u8>, CodecError> {
        let bytes = rmp_serde::to_vec_named(packet)
            .map_err(|_| CodecError::new("msgpack", "the packet cannot be expressed"))?;
        budget::check_msgpack(&bytes).map_err(|rejected| over_budget("msgpack", rejected))?;
        Ok(bytes)
    }

    fn decode(&self, bytes: &[u8]) -> Result<Packet, CodecError> {
        use serde::Deserialize;
        budget::check_msgpack(bytes).map_err(|rejected| over_budget("msgpack", rejected))?;
        let mut reader = rmp_serde::Deserializer::new(std::io::Cursor::new(bytes));
        reader.set_max_depth(crate::packet::MAX_PAYLOAD_DEPTH + 8);
        let packet = Packet::deserialize(&mut reader).map_err(|_| CodecError::new("msgpack", "no packet"))?;
        if reader.position() != bytes.len() as u64 {
            return Err(CodecError::new("msgpack", "trailing bytes"));
        }
        Ok(packet)
    }
}

/// YAML, for people who read queues.
#[cfg(feature = "yaml")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Yaml;

#[cfg(feature = "yaml")]
impl Codec for Yaml {
    fn name(&self) -> &'static str {
        "yaml"
    }

    fn content_type(&self) -> &'static str {
        "application/vnd.nanite.yaml"
    }

    fn encode(&self, packet: &Packet) -> Result<Vec<u8>, CodecError> {
        let text =
            serde_saphyr::to_string(packet).map_err(|_| CodecError::new("yaml", "the packet cannot be expressed"))?;
        Ok(text.into_bytes())
    }

    fn decode(&self, bytes: &[u8]) -> Result<Packet, CodecError> {
        // The defaults bound the values, 250,000, and the nesting. An alias could repeat a long text.
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! { max_aliases: 0, max_anchors: 0 },
        };
        serde_saphyr::from_slice_with_options(bytes, options).map_err(|_| CodecError::new("yaml", "no packet"))
    }
}

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
