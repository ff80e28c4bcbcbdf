//! s10: whatever bytes come, nothing panics; and no message is opened that is not one that was sealed: bit for bit, but for the second
//! form that every elliptic signature has, which makes no second message.

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

/// A reader, and a message that it would open.
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

    /// Flips every `step`th bit, each alone; the message itself is opened in the end.
    fn flip(&self, step: usize) {
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
fn s10_no_message_opens_with_one_bit_flipped() {
    Case::request(KeyType::P256).flip(1);
    // Odd steps meet every position within a byte.
    Case::register().flip(5);
    Case::request(KeyType::Rsa2048).flip(5);
}

#[test]
fn s10_any_bytes_are_refused_without_a_panic() {
    let case = Case::request(KeyType::P256);
    proptest!(ProptestConfig::with_cases(2_000), |(bytes in proptest::collection::vec(any::<u8>(), 0..600))| {
        prop_assert!(!case.opens(&bytes));
    });
    assert!(case.opens(&case.message));
}

#[test]
fn s10_any_change_of_a_message_is_refused_without_a_panic() {
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
fn s10_the_second_form_of_a_signature_makes_no_second_message() {
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
    assert!(case.opens(&second), "it is a signature of the same over the same");
    assert!(!case.opens(&case.message) && !case.opens(&second));
    let counters = case.reader.counters();
    assert_eq!((counters.opened(), counters.refused(OpenErrorKind::Replayed)), (1, 2));
}
