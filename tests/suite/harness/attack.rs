//! The setting of the attack tests: mapper m1 sends a request to agent fred. The attacker carries the messages. It may be a node with a
//! certificate of the same CA (mapper m2, agent bob), or have no certificate.

use nanite::certs::{Credentials, KeyType};
use nanite::clock::Timestamp;
use nanite::packet::{Packet, Payload, Ping, Register, Request, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenError, OpenErrorKind, SealRequest, Serializer};

use super::pki::{Pki, agent, at, mapper};
use super::tamper::Forged;

/// The nodes, and one message from m1 to fred.
pub struct World {
    pub pki: Pki,
    pub m1: SecureSerializer,
    pub fred: SecureSerializer,
    pub message: Vec<u8>,
}

impl World {
    pub fn new() -> Self {
        Self::with(KeyType::P256)
    }

    pub fn with(key_type: KeyType) -> Self {
        let pki = Pki::new(key_type);
        let (m1, fred) = (pki.serializer(&mapper("m1")), pki.serializer(&agent("fred")));
        for identity in [mapper("m2"), agent("bob")] {
            pki.credentials(&identity);
        }
        let mut world = Self { pki, m1, fred, message: Vec::new() };
        world.message = world.seal(&request(), at(10));
        world
    }

    pub fn seal(&self, packet: &Packet, now: Timestamp) -> Vec<u8> {
        let audience = Audience::One(agent("fred"));
        self.m1.seal(packet, &SealRequest::new(&audience, now)).unwrap().bytes
    }

    pub fn forged(&self) -> Forged {
        Forged::new(&self.message)
    }

    pub fn credentials(&self, name: &str) -> Credentials {
        self.pki.credentials(&if name.starts_with('m') { mapper(name) } else { agent(name) })
    }

    /// Delivers bytes to fred's inbox, who must refuse and count them, and remember nothing of them.
    #[track_caller]
    pub fn refused(&self, bytes: &[u8], kind: OpenErrorKind) -> OpenError {
        self.refused_on(InboundQueue::AgentInbox, bytes, kind)
    }

    #[track_caller]
    pub fn refused_on(&self, channel: InboundQueue, bytes: &[u8], kind: OpenErrorKind) -> OpenError {
        refused_by(&self.fred, bytes, channel, at(11), kind)
    }

    /// The honest message still opens: the attack changed no state.
    #[track_caller]
    pub fn unharmed(&self) {
        let inbound = self.fred.open(&self.message, &OpenContext::new(InboundQueue::AgentInbox, at(12))).unwrap();
        assert_eq!(inbound.packet, request());
        assert_eq!(inbound.sender(), Some(&mapper("m1")));
    }
}

pub fn request() -> Packet {
    Packet::Request(Request::new("/bank/pay".parse().unwrap(), Payload::from("100 to bob")))
}

pub fn register(name: &str) -> Packet {
    let services = vec!["/bank/pay".parse().unwrap()];
    let identity = agent(name);
    Register::new(identity, services).with_status(Status::new(0.0)).into()
}

pub fn ping(name: &str) -> Packet {
    Ping::new(agent(name), Status::new(0.0)).into()
}

#[track_caller]
pub fn refused_by(
    reader: &SecureSerializer,
    bytes: &[u8],
    channel: InboundQueue,
    now: Timestamp,
    kind: OpenErrorKind,
) -> OpenError {
    let (before, remembered) = (reader.counters().refused(kind), reader.remembered());
    let error = reader.open(bytes, &OpenContext::new(channel, now)).unwrap_err();
    assert_eq!(error.kind, kind, "{error}");
    assert_eq!(reader.counters().refused(kind), before + 1);
    if kind < OpenErrorKind::Replayed {
        assert_eq!(reader.remembered(), remembered, "an unverified message is remembered");
    }
    assert!(!error.to_string().contains("100 to bob"));
    error
}
