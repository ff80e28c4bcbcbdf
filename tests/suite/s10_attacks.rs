//! s10: the original's holes and the classic attacks, each refused at its own step, before anything of it is used.
//!
//! The world: mapper m1 sends a request to agent fred. The attacker carries the messages, and may be a node with a certificate of the
//! same CA (mapper m2, agent bob) or have none at all.

use std::sync::Arc;
use std::time::Duration;

use nanite::certs::{
    Certificate, CertificateStore, Credentials, KeyType, Recipient, RecipientQuery, SignerQuery, StoreError,
};
use nanite::clock::Timestamp;
use nanite::packet::{Advertise, Packet, Payload, Ping, Register, Request, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::{
    Audience, Codec, InboundQueue, Json, OpenContext, OpenError, OpenErrorKind, PlainSerializer, SealRequest,
    Serializer,
};

use OpenErrorKind::*;

use crate::harness::pki::{Peers, Pki, agent, at, mapper};
use crate::harness::tamper::{Der, Forged, field};

/// Who is there, and one message from m1 to fred.
struct World {
    pki: Pki,
    m1: SecureSerializer,
    fred: SecureSerializer,
    message: Vec<u8>,
}

fn request() -> Packet {
    Packet::Request(Request::new("/bank/pay".parse().unwrap(), Payload::from("100 to bob")))
}

fn register(name: &str) -> Packet {
    let services = vec!["/bank/pay".parse().unwrap()];
    let identity = agent(name);
    Register { identity, services, status: Status::new(0.0), tags: vec![], files: vec![], instance: None }.into()
}

fn ping(name: &str) -> Packet {
    Ping { identity: agent(name), status: Status::new(0.0), instance: None }.into()
}

impl World {
    fn new() -> Self {
        Self::with(KeyType::P256)
    }

    fn with(key_type: KeyType) -> Self {
        let pki = Pki::new(key_type);
        let (m1, fred) = (pki.serializer(&mapper("m1")), pki.serializer(&agent("fred")));
        for identity in [mapper("m2"), agent("bob")] {
            pki.credentials(&identity);
        }
        let mut world = Self { pki, m1, fred, message: Vec::new() };
        world.message = world.seal(&request(), at(10));
        world
    }

    fn seal(&self, packet: &Packet, now: Timestamp) -> Vec<u8> {
        let audience = Audience::One(agent("fred"));
        self.m1.seal(packet, &SealRequest::new(&audience, now)).unwrap().bytes
    }

    fn forged(&self) -> Forged {
        Forged::new(&self.message)
    }

    fn credentials(&self, name: &str) -> Credentials {
        self.pki.credentials(&if name.starts_with('m') { mapper(name) } else { agent(name) })
    }

    /// Hands bytes to fred's inbox: they are refused, counted, and nothing is remembered of them.
    #[track_caller]
    fn refused(&self, bytes: &[u8], kind: OpenErrorKind) -> OpenError {
        self.refused_on(InboundQueue::AgentInbox, bytes, kind)
    }

    #[track_caller]
    fn refused_on(&self, channel: InboundQueue, bytes: &[u8], kind: OpenErrorKind) -> OpenError {
        refused_by(&self.fred, bytes, channel, at(11), kind)
    }

    /// The honest message is still opened: the attack has used up nothing.
    #[track_caller]
    fn unharmed(&self) {
        let inbound = self.fred.open(&self.message, &OpenContext::new(InboundQueue::AgentInbox, at(12))).unwrap();
        assert_eq!(inbound.packet, request());
        assert_eq!(inbound.sender(), Some(&mapper("m1")));
    }
}

#[track_caller]
fn refused_by(
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
    if kind < Replayed {
        assert_eq!(reader.remembered(), remembered, "what is not verified leaves nothing behind");
    }
    assert!(!error.to_string().contains("100 to bob"));
    error
}

#[test]
fn s10_resigned_by_another_node_is_not_that_nodes_message() {
    let world = World::new();
    // m2 takes m1's ciphertext for its own: everything outside is right, and inside stands the digest of another header.
    let mut forged = world.forged();
    *forged.header.at(&[field::FROM]).leaf() = b"mapper-m2".to_vec();
    let error = world.refused(&forged.signed_by(&world.credentials("m2")), CannotOpen);
    assert_eq!(error.claimed, Some(mapper("m2")));
    // Without changing the header: it is signed by a key that is not m1's.
    world.refused(&world.forged().signed_by(&world.credentials("m2")), UnknownSigner);
    world.unharmed();
}

#[test]
fn s10_signed_by_a_stranger_is_refused() {
    let world = World::new();
    let stranger = world.pki.stranger(&mapper("m1"));
    world.refused(&world.forged().signed_by(&stranger), UnknownSigner);
    // With the key id of m1's certificate written over its own.
    let mut forged = Forged::new(&world.forged().signed_by(&stranger));
    *forged.signer().at(&[1]).leaf() = world.credentials("m1").certificate().key_id().as_bytes().to_vec();
    world.refused(&forged.bytes(), BadSignature);
    world.unharmed();
}

#[test]
fn s10_retargeted_to_another_node_or_queue_is_refused() {
    let world = World::new();
    let bob = world.pki.serializer(&agent("bob"));
    refused_by(&bob, &world.message, InboundQueue::AgentInbox, at(11), WrongDestination);
    let mut forged = world.forged();
    forged.header.at(&[field::TO]).replace(b"nanite-fred", b"nanite-bob");
    refused_by(&bob, &forged.bytes(), InboundQueue::AgentInbox, at(11), BadSignature);
    for channel in [
        InboundQueue::AgentControl,
        InboundQueue::MapperInbox,
        InboundQueue::Presence,
        InboundQueue::Requests,
        InboundQueue::Offline,
    ] {
        world.refused_on(channel, &world.message, WrongDestination);
    }
    // A recipient that the sender did not choose, in place of the one it did.
    let mut forged = world.forged();
    let key_id = |name: &str| world.credentials(name).certificate().key_id().as_bytes().to_vec();
    forged.content.replace(&key_id("fred"), &key_id("bob"));
    forged.header.at(&[field::TO]).replace(b"nanite-fred", b"nanite-bob");
    *forged.header.at(&[field::FROM]).leaf() = b"mapper-m2".to_vec();
    let bytes = forged.signed_by(&world.credentials("m2"));
    refused_by(&bob, &bytes, InboundQueue::AgentInbox, at(11), CannotOpen);
    world.unharmed();
}

#[test]
fn s10_a_body_under_another_header_is_refused() {
    let world = World::new();
    let other = Packet::Request(Request::new("/bank/pay".parse().unwrap(), Payload::from("1 to eve")));
    let other = Forged::new(&world.seal(&other, at(10)));
    let mut forged = world.forged();
    forged.content = other.content.clone();
    world.refused(&forged.bytes(), BadSignature);
    world.unharmed();
    // Even m1 itself cannot say that the header of one message is that of the other's body.
    let mut forged = Forged::new(&world.seal(&request(), at(10)));
    forged.content = other.content;
    world.refused(&forged.signed_by(&world.credentials("m1")), CannotOpen);
}

#[test]
fn s10_downgraded_to_less_protection_is_refused() {
    let world = World::new();
    let plain = world.pki.builder(&mapper("m1")).dangerous().seal_signed_only().build().unwrap();
    let audience = Audience::One(agent("fred"));
    let how = SealRequest::new(&audience, at(10));
    let signed_only = plain.seal(&request(), &how).unwrap().bytes;
    assert!(signed_only.windows(9).any(|window| window == b"/bank/pay"));
    world.refused(&signed_only, Unsupported);
    let taker = world.pki.builder(&agent("fred")).dangerous().accept_signed_only().build().unwrap();
    let inbound = taker.open(&signed_only, &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap();
    assert_eq!(inbound.packet, request(), "only who was built to take it does");

    let plaintext = PlainSerializer::json(agent("fred")).seal(&request(), &how).unwrap().bytes;
    world.refused(&plaintext, Malformed);
    world.refused(&Json.encode(&request()).unwrap(), Malformed);
    world.refused(b"", Malformed);

    // EnvelopedData, which has no authentication, in place of AuthEnvelopedData.
    let mut forged = world.forged();
    let auth_enveloped = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x10, 0x01, 0x17];
    let enveloped = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x03];
    *forged.outer.at(&[1, 0, 2, 0]).leaf() = enveloped.to_vec();
    forged.signer().at(&[3]).replace(&auth_enveloped, &enveloped);
    world.refused(&forged.signed_by(&world.credentials("m1")), Unsupported);
    // An advertise that is encrypted, and one from a node that may not ask.
    let mut forged = world.forged();
    *forged.header.at(&[field::KIND]).leaf() = vec![4];
    world.refused(&forged.signed_by(&world.credentials("m1")), Unsupported);
    world.unharmed();
}

