//! s06: a message that one process has opened is opened by no other process of the same node, started before or after, also when the
//! sender's clock is ahead; and nodes that have just started work with each other at once.

use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Actor, Agent, actor};
use nanite::certs::KeyType;
use nanite::clock::{Clock, ManualClock, SystemClock, Timestamp};
use nanite::link::{Link, Outbound};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, Identity, Packet, Payload, Ping, Register, Request, Status, Token};
use nanite::proxy::MapperProxy;
use nanite::security::{CONTENT_TYPE, SecureSerializer};
use nanite::serializer::{Audience, InboundQueue, OpenContext, OpenErrorKind, SealRequest, Serializer, Verification};
use nanite::transport::{Destination, PublishRequest, Transport, topology};
use tokio::sync::mpsc;

use crate::harness::broker::Broker;
use crate::harness::pki::{Pki, agent, at, mapper};
use crate::harness::system::{System, start, wait_until_known};
use crate::harness::{WAIT_TIMEOUT, wait_until};

/// How far the sender's clock may be ahead.
const LEAD: u64 = 30;

fn request() -> Packet {
    let request = Request::new("/count/up".parse().unwrap(), Payload::from("x"));
    Packet::Request(request.with_token(Token::random().unwrap()))
}

fn seal(from: &SecureSerializer, packet: &Packet, to: &Audience, instances: &[u64], now: Timestamp) -> Vec<u8> {
    let mut options = SealRequest::new(to, now);
    options.instances = instances;
    from.seal(packet, &options).unwrap().bytes
}

#[test]
fn s06_replayed_message_is_opened_by_no_later_process_within_the_senders_clock_lead() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred) = (mapper("m1"), agent("fred"));
    let (by_mapper, by_agent) = (pki.serializer(&m1), pki.serializer(&fred));
    let register = Packet::Register(Register::new(fred.clone(), ["/count/up".parse().unwrap()]));
    let (to_fred, to_mappers) = (Audience::One(fred.clone()), Audience::Mappers);
    let start = |node: &Identity, second: u64| pki.builder(node).started_at(at(second)).build().unwrap();
    for (from, packet, to, reader, queue) in [
        (&by_mapper, request(), &to_fred, &fred, InboundQueue::AgentInbox),
        (&by_agent, request(), &to_mappers, &m1, InboundQueue::Requests),
        (&by_agent, register, &to_mappers, &m1, InboundQueue::Presence),
    ] {
        // The time is 60 s, the sender's clock shows 90 s.
        let (now, ahead) = (60, at(60 + LEAD));
        let first = start(reader, 50);
        let named = seal(from, &packet, to, &[first.instance()], ahead);
        // A first process that has run for long enough opens what does not name it.
        let unnamed = seal(from, &packet, to, &[], at(50 + LEAD));
        for message in [&named, &unnamed] {
            first.open(message, &OpenContext::new(queue, at(now + LEAD))).unwrap();
        }
        for second in now + 1..=now + 2 * LEAD {
            let later = start(reader, second);
            for message in [&named, &unnamed] {
                let refused = later.open(message, &OpenContext::new(queue, at(second))).unwrap_err();
                let expected = match (to, message == &named) {
                    (Audience::One(_), true) if at(second) <= ahead => OpenErrorKind::WrongDestination,
                    _ => OpenErrorKind::NotFresh,
                };
                assert_eq!(refused.kind, expected, "{queue:?}, a process that started at {second}: {refused}");
            }
        }
    }
}

