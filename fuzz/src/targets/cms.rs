//! The strict CMS parser against OpenSSL's: a message of the right structure is CMS to OpenSSL too, to the byte; both agree on every
//! signature; and what one decrypts, the other decrypts. Each input is checked unchanged, and again with a valid signature of a known node, so
//! that mutations behind the signature check are reached.

use std::sync::LazyLock;

use nanite::certs::{Credentials, Suite};
use nanite::packet::{Kind, Packet};
use nanite::security::{Inspection, fuzzing, fuzzing::Shape, inspect};
use nanite::serializer::{
    Codec, InboundQueue, Json, MessageClass, MsgPack, OpenContext, OpenError, OpenErrorKind, Serializer,
};
use openssl::cms::{CMSOptions, CmsContentInfo};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Padding;
use openssl::sha::sha256;
use openssl::sign::{RsaPssSaltlen, Signer};
use openssl::stack::Stack;
use openssl::x509::X509;
use openssl::x509::store::{X509Store, X509StoreBuilder};

use super::der::{Der, encoded};
use super::world::{CHANNELS, START, world};

/// id-ct-authEnvelopedData.
const AUTH_ENVELOPED: [u8; 13] = [0x06, 0x0b, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x10, 0x01, 0x17];
/// messageDigest.
const MESSAGE_DIGEST: [u8; 9] = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x04];

/// The keys of the nodes, in the order of `World::nodes`, as OpenSSL keys.
static KEYS: LazyLock<Vec<PKey<Private>>> = LazyLock::new(|| {
    let pem = |node: &Credentials| node.key().to_pem().unwrap();
    world().nodes.iter().map(|node| PKey::private_key_from_pem(&pem(node)).unwrap()).collect()
});

/// A store without certificates: only signatures are verified here, not chains.
static EMPTY_STORE: LazyLock<X509Store> = LazyLock::new(|| X509StoreBuilder::new().unwrap().build());

/// The target.
pub fn run(data: &[u8]) {
    let Some(shape) = fuzzing::shape(data) else { return };
    compare(data, &shape);
    let signed = signed_again(data, &shape);
    compare(&signed, &fuzzing::shape(&signed).expect("the structure is lost by signing"));
}

fn compare(data: &[u8], shape: &Shape) {
    // Our parser accepts any SEQUENCE as a certificate until it needs it; OpenSSL parses all.
    let is_certificate = |der: &Vec<u8>| X509::from_der(der).is_ok_and(|x509| x509.to_der().unwrap() == *der);
    if !shape.certificates.iter().all(is_certificate) {
        drop(ErrorStack::get());
        return;
    }
    let mut cms = CmsContentInfo::from_der(data).expect("OpenSSL cannot parse it");
    assert_eq!(cms.to_der().unwrap(), data, "OpenSSL encodes it differently");
    let enveloped = shape.recipients.map(|count| {
        let bytes = encoded(0x30, &[&AUTH_ENVELOPED[..], &encoded(0xa0, &shape.content)].concat());
        let enveloped = CmsContentInfo::from_der(&bytes).expect("OpenSSL cannot parse the content");
        assert_eq!(enveloped.to_der().unwrap(), bytes, "OpenSSL encodes the content differently");
        let content = Der::one(&shape.content).unwrap();
        assert_eq!(content.inside()[1].inside().len(), count, "the number of recipients differs");
        enveloped
    });

    let Ok(inspection) = inspect(data) else { return };
    let Some((reader, opened)) = open(data, &inspection) else { return };
    let verified_here = match &opened {
        Ok(_) => true,
        Err(error) if error.kind == OpenErrorKind::BadSignature => false,
        Err(error) if error.kind > OpenErrorKind::BadSignature => true,
        Err(_) => return,
    };
    // OpenSSL chooses the algorithm by the key alone; here the suite in the message must be that of the key.
    let signer = world().nodes.iter().find(|node| *node.certificate().key_id() == inspection.signer);
    if signer.is_none_or(|node| node.certificate().suite() != inspection.suite) {
        assert!(!verified_here, "verified with another suite than the signer's");
        return;
    }
    let content = verify(&mut cms);
    assert_eq!(
        content.is_some(),
        verified_here,
        "OpenSSL and nanite disagree on the signature: {:?}",
        opened.as_ref().err()
    );
    assert!(content.is_none_or(|content| content == shape.content), "the signed content differs");
    if let (true, Some(enveloped)) = (verified_here, enveloped) {
        compare_decrypted(&enveloped, &inspection, reader, &opened);
    }
}

