//! s10: messages with other algorithms, or with changed cryptographic values, although an honest key signed them.

use nanite::certs::KeyType;
use nanite::serializer::OpenErrorKind::*;
use nanite::serializer::{InboundQueue, OpenContext, Serializer};

use crate::harness::attack::{World, request};
use crate::harness::pki::at;
use crate::harness::tamper::{Der, Forged};

#[test]
fn s10_rejects_other_algorithms() {
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
        // dhSinglePass-stdDH-sha1kdf-scheme, OpenSSL's default.
        let sha1_kdf = [0x2b, 0x81, 0x05, 0x10, 0x86, 0x48, 0x3f, 0x00, 0x02];
        forged.content.at(&[1, 0]).replace(&[0x2b, 0x81, 0x04, 0x01, 0x0b, 0x01], &sha1_kdf);
    });
    refused("a tag of 12 bytes, explicit", &|forged| *forged.content.at(&[2, 1, 1, 1]).leaf() = vec![12]);
    refused("a tag of 12 bytes, by default", &|forged| {
        forged.content.at(&[2, 1, 1]).children().pop();
    });
    world.unharmed();
}

#[test]
fn s10_rejects_suite_other_than_the_certificates() {
    // An ECDSA signature labelled as RSA, and the reverse.
    let (elliptic, rsa) = (World::new(), World::with(KeyType::Rsa2048));
    let algorithm = |world: &World| world.forged().signer().at(&[4]).clone();
    for (world, other) in [(&elliptic, &rsa), (&rsa, &elliptic)] {
        let mut forged = world.forged();
        *forged.signer().at(&[4]) = algorithm(other);
        world.refused(&forged.signed_by(&world.credentials("m1")), BadSignature);
        world.unharmed();
    }
    // PKCS#1 v1.5 key transport in place of OAEP.
    let rsa = World::with(KeyType::Rsa2048);
    let mut forged = rsa.forged();
    let pkcs1 =
        Der::Node(0x30, vec![Der::Leaf(6, vec![0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1]), Der::Leaf(5, vec![])]);
    *forged.content.at(&[1, 0, 2]) = pkcs1;
    rsa.refused(&forged.signed_by(&rsa.credentials("m1")), Unsupported);
    rsa.unharmed();
}

#[test]
fn s10_rejects_shortened_tag_or_nonce() {
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
fn s10_rejects_changed_ciphertext_tag_and_keys_even_if_signed() {
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
    // A point that is not on the curve, and other encodings of points.
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
