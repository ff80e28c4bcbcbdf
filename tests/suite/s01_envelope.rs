//! s01: recipients open sealed messages, in both suites, for one recipient, several, and groups.

use nanite::certs::KeyType;
use nanite::packet::{Advertise, Packet, Payload, Ping, Register, Request, Status};
use nanite::serializer::{Audience, InboundQueue, MessageClass, OpenContext, SealRequest, Serializer};

use crate::harness::pki::{Pki, agent, at, mapper};

fn request(payload: &str) -> Packet {
    Packet::Request(Request::new("/simple/echo".parse().unwrap(), Payload::from(payload)))
}

#[test]
fn s01_recipients_open_requests_in_both_suites() {
    for key_type in [KeyType::P256, KeyType::Rsa2048] {
        let pki = Pki::new(key_type);
        let (m1, fred, bob) = (mapper("m1"), agent("fred"), agent("bob"));
        let (from, to_fred, to_bob) = (pki.serializer(&m1), pki.serializer(&fred), pki.serializer(&bob));
        let both = Audience::Many(vec![fred.clone(), bob.clone()]);
        for (audience, readers) in [(Audience::One(fred), vec![&to_fred]), (both, vec![&to_fred, &to_bob])] {
            let packet = request("hello");
            let sealed = from.seal(&packet, &SealRequest::new(&audience, at(1))).unwrap();
            assert!(!sealed.bytes.windows(5).any(|w| w == b"hello" || w == b"/simp"));
            for reader in readers {
                let inbound = reader.open(&sealed.bytes, &OpenContext::new(InboundQueue::AgentInbox, at(2))).unwrap();
                assert_eq!(inbound.packet, packet);
                let signer = inbound.signer().unwrap();
                assert_eq!(signer.signer(), &m1);
                assert_eq!(signer.id(), sealed.id);
                assert_eq!(Some(signer.instance()), from.verification().map(|verification| verification.instance()));
                assert_eq!(signer.expires_at(), at(61));
                assert!(signer.proof().is_none());
                assert_eq!(reader.counters().refused_in_all(), 0);
            }
        }
    }
}

#[test]
fn s01_every_mapper_opens_presence_messages_with_a_proof() {
    let pki = Pki::new(KeyType::P256);
    let fred = agent("fred");
    let mappers = [pki.serializer(&mapper("m1")), pki.serializer(&mapper("m2"))];
    let from = pki.serializer(&fred);
    let register =
        Packet::Register(Register::new(fred.clone(), ["/simple/echo".parse().unwrap()]).with_status(Status::new(0.5)));
    let ping = Packet::Ping(Ping::new(fred.clone(), Status::new(0.5)));
    for (packet, has_proof) in [(register, true), (ping, true)] {
        let sealed = from.seal(&packet, &SealRequest::new(&Audience::Mappers, at(1))).unwrap();
        for reader in &mappers {
            let inbound = reader.open(&sealed.bytes, &OpenContext::new(InboundQueue::Presence, at(1))).unwrap();
            assert_eq!(inbound.packet, packet);
            assert_eq!(inbound.sender(), Some(&fred));
            assert_eq!(inbound.signer().unwrap().proof().is_some(), has_proof);
        }
    }
    assert_eq!(pki.peers.learned.lock().unwrap().len(), 2, "each mapper passes the certificate to its store");
}

#[test]
fn s01_advertise_is_signed_only_for_unknown_agents() {
    let pki = Pki::new(KeyType::P256);
    let from = pki.serializer(&mapper("m1"));
    let packet = Packet::Advertise(Advertise::default());
    let reader = pki.builder_for(pki.stranger(&agent("new"))).build().unwrap();
    for audience in [Audience::Agents, Audience::One(agent("new"))] {
        let sealed = from.seal(&packet, &SealRequest::new(&audience, at(1))).unwrap();
        let inbound = reader.open(&sealed.bytes, &OpenContext::new(InboundQueue::AgentControl, at(1))).unwrap();
        assert_eq!((inbound.sender(), &inbound.packet), (Some(&mapper("m1")), &packet));
    }
}

#[test]
fn s01_stored_requests_open_after_days() {
    let pki = Pki::new(KeyType::P256);
    let from = pki.serializer(&mapper("m2"));
    let day = 24 * 3600;
    let reader = pki.builder(&mapper("m1")).started_at(at(day)).build().unwrap();
    let mut options = SealRequest::new(&Audience::Mappers, at(1));
    (options.class, options.lifetime) = (MessageClass::Stored, std::time::Duration::from_secs(2 * day));
    let sealed = from.seal(&request("later"), &options).unwrap();
    assert_eq!(sealed.expires_at, at(1 + 2 * day));
    let inbound = reader.open(&sealed.bytes, &OpenContext::new(InboundQueue::Offline, at(day + 5))).unwrap();
    assert_eq!(inbound.packet, request("later"));
}
