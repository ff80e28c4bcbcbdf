//! Presence: what agents say of themselves, and the mappers' question for it.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::{Identity, Payload, Service, Tag};

/// How loaded an agent is: any finite number, lower is less loaded; or none that can be compared.
///
/// Reading never fails: what is not a finite number (a text, a list, not-a-number) is 'none', which sorts behind every number.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Status(Option<f64>);

impl Status {
    /// A status of this number; none when it is not finite.
    pub fn new(load: f64) -> Self {
        Self(load.is_finite().then_some(load))
    }

    /// The number, where there is one.
    pub fn load(self) -> Option<f64> {
        self.0
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(load) => write!(f, "{load:.2}"),
            None => f.write_str("-"),
        }
    }
}

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Status {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyStatus;
        impl<'de> Visitor<'de> for AnyStatus {
            type Value = Status;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a status")
            }
            fn visit_f64<E>(self, value: f64) -> Result<Status, E> {
                Ok(Status::new(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Status, E> {
                Ok(Status::new(value as f64))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Status, E> {
                Ok(Status::new(value as f64))
            }
            fn visit_bool<E>(self, _: bool) -> Result<Status, E> {
                Ok(Status(None))
            }
            fn visit_str<E>(self, _: &str) -> Result<Status, E> {
                Ok(Status(None))
            }
            fn visit_unit<E>(self) -> Result<Status, E> {
                Ok(Status(None))
            }
            fn visit_none<E>(self) -> Result<Status, E> {
                Ok(Status(None))
            }
            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Status, D::Error> {
                deserializer.deserialize_any(self)
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Status, A::Error> {
                while items.next_element::<Payload>()?.is_some() {}
                Ok(Status(None))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut entries: A) -> Result<Status, A::Error> {
                while entries.next_entry::<String, Payload>()?.is_some() {}
                Ok(Status(None))
            }
        }
        deserializer.deserialize_any(AnyStatus)
    }
}

/// An agent says that it lives, what it offers, how loaded it is and which tags it carries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Register {
    /// Who registers.
    pub identity: Identity,
    /// The services it offers; at most [`Register::MAX_SERVICES`].
    pub services: Vec<Service>,
    /// How loaded it is.
    pub status: Status,
    /// The tags it carries; at most [`Register::MAX_TAGS`].
    #[serde(default)]
    pub tags: Vec<Tag>,
    /// The domains of files it takes; at most [`Register::MAX_TAGS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Tag>,
    /// The instance of its process, in plain formats only: a secure message says it in its signed header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
}

impl Register {
    /// How many services one agent may offer.
    pub const MAX_SERVICES: usize = 1024;
    /// How many tags one agent may carry, and how many domains of files it may take.
    pub const MAX_TAGS: usize = 64;

    /// Whether the counts are within their limits.
    pub fn within_limits(&self) -> bool {
        self.services.len() <= Self::MAX_SERVICES && self.tags.len().max(self.files.len()) <= Self::MAX_TAGS
    }
}

/// An agent says that it goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unregister {
    /// Who goes.
    pub identity: Identity,
}

/// An agent's heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ping {
    /// Who lives.
    pub identity: Identity,
    /// How loaded it is now.
    pub status: Status,
    /// The instance of its process, in plain formats only: a secure message says it in its signed header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
}

/// A mapper asks agents to register; a node makes itself known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Advertise {
    /// The agent that is asked; none: every agent.
    #[serde(default)]
    pub target: Option<Identity>,
    /// Another process that runs under the identity of the one that is told of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicate: Option<DuplicateInstance>,
    /// Whether the sender is a mapper that takes requests of other nodes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub serves: bool,
}

/// Another process under the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DuplicateInstance {
    /// Its instance: when it was started, in microseconds.
    pub instance: u64,
    /// Whether the later of the two has registered, and so has the place of the earlier one.
    pub replaced: bool,
}
