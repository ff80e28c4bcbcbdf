//! s10: messages of another structure than the specified one, although an honest key signed them: other fields, sizes, nesting.

use nanite::packet::{Packet, Payload, Request};
use nanite::serializer::OpenErrorKind::*;
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenErrorKind, SealRequest, Serializer};

use crate::harness::attack::{World, ping, refused_by, request};
use crate::harness::pki::{agent, at, mapper};
use crate::harness::tamper::{Der, Forged, field};

#[test]
fn s10_rejects_other_structures() {
    let world = World::new();
    let m1 = world.credentials("m1");
    let refused = |what: &str, kind: OpenErrorKind, change: fn(&mut Forged)| {
        // A new message each time: a correctly signed one is remembered.
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
    refused("no recipient", Malformed, |forged| forged.content.at(&[1]).children().clear());
    refused("a recipient twice", Malformed, |forged| {
        let recipient = forged.content.at(&[1, 0]).clone();
        forged.content.at(&[1]).children().push(recipient);
    });
    refused("two encrypted keys for a recipient", Malformed, |forged| {
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
    refused("a recipient that is not in the header", CannotOpen, |forged| {
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
    refused("another content type inside", Malformed, |forged| {
        *forged.content.at(&[2, 0]).leaf().last_mut().unwrap() = 2
    });
    refused("a wrapped key of 32 bytes", Malformed, |forged| forged.content.at(&[1, 0, 4, 0, 1]).leaf().truncate(32));
    refused("authenticated attributes", Malformed, |forged| {
        forged.content.children().insert(3, Der::Node(0xa1, Vec::new()));
    });
    refused("a header that is not a SEQUENCE", Malformed, |forged| forged.header = Der::Leaf(4, b"HEADER".to_vec()));
    refused("a header with an extra field", Malformed, |forged| {
        forged.header.children().push(Der::Leaf(5, Vec::new()));
    });
    refused("a codec that is not accepted", CannotOpen, |forged| {
        *forged.header.at(&[field::CODEC]).leaf() = b"marshal".to_vec();
    });
    refused("another version", Unsupported, |forged| *forged.header.at(&[0]).leaf() = vec![3]);
    refused("an unknown kind", Unsupported, |forged| *forged.header.at(&[field::KIND]).leaf() = vec![12]);
    world.unharmed();
}

#[test]
fn s10_rejects_truncated_and_extended_messages() {
    let world = World::new();
    for length in 0..world.message.len() {
        world.refused(&world.message[..length], Malformed);
    }
    world.refused(&[&world.message[..], &[0]].concat(), Malformed);
    world.refused(&[&world.message[..], &world.message].concat(), Malformed);
    world.unharmed();
}

#[test]
fn s10_rejects_deep_nesting() {
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
fn s10_rejects_oversized_messages_before_parsing() {
    let world = World::new();
    let limit = InboundQueue::AgentInbox.max_bytes();
    world.refused(&vec![0; limit + 1], TooLarge);
    world.refused(&vec![0; limit], Malformed);
    // Small enough for the queue, but too large for its kind.
    let presence = InboundQueue::Presence.max_bytes();
    let mut forged =
        Forged::new(&world.fred.seal(&ping("fred"), &SealRequest::new(&Audience::Mappers, at(1))).unwrap().bytes);
    *forged.content.at(&[2, 2]).leaf() = vec![0; nanite::packet::Kind::Ping.max_bytes()];
    let bytes = forged.signed_by(&world.credentials("fred"));
    assert!(bytes.len() <= presence);
    refused_by(&world.m1, &bytes, InboundQueue::Presence, at(2), TooLarge);
    // Sealing refuses it too.
    let large = Packet::Request(Request::new("/a/b".parse().unwrap(), Payload::from("x".repeat(limit).as_str())));
    let sealed = world.m1.seal(&large, &SealRequest::new(&Audience::One(agent("fred")), at(1)));
    assert!(matches!(sealed, Err(nanite::serializer::SealError::TooLarge(..))));
    world.unharmed();
}
