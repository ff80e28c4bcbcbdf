//! Packets: the content of messages, and the types that they are made of.
//!
//! A [`Packet`] is the content of one message before a serializer turns it into bytes. The names of its kinds and fields are those of
//! the Ruby nanite's JSON format. This file also holds the packets of file transfers.
//!
//! ```
//! use nanite::packet::{Identity, Packet, Ping, Status};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let ping = Packet::from(Ping::new(Identity::agent("fred")?, Status::new(0.5)));
//! let json = serde_json::to_string(&ping)?;
//! assert_eq!(json, r#"{"json_class":"Nanite::Ping","data":{"identity":"nanite-fred","status":0.5}}"#);
//! # Ok(())
//! # }
//! ```

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Implements chainable setters for optional fields.
macro_rules! optional_setters {
    ($packet:ident { $($(#[$doc:meta])* $setter:ident($field:ident: $type:ty)),* $(,)? }) => {
        impl $packet {$(
            $(#[$doc])*
            #[must_use]
            pub fn $setter(mut self, $field: $type) -> Self {
                self.$field = Some($field.into());
                self
            }
        )*}
    };
}

mod chunk;
mod identity;
mod names;
mod origin;
mod payload;
mod presence;
mod request;

pub use chunk::Chunk;
pub use identity::{Identity, InvalidIdentity, Role, is_trust_domain};
pub use names::{InvalidId, InvalidService, InvalidTag, MessageId, RandomnessError, Service, Tag, Token};
pub use origin::{ForwardedProof, RequestDigest, RequestOrigin};
pub use payload::{MAX_PAYLOAD_DEPTH, Payload};
pub use presence::{Advertise, DuplicateInstance, Ping, Register, Status, Unregister};
pub use request::{Failure, FailureCode, Intermediate, Outcome, Request, SelectorName, UnknownSelector};
/// The JSON library whose `Value` and `Error` are part of this module's interface.
#[doc(no_inline)]
pub use serde_json;

/// The content of one message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "json_class", content = "data")]
#[non_exhaustive]
pub enum Packet {
    /// An agent registers with the services that it offers.
    #[serde(rename = "Nanite::Register")]
    Register(Register),
    /// An agent unregisters.
    #[serde(rename = "Nanite::UnRegister")]
    Unregister(Unregister),
    /// An agent's heartbeat.
    #[serde(rename = "Nanite::Ping")]
    Ping(Ping),
    /// A mapper asks agents to register; a node announces itself.
    #[serde(rename = "Nanite::Advertise")]
    Advertise(Advertise),
    /// A request that is answered.
    #[serde(rename = "Nanite::Request")]
    Request(Request),
    /// A request that is not answered.
    #[serde(rename = "Nanite::Push")]
    Push(Request),
    /// The final answer to a request.
    #[serde(rename = "Nanite::Result")]
    Outcome(Outcome),
    /// A partial answer, sent while the handler still runs.
    #[serde(rename = "Nanite::IntermediateMessage")]
    Intermediate(Intermediate),
    /// The start of a file transfer.
    #[serde(rename = "Nanite::FileStart")]
    FileStart(FileStart),
    /// A piece of a file.
    #[serde(rename = "Nanite::FileChunk")]
    FileChunk(FileChunk),
    /// The end of a file transfer.
    #[serde(rename = "Nanite::FileEnd")]
    FileEnd(FileEnd),
}

/// The kind of a packet. Its number is part of the signed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Kind {
    Register = 1,
    Unregister = 2,
    Ping = 3,
    Advertise = 4,
    Request = 5,
    Push = 6,
    Outcome = 7,
    Intermediate = 8,
    FileStart = 9,
    FileChunk = 10,
    FileEnd = 11,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 11] = [
        Kind::Register,
        Kind::Unregister,
        Kind::Ping,
        Kind::Advertise,
        Kind::Request,
        Kind::Push,
        Kind::Outcome,
        Kind::Intermediate,
        Kind::FileStart,
        Kind::FileChunk,
        Kind::FileEnd,
    ];

    /// The kind with this number.
    ///
    /// ```
    /// use nanite::packet::Kind;
    ///
    /// assert_eq!(Kind::from_number(3), Some(Kind::Ping));
    /// assert_eq!(Kind::from_number(99), None);
    /// ```
    pub fn from_number(number: u8) -> Option<Kind> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// The kind as a word for logs and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Register => "register",
            Kind::Unregister => "unregister",
            Kind::Ping => "ping",
            Kind::Advertise => "advertise",
            Kind::Request => "request",
            Kind::Push => "push",
            Kind::Outcome => "result",
            Kind::Intermediate => "intermediate",
            Kind::FileStart => "file-start",
            Kind::FileChunk => "file-chunk",
            Kind::FileEnd => "file-end",
        }
    }

    /// The largest message of this kind that is accepted, in bytes, envelope included.
    ///
    /// Presence packets are small; requests and files may be larger. A longer message is refused before it is parsed.
    pub const fn max_bytes(self) -> usize {
        match self {
            Kind::Ping | Kind::Unregister | Kind::FileEnd | Kind::FileStart => 64 * 1024,
            Kind::Advertise | Kind::Register => 256 * 1024,
            Kind::FileChunk => 2 * 1024 * 1024,
            Kind::Request | Kind::Push | Kind::Outcome | Kind::Intermediate => 16 * 1024 * 1024,
        }
    }
}

impl Packet {
    /// The kind of this packet.
    pub fn kind(&self) -> Kind {
        match self {
            Packet::Register(_) => Kind::Register,
            Packet::Unregister(_) => Kind::Unregister,
            Packet::Ping(_) => Kind::Ping,
            Packet::Advertise(_) => Kind::Advertise,
            Packet::Request(_) => Kind::Request,
            Packet::Push(_) => Kind::Push,
            Packet::Outcome(_) => Kind::Outcome,
            Packet::Intermediate(_) => Kind::Intermediate,
            Packet::FileStart(_) => Kind::FileStart,
            Packet::FileChunk(_) => Kind::FileChunk,
            Packet::FileEnd(_) => Kind::FileEnd,
        }
    }

    /// The sender that the packet names, if its kind names one. It is not verified: only the signer that the serializer reports is.
    pub fn claimed_sender(&self) -> Option<&Identity> {
        match self {
            Packet::Register(p) => Some(&p.identity),
            Packet::Unregister(p) => Some(&p.identity),
            Packet::Ping(p) => Some(&p.identity),
            Packet::Request(p) => p.from.as_ref(),
            Packet::Push(p) => p.from.as_ref(),
            Packet::Outcome(p) => Some(&p.from),
            Packet::Intermediate(p) => Some(&p.from),
            Packet::FileStart(p) => p.from.as_ref(),
            Packet::Advertise(_) | Packet::FileChunk(_) | Packet::FileEnd(_) => None,
        }
    }
}

macro_rules! packet_from {
    ($($name:ident),*) => {$(
        impl From<$name> for Packet {
            fn from(packet: $name) -> Packet {
                Packet::$name(packet)
            }
        }
    )*};
}

packet_from!(Register, Unregister, Ping, Advertise, Request, Outcome, Intermediate, FileStart, FileChunk, FileEnd);

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