#[test]
fn s10_replayed_is_refused() {
    let world = World::new();
    world.unharmed();
    for now in [12, 13, 69] {
        refused_by(&world.fred, &world.message, InboundQueue::AgentInbox, at(now), Replayed);
    }
    refused_by(&world.fred, &world.message, InboundQueue::AgentInbox, at(71), NotFresh);
    assert_eq!(world.fred.counters().opened(), 1);

    // Presence by its order: a registration after the farewell that followed it, a heartbeat after a later one.
    let m1 = &world.m1;
    let sealed = [1, 2, 3].map(|second| {
        let packet = if second == 2 { ping("fred") } else { register("fred") };
        world.fred.seal(&packet, &SealRequest::new(&Audience::Mappers, at(second))).unwrap().bytes
    });
    m1.open(&sealed[2], &OpenContext::new(InboundQueue::Presence, at(4))).unwrap();
    for bytes in &sealed {
        refused_by(m1, bytes, InboundQueue::Presence, at(4), Replayed);
    }
}

#[test]
fn s10_expired_future_and_long_lived_are_refused() {
    let world = World::new();
    refused_by(&world.fred, &world.message, InboundQueue::AgentInbox, at(71), NotFresh);
    let future = world.seal(&request(), at(11 + 31));
    world.refused(&future, NotFresh);
    refused_by(&world.fred, &world.seal(&request(), at(11 + 32)), InboundQueue::AgentInbox, at(12), NotFresh);
    let tolerated = world.seal(&request(), at(11 + 30));
    world.fred.open(&tolerated, &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap();

    // A node that gives its messages more time than others grant.
    let patient = world.pki.builder(&mapper("m1")).max_lifetime(Default::default(), Duration::from_secs(61));
    let audience = Audience::One(agent("fred"));
    let mut how = SealRequest::new(&audience, at(10));
    how.lifetime = Duration::from_secs(61);
    world.refused(&patient.build().unwrap().seal(&request(), &how).unwrap().bytes, NotFresh);

    // Expired before it was issued.
    let mut forged = world.forged();
    let issued_at = forged.header.at(&[field::ISSUED_AT]).clone();
    let later = forged.header.at(&[field::EXPIRES_AT]).clone();
    *forged.header.at(&[field::ISSUED_AT]) = later;
    *forged.header.at(&[field::EXPIRES_AT]) = issued_at;
    let bytes = forged.signed_by(&world.credentials("m1"));
    refused_by(&world.fred, &bytes, InboundQueue::AgentInbox, at(40), NotFresh);
    // Made before this process started.
    let restarted = world.pki.builder(&agent("fred")).started_at(at(11)).build().unwrap();
    refused_by(&restarted, &world.message, InboundQueue::AgentInbox, at(12), NotFresh);
    world.unharmed();
}

#[test]
fn s10_certificates_that_are_not_good_are_refused() {
    let world = World::new();
    // m1's certificate is known, and expires.
    let late = at(31 * 24 * 3600);
    let key = world.credentials("m1");
    let mut forged = world.forged();
    for (place, seconds) in [(field::ISSUED_AT, 0), (field::EXPIRES_AT, 60)] {
        let moment = late.saturating_add(Duration::from_secs(seconds)).as_micros().to_be_bytes();
        *forged.header.at(&[place]).leaf() = moment.iter().copied().skip_while(|byte| *byte == 0).collect();
    }
    refused_by(&world.fred, &forged.signed_by(&key), InboundQueue::AgentInbox, late, BadCertificate);
    // Own certificates that have expired are not used.
    let late_seal = world.m1.seal(&request(), &SealRequest::new(&Audience::One(agent("fred")), late));
    assert!(late_seal.unwrap_err().to_string().contains("own certificate"));

    // The store knows a certificate of another CA.
    let other = Pki::new(KeyType::P256);
    let stranger = other.credentials(&mapper("m1"));
    world.pki.peers.put(stranger.certificate());
    world.refused(&world.forged().signed_by(&stranger), BadCertificate);

    // A store that gives m2's certificate when it is asked for m1's.
    #[derive(Debug)]
    struct Confused(Arc<Certificate>);
    impl CertificateStore for Confused {
        fn signer(&self, _: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
            Ok(Some(self.0.clone()))
        }
        fn recipients(&self, _: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
            Ok(vec![self.0.clone()])
        }
    }
    let m2 = world.credentials("m2");
    let store = Arc::new(Confused(m2.certificate().clone()));
    let builder =
        SecureSerializer::builder(world.credentials("fred"), store, world.pki.ca.trust().unwrap()).started_at(at(0));
    let fred = builder.build().unwrap();
    refused_by(&fred, &world.forged().signed_by(&m2), InboundQueue::AgentInbox, at(11), BadCertificate);
    let ping = fred.seal(&ping("fred"), &SealRequest::new(&Audience::One(mapper("m1")), at(1)));
    assert!(matches!(ping, Err(nanite::serializer::SealError::NoRecipient(_))), "nor is it encrypted to");
    world.unharmed();
}

#[test]
fn s10_roles_that_may_not_are_refused() {
    let world = World::new();
    // An agent sends work to another, beside the mappers.
    let bob = world.pki.serializer(&agent("bob"));
    let audience = Audience::One(agent("fred"));
    let work = bob.seal(&request(), &SealRequest::new(&audience, at(10))).unwrap().bytes;
    world.refused(&work, NotAuthorized);
    // An agent asks others to advertise.
    let packet = Packet::Advertise(Advertise::default());
    let advertise = bob.seal(&packet, &SealRequest::new(&Audience::Agents, at(10))).unwrap().bytes;
    world.refused_on(InboundQueue::AgentControl, &advertise, NotAuthorized);
    // A node's own rules.
    let picky = world.pki.builder(&agent("fred")).authorize(|signer, _, _| signer.name() != "m1").build().unwrap();
    refused_by(&picky, &world.message, InboundQueue::AgentInbox, at(11), NotAuthorized);
    world.unharmed();
}

/// Believes whatever certificate comes along.
#[derive(Debug)]
struct Gullible;

impl CertificateStore for Gullible {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        Ok(query.presented.cloned())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let Recipient::One(identity) = query.recipient else { return Ok(Vec::new()) };
        Err(StoreError::Other(format!("knows nothing of {identity}")))
    }
}

