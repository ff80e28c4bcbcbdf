//! Any bytes, and mutated messages, through the steps of opening: nothing panics, and a message that opens is exactly what a known node has
//! signed.
//!
//! The bytes may differ where the signature does not cover them: other carried certificates, or SHA-256 with and without NULL.

use std::sync::LazyLock;

use nanite::certs::Suite;
use nanite::packet::Packet;
use nanite::security::{Header, Inspection, SecureSerializer, fuzzing, inspect};
use nanite::serializer::{Codec, InboundQueue, Json, OpenContext, OpenErrorKind, Serializer};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::rsa::Padding;
use openssl::sha::sha256;
use openssl::sign::{RsaPssSaltlen, Verifier};

use super::der::{Der, content};
use super::world::{CHANNELS, NOW, START, read, root, world};

/// The attribute types messageDigest and header.
const MESSAGE_DIGEST: [u8; 9] = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x04];
const HEADER: [u8; 10] = [0x2b, 0x06, 0x01, 0x04, 0x01, 0x81, 0xfd, 0x59, 0x02, 0x01];

/// A message that a node really signed.
#[derive(Clone)]
struct Original {
    header: Header,
    /// The digest of the signed content.
    digest: Vec<u8>,
    signer: Vec<u8>,
    /// The packet, if a reader can open it.
    packet: Option<Packet>,
}

static ORIGINALS: LazyLock<Vec<Original>> = LazyLock::new(originals);
static READER: LazyLock<SecureSerializer> = LazyLock::new(|| world().serializer(&world().nodes[2]));

/// The target.
pub fn run(data: &[u8]) {
    match inspect(data) {
        Err(error) => {
            // The first three steps do not depend on the reader, except for the size limit of its queue.
            let refused = READER.open(data, &OpenContext::new(InboundQueue::AgentInbox, NOW)).unwrap_err();
            let same = refused.kind == error.kind || refused.kind == OpenErrorKind::TooLarge;
            assert!(same, "refused as {refused}, inspected as {error}");
        }
        Ok(inspection) => {
            for node in world().readers(&inspection.header.to).into_iter().take(2) {
                let role = node.certificate().identity().role();
                for channel in CHANNELS.into_iter().filter(|channel| channel.reader() == role) {
                    let reader = world().serializer(node);
                    open(&reader, data, &inspection, channel);
                }
            }
        }
    }
}

fn open(reader: &SecureSerializer, data: &[u8], inspection: &Inspection, channel: InboundQueue) {
    let header = &inspection.header;
    // At the time when it was issued, and at the fixed time.
    for now in [header.issued_at.max(START), NOW] {
        let context = OpenContext::new(channel, now);
        let Ok(inbound) = reader.open(data, &context) else { continue };
        let shape = fuzzing::shape(data).expect("opened, but has another structure");
        let mut originals = ORIGINALS.iter().filter(|original| original.header == *header);
        let original = originals.find(|original| original.digest == sha256(&shape.content));
        let original = original.expect("opened a message that no node sealed");
        assert_eq!(shape.key_id, original.signer, "another signer");
        if let Some(packet) = &original.packet {
            assert_eq!(inbound.packet, *packet, "not the packet that was signed");
        }
        let signer = inbound.signer().expect("opened, but not verified");
        assert_eq!((signer.signer(), signer.id()), (&header.from, header.id));
        let again = reader.open(data, &context);
        let replayed = again.is_err_and(|error| error.kind == OpenErrorKind::Replayed);
        assert!(replayed || channel == InboundQueue::Offline, "opened twice");
        return;
    }
}

/// All that the nodes have signed in the vectors and in our own seeds. Includes the invalid messages: their fault may be outside the signed
/// part.
fn originals() -> Vec<Original> {
    let folder = root().join("tests/vectors/envelope");
    let index: serde_json::Value = serde_json::from_slice(&read("tests/vectors/envelope/index.json")).unwrap();
    let mut all = Vec::new();
    for message in index["messages"].as_array().unwrap() {
        let bytes = std::fs::read(folder.join("messages").join(message["file"].as_str().unwrap())).unwrap();
        let packet = message.get("packet").filter(|packet| !packet.is_null());
        let packet = packet.map(|packet| Json.decode(packet.to_string().as_bytes()).unwrap());
        signed(&Der::all(&bytes).0, &packet, &mut all);
    }
    for entry in std::fs::read_dir(root().join("fuzz/seeds/envelope")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("ours-") {
            signed(&Der::all(&std::fs::read(path).unwrap()).0, &None, &mut all);
        }
    }
    assert!(all.len() > 50, "only {} messages are signed", all.len());
    all
}

/// Finds every SignerInfo with a header and a valid signature of one of the nodes.
fn signed(values: &[Der], packet: &Option<Packet>, found: &mut Vec<Original>) {
    for value in values {
        if let [_, Der::Leaf(_, signer), _, Der::Node(0xa0, _, attributes), _, signature, ..] = value.inside() {
            let (header, digest) = (attribute(attributes, &HEADER), attribute(attributes, &MESSAGE_DIGEST));
            let header = header.and_then(|bytes| fuzzing::header(&bytes));
            if let (Some(header), Some(digest), true) = (header, digest, is_signed(signer, attributes, signature)) {
                found.push(Original { header, digest, signer: signer.clone(), packet: packet.clone() });
            }
        }
        signed(value.inside(), packet, found);
    }
}

/// The content of the value of an attribute.
fn attribute(attributes: &[Der], wanted: &[u8]) -> Option<Vec<u8>> {
    let mut attributes = attributes.iter().map(Der::inside);
    let value = attributes.find_map(|attribute| match attribute {
        [Der::Leaf(0x06, name), Der::Node(_, _, values)] if name == wanted => values.first(),
        _ => None,
    });
    value.and_then(|value| Some(content(&value.bytes())?.0.to_vec()))
}

fn is_signed(signer: &[u8], attributes: &[Der], signature: &Der) -> bool {
    let node = world().nodes.iter().find(|node| node.certificate().key_id().as_bytes() == signer);
    let Some((node, signature)) = node.zip(content(&signature.bytes()).map(|(content, _)| content.to_vec())) else {
        return false;
    };
    let mut verifier = Verifier::new(MessageDigest::sha256(), node.certificate().public_key()).unwrap();
    if node.key().suite() == Suite::Rsa {
        verifier.set_rsa_padding(Padding::PKCS1_PSS).unwrap();
        verifier.set_rsa_pss_saltlen(RsaPssSaltlen::custom(32)).unwrap();
    }
    let good = verifier.verify_oneshot(&signature, &Der::Node(0x31, Vec::new(), attributes.to_vec()).bytes());
    drop(ErrorStack::get());
    good.unwrap_or(false)
}
