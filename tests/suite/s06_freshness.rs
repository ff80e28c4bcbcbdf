//! s06: a process accepts a message once, and for a limited time; refused messages are counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nanite::certs::KeyType;
use nanite::clock::Timestamp;
use nanite::packet::{MessageId, Outcome, Packet, Payload, Ping, Request, Status, Token};
use nanite::security::{ReplayLimits, SecureSerializer};
use nanite::serializer::{Audience, InboundQueue, MessageClass, OpenContext, OpenErrorKind, SealRequest, Serializer};

use crate::harness::pki::{Pki, agent, at, mapper};

fn request() -> Packet {
    Packet::Request(Request::new("/a/b".parse().unwrap(), Payload::from("x")))
}

fn outcome() -> Packet {
    let (token, results) = (Token::random().unwrap(), Payload::from("y"));
    Packet::Outcome(Outcome::new(token, mapper("m1"), agent("fred"), Ok(results)))
}

fn seal(from: &SecureSerializer, packet: &Packet, to: &Audience, now: Timestamp) -> Vec<u8> {
    from.seal(packet, &SealRequest::new(to, now)).unwrap().bytes
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

#[test]
fn s06_accepts_answer_to_own_message_despite_slow_clock() {
    let pki = Pki::new(KeyType::P256);
    let fred = pki.serializer(&agent("fred"));
    let m1 = pki.builder(&mapper("m1")).started_at(at(100)).build().unwrap();
    let asked = m1.seal(&request(), &SealRequest::new(&Audience::One(agent("fred")), at(100))).unwrap();
    // Fred's clock shows 100 ms before m1 started.
    let behind = at(100).saturating_sub(millis(100));
    let to_m1 = Audience::One(mapper("m1"));
    let answer = |in_reply_to| {
        let mut options = SealRequest::new(&to_m1, behind);
        options.in_reply_to = in_reply_to;
        fred.seal(&outcome(), &options).unwrap().bytes
    };
    let context = OpenContext::new(InboundQueue::MapperInbox, at(101));
    for in_reply_to in [None, Some(MessageId::from_bytes([7; 16]))] {
        assert_eq!(m1.open(&answer(in_reply_to), &context).unwrap_err().kind, OpenErrorKind::NotFresh);
    }
    let answered = answer(Some(asked.id));
    assert_eq!(m1.open(&answered, &context).unwrap().signer().unwrap().in_reply_to(), Some(asked.id));
    assert_eq!(m1.open(&answered, &context).unwrap_err().kind, OpenErrorKind::Replayed);
    // The next process did not send the message that it answers.
    let next = pki.builder(&mapper("m1")).started_at(at(102)).build().unwrap();
    let context = OpenContext::new(InboundQueue::MapperInbox, at(103));
    assert_eq!(next.open(&answered, &context).unwrap_err().kind, OpenErrorKind::NotFresh);
    assert_eq!((next.counters().opened(), next.counters().refused(OpenErrorKind::NotFresh)), (0, 1));
}

#[test]
fn s06_validity_limits_are_exact() {
    let pki = Pki::new(KeyType::P256);
    let m1 = pki.serializer(&mapper("m1"));
    let to = Audience::One(agent("fred"));
    let open = |instances: &[u64], issued: Timestamp, now: Timestamp| {
        let fred = pki.builder(&agent("fred")).started_at(at(1)).build().unwrap();
        let mut options = SealRequest::new(&to, issued);
        options.instances = instances;
        let bytes = m1.seal(&request(), &options).unwrap().bytes;
        let opened = fred.open(&bytes, &OpenContext::new(InboundQueue::AgentInbox, now));
        opened.map(|_| ()).map_err(|error| error.kind)
    };
    let opens = |issued: Timestamp, now: Timestamp| open(&[at(1).as_micros()], issued, now);
    let micro = Duration::from_micros(1);
    assert_eq!(opens(at(10), at(70)), Ok(()), "valid up to and including its last moment");
    assert_eq!(opens(at(10), at(70).saturating_add(micro)), Err(OpenErrorKind::NotFresh));
    assert_eq!(opens(at(40), at(10)), Ok(()), "30 s from the future");
    assert_eq!(opens(at(40).saturating_add(micro), at(10)), Err(OpenErrorKind::NotFresh));
    assert_eq!(
        opens(at(1).saturating_sub(micro), at(10)),
        Ok(()),
        "it names the process, so the sender's clock is behind"
    );
    assert_eq!(open(&[], at(31), at(31)), Ok(()), "issued 30 s after the process started");
    for early in [at(31).saturating_sub(micro), at(1), at(1).saturating_sub(micro)] {
        assert_eq!(open(&[], early, at(31)), Err(OpenErrorKind::NotFresh), "an earlier process may have opened it");
    }
}

#[test]
fn s06_lifetimes_are_limited_to_the_maximum() {
    let pki = Pki::new(KeyType::P256);
    let m1 = pki.serializer(&mapper("m1"));
    pki.credentials(&agent("fred"));
    let week = Duration::from_secs(7 * 24 * 3600);
    let (one, group) = (Audience::One(agent("fred")), Audience::Mappers);
    for (audience, class, asked, granted) in [
        (&one, MessageClass::Live, millis(1), millis(1)),
        (&one, MessageClass::Live, week, Duration::from_secs(60)),
        (&group, MessageClass::Stored, 2 * week, week),
    ] {
        let mut options = SealRequest::new(audience, at(1));
        (options.class, options.lifetime) = (class, asked);
        assert_eq!(m1.seal(&request(), &options).unwrap().expires_at, at(1).saturating_add(granted));
    }
    let mut options = SealRequest::new(&one, at(1));
    options.class = MessageClass::Stored;
    assert!(m1.seal(&request(), &options).is_err(), "class stored is only for the mappers");
}

#[test]
fn s06_concurrent_opens_accept_a_message_once() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred) = (pki.serializer(&mapper("m1")), pki.serializer(&agent("fred")));
    let bytes = seal(&m1, &request(), &Audience::One(agent("fred")), at(1));
    let opened = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| match fred.open(&bytes, &OpenContext::new(InboundQueue::AgentInbox, at(2))) {
                Ok(_) => drop(opened.fetch_add(1, Ordering::SeqCst)),
                Err(error) => assert_eq!(error.kind, OpenErrorKind::Replayed),
            });
        }
    });
    assert_eq!(opened.into_inner(), 1);
    assert_eq!((fred.counters().opened(), fred.counters().refused(OpenErrorKind::Replayed)), (1, 7));
}