#[test]
fn s10_an_embedded_certificate_of_a_stranger_proves_nothing() {
    let world = World::new();
    let other = Pki::new(KeyType::P256);
    other.peers.put(world.credentials("m1").certificate());
    let stranger = other.serializer(&agent("fred"));
    let how = SealRequest::new(&Audience::Mappers, at(10));
    // It seals to m1 by that certificate, whoever issued it: trust in m1 is not what is tried here.
    let trusting = SecureSerializer::builder(
        other.credentials(&agent("fred")),
        world.pki.peers.clone(),
        world.pki.ca.trust().unwrap(),
    );
    drop(stranger);
    let bytes = trusting.started_at(at(0)).build().unwrap().seal(&register("fred"), &how).unwrap().bytes;
    refused_by(&world.m1, &bytes, InboundQueue::Presence, at(11), UnknownSigner);
    let gullible = |trust: &Pki| {
        SecureSerializer::builder(world.credentials("m1"), Arc::new(Gullible), trust.ca.trust().unwrap())
            .started_at(at(0))
            .build()
            .unwrap()
    };
    refused_by(&gullible(&world.pki), &bytes, InboundQueue::Presence, at(11), BadCertificate);
    gullible(&other).open(&bytes, &OpenContext::new(InboundQueue::Presence, at(11))).unwrap();
    assert!(world.pki.peers.learned.lock().unwrap().is_empty(), "nothing was learned of it");

    // A certificate where none may stand.
    let mut forged = world.forged();
    let certificate = Der::parse(world.credentials("m1").certificate().der());
    forged.signed().children().insert(3, Der::Node(0xa0, vec![certificate]));
    world.refused(&forged.signed_by(&world.credentials("m1")), Malformed);
    world.unharmed();
}

