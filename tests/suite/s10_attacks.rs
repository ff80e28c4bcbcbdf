//! s10: the classic attacks on messages, and those that worked on the Ruby project. Each is refused at its own step, before anything of the
//! message is used.

use std::time::Duration;

use nanite::packet::{Advertise, Packet, Payload, Request};
use nanite::serializer::OpenErrorKind::*;
use nanite::serializer::{Audience, Codec, InboundQueue, Json, OpenContext, PlainSerializer, SealRequest, Serializer};

use crate::harness::attack::{World, ping, refused_by, register, request};
use crate::harness::pki::{agent, at, mapper};
use crate::harness::tamper::{Der, Forged, field};

#[test]
fn s10_rejects_message_resigned_by_another_node() {
    let world = World::new();
    // m2 signs m1's ciphertext as its own: everything outside is correct, but the digest inside is that of another header.
    let mut forged = world.forged();
    *forged.header.at(&[field::FROM]).leaf() = b"mapper-m2".to_vec();
    let error = world.refused(&forged.signed_by(&world.credentials("m2")), CannotOpen);
    assert_eq!(error.claimed, Some(mapper("m2")));
    // With the header unchanged: the key is not m1's.
    world.refused(&world.forged().signed_by(&world.credentials("m2")), UnknownSigner);
    world.unharmed();
}

#[test]
fn s10_rejects_signature_of_unknown_signer() {
    let world = World::new();
    let stranger = world.pki.stranger(&mapper("m1"));
    world.refused(&world.forged().signed_by(&stranger), UnknownSigner);
    // With the key id of m1's certificate in place of its own.
    let mut forged = Forged::new(&world.forged().signed_by(&stranger));
    *forged.signer().at(&[1]).leaf() = world.credentials("m1").certificate().key_id().as_bytes().to_vec();
    world.refused(&forged.bytes(), BadSignature);
    world.unharmed();
}

