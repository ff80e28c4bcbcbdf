//! File transfers: a start, chunks, an end.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::{Identity, Token};

/// The start of a file transfer: what comes, and how it can be checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileStart {
    /// The name at the sender.
    pub filename: String,
    /// The name asked for at the receiver: one component.
    pub dest: String,
    /// What names the transfer.
    pub token: Token,
    /// Who sends it, in plain formats only: a secure message says it by its signer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Identity>,
    /// Where receivers answer, in plain formats only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    /// What the file is about; agents subscribe to domains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// The length in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_size: Option<u64>,
    /// The SHA-256 of the whole, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// A piece of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileChunk {
    /// The transfer.
    pub token: Token,
    /// The bytes.
    pub chunk: Chunk,
    /// Counts the chunks from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
}

/// The end of a file transfer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEnd {
    /// The transfer.
    pub token: Token,
    /// What the sender adds.
    #[serde(default)]
    pub meta: Value,
}

/// The bytes of a chunk.
///
/// Binary formats carry them as they are. Formats of text carry `{"base64": ..}`, or a plain text when the chunk is UTF-8.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Readable<'a> {
    Text(std::borrow::Cow<'a, str>),
    Bytes { base64: String },
}

impl Serialize for Chunk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return serializer.serialize_bytes(&self.0);
        }
        match std::str::from_utf8(&self.0) {
            Ok(text) => Readable::Text(text.into()),
            Err(_) => Readable::Bytes { base64: openssl::base64::encode_block(&self.0) },
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
        match Readable::deserialize(deserializer)? {
            Readable::Text(text) => Ok(Chunk(text.into_owned().into_bytes())),
            Readable::Bytes { base64 } => {
                openssl::base64::decode_block(&base64).map(Chunk).map_err(|_| de::Error::custom("not base64"))
            }
        }
    }
}
