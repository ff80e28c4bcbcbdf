//! Presence packets: registrations and heartbeats of agents, and the advertises of mappers that ask for them.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::identity::Identity;
use super::names::{Service, Tag};
use super::payload::Payload;

/// The load of an agent: a finite number, lower is less loaded; or unknown.
///
/// Deserializing never fails: any value that is not a finite number (a string, a list, not-a-number) is an unknown load, which selectors
/// sort after every number.
///
/// ```
/// use nanite::packet::Status;
///
/// assert_eq!(Status::new(0.5).load(), Some(0.5));
/// assert_eq!(Status::new(f64::NAN).load(), None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Status(Option<f64>);

impl Status {
    /// The status with this load; unknown when the number is not finite.
    pub fn new(load: f64) -> Self {
        Self(load.is_finite().then_some(load))
    }

    /// The load, if it is known.
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

/// An agent registers with its services, load, tags and file domains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Register {
    /// The agent.
    pub identity: Identity,
    /// The services that it offers; at most [`Register::MAX_SERVICES`].
    pub services: Vec<Service>,
    /// Its load.
    pub status: Status,
    /// Its tags; at most [`Register::MAX_TAGS`].
    #[serde(default)]
    pub tags: Vec<Tag>,
    /// The file domains that it subscribes to; at most [`Register::MAX_TAGS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Tag>,
    /// The instance of its process, in plain formats only: a secure message has it in its signed header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
}

impl Register {
    /// The most services that an agent may offer.
    pub const MAX_SERVICES: usize = 1024;
    /// The most tags that an agent may have, and the most file domains that it may subscribe to.
    pub const MAX_TAGS: usize = 64;

    /// The registration of an agent with these services, an unknown load and no tags.
    ///
    /// ```
    /// use nanite::packet::{Identity, Register, Status};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let register = Register::new(Identity::agent("fred")?, ["/simple/echo".parse()?])
    ///     .with_status(Status::new(0.5))
    ///     .with_tags(["eu".parse()?]);
    /// assert!(register.within_limits());
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(identity: Identity, services: impl IntoIterator<Item = Service>) -> Self {
        Self {
            identity,
            services: services.into_iter().collect(),
            status: Status::default(),
            tags: Vec::new(),
            files: Vec::new(),
            instance: None,
        }
    }

    /// Sets the load.
    #[must_use]
    pub fn with_status(mut self, status: Status) -> Self {
        self.status = status;
        self
    }

    /// Sets the tags.
    #[must_use]
    pub fn with_tags(mut self, tags: impl IntoIterator<Item = Tag>) -> Self {
        self.tags = tags.into_iter().collect();
        self
    }

    /// Sets the file domains.
    #[must_use]
    pub fn with_files(mut self, domains: impl IntoIterator<Item = Tag>) -> Self {
        self.files = domains.into_iter().collect();
        self
    }

    /// Whether the counts of services, tags and file domains are within their limits.
    pub fn within_limits(&self) -> bool {
        self.services.len() <= Self::MAX_SERVICES && self.tags.len().max(self.files.len()) <= Self::MAX_TAGS
    }
}

optional_setters!(Register {
    /// Sets the instance of the process, in plain formats only.
    with_instance(instance: u64),
});

/// An agent unregisters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Unregister {
    /// The agent.
    pub identity: Identity,
}

impl Unregister {
    /// The end of this agent's registration.
    pub fn new(identity: Identity) -> Self {
        Self { identity }
    }
}

/// An agent's heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Ping {
    /// The agent.
    pub identity: Identity,
    /// Its load now.
    pub status: Status,
    /// The instance of its process, in plain formats only: a secure message has it in its signed header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
}

impl Ping {
    /// The heartbeat of an agent with this load.
    ///
    /// ```
    /// use nanite::packet::{Identity, Ping, Status};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let ping = Ping::new(Identity::agent("fred")?, Status::new(0.5));
    /// assert_eq!(ping.status.load(), Some(0.5));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(identity: Identity, status: Status) -> Self {
        Self { identity, status, instance: None }
    }
}

optional_setters!(Ping {
    /// Sets the instance of the process, in plain formats only.
    with_instance(instance: u64),
});

/// A mapper asks agents to register; a node announces itself.
///
/// ```
/// use nanite::packet::{Advertise, Identity};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let to_all = Advertise::default();
/// let to_fred = Advertise::default().with_target(Identity::agent("fred")?);
/// assert_eq!((to_all.target, to_fred.target), (None, Some(Identity::agent("fred")?)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Advertise {
    /// The agent that is asked to register; none asks every agent.
    #[serde(default)]
    pub target: Option<Identity>,
    /// Another process that runs under the recipient's identity.
    #[serde(rename = "twin", default, skip_serializing_if = "Option::is_none")]
    pub duplicate: Option<DuplicateInstance>,
    /// Whether the sender is a mapper that dispatches the requests of other nodes.
    #[serde(rename = "serves", default, skip_serializing_if = "std::ops::Not::not")]
    pub serves_requests: bool,
}

impl Advertise {
    /// Sets whether the sender is a mapper that dispatches the requests of other nodes.
    #[must_use]
    pub fn with_serves_requests(mut self, serves_requests: bool) -> Self {
        self.serves_requests = serves_requests;
        self
    }
}

optional_setters!(Advertise {
    /// Asks only this agent.
    with_target(target: Identity),
    /// Tells the recipient of another process under its identity.
    with_duplicate(duplicate: DuplicateInstance),
});

/// Another process under the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DuplicateInstance {
    /// Its instance: the start time of the process, in microseconds since the Unix epoch.
    pub instance: u64,
    /// Whether the newer of the two processes has registered and thereby replaced the older one.
    pub replaced: bool,
}

impl DuplicateInstance {
    /// The process that was started at `instance`; `replaced` tells whether the newer of the two has replaced the older one.
    pub fn new(instance: u64, replaced: bool) -> Self {
        Self { instance, replaced }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Packet;

    /// Nodes of earlier versions read these names.
    #[test]
    fn n23_advertise_keeps_its_serialized_names() {
        let advertise = Advertise::default()
            .with_target(Identity::agent("fred").unwrap())
            .with_duplicate(DuplicateInstance::new(1_800_000_000_000_000, true))
            .with_serves_requests(true);
        let packet = Packet::from(advertise);
        let json = r#"{"json_class":"Nanite::Advertise","data":{"target":"nanite-fred","twin":{"instance":1800000000000000,"replaced":true},"serves":true}}"#;
        assert_eq!(serde_json::to_string(&packet).unwrap(), json);
        assert_eq!(serde_json::from_str::<Packet>(json).unwrap(), packet);
        let empty = r#"{"json_class":"Nanite::Advertise","data":{"target":null}}"#;
        assert_eq!(serde_json::to_string(&Packet::from(Advertise::default())).unwrap(), empty);
    }
}
