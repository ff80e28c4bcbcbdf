//! s10: attacks with certificates: unknown, expired, of another CA, sent along with a message.

use std::sync::Arc;
use std::time::Duration;

use nanite::certs::{
    Certificate, CertificateStore, KeyType, Recipient, RecipientQuery, SignerQuery, StoreError, Trust,
};
use nanite::security::SecureSerializer;
use nanite::serializer::OpenErrorKind::*;
use nanite::serializer::{
    Audience, InboundQueue, OpenContext, Proof, Provenance, SealRequest, Serializer, Verification,
};

use crate::harness::attack::{World, ping, refused_by, register, request};
use crate::harness::pki::{Peers, Pki, STARTED, agent, at, mapper};
use crate::harness::tamper::{Der, Forged, field};

#[test]
fn s10_rejects_unknown_peers() {
    let world = World::new();
    let peers = Arc::new(Peers::default());
    let builder = SecureSerializer::builder(world.credentials("fred"), peers.clone(), world.pki.ca.trust().unwrap())
        .started_at(STARTED);
    let fred = builder.build().unwrap();
    refused_by(&fred, &world.message, InboundQueue::AgentInbox, at(11), UnknownSigner);
    peers.put(world.credentials("m1").certificate());
    fred.open(&world.message, &OpenContext::new(InboundQueue::AgentInbox, at(11))).unwrap();
}

#[test]
fn s10_rejects_invalid_certificates() {
    let world = World::new();
    // m1's certificate is known, but has expired.
    let late = at(31 * 24 * 3600);
    let key = world.credentials("m1");
    let mut forged = world.forged();
    for (index, seconds) in [(field::ISSUED_AT, 0), (field::EXPIRES_AT, 60)] {
        let time = late.saturating_add(Duration::from_secs(seconds)).as_micros().to_be_bytes();
        *forged.header.at(&[index]).leaf() = time.iter().copied().skip_while(|byte| *byte == 0).collect();
    }
    refused_by(&world.fred, &forged.signed_by(&key), InboundQueue::AgentInbox, late, BadCertificate);
    // A node does not use its own expired certificate.
    let late_seal = world.m1.seal(&request(), &SealRequest::new(&Audience::One(agent("fred")), late));
    assert!(late_seal.unwrap_err().to_string().contains("own certificate"));

    // The store knows a certificate of another CA.
    let other = Pki::new(KeyType::P256);
    let stranger = other.credentials(&mapper("m1"));
    world.pki.peers.put(stranger.certificate());
    world.refused(&world.forged().signed_by(&stranger), BadCertificate);

    // A store that returns m2's certificate for m1.
    #[derive(Debug)]
    struct WrongStore(Arc<Certificate>);
    impl CertificateStore for WrongStore {
        fn signer(&self, _: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
            Ok(Some(self.0.clone()))
        }
        fn recipients(&self, _: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
            Ok(vec![self.0.clone()])
        }
    }
    let m2 = world.credentials("m2");
    let store = Arc::new(WrongStore(m2.certificate().clone()));
    let builder =
        SecureSerializer::builder(world.credentials("fred"), store, world.pki.ca.trust().unwrap()).started_at(STARTED);
    let fred = builder.build().unwrap();
    refused_by(&fred, &world.forged().signed_by(&m2), InboundQueue::AgentInbox, at(11), BadCertificate);
    let ping = fred.seal(&ping("fred"), &SealRequest::new(&Audience::One(mapper("m1")), at(1)));
    assert!(
        matches!(ping, Err(nanite::serializer::SealError::NoRecipient(_))),
        "encrypted for a certificate of another identity"
    );
    world.unharmed();
}

/// A store that returns whichever certificate was sent along.
#[derive(Debug)]
struct TrustingStore;

impl CertificateStore for TrustingStore {
    fn signer(&self, query: &SignerQuery<'_>) -> Result<Option<Arc<Certificate>>, StoreError> {
        Ok(query.presented.cloned())
    }

    fn recipients(&self, query: &RecipientQuery<'_>) -> Result<Vec<Arc<Certificate>>, StoreError> {
        let Recipient::One(identity) = query.recipient else { return Ok(Vec::new()) };
        Err(StoreError::Other(format!("no certificate of {identity}")))
    }
}