#[test]
fn s06_full_replay_memory_refuses_until_entries_expire() {
    let pki = Pki::new(KeyType::P256);
    let mut limits = ReplayLimits::default();
    (limits.per_sender, limits.total, limits.senders) = (2, 3, 1);
    let m1 = pki.builder(&mapper("m1")).replay_limits(limits).build().unwrap();
    let senders = ["fred", "bob", "carl"].map(|name| pki.serializer(&agent(name)));
    let ask = |sender: usize, second: u64| {
        let bytes = seal(&senders[sender], &request(), &Audience::Mappers, at(second));
        m1.open(&bytes, &OpenContext::new(InboundQueue::Requests, at(second))).map(|_| ()).map_err(|error| error.kind)
    };
    assert_eq!([ask(0, 1), ask(0, 2)], [Ok(()), Ok(())]);
    assert_eq!(ask(0, 3), Err(OpenErrorKind::Replayed), "the limit of one sender");
    assert_eq!(ask(1, 3), Ok(()), "another sender still has room");
    assert_eq!(ask(2, 4), Err(OpenErrorKind::Replayed), "the total limit");
    assert_eq!(m1.remembered(), 3);
    // The last of them expires at 63 s, and is remembered for 30 s more, by which clocks may differ.
    assert_eq!(ask(2, 200), Ok(()));
    assert_eq!(m1.remembered(), 1);

    let ping = |sender: usize, second: u64| {
        let identity = senders[sender].identity().clone();
        let packet = Packet::Ping(Ping::new(identity, Status::new(0.5)));
        let bytes = seal(&senders[sender], &packet, &Audience::Mappers, at(second));
        m1.open(&bytes, &OpenContext::new(InboundQueue::Presence, at(second))).map(|_| ()).map_err(|error| error.kind)
    };
    assert_eq!([ping(0, 201), ping(0, 202)], [Ok(()), Ok(())]);
    assert_eq!(ping(1, 203), Err(OpenErrorKind::Replayed), "heartbeats have a limit as well");
    assert_eq!(ping(1, 400), Ok(()), "which frees space when the earlier heartbeats have expired");
}

#[test]
fn s06_refusals_are_counted_by_kind() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred) = (pki.serializer(&mapper("m1")), pki.serializer(&agent("fred")));
    let bytes = seal(&m1, &request(), &Audience::One(agent("fred")), at(1));
    let inbox = OpenContext::new(InboundQueue::AgentInbox, at(2));
    fred.open(&bytes, &inbox).unwrap();
    for _ in 0..3 {
        fred.open(&bytes, &inbox).unwrap_err();
    }
    for _ in 0..2 {
        fred.open(b"x", &inbox).unwrap_err();
    }
    fred.open(&bytes, &OpenContext::new(InboundQueue::AgentInbox, at(62))).unwrap_err();
    let counters = fred.counters();
    for kind in OpenErrorKind::ALL {
        let expected = match kind {
            OpenErrorKind::Replayed => 3,
            OpenErrorKind::Malformed => 2,
            OpenErrorKind::NotFresh => 1,
            _ => 0,
        };
        assert_eq!(counters.refused(kind), expected, "{kind}");
    }
    assert_eq!((counters.opened(), counters.refused_in_all(), m1.counters().sealed()), (1, 6, 1));
}