#[test]
fn s06_message_for_one_of_two_processes_is_opened_by_that_one_only() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred, bob) = (pki.serializer(&mapper("m1")), agent("fred"), agent("bob"));
    let start = |node: &Identity, second: u64| pki.builder(node).started_at(at(second)).build().unwrap();
    let (older, newer, other) = (start(&fred, 0), start(&fred, 1), start(&bob, 2));
    let inbox = OpenContext::new(InboundQueue::AgentInbox, at(100));
    let both = Audience::Many(vec![fred.clone(), bob]);
    for to in [Audience::One(fred.clone()), both] {
        let instances = |of_fred: &SecureSerializer| match &to {
            Audience::One(_) => vec![of_fred.instance()],
            _ => vec![of_fred.instance(), other.instance()],
        };
        let for_newer = seal(&m1, &request(), &to, &instances(&newer), at(100));
        let refused = older.open(&for_newer, &inbox).unwrap_err();
        assert_eq!((refused.kind, refused.for_others), (OpenErrorKind::WrongDestination, true));
        newer.open(&for_newer, &inbox).unwrap();
        // The older process ends, or has ended: the newer one does not return its messages to the queue.
        let for_older = seal(&m1, &request(), &to, &instances(&older), at(100));
        let refused = newer.open(&for_older, &inbox).unwrap_err();
        // Of several nodes, it cannot know whose process is newer.
        let may_be_newer = matches!(to, Audience::Many(_));
        assert_eq!((refused.kind, refused.for_others), (OpenErrorKind::WrongDestination, may_be_newer));
        older.open(&for_older, &inbox).unwrap();
    }
    // Where the processes of some nodes are not known, the time decides.
    let both = Audience::Many(vec![fred, agent("bob")]);
    let partly = seal(&m1, &request(), &both, &[other.instance()], at(100));
    older.open(&partly, &inbox).unwrap();
    // A sender that may send nothing here gets nothing returned to the queue.
    let strict = pki.builder(&agent("fred")).authorize(|_, _, _| false).build().unwrap();
    let for_newer = seal(&m1, &request(), &Audience::One(agent("fred")), &[newer.instance()], at(100));
    let refused = strict.open(&for_newer, &inbox).unwrap_err();
    assert_eq!((refused.kind, refused.for_others), (OpenErrorKind::NotAuthorized, false));
}

#[test]
fn s06_largest_instance_number_does_not_bar_the_node() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred) = (pki.serializer(&mapper("m1")), agent("fred"));
    let ping = Packet::Ping(Ping::new(fred.clone(), Status::new(0.5)));
    let (presence, to) = (|second| OpenContext::new(InboundQueue::Presence, at(second)), Audience::Mappers);
    let micro = Duration::from_micros(1);
    for liar in [Timestamp::from_micros(u64::MAX), at(10 + LEAD).saturating_add(micro)] {
        let liar = pki.builder(&fred).started_at(liar).build().unwrap();
        let refused = m1.open(&seal(&liar, &ping, &to, &[], at(10)), &presence(10)).unwrap_err();
        assert_eq!(refused.kind, OpenErrorKind::NotFresh);
    }
    // The honest process is heard, also after a message with the largest instance that is possible.
    let honest = pki.builder(&fred).started_at(at(5)).build().unwrap();
    m1.open(&seal(&honest, &ping, &to, &[], at(10)), &presence(10)).unwrap();
    let ahead = pki.builder(&fred).started_at(at(10 + LEAD)).build().unwrap();
    m1.open(&seal(&ahead, &ping, &to, &[], at(10)), &presence(10)).unwrap();
    let restarted = pki.builder(&fred).started_at(at(10 + LEAD).saturating_add(micro)).build().unwrap();
    m1.open(&seal(&restarted, &ping, &to, &[], at(11 + LEAD)), &presence(11 + LEAD)).unwrap();
}

#[test]
fn s06_replaced_certificate_forgets_the_order_of_the_old_one() {
    let pki = Pki::new(KeyType::P256);
    let (m1, fred) = (pki.serializer(&mapper("m1")), agent("fred"));
    let ping = Packet::Ping(Ping::new(fred.clone(), Status::new(0.5)));
    let valid = nanite::certs::CertificateAuthority::LEAF_VALID_FOR;
    let new = pki.ca.issue(&fred, KeyType::P256, valid, at(20)).unwrap();
    pki.peers.put(new.certificate());
    let old = pki.credentials(&fred);
    let process = |credentials, second| pki.builder_for(credentials).started_at(at(second)).build().unwrap();
    let (honest, thief, renewed) = (process(old.clone(), 1), process(old, 19), process(new, 1));
    let open = |from: &SecureSerializer, second| {
        let bytes = seal(from, &ping, &Audience::Mappers, &[], at(second));
        m1.open(&bytes, &OpenContext::new(InboundQueue::Presence, at(second))).map(drop).map_err(|error| error.kind)
    };
    assert_eq!(open(&honest, 20), Ok(()));
    assert_eq!(open(&thief, 21), Ok(()), "a process with a stolen key");
    assert_eq!(open(&honest, 22), Err(OpenErrorKind::Replayed), "the newest process wins");
    assert_eq!(open(&renewed, 23), Ok(()), "the same process with a new certificate");
    assert_eq!(open(&honest, 24), Err(OpenErrorKind::Replayed));
    assert_eq!(open(&thief, 25), Ok(()), "the old certificate is still valid, but bars the new one no more");
    assert_eq!(open(&renewed, 26), Ok(()));
}

