//! What a node with a valid certificate can do: any header and any body, truly signed and encrypted. Nothing panics, and what is opened
//! is what this node may say, to whom it may say it.
//!
//! An input is a byte that chooses signer, honesty and protection, a header in DER, and the body.

use std::sync::{Arc, LazyLock};

use nanite::certs::Certificate;
use nanite::packet::Packet;
use nanite::security::{Header, SecureSerializer, fuzzing};
use nanite::serializer::{Audience, InboundQueue, MessageClass, OpenContext, OpenErrorKind, Serializer};

use super::der;
use super::world::{CHANNELS, START, world};

/// A header may lie about recipients and body.
const LIES: u8 = 0x08;
/// It is not encrypted.
const CLEAR: u8 = 0x10;
/// It is encrypted for two that it may or may not be for.
const OTHERS: u8 = 0x20;

static SIGNERS: LazyLock<Vec<SecureSerializer>> =
    LazyLock::new(|| world().nodes.iter().map(|node| world().serializer(node)).collect());

/// The target.
pub fn run(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else { return };
    let Some((_, body)) = der::content(rest) else { return };
    let Some(header) = fuzzing::header(&rest[..rest.len() - body.len()]) else { return };
    assert_eq!(fuzzing::header_der(&header).unwrap(), &rest[..rest.len() - body.len()], "one header in two encodings");
    let signer = &SIGNERS[usize::from(choice & 7) % SIGNERS.len()];
    let readers = world().readers(&header.to);
    let recipients: Vec<Arc<Certificate>> = match choice & OTHERS {
        0 => readers.iter().map(|node| node.certificate().clone()).collect(),
        _ => world().nodes.iter().rev().take(2).map(|node| node.certificate().clone()).collect(),
    };
    let recipients = (choice & CLEAR == 0).then_some(&recipients[..]).filter(|recipients| !recipients.is_empty());
    let honest = choice & LIES == 0;
    let Some(message) = fuzzing::seal(signer, header.clone(), body, recipients, honest) else { return };
    for node in readers.into_iter().take(2) {
        let reader = world().serializer(node);
        for channel in CHANNELS.into_iter().filter(|channel| channel.reader() == node.certificate().identity().role()) {
            let now = header.issued_at.max(START);
            let context = OpenContext::new(channel, now);
            let Ok(inbound) = reader.open(&message, &context) else { continue };
            assert!(honest, "recipients or body are not what the header says");
            let me = node.certificate().identity();
            let is_me = |recipient: &Arc<Certificate>| recipient.key_id() == node.certificate().key_id();
            assert!(recipients.is_none_or(|all| all.iter().any(is_me)), "opened by one that it was not encrypted for");
            assert!(matches!(&header.to, Audience::One(to) if to == me) || !matches!(header.to, Audience::One(_)));
            check(&header, &inbound.packet, channel, recipients.is_some());
            let verified = inbound.signer().unwrap();
            assert_eq!(verified.signer(), signer.identity(), "another signer");
            assert_eq!(verified.signer(), &header.from);
            let again = reader.open(&message, &context);
            let replayed = again.is_err_and(|error| error.kind == OpenErrorKind::Replayed);
            assert!(replayed || channel == InboundQueue::Offline, "opened twice");
            break;
        }
    }
}

/// What holds for everything that is opened.
fn check(header: &Header, packet: &Packet, channel: InboundQueue, encrypted: bool) {
    let kind = packet.kind();
    assert_eq!(kind, header.kind);
    assert!(channel.permits(header.from.role(), kind), "its sender may not send it here");
    assert!(packet.claimed_sender().is_none_or(|sender| *sender == header.from), "in another's name");
    assert_eq!(
        encrypted,
        kind != nanite::packet::Kind::Advertise,
        "a message in the clear, or an advertise that is not"
    );
    let lifetime = header.expires_at.since(header.issued_at).as_secs();
    match header.class {
        MessageClass::Live => assert!(lifetime <= 60 && header.issued_at >= START, "too long, or before the start"),
        MessageClass::Stored => assert!(lifetime <= 7 * 24 * 3600 && header.to == Audience::Mappers),
    }
    assert!(header.issued_at <= header.expires_at);
    assert!(channel != InboundQueue::Offline || header.class == MessageClass::Stored);
    let instance = match packet {
        Packet::Register(register) => register.instance,
        Packet::Ping(ping) => ping.instance,
        _ => None,
    };
    assert!(instance.is_none_or(|instance| instance == header.instance), "another process");
}
