//! File transfer packets: a start, chunks and an end.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::identity::Identity;
use super::names::Token;

/// The start of a file transfer, with the size and digest to check the file by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FileStart {
    /// The name of the file at the sender.
    pub filename: String,
    /// The file name to use at the receiver, without directories.
    pub dest: String,
    /// Identifies the transfer.
    pub token: Token,
    /// The sender, in plain formats only: in a secure message the signer is the sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Identity>,
    /// The queue for the receivers' answers, in plain formats only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    /// The file domain; agents subscribe to domains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// The length in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_size: Option<u64>,
    /// The SHA-256 of the whole file, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl FileStart {
    /// The start of the transfer `token` of a file.
    ///
    /// ```
    /// use nanite::packet::{FileStart, Token};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let start = FileStart::new(Token::random()?, "report.pdf", "report.pdf").with_file_size(4096);
    /// assert_eq!((&*start.filename, start.file_size), ("report.pdf", Some(4096)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(token: Token, filename: impl Into<String>, dest: impl Into<String>) -> Self {
        Self {
            filename: filename.into(),
            dest: dest.into(),
            token,
            from: None,
            reply_to: None,
            domain: None,
            file_size: None,
            sha256: None,
        }
    }
}

optional_setters!(FileStart {
    /// Names the sender, in plain formats only.
    with_from(from: Identity),
    /// Names the queue for the receivers' answers, in plain formats only.
    with_reply_to(reply_to: impl Into<String>),
    /// Sets the file domain.
    with_domain(domain: impl Into<String>),
    /// Sets the length in bytes.
    with_file_size(file_size: u64),
    /// Sets the SHA-256 of the whole file, in hexadecimal digits.
    with_sha256(sha256: impl Into<String>),
});

/// A chunk of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FileChunk {
    /// The transfer.
    pub token: Token,
    /// The bytes.
    pub chunk: Chunk,
    /// The number of the chunk, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
}

impl FileChunk {
    /// A chunk of the file that the transfer `token` carries.
    ///
    /// ```
    /// use nanite::packet::{FileChunk, Token};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let chunk = FileChunk::new(Token::random()?, *b"first bytes").with_sequence(0);
    /// assert_eq!(chunk.chunk.0, b"first bytes");
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(token: Token, bytes: impl Into<Vec<u8>>) -> Self {
        Self { token, chunk: Chunk(bytes.into()), sequence: None }
    }
}

optional_setters!(FileChunk {
    /// Sets the number of the chunk, counted from 0.
    with_sequence(sequence: u64),
});

/// The end of a file transfer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FileEnd {
    /// The transfer.
    pub token: Token,
    /// Metadata from the sender; null when there is none.
    #[serde(default)]
    pub meta: Value,
}

impl FileEnd {
    /// The end of the transfer `token`.
    pub fn new(token: Token) -> Self {
        Self { token, meta: Value::Null }
    }

    /// Adds metadata.
    #[must_use]
    pub fn with_meta(mut self, meta: Value) -> Self {
        self.meta = meta;
        self
    }
}

/// The bytes of a chunk.
///
/// Binary formats carry them as they are. Text formats carry a string when the chunk is UTF-8, and `{"base64": ..}` otherwise.
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
