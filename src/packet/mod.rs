//! What is sent: packets, and the small types they are made of.
//!
//! A [`Packet`] is one message's content, before a serializer turns it into bytes. The names of its fields and kinds are those
//! of the original's JSON format.

mod file;
mod identity;
mod payload;
mod presence;
mod request;
mod text;

use serde::{Deserialize, Serialize};

pub use file::{Chunk, FileChunk, FileEnd, FileStart};
pub use identity::{Identity, InvalidIdentity, Role, is_domain};
pub use payload::{MAX_DEPTH, Payload};
pub use presence::{Advertise, DuplicateInstance, Ping, Register, Status, Unregister};
pub use request::{Failure, FailureCode, Intermediate, Outcome, Request, SelectorName, UnknownSelector};
pub use text::{InvalidId, InvalidService, InvalidTag, MessageId, RandomnessError, Service, Tag, Token};

/// The content of one message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "json_class", content = "data")]
pub enum Packet {
    /// An agent says that it lives and what it offers.
    #[serde(rename = "Nanite::Register")]
    Register(Register),
    /// An agent says that it goes.
    #[serde(rename = "Nanite::UnRegister")]
    Unregister(Unregister),
    /// An agent's heartbeat.
    #[serde(rename = "Nanite::Ping")]
    Ping(Ping),
    /// A mapper asks agents to register.
    #[serde(rename = "Nanite::Advertise")]
    Advertise(Advertise),
    /// Work to do, with an answer.
    #[serde(rename = "Nanite::Request")]
    Request(Request),
    /// Work to do, without an answer.
    #[serde(rename = "Nanite::Push")]
    Push(Request),
    /// The answer to a request.
    #[serde(rename = "Nanite::Result")]
    Outcome(Outcome),
    /// A part of an answer, before it is complete.
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

/// The kind of a packet; the number stands in the signed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
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
    pub fn from_number(number: u8) -> Option<Kind> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// The kind as a word, for people.
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
    /// Presence is small; work and files may be larger. A longer message is refused before it is parsed.
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
    /// Which kind this is.
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

    /// Who the packet says it is from, where its kind says so. Believe it only as far as its serializer vouches for it.
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