#[test]
fn s10_certificates_in_another_shape_are_refused() {
    let world = World::new();
    let fred = world.credentials("fred");
    let how = SealRequest::new(&Audience::Mappers, at(10));
    let sealed = world.fred.seal(&register("fred"), &how).unwrap().bytes;
    let own = Der::parse(fred.certificate().der());
    let mut others = ["bob", "m1", "m2", "x"].map(|name| Der::parse(world.credentials(name).certificate().der()));
    others.sort_by_key(Der::bytes);
    let with = |certificates: Vec<Der>| {
        let mut forged = Forged::new(&sealed);
        *forged.signed().at(&[3]).children() = certificates;
        forged.bytes()
    };
    let sorted = |mut certificates: Vec<Der>| {
        certificates.sort_by_key(Der::bytes);
        certificates
    };
    let mut backwards = sorted(vec![own.clone(), others[0].clone()]);
    backwards.reverse();
    for (what, certificates, kind) in [
        ("none, where they begin", vec![], Malformed),
        ("the same twice", vec![own.clone(), own.clone()], Malformed),
        ("not in the order of DER", backwards, Malformed),
        ("five", sorted([vec![own.clone()], others.to_vec()].concat()), Malformed),
        ("no certificate", vec![Der::Leaf(4, vec![1])], Malformed),
        ("an attribute certificate", vec![Der::Node(0xa2, vec![])], Malformed),
        ("no certificate, though it looks like one", vec![Der::Node(0x30, vec![])], BadCertificate),
        ("others', without its own", others[..1].to_vec(), BadCertificate),
    ] {
        let error = world.m1.open(&with(certificates), &OpenContext::new(InboundQueue::Presence, at(11))).unwrap_err();
        assert_eq!(error.kind, kind, "{what}: {error}");
    }
    world.m1.open(&with(vec![own]), &OpenContext::new(InboundQueue::Presence, at(11))).unwrap();
}