#[test]
fn s10_rejects_message_retargeted_to_another_node_or_queue() {
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
    // A recipient that the sender did not choose, in place of the one that it chose.
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
fn s10_rejects_body_under_another_header() {
    let world = World::new();
    let other = Packet::Request(Request::new("/bank/pay".parse().unwrap(), Payload::from("1 to eve")));
    let other = Forged::new(&world.seal(&other, at(10)));
    let mut forged = world.forged();
    forged.content = other.content.clone();
    world.refused(&forged.bytes(), BadSignature);
    world.unharmed();
    // Even m1 itself cannot combine the header of one message with the body of the other.
    let mut forged = Forged::new(&world.seal(&request(), at(10)));
    forged.content = other.content;
    world.refused(&forged.signed_by(&world.credentials("m1")), CannotOpen);
}

#[test]
fn s10_rejects_changed_header() {
    let world = World::new();
    let fields = world.forged().header.children().len();
    for index in 0..fields {
        let mut forged = world.forged();
        if index == field::INSTANCES {
            // For another process of fred.
            forged.header.at(&[index]).children().push(Der::Leaf(2, vec![1]));
            world.refused(&forged.bytes(), BadSignature);
            continue;
        }
        let Der::Leaf(tag, bytes) = forged.header.at(&[index]) else {
            // `to` is a list; change the name in it.
            forged.header.at(&[index, 0]).leaf()[7] ^= 1;
            world.refused(&forged.bytes(), WrongDestination);
            continue;
        };
        if *tag == 5 {
            // in_reply_to: from none to an id.
            *forged.header.at(&[index]) = Der::Leaf(4, vec![7; 16]);
        } else {
            *bytes.last_mut().unwrap() ^= 1;
        }
        let expected = match index {
            0 => Unsupported,              // the version
            field::KIND => Unsupported,    // now advertise, which is never encrypted
            field::FROM => UnknownSigner,  // now mapper-m0, which does not exist
            field::EXPIRES_AT => NotFresh, // valid for too long
            field::CLASS => Malformed,     // class stored, but not to the mappers
            _ => BadSignature,
        };
        let error = world.fred.open(&forged.bytes(), &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap_err();
        assert_eq!(error.kind, expected, "field {index}: {error}");
    }
    world.unharmed();
}

#[test]
fn s10_rejects_downgrade_of_protection() {
    let world = World::new();
    let plain = world.pki.builder(&mapper("m1")).dangerous().seal_signed_only().build().unwrap();
    let audience = Audience::One(agent("fred"));
    let options = SealRequest::new(&audience, at(10));
    let signed_only = plain.seal(&request(), &options).unwrap().bytes;
    assert!(signed_only.windows(9).any(|window| window == b"/bank/pay"));
    world.refused(&signed_only, Unsupported);
    let permissive = world.pki.builder(&agent("fred")).dangerous().accept_signed_only().build().unwrap();
    let inbound = permissive.open(&signed_only, &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap();
    assert_eq!(inbound.packet, request(), "only a receiver configured for it accepts it");

    let plaintext = PlainSerializer::json(agent("fred")).seal(&request(), &options).unwrap().bytes;
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
    // An encrypted advertise.
    let mut forged = world.forged();
    *forged.header.at(&[field::KIND]).leaf() = vec![4];
    world.refused(&forged.signed_by(&world.credentials("m1")), Unsupported);
    world.unharmed();
}

#[test]
fn s10_rejects_replay() {
    let world = World::new();
    world.unharmed();
    for now in [12, 13, 69] {
        refused_by(&world.fred, &world.message, InboundQueue::AgentInbox, at(now), Replayed);
    }
    refused_by(&world.fred, &world.message, InboundQueue::AgentInbox, at(71), NotFresh);
    assert_eq!(world.fred.counters().opened(), 1);

    // Presence messages are ordered: a receiver that has seen a later one refuses the earlier ones.
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
fn s10_rejects_expired_future_and_long_lived_messages() {
    let world = World::new();
    refused_by(&world.fred, &world.message, InboundQueue::AgentInbox, at(71), NotFresh);
    let future = world.seal(&request(), at(11 + 31));
    world.refused(&future, NotFresh);
    refused_by(&world.fred, &world.seal(&request(), at(11 + 32)), InboundQueue::AgentInbox, at(12), NotFresh);
    let tolerated = world.seal(&request(), at(11 + 30));
    world.fred.open(&tolerated, &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap();

    // A node that gives its messages a longer lifetime than others accept.
    let long_lived = world.pki.builder(&mapper("m1")).max_lifetime(Default::default(), Duration::from_secs(61));
    let audience = Audience::One(agent("fred"));
    let mut options = SealRequest::new(&audience, at(10));
    options.lifetime = Duration::from_secs(61);
    world.refused(&long_lived.build().unwrap().seal(&request(), &options).unwrap().bytes, NotFresh);

    // Expired before it was issued.
    let mut forged = world.forged();
    let issued_at = forged.header.at(&[field::ISSUED_AT]).clone();
    let later = forged.header.at(&[field::EXPIRES_AT]).clone();
    *forged.header.at(&[field::ISSUED_AT]) = later;
    *forged.header.at(&[field::EXPIRES_AT]) = issued_at;
    let bytes = forged.signed_by(&world.credentials("m1"));
    refused_by(&world.fred, &bytes, InboundQueue::AgentInbox, at(40), NotFresh);
    // Issued before this process started.
    let restarted = world.pki.builder(&agent("fred")).started_at(at(11)).build().unwrap();
    refused_by(&restarted, &world.message, InboundQueue::AgentInbox, at(12), NotFresh);
    world.unharmed();
}

#[test]
fn s10_rejects_roles_without_permission() {
    let world = World::new();
    // An agent sends work to another agent directly.
    let bob = world.pki.serializer(&agent("bob"));
    let audience = Audience::One(agent("fred"));
    let work = bob.seal(&request(), &SealRequest::new(&audience, at(10))).unwrap().bytes;
    world.refused(&work, NotAuthorized);
    // An agent asks other agents to register.
    let packet = Packet::Advertise(Advertise::default());
    let advertise = bob.seal(&packet, &SealRequest::new(&Audience::Agents, at(10))).unwrap().bytes;
    world.refused_on(InboundQueue::AgentControl, &advertise, NotAuthorized);
    // The receiver's own rule.
    let strict = world.pki.builder(&agent("fred")).authorize(|signer, _, _| signer.name() != "m1").build().unwrap();
    refused_by(&strict, &world.message, InboundQueue::AgentInbox, at(11), NotAuthorized);
    world.unharmed();
}
