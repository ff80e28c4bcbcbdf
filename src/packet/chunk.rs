//! Bytes in a packet: pieces of files, and what agents signed.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes in a packet.
///
/// Binary formats carry them as they are. Text formats carry a string when the bytes are UTF-8, and `{"base64": ..}` otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk(pub Vec<u8>);

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// A chunk in a text format.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum TextForm<'a> {
    Text(std::borrow::Cow<'a, str>),
    Base64 { base64: String },
}

impl Serialize for Chunk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return serializer.serialize_bytes(&self.0);
        }
        match std::str::from_utf8(&self.0) {
            Ok(text) => TextForm::Text(text.into()),
            Err(_) => TextForm::Base64 { base64: openssl::base64::encode_block(&self.0) },
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Chunk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            struct Bytes;
            impl de::Visitor<'_> for Bytes {
                type Value = Chunk;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("bytes")
                }
                fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Chunk, E> {
                    Ok(Chunk(bytes.to_vec()))
                }
                fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Chunk, E> {
                    Ok(Chunk(bytes))
                }
                fn visit_str<E>(self, text: &str) -> Result<Chunk, E> {
                    Ok(Chunk(text.as_bytes().to_vec()))
                }
            }
            return deserializer.deserialize_byte_buf(Bytes);
        }
        match TextForm::deserialize(deserializer)? {
            TextForm::Text(text) => Ok(Chunk(text.into_owned().into_bytes())),
            TextForm::Base64 { base64 } => {
                openssl::base64::decode_block(&base64).map(Chunk).map_err(|_| de::Error::custom("not base64"))
            }
        }
    }
}
