//! Proofs of registrations and heartbeats: one process stores them, another verifies them; nothing else passes verification.

use std::sync::Arc;
use std::time::Duration;

use nanite::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
use nanite::clock::Timestamp;
use nanite::packet::{Packet, Ping, Register, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::{
    Audience, InboundQueue, OpenContext, OpenErrorKind, PlainSerializer, Proof, SealRequest, Serializer, Verification,
    Verified,
};

use crate::harness::pki::{Pki, T0, agent, at, mapper};
use crate::harness::tamper::Der;

fn register(name: &str) -> Packet {
    let services = vec!["/simple/echo".parse().unwrap()];
    let tags = vec!["big".parse().unwrap()];
    Register::new(agent(name), services).with_status(Status::new(1.0)).with_tags(tags).into()
}

fn ping(name: &str) -> Packet {
    Ping::new(agent(name), Status::new(2.0)).into()
}

/// What a mapper stores of a message.
fn stored(
    sender: &SecureSerializer,
    mapper: &SecureSerializer,
    packet: &Packet,
    now: Timestamp,
) -> (Verified, Arc<Proof>) {
    let sealed = sender.seal(packet, &SealRequest::new(&Audience::Mappers, now)).unwrap();
    let opened = mapper.open(&sealed.bytes, &OpenContext::new(InboundQueue::Presence, now)).unwrap();
    let signer = opened.signer().unwrap();
    (signer.clone(), signer.proof().unwrap().clone())
}

#[test]
fn n14_proof_is_verified_by_another_mapper() {
    for key_type in [KeyType::P256, KeyType::Rsa2048] {
        let pki = Pki::new(key_type);
        let (fred, one, other) =
            (pki.serializer(&agent("fred")), pki.serializer(&mapper("one")), pki.serializer(&mapper("other")));
        for packet in [register("fred"), ping("fred")] {
            let (signer, proof) = stored(&fred, &one, &packet, at(1));
            // A proof does not expire: the caller decides how old it may be.
            let verified = other.verify_proof(&proof, at(3600)).unwrap();
            assert_eq!(verified.packet, packet);
            let again = verified.signer().unwrap();
            assert_eq!(again.signer(), &agent("fred"));
            assert_eq!((again.instance(), again.sequence()), (signer.instance(), signer.sequence()));
            assert_eq!((again.issued_at(), again.expires_at()), (at(1), at(61)));
            assert_eq!(again.proof(), Some(&proof));
            assert!(other.verify_proof(&proof, at(3600)).is_ok(), "it does not count as a replay");
        }
    }
}

#[test]
fn n14_modified_proof_is_rejected() {
    let pki = Pki::new(KeyType::P256);
    let (fred, one) = (pki.serializer(&agent("fred")), pki.serializer(&mapper("one")));
    let (_, proof) = stored(&fred, &one, &register("fred"), at(1));
    let (_, other) = stored(&fred, &one, &ping("fred"), at(2));
    let refused = |proof: Proof| one.verify_proof(&Arc::new(proof), at(3)).unwrap_err().kind;

    let mut swapped = (*proof).clone();
    (swapped.salt, swapped.body) = (other.salt, other.body.clone());
    assert_eq!(refused(swapped), OpenErrorKind::CannotOpen, "the body of another message");
    let mut resalted = (*proof).clone();
    resalted.salt[0] ^= 1;
    assert_eq!(refused(resalted), OpenErrorKind::CannotOpen);
    for bit in 0..proof.body.len() * 8 {
        let mut changed = (*proof).clone();
        changed.body[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(refused(changed), OpenErrorKind::CannotOpen, "bit {bit} of the body");
    }
    for bit in 0..proof.signer_info.len() * 8 {
        let mut changed = (*proof).clone();
        changed.signer_info[bit / 8] ^= 1 << (bit % 8);
        assert!(one.verify_proof(&Arc::new(changed), at(3)).is_err(), "bit {bit} of the signature");
    }
    for length in 0..proof.signer_info.len() {
        let mut cut = (*proof).clone();
        cut.signer_info.truncate(length);
        assert_eq!(refused(cut), OpenErrorKind::Malformed);
    }
    let mut longer = (*proof).clone();
    longer.signer_info.push(0);
    assert_eq!(refused(longer), OpenErrorKind::Malformed);
    let mut huge = (*proof).clone();
    huge.body = vec![0; 512 * 1024];
    assert_eq!(refused(huge), OpenErrorKind::TooLarge);
    let mut many = (*proof).clone();
    many.certificates = vec![many.certificates[0].clone(); 5];
    assert_eq!(refused(many), OpenErrorKind::Malformed);
    let mut carrying = (*other).clone();
    carrying.certificates = proof.certificates.clone();
    assert_eq!(refused(carrying), OpenErrorKind::Malformed, "a heartbeat carries no certificates");
    assert!(one.verify_proof(&proof, at(3)).is_ok());
}

#[test]
fn n14_proof_with_an_instance_after_its_time_of_issue_is_rejected() {
    let pki = Pki::new(KeyType::P256);
    let one = pki.builder(&mapper("one")).dangerous().accept_signed_only().build().unwrap();
    // The largest instance would bar the agent in Redis for as long as the registration is stored.
    for (started, expected) in [
        (Timestamp::from_micros(u64::MAX), Err(OpenErrorKind::NotFresh)),
        (at(32), Err(OpenErrorKind::NotFresh)),
        (at(31), Ok(())),
    ] {
        let fred = pki.builder(&agent("fred")).started_at(started).dangerous().seal_signed_only().build().unwrap();
        let bytes = fred.seal(&ping("fred"), &SealRequest::new(&Audience::Mappers, at(1))).unwrap().bytes;
        let mut message = Der::parse(&bytes);
        let content = message.at(&[1, 0, 2, 1, 0]).leaf().clone();
        let last = message.at(&[1, 0]).children().len() - 1;
        let signer_info = message.at(&[1, 0, last, 0]).bytes();
        let proof = Proof::new(content[..32].try_into().unwrap(), content[64..].to_vec(), signer_info, Vec::new());
        let verified = one.verify_proof(&Arc::new(proof), at(2)).map(drop).map_err(|error| error.kind);
        assert_eq!(verified, expected, "{started}");
    }
}

#[test]
fn n14_proof_requires_a_trusted_signer() {
    let pki = Pki::new(KeyType::P256);
    let (fred, one) = (pki.serializer(&agent("fred")), pki.serializer(&mapper("one")));
    let (_, proof) = stored(&fred, &one, &register("fred"), at(1));
    let refused = |verifier: &SecureSerializer, now| verifier.verify_proof(&proof, now).unwrap_err().kind;
    let after_expiry = T0.saturating_add(CertificateAuthority::LEAF_VALID_FOR + Duration::from_secs(1));
    // The mapper's own certificate has expired too, but does not matter here.
    assert_eq!(refused(&one, after_expiry), OpenErrorKind::BadCertificate);
    assert_eq!(refused(&one, T0.saturating_sub(Duration::from_secs(40))), OpenErrorKind::NotFresh, "from the future");

    let others = Pki::new(KeyType::P256);
    assert_eq!(refused(&others.serializer(&mapper("one")), at(3)), OpenErrorKind::UnknownSigner);
    let empty = Arc::new(StaticCertificateStore::default());
    let knows_no_peer =
        SecureSerializer::builder(others.credentials(&mapper("one")), empty, others.ca.trust().unwrap());
    assert_eq!(refused(&knows_no_peer.build().unwrap(), at(3)), OpenErrorKind::UnknownSigner);
}

#[test]
fn n14_only_messages_from_agents_to_all_mappers_have_a_proof() {
    let pki = Pki::new(KeyType::P256);
    let (fred, one) = (pki.serializer(&agent("fred")), pki.serializer(&mapper("one")));
    // A message to a single mapper.
    let audience = Audience::One(mapper("one"));
    let sealed = fred.seal(&register("fred"), &SealRequest::new(&audience, at(1))).unwrap();
    let opened = one.open(&sealed.bytes, &OpenContext::new(InboundQueue::Presence, at(1))).unwrap();
    let proof = opened.signer().unwrap().proof().unwrap();
    assert_eq!(one.verify_proof(proof, at(1)).unwrap_err().kind, OpenErrorKind::WrongDestination);
    // A node that lets no agent register.
    let (_, proof) = stored(&fred, &one, &register("fred"), at(1));
    let strict = pki.builder(&mapper("strict")).authorize(|_, _, _| false).build().unwrap();
    assert_eq!(strict.verify_proof(&proof, at(1)).unwrap_err().kind, OpenErrorKind::NotAuthorized);
    // Plain formats have no proofs.
    assert!(PlainSerializer::json(mapper("m1")).verification().is_none());
}