/// Counts the requests that it has handled.
fn counter(node: &'static str, done: &mpsc::UnboundedSender<&'static str>) -> impl Actor + use<> {
    let done = done.clone();
    actor("count").expose("up", move |_: Payload| {
        let done = done.clone();
        async move {
            done.send(node).unwrap();
            Ok::<_, Failure>(node)
        }
    })
}

/// Puts a message into a queue, as the broker could.
async fn inject(transport: &dyn Transport, queue: &str, body: &[u8], content_type: &str) {
    let message = PublishRequest::new(Destination::queue(queue), body.to_vec()).content_type(content_type);
    transport.publish(message, WAIT_TIMEOUT).await.unwrap();
}

fn refusals(agent: &Agent, kind: OpenErrorKind) -> u64 {
    agent.refusals().into_iter().find(|(found, _)| *found == kind).unwrap().1
}

#[tokio::test]
async fn s06_replayed_request_is_executed_by_no_restarted_agent_when_the_senders_clock_is_ahead() {
    let system = System::secure();
    let (done, mut counted) = mpsc::unbounded_channel();
    let first = start(system.agent("fred").actor(counter("first", &done))).await;
    let m1 = system.started_mapper("m1").await;
    wait_until_known(&m1, &["fred"]).await;
    let instance = m1.agents().await.unwrap()[0].instance;
    // The requests of a mapper whose clock is ahead, for a known process and for none.
    let by_mapper = system.serializer(&mapper("m2"));
    let ahead = SystemClock.now().saturating_add(Duration::from_secs(LEAD - 1));
    let to = Audience::One(agent("fred"));
    let sealed = |instances: &[u64]| {
        let mut options = SealRequest::new(&to, ahead);
        options.instances = instances;
        by_mapper.seal(&request(), &options).unwrap().bytes
    };
    let (named, unnamed) = (sealed(&[instance]), sealed(&[]));
    let inbox = topology::agent_inbox_name("nanite-fred");
    let broker = system.connect();
    inject(&*broker, &inbox, &named, CONTENT_TYPE).await;
    assert_eq!(counted.recv().await, Some("first"));
    first.stop().await.unwrap();
    let mut known = instance;
    for _ in 0..3 {
        let later = start(system.agent("fred").actor(counter("later", &done))).await;
        // A message that a stopped process had not acknowledged yet arrives once more.
        inject(&*broker, &inbox, &named, CONTENT_TYPE).await;
        wait_until("it is for another process", async || refusals(&later, OpenErrorKind::WrongDestination) > 0).await;
        inject(&*broker, &inbox, &unnamed, CONTENT_TYPE).await;
        wait_until("it may have been opened before", async || refusals(&later, OpenErrorKind::NotFresh) > 0).await;
        // What it executes is what comes after them.
        let registered =
            async || m1.agents().await.unwrap().iter().map(|record| record.instance).find(|it| *it != known);
        wait_until("the mapper knows the process", async || registered().await.is_some()).await;
        known = registered().await.unwrap();
        m1.request("/count/up", "x").await.unwrap();
        assert_eq!(counted.recv().await, Some("later"));
        assert!(counted.try_recv().is_err(), "a replayed request was executed");
        later.stop().await.unwrap();
    }
    assert!(counted.try_recv().is_err());
}

