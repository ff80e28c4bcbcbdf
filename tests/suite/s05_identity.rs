//! s05: the sender in a packet equals the identity in its signer's certificate, for every kind of packet.

use nanite::certs::KeyType;
use nanite::packet::{
    FileStart, Identity, Intermediate, Outcome, Packet, Payload, Ping, Register, Request, Status, Token, Unregister,
};
use nanite::serializer::{
    Audience, Codec, CodecError, InboundQueue, Json, OpenContext, OpenErrorKind, SealError, SealRequest, Serializer,
};

use crate::harness::pki::{Pki, agent, at, mapper};

/// A codec that writes another packet than the given one, as an attacker's program can.
#[derive(Debug)]
struct Lying(Packet);

impl Codec for Lying {
    fn name(&self) -> &'static str {
        "json"
    }

    fn content_type(&self) -> &'static str {
        "application/vnd.nanite.json"
    }

    fn encode(&self, _: &Packet) -> Result<Vec<u8>, CodecError> {
        Json.encode(&self.0)
    }

    fn decode(&self, bytes: &[u8]) -> Result<Packet, CodecError> {
        Json.decode(bytes)
    }
}

/// One packet of each kind that names its sender, from this sender to this receiver.
fn packets(from: &Identity, to: &Identity) -> Vec<Packet> {
    let token = Token::random().unwrap();
    let (identity, status) = (from.clone(), Status::new(0.5));
    let services = vec!["/a/b".parse().unwrap()];
    let mut request = Request::new("/a/b".parse().unwrap(), Payload::from("x"));
    request.from = Some(from.clone());
    vec![
        Packet::Register(Register::new(identity.clone(), services).with_status(status)),
        Packet::Ping(Ping::new(identity.clone(), status)),
        Packet::Unregister(Unregister::new(identity)),
        Packet::Outcome(Outcome::new(token, to.clone(), from.clone(), Ok(Payload::from("y")))),
        Packet::Intermediate(
            Intermediate::new(token, to.clone(), from.clone(), "k", Payload::from("z")).with_sequence(0),
        ),
        Packet::Request(request.clone()),
        Packet::Push(request),
    ]
}

fn route(packet: &Packet) -> (Audience, InboundQueue) {
    match packet {
        Packet::Outcome(_) | Packet::Intermediate(_) => (Audience::One(mapper("m1")), InboundQueue::MapperInbox),
        Packet::Request(_) | Packet::Push(_) => (Audience::Mappers, InboundQueue::Requests),
        _ => (Audience::Mappers, InboundQueue::Presence),
    }
}

#[test]
fn s05_rejects_packets_in_the_name_of_another_node() {
    let pki = Pki::new(KeyType::P256);
    let (fred, bob, m1) = (agent("fred"), agent("bob"), mapper("m1"));
    let reader = pki.serializer(&m1);
    let (from_fred, from_bob) = (packets(&fred, &m1), packets(&bob, &m1));
    for (count, (own, other)) in (1..).zip(from_fred.iter().zip(from_bob)) {
        let (audience, channel) = route(own);
        let options = SealRequest::new(&audience, at(1));
        let context = OpenContext::new(channel, at(2));
        // Our own serializer does not seal it.
        let honest = pki.serializer(&fred);
        let refused = honest.seal(&other, &options).unwrap_err();
        assert!(matches!(refused, SealError::NotAllowed(_)), "{refused}");
        // An attacker's serializer does.
        let liar = pki.builder(&fred).started_at(at(count)).codec(Lying(other)).build().unwrap();
        let error = reader.open(&liar.seal(own, &options).unwrap().bytes, &context).unwrap_err();
        assert_eq!((error.kind, error.claimed), (OpenErrorKind::BadBody, Some(fred.clone())), "{own:?}");
        assert_eq!(reader.counters().refused(OpenErrorKind::BadBody), count);
        // In its own name it is allowed.
        let honest = pki.builder(&fred).started_at(at(count).saturating_add(std::time::Duration::from_millis(1)));
        let sealed = honest.build().unwrap().seal(own, &options).unwrap();
        let inbound = reader.open(&sealed.bytes, &context).unwrap();
        assert_eq!((inbound.sender(), &inbound.packet), (Some(&fred), own));
    }
}

