//! s06: what the replay memory takes for each message, in bytes of resident memory.
//!
//! `cargo bench --bench replay` opens 200,000 messages in two parts, and prints what the process grew by.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::Arc;
use std::time::Duration;

use nanite::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
use nanite::clock::Timestamp;
use nanite::packet::{Identity, Packet, Payload, Request};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue, OpenContext, SealRequest, Serializer};

const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);
const PART: usize = 100_000;

/// Bytes that this process holds in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
}

fn main() {
    let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, NOW).unwrap();
    let issue = |identity| ca.issue(identity, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, NOW).unwrap();
    let (desk, fred) = (issue(&Identity::mapper("desk").unwrap()), issue(&Identity::agent("fred").unwrap()));
    let store = Arc::new(StaticCertificateStore::new([desk.certificate().clone(), fred.certificate().clone()]));
    let audience = Audience::One(fred.certificate().identity().clone());
    let serializer = |credentials| {
        let builder = SecureSerializer::builder(credentials, store.clone(), ca.trust().unwrap());
        builder.started_at(NOW.saturating_sub(Duration::from_secs(60))).build().unwrap()
    };
    let (from, to) = (serializer(desk), serializer(fred));
    let packet = Packet::Request(Request::new("/simple/echo".parse().unwrap(), Payload::default()));
    let (how, context) = (SealRequest::new(&audience, NOW), OpenContext::new(InboundQueue::AgentInbox, NOW));
    let mut before = resident();
    for _ in 0..2 {
        let known = to.remembered();
        for _ in 0..PART {
            to.open(&from.seal(&packet, &how).unwrap().bytes, &context).unwrap();
        }
        let (now, more) = (resident(), to.remembered() - known);
        assert_eq!(more, PART);
        println!(
            "{:>8} messages remembered: {:.0} bytes for each more",
            to.remembered(),
            (now - before) as f64 / more as f64
        );
        before = now;
    }
}
