//! Attacks by a node with a valid certificate: any header and any body, correctly signed and encrypted. Nothing panics, and a message that
//! opens is one that this node may send to that receiver.
//!
//! An input is a byte that selects signer, honesty and protection, then a header in DER, then the body.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nanite::certs::Certificate;
use nanite::packet::{Kind, Packet};
use nanite::security::{Header, SecureSerializer, fuzzing};
use nanite::serializer::{Audience, InboundQueue, MessageClass, OpenContext, OpenErrorKind, Serializer};

use super::der;
use super::world::{CHANNELS, START, world};

/// The header may have wrong digests of recipients and body.
const DISHONEST: u8 = 0x08;
/// The message is not encrypted.
const UNENCRYPTED: u8 = 0x10;
/// The message is encrypted for two nodes, whether they are its receivers or not.
const OTHER_RECIPIENTS: u8 = 0x20;

static SIGNERS: LazyLock<Vec<SecureSerializer>> =
    LazyLock::new(|| world().nodes.iter().map(|node| world().serializer(node)).collect());

/// The target.
pub fn run(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else { return };
    let Some((_, body)) = der::content(rest) else { return };
    let Some(header) = fuzzing::header(&rest[..rest.len() - body.len()]) else { return };
    assert_eq!(
        fuzzing::header_der(&header).unwrap(),
        &rest[..rest.len() - body.len()],
        "a header with a second encoding"
    );
    let signer = &SIGNERS[usize::from(choice & 7) % SIGNERS.len()];
    let readers = world().readers(&header.to);
    let recipients: Vec<Arc<Certificate>> = match choice & OTHER_RECIPIENTS {
        0 => readers.iter().map(|node| node.certificate().clone()).collect(),
        _ => world().nodes.iter().rev().take(2).map(|node| node.certificate().clone()).collect(),
    };
    let recipients = (choice & UNENCRYPTED == 0).then_some(&recipients[..]).filter(|recipients| !recipients.is_empty());
    let honest = choice & DISHONEST == 0;
    let Some(message) = fuzzing::seal(signer, header.clone(), body, recipients, honest) else { return };
    for node in readers.into_iter().take(2) {
        let reader = world().serializer(node);
        for channel in CHANNELS.into_iter().filter(|channel| channel.reader() == node.certificate().identity().role()) {
            let now = header.issued_at.max(START);
            let context = OpenContext::new(channel, now);
            let Ok(inbound) = reader.open(&message, &context) else { continue };
            assert!(honest, "recipients or body do not match the header");
            let me = node.certificate().identity();
            let is_me = |recipient: &Arc<Certificate>| recipient.key_id() == node.certificate().key_id();
            assert!(recipients.is_none_or(|all| all.iter().any(is_me)), "opened by a node that is not a recipient");
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

/// Checks what must be true of every opened message.
fn check(header: &Header, packet: &Packet, channel: InboundQueue, encrypted: bool) {
    let kind = packet.kind();
    assert_eq!(kind, header.kind);
    assert!(channel.permits(header.from.role(), kind), "the sender may not send it to this queue");
    assert!(packet.claimed_sender().is_none_or(|sender| *sender == header.from), "in the name of another node");
    assert_eq!(encrypted, kind != Kind::Advertise, "unencrypted, or an encrypted advertise");
    let lifetime = header.expires_at.since(header.issued_at).as_secs();
    match header.class {
        MessageClass::Live => {
            let named = header.instances.contains(&START.as_micros());
            let nodes = match &header.to {
                Audience::One(_) => 1,
                Audience::Many(many) => many.len(),
                _ => usize::MAX,
            };
            assert!(named || header.instances.len() < nodes, "for another process");
            let may_repeat = matches!(kind, Kind::Ping | Kind::Unregister | Kind::Advertise);
            let margin = Duration::from_secs(if may_repeat { 0 } else { 30 });
            let late_enough = named || header.issued_at >= START.saturating_add(margin);
            assert!(lifetime <= 60 && late_enough, "lifetime too long, or issued before the start");
        }
        MessageClass::Stored => assert!(lifetime <= 7 * 24 * 3600 && header.to == Audience::Mappers),
    }
    assert!(header.issued_at <= header.expires_at);
    let latest = header.issued_at.saturating_add(Duration::from_secs(30)).as_micros();
    assert!(header.instance <= latest, "the sender started after it issued the message");
    assert!(channel != InboundQueue::Offline || header.class == MessageClass::Stored);
    let instance = match packet {
        Packet::Register(register) => register.instance,
        Packet::Ping(ping) => ping.instance,
        _ => None,
    };
    assert!(instance.is_none_or(|instance| instance == header.instance), "another process");
}