#[tokio::test]
async fn s06_request_for_the_newer_of_two_processes_is_returned_to_the_queue_by_the_older() {
    let system = System::secure();
    let (done, mut counted) = mpsc::unbounded_channel();
    let older = start(system.agent("fred").actor(counter("older", &done)).ping_time(WAIT_TIMEOUT)).await;
    let newer = system.serializer(&agent("fred"));
    let instance = newer.verification().unwrap().instance();
    let by_mapper = system.serializer(&mapper("m1"));
    let to = Audience::One(agent("fred"));
    let mut options = SealRequest::new(&to, SystemClock.now());
    let instances = [instance];
    options.instances = &instances;
    let bytes = by_mapper.seal(&request(), &options).unwrap().bytes;
    let inbox = topology::agent_inbox_name("nanite-fred");
    inject(&*system.connect(), &inbox, &bytes, CONTENT_TYPE).await;
    wait_until("the older one refuses it", async || refusals(&older, OpenErrorKind::WrongDestination) > 1).await;
    assert!(counted.try_recv().is_err());
    let newer = Agent::builder(newer, system.connect()).actor(counter("newer", &done)).ping_time(WAIT_TIMEOUT);
    let newer = start(newer).await;
    assert_eq!(counted.recv().await, Some("newer"));
    let again = refusals(&older, OpenErrorKind::WrongDestination);
    assert!(again < 200, "returned {again} times: a hot loop");
    newer.stop().await.unwrap();
    older.stop().await.unwrap();
}

#[tokio::test]
async fn s10_message_with_another_content_type_is_refused() {
    let system = System::secure();
    let (done, mut counted) = mpsc::unbounded_channel();
    let fred = start(system.agent("fred").actor(counter("fred", &done))).await;
    let m1 = system.started_mapper("m1").await;
    wait_until_known(&m1, &["fred"]).await;
    let instances = [m1.agents().await.unwrap()[0].instance];
    let to = Audience::One(agent("fred"));
    let mut options = SealRequest::new(&to, SystemClock.now());
    options.instances = &instances;
    let bytes = system.serializer(&mapper("m2")).seal(&request(), &options).unwrap().bytes;
    let inbox = topology::agent_inbox_name("nanite-fred");
    for (number, other) in [(1, "application/vnd.nanite.json"), (2, "")] {
        inject(&*system.connect(), &inbox, &bytes, other).await;
        wait_until("it is refused", async || refusals(&fred, OpenErrorKind::Unsupported) == number).await;
    }
    assert!(counted.try_recv().is_err());
    inject(&*system.connect(), &inbox, &bytes, CONTENT_TYPE).await;
    assert_eq!(counted.recv().await, Some("fred"));
    fred.stop().await.unwrap();
}

#[test]
fn s10_message_for_other_mappers_from_an_unauthorized_sender_is_not_returned_to_the_queue() {
    let pki = Pki::new(KeyType::P256);
    let fred = pki.serializer(&agent("fred"));
    pki.credentials(&mapper("m2"));
    // fred does not know m1 yet.
    let bytes = seal(&fred, &request(), &Audience::Mappers, &[], at(1));
    let context = OpenContext::new(InboundQueue::Requests, at(1));
    for (authorized, expected) in
        [(true, (OpenErrorKind::CannotOpen, true)), (false, (OpenErrorKind::NotAuthorized, false))]
    {
        let m1 = pki.builder(&mapper("m1")).authorize(move |_, _, _| authorized).build().unwrap();
        let refused = m1.open(&bytes, &context).unwrap_err();
        assert_eq!((refused.kind, refused.for_others), expected);
    }
}