#[test]
fn s10_rejects_untrusted_embedded_certificate() {
    let world = World::new();
    let other = Pki::new(KeyType::P256);
    other.peers.put(world.credentials("m1").certificate());
    let options = SealRequest::new(&Audience::Mappers, at(10));
    // This fred has a certificate of the other CA, but trusts m1's CA, so that it can seal for m1.
    let forger = SecureSerializer::builder(
        other.credentials(&agent("fred")),
        world.pki.peers.clone(),
        world.pki.ca.trust().unwrap(),
    );
    let bytes = forger.started_at(STARTED).build().unwrap().seal(&register("fred"), &options).unwrap().bytes;
    refused_by(&world.m1, &bytes, InboundQueue::Presence, at(11), UnknownSigner);
    let with_trusting_store = |trust: &Pki| {
        SecureSerializer::builder(world.credentials("m1"), Arc::new(TrustingStore), trust.ca.trust().unwrap())
            .started_at(STARTED)
            .build()
            .unwrap()
    };
    refused_by(&with_trusting_store(&world.pki), &bytes, InboundQueue::Presence, at(11), BadCertificate);
    with_trusting_store(&other).open(&bytes, &OpenContext::new(InboundQueue::Presence, at(11))).unwrap();
    assert!(world.pki.peers.learned.lock().unwrap().is_empty(), "the certificate was learned");

    // A certificate in a message of a kind that carries none.
    let mut forged = world.forged();
    let certificate = Der::parse(world.credentials("m1").certificate().der());
    forged.signed().children().insert(3, Der::Node(0xa0, vec![certificate]));
    world.refused(&forged.signed_by(&world.credentials("m1")), Malformed);
    world.unharmed();
}

#[test]
fn s10_rejects_malformed_certificate_sets() {
    let world = World::new();
    let fred = world.credentials("fred");
    let options = SealRequest::new(&Audience::Mappers, at(10));
    let sealed = world.fred.seal(&register("fred"), &options).unwrap().bytes;
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
        ("an empty set", vec![], Malformed),
        ("the same twice", vec![own.clone(), own.clone()], Malformed),
        ("not in DER order", backwards, Malformed),
        ("five", sorted([vec![own.clone()], others.to_vec()].concat()), Malformed),
        ("not a certificate", vec![Der::Leaf(4, vec![1])], Malformed),
        ("an attribute certificate", vec![Der::Node(0xa2, vec![])], Malformed),
        ("a SEQUENCE that is not a certificate", vec![Der::Node(0x30, vec![])], BadCertificate),
        ("another node's, without the signer's", others[..1].to_vec(), BadCertificate),
    ] {
        let error = world.m1.open(&with(certificates), &OpenContext::new(InboundQueue::Presence, at(11))).unwrap_err();
        assert_eq!(error.kind, kind, "{what}: {error}");
    }
    world.m1.open(&with(vec![own]), &OpenContext::new(InboundQueue::Presence, at(11))).unwrap();
}

/// The broker can add certificates to a message: they are not signed.
#[test]
fn s10_rejects_unreadable_extra_certificate_also_when_the_verdict_is_remembered() {
    let world = World::new();
    let m1 = world.credentials("m1");
    let extra = |seconds, extra: Option<Der>| {
        let options = SealRequest::new(&Audience::Mappers, at(seconds));
        let mut forged = Forged::new(&world.fred.seal(&register("fred"), &options).unwrap().bytes);
        forged.signed().at(&[3]).children().extend(extra);
        forged.signed().at(&[3]).children().sort_by_key(Der::bytes);
        forged.bytes()
    };
    let junk = || Some(Der::Node(0x30, vec![Der::Leaf(2, vec![1])]));
    let ca = Der::parse(&world.pki.ca.certificate().to_der().unwrap());
    for (what, trust) in [("CA", world.pki.ca.trust().unwrap()), ("pinned", Trust::pinned())] {
        let builder = SecureSerializer::builder(m1.clone(), world.pki.peers.clone(), trust);
        let reader = builder.started_at(STARTED).build().unwrap();
        let open = |bytes: &[u8]| reader.open(bytes, &OpenContext::new(InboundQueue::Presence, at(15))).map(drop);
        for seconds in [10, 12] {
            let error = open(&extra(seconds, junk())).unwrap_err();
            assert_eq!(error.kind, BadCertificate, "{what}: {error}");
            assert!(error.to_string().contains("another certificate in the message cannot be read"), "{what}: {error}");
            // From here on, the verdict about fred's certificate is remembered.
            open(&extra(seconds + 1, Some(ca.clone()))).unwrap();
        }
        // The same for the proof of a heartbeat, as another mapper gets it.
        let inbound = reader.open(&extra(14, None), &OpenContext::new(InboundQueue::Presence, at(15))).unwrap();
        let Provenance::Verified(verified) = &inbound.provenance else { panic!("{inbound:?}") };
        let proof = verified.proof().unwrap().clone();
        reader.verify_proof(&proof, at(15)).unwrap();
        let mut more = Proof::clone(&proof);
        more.certificates.push(junk().unwrap().bytes());
        let error = reader.verify_proof(&Arc::new(more), at(15)).unwrap_err();
        assert_eq!(error.kind, BadCertificate, "{what}: {error}");
    }
}