fn compare_decrypted(
    enveloped: &CmsContentInfo,
    inspection: &Inspection,
    reader: usize,
    opened: &Result<Packet, OpenError>,
) {
    let certificate = world().nodes[reader].certificate().x509().to_owned();
    let plaintext = enveloped.decrypt(&KEYS[reader], &certificate);
    drop(ErrorStack::get());
    let good = plaintext.ok().filter(|plaintext| is_bound(plaintext, inspection));
    match opened {
        Ok(packet) => {
            let plaintext = good.expect("OpenSSL does not decrypt it, or the header differs");
            let codec: &dyn Codec = if inspection.header.codec == "json" { &Json } else { &MsgPack };
            assert_eq!(codec.decode(&plaintext[64..]).unwrap(), *packet);
        }
        // OpenSSL accepts an RSA ciphertext of any length; here it must be as long as the modulus (RFC 8017, section 7.1.2).
        Err(error) if error.kind == OpenErrorKind::CannotOpen => {
            let is_rsa = world().nodes[reader].key().suite() == Suite::Rsa;
            assert!(is_rsa || good.is_none(), "OpenSSL decrypts it: {error}");
        }
        Err(error) if error.kind == OpenErrorKind::BadBody => {
            assert!(good.is_some(), "OpenSSL does not decrypt it: {error}")
        }
        Err(_) => {}
    }
}

/// Whether the plaintext matches the digests in the header.
fn is_bound(plaintext: &[u8], inspection: &Inspection) -> bool {
    let header = &inspection.header;
    let Some((prefix, body)) = plaintext.split_at_checked(64) else { return false };
    let mut ids: Vec<&[u8]> = inspection.recipients.iter().map(|(id, _)| id.as_bytes()).collect();
    ids.sort_unstable();
    let ids: Vec<u8> = ids.into_iter().flat_map(|id| [&[id.len() as u8], id].concat()).collect();
    prefix[32..] == sha256(&fuzzing::header_der(header).unwrap())
        && header.commitment == sha256(&[b"nanite/2 commitment", &prefix[..32], body].concat())
        && header.recipients == sha256(&ids)
}

/// Opens the message as its first receiver would, if it has one: the index of that node, and the result.
fn open(data: &[u8], inspection: &Inspection) -> Option<(usize, Result<Packet, OpenError>)> {
    let header = &inspection.header;
    let node = *world().readers(&header.to).first()?;
    let index = world().nodes.iter().position(|other| std::ptr::eq(other, node))?;
    let fits = |channel: &InboundQueue| {
        channel.reader() == node.certificate().identity().role()
            && channel.accepts(header.kind)
            && (*channel == InboundQueue::Offline) == (header.class == MessageClass::Stored)
    };
    let channel = CHANNELS.into_iter().find(fits)?;
    let context = OpenContext::new(channel, header.issued_at.max(START));
    let opened = world().serializer(node).open(data, &context);
    assert!(opened.is_err() || inspection.header.kind == Kind::Advertise || !inspection.recipients.is_empty());
    Some((index, opened.map(|inbound| inbound.packet)))
}

/// The content, if OpenSSL verifies the signature of one of the nodes.
fn verify(cms: &mut CmsContentInfo) -> Option<Vec<u8>> {
    let mut certificates = Stack::new().unwrap();
    for node in &world().nodes {
        certificates.push(node.certificate().x509().to_owned()).unwrap();
    }
    let mut content = Vec::new();
    let flags = CMSOptions::NO_SIGNER_CERT_VERIFY | CMSOptions::NOINTERN | CMSOptions::BINARY;
    let verified = cms.verify(Some(&certificates), Some(&EMPTY_STORE), None, Some(&mut content), flags);
    drop(ErrorStack::get());
    verified.is_ok().then_some(content)
}

/// The same message with the correct digest and a signature of the node that it names, or of the first node if it names none.
fn signed_again(data: &[u8], shape: &Shape) -> Vec<u8> {
    let mut message = Der::one(data).expect("cannot be split");
    assert_eq!(message.bytes(), data, "is not DER");
    let known = world().nodes.iter().position(|node| node.certificate().key_id().as_bytes() == shape.key_id);
    let index = known.unwrap_or(0);
    let signed = message.at(&[1, 0]).unwrap();
    let last = signed.inside().len() - 1;
    let info = signed.at(&[last, 0]).unwrap();
    let key_id = world().nodes[index].certificate().key_id().as_bytes().to_vec();
    *info.at(&[1]).unwrap() = Der::Leaf(0x80, key_id);
    let attributes = info.at(&[3]).unwrap();
    for at in 0..attributes.inside().len() {
        if matches!(attributes.at(&[at, 0]), Some(Der::Leaf(_, oid)) if *oid == MESSAGE_DIGEST) {
            *attributes.at(&[at, 1, 0]).unwrap() = Der::Leaf(0x04, sha256(&shape.content).to_vec());
        }
    }
    let Der::Node(_, _, values) = attributes.clone() else { panic!("no attributes") };
    let signature = sign(index, &Der::Node(0x31, Vec::new(), values).bytes());
    *info.at(&[5]).unwrap() = Der::Leaf(0x04, signature);
    message.bytes()
}

fn sign(index: usize, data: &[u8]) -> Vec<u8> {
    let mut signer = Signer::new(MessageDigest::sha256(), &KEYS[index]).unwrap();
    if world().nodes[index].key().suite() == Suite::Rsa {
        signer.set_rsa_padding(Padding::PKCS1_PSS).unwrap();
        signer.set_rsa_pss_saltlen(RsaPssSaltlen::custom(32)).unwrap();
    }
    signer.sign_oneshot_to_vec(data).unwrap()
}