#[test]
fn s05_rejects_body_of_another_kind_than_the_header() {
    let pki = Pki::new(KeyType::P256);
    let reader = pki.serializer(&mapper("m1"));
    let all = packets(&agent("fred"), &mapper("m1"));
    for (header, body) in all.iter().zip(all.iter().cycle().skip(1)) {
        let (audience, channel) = route(header);
        let liar = pki.builder(&agent("fred")).started_at(at(1)).codec(Lying(body.clone())).build().unwrap();
        // Some kinds need a larger sequence number than the previous message.
        let sealed =
            all.iter().map(|_| liar.seal(header, &SealRequest::new(&audience, at(1))).unwrap()).last().unwrap();
        let error = reader.open(&sealed.bytes, &OpenContext::new(channel, at(2))).unwrap_err();
        // Each serializer starts its sequence at 1 again, so that some messages are refused as replayed first.
        let expected = [OpenErrorKind::BadBody, OpenErrorKind::Replayed];
        assert!(expected.contains(&error.kind), "{error}");
    }
    assert!(reader.counters().refused(OpenErrorKind::BadBody) >= 5);
    assert_eq!(reader.counters().opened(), 0);
}

#[test]
fn s05_rejects_registration_with_too_many_services_or_tags() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred) = (pki.serializer(&mapper("m1")), agent("fred"));
    let register = |services: usize, tags: usize| {
        Packet::Register(
            Register::new(fred.clone(), (0..services).map(|number| format!("/a/b{number}").parse().unwrap()))
                .with_status(Status::new(0.5))
                .with_tags((0..tags).map(|number| format!("t{number}").parse().unwrap())),
        )
    };
    let from = pki.serializer(&fred);
    let open = |packet: &Packet| {
        let sealed = from.seal(packet, &SealRequest::new(&Audience::Mappers, at(1))).unwrap();
        m1.open(&sealed.bytes, &OpenContext::new(InboundQueue::Presence, at(2))).map_err(|error| error.kind)
    };
    open(&register(Register::MAX_SERVICES, Register::MAX_TAGS)).unwrap();
    for (services, tags) in [(Register::MAX_SERVICES + 1, 0), (0, Register::MAX_TAGS + 1)] {
        assert_eq!(open(&register(services, tags)).unwrap_err(), OpenErrorKind::BadBody);
    }
}

#[test]
fn s05_rejects_another_instance_and_another_senders_file() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred) = (pki.serializer(&mapper("m1")), agent("fred"));
    let ping = || Ping::new(fred.clone(), Status::new(0.5));
    let (audience, context) = (Audience::Mappers, OpenContext::new(InboundQueue::Presence, at(2)));
    let liar = pki.builder(&fred).codec(Lying(ping().with_instance(1).into())).build().unwrap();
    let sealed = liar.seal(&ping().into(), &SealRequest::new(&audience, at(1))).unwrap();
    assert_eq!(m1.open(&sealed.bytes, &context).unwrap_err().kind, OpenErrorKind::BadBody);

    let file =
        |from: &str| Packet::FileStart(FileStart::new(Token::random().unwrap(), "a", "a").with_from(mapper(from)));
    let liar = pki.builder(&mapper("m1")).codec(Lying(file("m2"))).build().unwrap();
    let audience = Audience::One(fred.clone());
    let sealed = liar.seal(&file("m1"), &SealRequest::new(&audience, at(1))).unwrap();
    let error =
        pki.serializer(&fred).open(&sealed.bytes, &OpenContext::new(InboundQueue::AgentControl, at(2))).unwrap_err();
    assert_eq!(error.kind, OpenErrorKind::BadBody);
}