#[test]
fn s10_other_shapes_are_refused() {
    let world = World::new();
    let m1 = world.credentials("m1");
    let refused = |what: &str, kind: OpenErrorKind, change: fn(&mut Forged)| {
        // A message of its own each time, since what is signed well enough to be tried is remembered.
        let mut forged = Forged::new(&world.seal(&request(), at(10)));
        change(&mut forged);
        let error =
            world.fred.open(&forged.signed_by(&m1), &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap_err();
        assert_eq!(error.kind, kind, "{what}: {error}");
    };
    refused("a second signer", Malformed, |forged| {
        let signer = forged.signer().clone();
        let last = forged.signed().children().len() - 1;
        forged.signed().at(&[last]).children().insert(0, signer);
    });
    refused("unsigned attributes", Malformed, |forged| {
        forged.signer().children().push(Der::Node(0xa1, Vec::new()));
    });
    refused("revocation lists", Malformed, |forged| {
        forged.signed().children().insert(3, Der::Node(0xa1, Vec::new()));
    });
    refused("a fourth signed attribute", Malformed, |forged| {
        let more = forged.signer().at(&[3, 2]).clone();
        forged.signer().at(&[3]).children().push(more);
    });
    refused("another signed attribute in place of the header", Unsupported, |forged| {
        // 1.3.6.1.4.1.32473.2.2
        let name = forged.signer().at(&[3, 2, 0]).leaf();
        *name.last_mut().unwrap() = 2;
    });
    refused("two values of one attribute", Malformed, |forged| {
        let value = forged.signer().at(&[3, 0, 1, 0]).clone();
        forged.signer().at(&[3, 0, 1]).children().push(value);
    });
    refused("nobody to receive it", Malformed, |forged| forged.content.at(&[1]).children().clear());
    refused("one recipient twice", Malformed, |forged| {
        let recipient = forged.content.at(&[1, 0]).clone();
        forged.content.at(&[1]).children().push(recipient);
    });
    refused("one recipient with two keys", Malformed, |forged| {
        let mut recipient = forged.content.at(&[1, 0]).clone();
        *recipient.at(&[4, 0, 1]).leaf() = vec![0xff; 40];
        forged.content.at(&[1]).children().push(recipient);
    });
    refused("more than 64 recipients", Malformed, |forged| {
        let recipient = forged.content.at(&[1, 0]).clone();
        let many = (0..65u8).map(|number| {
            let mut recipient = recipient.clone();
            *recipient.at(&[4, 0, 0, 0]).leaf() = vec![number; 20];
            recipient
        });
        *forged.content.at(&[1]).children() = many.collect();
    });
    refused("a recipient more than the header says", CannotOpen, |forged| {
        let mut recipient = forged.content.at(&[1, 0]).clone();
        *recipient.at(&[4, 0, 0, 0]).leaf() = vec![0xff; 20];
        forged.content.at(&[1]).children().push(recipient);
    });
    refused("user keying material of more than 64 bytes", Malformed, |forged| {
        *forged.content.at(&[1, 0, 2, 0]).leaf() = vec![7; 65];
    });
    refused("empty user keying material", Malformed, |forged| forged.content.at(&[1, 0, 2, 0]).leaf().clear());
    refused("another version of AuthEnvelopedData", Malformed, |forged| *forged.content.at(&[0]).leaf() = vec![1]);
    refused("another version of a recipient", Malformed, |forged| *forged.content.at(&[1, 0, 0]).leaf() = vec![2]);
    refused("another type inside", Malformed, |forged| *forged.content.at(&[2, 0]).leaf().last_mut().unwrap() = 2);
    refused("a wrapped key of 32 bytes", Malformed, |forged| forged.content.at(&[1, 0, 4, 0, 1]).leaf().truncate(32));
    refused("authenticated attributes", Malformed, |forged| {
        forged.content.children().insert(3, Der::Node(0xa1, Vec::new()));
    });
    refused("a header that is no header", Malformed, |forged| forged.header = Der::Leaf(4, b"HEADER".to_vec()));
    refused("a header with a field more", Malformed, |forged| {
        forged.header.children().push(Der::Leaf(5, Vec::new()));
    });
    refused("another codec than is accepted", CannotOpen, |forged| {
        *forged.header.at(&[field::CODEC]).leaf() = b"marshal".to_vec();
    });
    refused("another version", Unsupported, |forged| *forged.header.at(&[0]).leaf() = vec![3]);
    refused("an unknown kind", Unsupported, |forged| *forged.header.at(&[field::KIND]).leaf() = vec![12]);
    world.unharmed();
}

#[test]
fn s10_truncated_and_continued_messages_are_refused() {
    let world = World::new();
    for length in 0..world.message.len() {
        world.refused(&world.message[..length], Malformed);
    }
    world.refused(&[&world.message[..], &[0]].concat(), Malformed);
    world.refused(&[&world.message[..], &world.message].concat(), Malformed);
    world.unharmed();
}

#[test]
fn s10_deep_nesting_is_refused() {
    let world = World::new();
    let mut nested = vec![0x30, 0x00];
    for _ in 0..20_000 {
        nested = [&[0x30, 0x83][..], &(nested.len() as u32).to_be_bytes()[1..], &nested].concat();
        if nested.len() > 60_000 {
            break;
        }
    }
    world.refused(&nested, Malformed);
    world.refused(&[0x30, 0x80].repeat(10_000), Malformed);
    let mut deep = serde_json::Value::Null;
    for _ in 0..65 {
        deep = serde_json::json!([deep]);
    }
    let deep = Packet::Request(Request::new("/a/b".parse().unwrap(), Payload(deep)));
    let error = world.refused(&world.seal(&deep, at(10)), BadBody);
    assert_eq!(error.claimed, Some(mapper("m1")));
    world.unharmed();
}

#[test]
fn s10_oversized_messages_are_refused_before_they_are_parsed() {
    let world = World::new();
    let limit = InboundQueue::AgentInbox.max_bytes();
    world.refused(&vec![0; limit + 1], TooLarge);
    world.refused(&vec![0; limit], Malformed);
    // A request's limit is not a heartbeat's: as large as the queue takes, too large for its kind.
    let presence = InboundQueue::Presence.max_bytes();
    let mut forged =
        Forged::new(&world.fred.seal(&ping("fred"), &SealRequest::new(&Audience::Mappers, at(1))).unwrap().bytes);
    *forged.content.at(&[2, 2]).leaf() = vec![0; nanite::packet::Kind::Ping.max_bytes()];
    let bytes = forged.signed_by(&world.credentials("fred"));
    assert!(bytes.len() <= presence);
    refused_by(&world.m1, &bytes, InboundQueue::Presence, at(2), TooLarge);
    // Nor is it sealed.
    let large = Packet::Request(Request::new("/a/b".parse().unwrap(), Payload::from("x".repeat(limit).as_str())));
    let sealed = world.m1.seal(&large, &SealRequest::new(&Audience::One(agent("fred")), at(1)));
    assert!(matches!(sealed, Err(nanite::serializer::SealError::TooLarge(..))));
    world.unharmed();
}

#[test]
fn s10_other_algorithms_are_refused() {
    let sha256 = [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01];
    let sha1 = [0x2b, 0x0e, 0x03, 0x02, 0x1a];
    let sha512 = [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03];
    let (ecdsa_sha256, ecdsa_sha1) =
        ([0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02], [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01]);
    let world = World::new();
    let m1 = world.credentials("m1");
    let refused = |what: &str, change: &dyn Fn(&mut Forged)| {
        let mut forged = world.forged();
        change(&mut forged);
        let error =
            world.fred.open(&forged.signed_by(&m1), &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap_err();
        assert_eq!(error.kind, Unsupported, "{what}: {error}");
    };
    for digest in [&sha1[..], &sha512] {
        refused("another digest", &|forged| {
            forged.signer().at(&[2]).replace(&sha256, digest);
            forged.signed().at(&[1]).replace(&sha256, digest);
        });
    }
    refused("ECDSA with SHA-1", &|forged| forged.signer().at(&[4]).replace(&ecdsa_sha256, &ecdsa_sha1));
    refused("PKCS#1 v1.5", &|forged| {
        forged.signer().at(&[4]).replace(&ecdsa_sha256, &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b]);
    });
    let aes = |last: u8| [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x01, last];
    for (what, cipher) in [("AES-128-GCM", 0x06), ("AES-256-CBC", 0x2a), ("AES-256-CCM", 0x2f)] {
        refused(what, &|forged| forged.content.at(&[2, 1]).replace(&aes(0x2e), &aes(cipher)));
    }
    refused("AES-128 key wrap", &|forged| forged.content.at(&[1, 0]).replace(&aes(0x2d), &aes(0x05)));
    refused("key derivation with SHA-1", &|forged| {
        // dhSinglePass-stdDH-sha1kdf-scheme, which is what OpenSSL does when it is not told otherwise.
        let sha1_kdf = [0x2b, 0x81, 0x05, 0x10, 0x86, 0x48, 0x3f, 0x00, 0x02];
        forged.content.at(&[1, 0]).replace(&[0x2b, 0x81, 0x04, 0x01, 0x0b, 0x01], &sha1_kdf);
    });
    refused("a tag of 12 bytes, as the algorithm says", &|forged| *forged.content.at(&[2, 1, 1, 1]).leaf() = vec![12]);
    refused("a tag of 12 bytes, by default", &|forged| {
        forged.content.at(&[2, 1, 1]).children().pop();
    });
    world.unharmed();
}

#[test]
fn s10_the_suite_is_that_of_the_certificate() {
    // RSA's name on an elliptic signature, and the other way round: each known, neither the signer's.
    let (elliptic, rsa) = (World::new(), World::with(KeyType::Rsa2048));
    let algorithm = |world: &World| world.forged().signer().at(&[4]).clone();
    for (world, other) in [(&elliptic, &rsa), (&rsa, &elliptic)] {
        let mut forged = world.forged();
        *forged.signer().at(&[4]) = algorithm(other);
        world.refused(&forged.signed_by(&world.credentials("m1")), BadSignature);
        world.unharmed();
    }
    // PKCS#1 v1.5 key transport, in place of OAEP: OpenSSL would open one that is called the other.
    let rsa = World::with(KeyType::Rsa2048);
    let mut forged = rsa.forged();
    let pkcs1 =
        Der::Node(0x30, vec![Der::Leaf(6, vec![0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1]), Der::Leaf(5, vec![])]);
    *forged.content.at(&[1, 0, 2]) = pkcs1;
    rsa.refused(&forged.signed_by(&rsa.credentials("m1")), Unsupported);
    rsa.unharmed();
}

#[test]
fn s10_a_shortened_tag_or_nonce_is_refused() {
    let world = World::new();
    let m1 = world.credentials("m1");
    for length in [0, 4, 12, 15] {
        let mut forged = world.forged();
        forged.content.at(&[3]).leaf().truncate(length);
        world.refused(&forged.signed_by(&m1), Malformed);
    }
    for length in [0, 8, 11] {
        let mut forged = world.forged();
        forged.content.at(&[2, 1, 1, 0]).leaf().truncate(length);
        world.refused(&forged.signed_by(&m1), Malformed);
    }
    world.unharmed();
}

#[test]
fn s10_changed_ciphertext_tag_and_keys_do_not_open_even_if_signed() {
    let world = World::new();
    let m1 = world.credentials("m1");
    let places: [(&str, &[usize]); 5] = [
        ("nonce", &[2, 1, 1, 0]),
        ("ciphertext", &[2, 2]),
        ("tag", &[3]),
        ("wrapped key", &[1, 0, 4, 0, 1]),
        ("user keying material", &[1, 0, 2, 0]),
    ];
    for (what, place) in places {
        let mut forged = Forged::new(&world.seal(&request(), at(10)));
        forged.content.at(place).leaf()[0] ^= 1;
        let error =
            world.fred.open(&forged.signed_by(&m1), &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap_err();
        assert_eq!(error.kind, CannotOpen, "{what}");
    }
    // Points that are not on the curve, and the other encodings of points.
    for (what, point, kind) in [
        ("off the curve", [&[0, 4][..], &[9; 64]].concat(), CannotOpen),
        ("compressed", [&[0, 2][..], &[9; 32]].concat(), Malformed),
        ("at infinity", vec![0, 0], Malformed),
        ("with unused bits", [&[1, 4][..], &[8; 64]].concat(), Malformed),
    ] {
        let mut forged = Forged::new(&world.seal(&request(), at(10)));
        *forged.content.at(&[1, 0, 1, 0, 1]).leaf() = point;
        let error =
            world.fred.open(&forged.signed_by(&m1), &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap_err();
        assert_eq!(error.kind, kind, "{what}");
    }
    world.unharmed();
}

#[test]
fn s10_a_changed_header_is_refused() {
    let world = World::new();
    let fields = world.forged().header.children().len();
    for index in 0..fields {
        let mut forged = world.forged();
        let Der::Leaf(tag, bytes) = forged.header.at(&[index]) else {
            // `to` is a list; its one name is changed.
            forged.header.at(&[index, 0]).leaf()[7] ^= 1;
            world.refused(&forged.bytes(), WrongDestination);
            continue;
        };
        if *tag == 5 {
            // in_reply_to, from none to some.
            *forged.header.at(&[index]) = Der::Leaf(4, vec![7; 16]);
        } else {
            *bytes.last_mut().unwrap() ^= 1;
        }
        let expected = match index {
            0 => Unsupported,              // the version
            field::KIND => Unsupported,    // an advertise, which is never encrypted
            field::FROM => UnknownSigner,  // there is no m0
            field::EXPIRES_AT => NotFresh, // valid for longer than it may be
            9 => Malformed,                // stored, and not for the mappers
            _ => BadSignature,
        };
        let error = world.fred.open(&forged.bytes(), &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap_err();
        assert_eq!(error.kind, expected, "field {index}: {error}");
    }
    world.unharmed();
}

#[test]
fn s10_peers_that_are_unknown_or_forgotten_are_refused() {
    let world = World::new();
    let peers = Arc::new(Peers::default());
    let builder = SecureSerializer::builder(world.credentials("fred"), peers.clone(), world.pki.ca.trust().unwrap())
        .started_at(at(0));
    let fred = builder.build().unwrap();
    refused_by(&fred, &world.message, InboundQueue::AgentInbox, at(11), UnknownSigner);
    peers.put(world.credentials("m1").certificate());
    fred.open(&world.message, &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap();
}