/// A new mapper, a new agent and a new proxy: each has started before the others know of it.
async fn works_at_once(system: &System, connect: impl AsyncFn() -> Arc<dyn Transport>) {
    let (done, mut counted) = mpsc::unbounded_channel();
    let proxy = MapperProxy::builder(system.serializer(&agent("asker")), connect().await).start().await.unwrap();
    let fred = Agent::builder(system.serializer(&agent("fred")), connect().await).actor(counter("fred", &done));
    let fred = fred.ping_time(WAIT_TIMEOUT).start().await.unwrap();
    let m1 = Mapper::builder(system.serializer(&mapper("m1")), connect().await).start().await.unwrap();
    wait_until_known(&m1, &["fred"]).await;
    // An agent that starts after the mapper.
    let bob = Agent::builder(system.serializer(&agent("bob")), connect().await).actor(counter("bob", &done));
    let bob = bob.ping_time(WAIT_TIMEOUT).start().await.unwrap();
    wait_until_known(&m1, &["bob", "fred"]).await;
    let started = SystemClock.now();
    for target in ["fred", "bob"].map(agent) {
        let answers = proxy.request("/count/up", "x").target(target.clone()).await.unwrap();
        assert_eq!(answers.outcomes.len(), 1);
        assert_eq!(answers.outcomes[&target], Ok(Payload::from(target.name())));
        let counted = counted.recv().await.unwrap();
        assert_eq!(counted, target.name());
    }
    let many: Vec<_> = (0..20)
        .map(|_| {
            let proxy = proxy.clone();
            async move { proxy.push("/count/up", "x").await }
        })
        .collect();
    for sent in futures_util::future::join_all(many).await {
        sent.unwrap();
    }
    // A second new mapper: some of the requests reach it.
    let m2 = Mapper::builder(system.serializer(&mapper("m2")), connect().await).start().await.unwrap();
    wait_until_known(&m2, &["bob", "fred"]).await;
    let more: Vec<_> = (0..20)
        .map(|_| {
            let proxy = proxy.clone();
            async move { proxy.request("/count/up", "x").await }
        })
        .collect();
    for answers in futures_util::future::join_all(more).await {
        assert_eq!(answers.unwrap().results().count(), 1);
    }
    for _ in 0..40 {
        tokio::time::timeout(WAIT_TIMEOUT, counted.recv()).await.unwrap().unwrap();
    }
    assert!(
        SystemClock.now().since(started) < Duration::from_secs(LEAD),
        "it waited until the mapper accepts everything"
    );
    assert!(counted.try_recv().is_err(), "each is done once");
    for mapper in [&m1, &m2] {
        let refused: Vec<_> = mapper.refusals().into_iter().filter(|(_, count)| *count > 0).collect();
        assert!(refused.is_empty(), "normal operation is not counted as refusals: {refused:?}");
    }
    fred.stop().await.unwrap();
    bob.stop().await.unwrap();
}

#[tokio::test]
async fn s06_new_mapper_agent_and_proxy_work_at_once() {
    let system = System::secure();
    // The mappers must be known to seal for them.
    for name in ["m1", "m2"] {
        system.serializer(&mapper(name));
    }
    works_at_once(&system, async || system.connect() as Arc<dyn Transport>).await;
}

#[tokio::test]
async fn s06_new_mapper_agent_and_proxy_work_at_once_with_rabbitmq() {
    let system = System::secure();
    for name in ["m1", "m2"] {
        system.serializer(&mapper(name));
    }
    let broker = Broker::shared();
    works_at_once(&system, async || Arc::new(broker.connect().await) as Arc<dyn Transport>).await;
}

#[tokio::test]
async fn s06_request_of_a_fast_clock_that_names_no_process_is_refused_by_a_new_mapper_and_asked_for_again() {
    let system = System::secure();
    let m1 = system.started_mapper("m1").await;
    let clock = ManualClock::new(SystemClock.now().saturating_add(Duration::from_secs(LEAD - 1)));
    let link = Link::builder(system.serializer(&agent("asker")), system.connect()).clock(clock).build();
    let control = topology::agent_control("nanite-asker", link.instance());
    let mut answers = link.subscribe(&control, InboundQueue::AgentControl, 10).await.unwrap();
    let send = || link.send(Outbound::new(request(), Audience::Mappers), Destination::queue(topology::REQUEST));
    let asked = send().await.unwrap();
    let advertise = answers.next().await.unwrap().accept().await;
    assert!(matches!(advertise.packet, Packet::Advertise(_)));
    assert_eq!(advertise.signer().unwrap().in_reply_to(), Some(asked));
    // It is known now, so the next request names it.
    send().await.unwrap();
    let outcome = answers.next().await.unwrap().accept().await;
    assert!(matches!(outcome.packet, Packet::Outcome(_)), "{:?}", outcome.packet);
    drop(m1);
}
