//! s10: no input panics, and only sealed messages open, bit for bit. The second form that every ECDSA signature has is a replay of the
//! same message.

use nanite::certs::KeyType;
use nanite::packet::{Packet, Payload, Register, Request, Status};
use nanite::security::{SecureSerializer, inspect};
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenErrorKind, SealRequest, Serializer};
use openssl::bn::{BigNum, BigNumContext};
use openssl::ec::EcGroup;
use openssl::ecdsa::EcdsaSig;
use openssl::nid::Nid;
use proptest::prelude::*;

use crate::harness::pki::{Pki, agent, at, mapper};
use crate::harness::tamper::Forged;

/// A reader, and a message that it opens.
struct Case {
    reader: SecureSerializer,
    channel: InboundQueue,
    message: Vec<u8>,
}

impl Case {
    fn request(key_type: KeyType) -> Self {
        let pki = Pki::new(key_type);
        let reader = pki.serializer(&agent("fred"));
        let packet = Packet::Request(Request::new("/a/b".parse().unwrap(), Payload::from("x")));
        let audience = Audience::One(agent("fred"));
        let message = pki.serializer(&mapper("m1")).seal(&packet, &SealRequest::new(&audience, at(1))).unwrap().bytes;
        Self { reader, channel: InboundQueue::AgentInbox, message }
    }

    fn register() -> Self {
        let pki = Pki::new(KeyType::P256);
        let reader = pki.serializer(&mapper("m1"));
        let (services, status) = (vec!["/a/b".parse().unwrap()], Status::new(0.5));
        let register = Register::new(agent("fred"), services).with_status(status);
        let how = SealRequest::new(&Audience::Mappers, at(1));
        let message = pki.serializer(&agent("fred")).seal(&register.into(), &how).unwrap().bytes;
        Self { reader, channel: InboundQueue::Presence, message }
    }

    fn opens(&self, bytes: &[u8]) -> bool {
        let _ = inspect(bytes);
        self.reader.open(bytes, &OpenContext::new(self.channel, at(2))).is_ok()
    }

    /// Flips every `step`th bit, one at a time: no such message opens. The unchanged message opens at the end.
    fn flip_bits(&self, step: usize) {
        for bit in (0..self.message.len() * 8).step_by(step) {
            let mut changed = self.message.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!self.opens(&changed), "with bit {bit} flipped");
        }
        assert!(self.opens(&self.message));
        assert_eq!(self.reader.counters().opened(), 1);
    }
}

#[test]
fn s10_rejects_every_single_bit_flip() {
    Case::request(KeyType::P256).flip_bits(1);
    // An odd step reaches every position within a byte.
    Case::register().flip_bits(5);
    Case::request(KeyType::Rsa2048).flip_bits(5);
}

#[test]
fn s10_rejects_random_bytes_without_panic() {
    let case = Case::request(KeyType::P256);
    proptest!(ProptestConfig::with_cases(2_000), |(bytes in proptest::collection::vec(any::<u8>(), 0..600))| {
        prop_assert!(!case.opens(&bytes));
    });
    assert!(case.opens(&case.message));
}

#[test]
fn s10_rejects_random_changes_without_panic() {
    let case = Case::register();
    let length = case.message.len();
    proptest!(ProptestConfig::with_cases(2_000), |(
        start in 0..length,
        removed in 0..64_usize,
        new in proptest::collection::vec(any::<u8>(), 0..64),
    )| {
        let mut changed = case.message.clone();
        changed.splice(start..(start + removed).min(length), new);
        prop_assume!(changed != case.message);
        prop_assert!(!case.opens(&changed));
    });
    assert!(case.opens(&case.message));
}

#[test]
fn s10_rejects_second_form_of_ecdsa_signature_as_replay() {
    let case = Case::request(KeyType::P256);
    let mut forged = Forged::new(&case.message);
    let bytes = forged.signer().at(&[5]).leaf();
    let signature = EcdsaSig::from_der(bytes).unwrap();
    let (mut order, mut context) = (BigNum::new().unwrap(), BigNumContext::new().unwrap());
    EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap().order(&mut order, &mut context).unwrap();
    let (r, s) = (signature.r().to_owned().unwrap(), &order - signature.s());
    *bytes = EcdsaSig::from_private_components(r, s).unwrap().to_der().unwrap();
    let second = forged.bytes();
    assert_ne!(second, case.message);
    assert!(case.opens(&second), "the second form is a valid signature too");
    assert!(!case.opens(&case.message) && !case.opens(&second));
    let counters = case.reader.counters();
    assert_eq!((counters.opened(), counters.refused(OpenErrorKind::Replayed)), (1, 2));
}
