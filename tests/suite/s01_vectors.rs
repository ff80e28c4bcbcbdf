//! s01, s10: messages in files (`tests/vectors/envelope`), made by an independent writer: valid ones of each kind and suite, and invalid
//! ones with one fault each. Each file gets a new reader.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nanite::certs::{Certificate, Credentials, PrivateKey, Trust};
use nanite::clock::Timestamp;
use nanite::packet::Packet;
use nanite::security::{SecureSerializer, inspect};
use nanite::serializer::{Codec, InboundQueue, Json, OpenContext, OpenErrorKind, Serializer};
use serde::Deserialize;

use crate::harness::pki::Peers;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    started_at: u64,
    messages: Vec<Message>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    file: PathBuf,
    what: String,
    reader: String,
    channel: String,
    now: u64,
    expect: String,
    packet: Option<serde_json::Value>,
}

fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/envelope")
}

fn index() -> Index {
    serde_json::from_slice(&fs::read(vectors().join("index.json")).unwrap()).unwrap()
}

fn pem(name: &str) -> Vec<u8> {
    fs::read(vectors().join("pki").join(name)).unwrap()
}

fn certificate(name: &str) -> Arc<Certificate> {
    Arc::new(Certificate::from_pem(&pem(&format!("{name}.pem"))).unwrap())
}

fn reader(name: &str, started_at: u64) -> SecureSerializer {
    let peers = Peers::default();
    for name in ["m1", "m2", "fred", "bob", "rsa-m3", "rsa-carl", "stranger"] {
        peers.put(&certificate(name));
    }
    let key = PrivateKey::from_pem(&pem(&format!("{name}-key.pem")), None).unwrap();
    let credentials = Credentials::new(certificate(name), key).unwrap();
    let trust = Trust::from_pem(&pem("ca.pem")).unwrap();
    let builder = SecureSerializer::builder(credentials, Arc::new(peers), trust);
    builder.started_at(Timestamp::from_secs(started_at)).build().unwrap()
}

fn channel(name: &str) -> InboundQueue {
    match name {
        "agent-inbox" => InboundQueue::AgentInbox,
        "agent-control" => InboundQueue::AgentControl,
        "mapper-inbox" => InboundQueue::MapperInbox,
        "presence" => InboundQueue::Presence,
        "requests" => InboundQueue::Requests,
        "offline" => InboundQueue::Offline,
        other => panic!("unknown channel {other}"),
    }
}

#[test]
fn s01_s10_vectors_give_the_expected_result() {
    let index = index();
    let mut wrong = Vec::new();
    for message in &index.messages {
        let bytes = fs::read(vectors().join("messages").join(&message.file)).unwrap();
        let reader = reader(&message.reader, index.started_at);
        let now = Timestamp::from_secs(message.now);
        let opened = reader.open(&bytes, &OpenContext::new(channel(&message.channel), now));
        let found = match &opened {
            Ok(_) => "opened".to_owned(),
            Err(error) => error.kind.to_string(),
        };
        if found != message.expect {
            let why = opened.as_ref().err().map(ToString::to_string);
            wrong.push(format!("{}: {}: {why:?}", message.file.display(), message.what));
            continue;
        }
        // A message that is refused for its bytes alone cannot be inspected either.
        let by_bytes = matches!(&*message.expect, "Malformed" | "TooLarge");
        let inspected = inspect(&bytes);
        assert!(!by_bytes || inspected.is_err(), "{}", message.what);
        if let Ok(inbound) = opened {
            let packet: Packet = Json.decode(message.packet.as_ref().unwrap().to_string().as_bytes()).unwrap();
            assert_eq!(inbound.packet, packet, "{}", message.what);
            assert_eq!(inspected.unwrap().header.id, inbound.signer().unwrap().id());
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn s01_s10_vectors_cover_every_kind_and_every_step() {
    let index = index();
    let files: BTreeSet<_> = index.messages.iter().map(|message| message.file.clone()).collect();
    let existing: BTreeSet<_> = fs::read_dir(vectors().join("messages"))
        .unwrap()
        .map(|entry| PathBuf::from(entry.unwrap().file_name()))
        .collect();
    assert_eq!(files, existing);
    assert_eq!(files.len(), index.messages.len());
    for kind in nanite::packet::Kind::ALL {
        for suite in ["p256", "rsa"] {
            assert!(files.contains(Path::new(&format!("good-{suite}-{}.der", kind.as_str()))), "{suite} {kind:?}");
        }
    }
    // A replay needs two openings of one file: `s10_rejects_replay`.
    for kind in OpenErrorKind::ALL.into_iter().filter(|kind| *kind != OpenErrorKind::Replayed) {
        assert!(index.messages.iter().any(|message| message.expect == kind.as_str()), "{kind}");
    }
}
