//! Requests and answers when mappers, brokers and agents misbehave: a request that comes again runs once, a refused answer costs nothing,
//! and only the process that was asked can answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nanite::agent::{Actor, Agent, Context, actor, reply};
use nanite::certs::KeyType;
use nanite::clock::{Clock, SystemClock};
use nanite::link::{Link, Outbound};
use nanite::mapper::Mapper;
use nanite::packet::{
    Failure, FailureCode, Identity, MessageId, Outcome, Packet, Payload, Register, Request, Status, Token,
};
use nanite::policy::{Caller, Decision, Policy};
use nanite::request::RequestError;
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue};
use nanite::transport::{AmqpOptions, AmqpTransport, Destination, topology};
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};

use crate::harness::broker::Broker;
use crate::harness::counting::Counting;
use crate::harness::hostile_mapper::{HostileMapper, Taken};
use crate::harness::pki::{Pki, agent, mapper};
use crate::harness::proxy::Proxy;
use crate::harness::system::{System, start, wait_until_known};
use crate::harness::{WAIT_TIMEOUT, wait_until};

/// A service that counts its calls, says so, and waits until the test lets it end.
struct Work {
    calls: Arc<AtomicUsize>,
    begun: mpsc::UnboundedReceiver<()>,
    gate: Arc<Semaphore>,
}

impl Work {
    fn new() -> (impl Actor, Self) {
        let (calls, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let (begins, begun) = mpsc::unbounded_channel();
        let (counted, waits) = (calls.clone(), gate.clone());
        let work = actor("work").expose("do", move |(): (), context: Context| {
            let number = counted.fetch_add(1, Ordering::SeqCst);
            begins.send(()).unwrap();
            let waits = waits.clone();
            async move {
                context.emit("begun", number).await?;
                waits.acquire().await?.forget();
                context.emit("ending", number).await?;
                reply(number)
            }
        });
        (work, Self { calls, begun, gate })
    }

    async fn begun(&mut self) {
        tokio::time::timeout(WAIT_TIMEOUT, self.begun.recv()).await.expect("the handler begins").unwrap();
    }

    fn end(&self) {
        self.gate.add_permits(1);
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

/// A request of the same node as another, as a mapper takes it.
fn taken(like: &Taken, token: Token) -> Taken {
    let request = Request::new("/work/do".parse().unwrap(), Payload::default()).with_token(token);
    Taken { request, signer: like.signer.clone() }
}

/// The outcome in what arrives next, after intermediate results.
async fn outcome(mapper: &mut HostileMapper) -> Outcome {
    loop {
        if let Packet::Outcome(outcome) = mapper.answered().await.inbound.packet {
            return outcome;
        }
    }
}

#[tokio::test]
async fn s18_proxied_request_that_several_mappers_send_runs_once() {
    let system = System::settled();
    let (work, mut job) = Work::new();
    let fred = agent("fred");
    let _fred = start(system.agent("fred").actor(work)).await;
    let boss = start(system.agent("boss")).await;
    let mut m1 = HostileMapper::start(&system, "m1").await;
    let events = boss.proxy().request("/work/do", ()).events().await.unwrap();
    let request = m1.take().await;
    let mut m2 = HostileMapper::start(&system, "m2").await;
    let again = taken(&request, request.request.token.unwrap());

    // The second delivery joins the running job.
    m1.send(&fred, m1.honest(&request)).await;
    job.begun().await;
    assert!(matches!(m1.answered().await.inbound.packet, Packet::Intermediate(_)));
    m2.send(&fred, m2.honest(&again)).await;
    system.waiting(topology::agent_inbox_name("nanite-fred").as_str(), 0).await;
    // A push after it begins: the second delivery was handled.
    let other = m2.honest(&taken(&request, Token::random().unwrap()));
    m2.link
        .send(Outbound::new(Packet::Push(other), fred.clone()), Destination::Queue("nanite-fred".into()))
        .await
        .unwrap();
    job.begun().await;
    assert_eq!(job.calls(), 2, "the request and the push");
    job.gate.add_permits(2);
    let (first, second) = (outcome(&mut m1).await, outcome(&mut m2).await);
    assert_eq!((&first.results, &second.results), (&json!(0).into(), &json!(0).into()));
    assert_eq!(first.request_origin, second.request_origin);
    assert_ne!(first.token, second.token, "each under the mapper's own token");

    // A third delivery gets the result that is known.
    m2.send(&fred, m2.honest(&again)).await;
    assert_eq!(outcome(&mut m2).await.results, json!(0).into());
    assert_eq!(job.calls(), 2);
    // The same token with another payload is another request, and its own answer.
    let mut different = m2.honest(&again);
    different.payload = json!(7).into();
    m2.send(&fred, different).await;
    assert_eq!(outcome(&mut m2).await.failure.unwrap().code, FailureCode::BadPayload);
    drop(events);
}

/// Two mappers, an agent and a node that asks, over RabbitMQ. The first mapper is connected through a proxy.
struct Pair {
    /// Of the second mapper: it is as old as the first one, and connects later.
    second: Arc<SecureSerializer>,
    broker: Broker,
    proxy: Proxy,
    job: Work,
    first: Mapper,
    _fred: Agent,
    boss: Agent,
}

impl Pair {
    fn serializer(pki: &Pki, identity: &Identity) -> Arc<SecureSerializer> {
        let trust = pki.ca.trust().unwrap();
        Arc::new(SecureSerializer::builder(pki.credentials(identity), pki.peers.clone(), trust).build().unwrap())
    }

    async fn start() -> Self {
        let pki = Pki::starting(KeyType::P256, SystemClock.now());
        let broker = Broker::shared();
        let proxy = Proxy::to(broker.port()).await;
        let url = broker.url().replace(&format!(":{}/", broker.port()), &format!(":{}/", proxy.port()));
        let first = AmqpTransport::connect(AmqpOptions::new(&url).unwrap()).await.unwrap();
        for name in [mapper("m1"), mapper("m2"), agent("fred"), agent("boss")] {
            pki.credentials(&name);
        }
        let second = Self::serializer(&pki, &mapper("m2"));
        let first = Mapper::builder(Self::serializer(&pki, &mapper("m1")), first).start().await.unwrap();
        let (work, job) = Work::new();
        let node = async |name: &str| Agent::builder(Self::serializer(&pki, &agent(name)), broker.connect().await);
        let fred = start(node("fred").await.ping_time(Duration::from_millis(200)).actor(work)).await;
        let boss = start(node("boss").await).await;
        wait_until_known(&first, &["boss", "fred"]).await;
        Self { second, broker, proxy, job, first, _fred: fred, boss }
    }

    async fn second(&self) -> Mapper {
        let second = Mapper::builder(self.second.clone(), self.broker.connect().await).start().await.unwrap();
        wait_until_known(&second, &["boss", "fred"]).await;
        second
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s18_request_of_a_mapper_that_lost_its_connection_joins_the_running_job() {
    let mut pair = Pair::start().await;
    let request = pair.boss.proxy().request("/work/do", ()).timeout(WAIT_TIMEOUT);
    let asked = tokio::spawn(async move { request.await });
    pair.job.begun().await;
    let second = pair.second().await;
    pair.proxy.disconnect();
    let fred = agent("fred");
    wait_until("the second mapper has sent the request", async || second.workloads([&fred])[0].in_flight == 1).await;
    pair.job.end();
    let answers = asked.await.unwrap().unwrap();
    assert_eq!(answers.outcomes[&fred], Ok(json!(0).into()));
    assert_eq!(pair.job.calls(), 1);
    drop(pair.first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s18_request_of_a_mapper_that_lost_its_connection_gets_the_result_that_is_known() {
    let mut pair = Pair::start().await;
    let request = pair.boss.proxy().request("/work/do", ()).timeout(WAIT_TIMEOUT);
    let asked = tokio::spawn(async move { request.await });
    pair.job.begun().await;
    pair.proxy.disconnect();
    wait_until("the request waits for another mapper", async || {
        pair.broker.queue(topology::REQUEST)["messages_ready"].as_u64() == Some(1)
    })
    .await;
    pair.job.end();
    wait_until("the job has ended", async || pair._fred.running().is_empty()).await;
    let _second = pair.second().await;
    let answers = asked.await.unwrap().unwrap();
    assert_eq!(answers.outcomes[&agent("fred")], Ok(json!(0).into()));
    assert_eq!(pair.job.calls(), 1);
}

#[tokio::test]
async fn s18_refused_answer_is_sealed_once_and_published_with_a_back_off() {
    let system = System::settled();
    let pki = Pki::starting(KeyType::P256, SystemClock.now());
    let sealer = Pair::serializer(&pki, &agent("fred"));
    let transport = Counting::new(system.connect());
    let (work, mut job) = Work::new();
    let fred = Agent::builder(sealer.clone(), transport.clone()).ping_time(Duration::from_secs(3600));
    let _fred = start(fred.actor(work)).await;
    let m1 = Mapper::builder(Pair::serializer(&pki, &mapper("m1")), system.connect()).start().await.unwrap();
    wait_until_known(&m1, &["fred"]).await;
    let asked = tokio::spawn(m1.request("/work/do", ()).timeout(Duration::from_secs(40)).into_future());
    job.begun().await;
    wait_until("the intermediate result is sent", async || transport.published() == 1).await;
    let sealed = sealer.counters().sealed();
    transport.refuse(true);
    let begun = tokio::time::Instant::now();
    job.end();
    // Another intermediate result, and five attempts at the answer: 0.1 + 0.2 + 0.4 + 0.8 s apart.
    wait_until("it is published again", async || transport.published() >= 1 + 1 + 5).await;
    assert!(begun.elapsed() >= Duration::from_millis(1500), "the attempts are further and further apart");
    assert_eq!(sealer.counters().sealed() - sealed, 2, "the intermediate result and the answer, once each");
    transport.refuse(false);
    let answers = asked.await.unwrap().unwrap();
    assert_eq!(answers.outcomes[&agent("fred")], Ok(json!(0).into()));
    assert_eq!(sealer.counters().sealed() - sealed, 2);
}

#[tokio::test]
async fn s18_refused_answer_ends_with_the_deadline() {
    let system = System::settled();
    let transport = Counting::new(system.connect());
    let (work, mut job) = Work::new();
    let fred = Agent::builder(system.serializer(&agent("fred")), transport.clone());
    let fred = start(fred.ping_time(Duration::from_secs(3600)).concurrency(1).actor(work)).await;
    let m1 = system.started_mapper("m1").await;
    wait_until_known(&m1, &["fred"]).await;
    let asked = tokio::spawn(m1.request("/work/do", ()).timeout(Duration::from_secs(2)).into_future());
    job.begun().await;
    transport.refuse(true);
    job.end();
    let answers = asked.await.unwrap().unwrap();
    assert_eq!(answers.outcomes[&agent("fred")].clone().unwrap_err().code, FailureCode::TimedOut);
    // The only worker of the agent is free again, though the broker still refuses.
    let asked = tokio::spawn(m1.request("/work/do", ()).into_future());
    job.begun().await;
    transport.refuse(false);
    job.end();
    assert_eq!(asked.await.unwrap().unwrap().outcomes[&agent("fred")], Ok(json!(1).into()));
    drop(fred);
}

#[tokio::test]
async fn d05_delivery_of_a_long_job_is_not_held_for_half_an_hour() {
    let system = System::settled();
    let transport = Counting::new(system.connect());
    let (work, mut job) = Work::new();
    let fred = Agent::builder(system.serializer(&agent("fred")), transport.clone()).actor(work);
    let _fred = start(fred).await;
    let m1 = system.started_mapper("m1").await;
    wait_until_known(&m1, &["fred"]).await;
    let answers = m1.request("/work/do", ()).timeout(Duration::from_secs(2 * 3600)).events().await.unwrap();
    job.begun().await;
    tokio::time::pause();
    assert_eq!(transport.acknowledged(), 0);
    tokio::time::advance(Duration::from_secs(16 * 60)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    tokio::time::resume();
    assert_eq!(transport.acknowledged(), 1);
    job.end();
    let answers = tokio::time::timeout(WAIT_TIMEOUT, answers.answers()).await.unwrap().unwrap();
    assert_eq!(answers.outcomes[&agent("fred")], Ok(json!(0).into()));
}

#[tokio::test]
async fn d05_request_is_acknowledged_after_its_answer_was_sent() {
    let system = System::settled();
    let connection = system.connect();
    let transport = Counting::new(connection.clone());
    let (work, mut job) = Work::new();
    let fred = Agent::builder(system.serializer(&agent("fred")), transport.clone()).actor(work);
    let _fred = start(fred).await;
    let m1 = system.started_mapper("m1").await;
    wait_until_known(&m1, &["fred"]).await;
    let mut events = m1.request("/work/do", ()).events().await.unwrap();
    job.begun().await;
    wait_until("the intermediate result is sent", async || transport.published() == 1).await;
    transport.refuse(true);
    job.end();
    // The second intermediate result and the answer were tried.
    wait_until("the answer was refused", async || transport.published() >= 1 + 1 + 2).await;
    connection.disconnect();
    // It was not acknowledged: the broker has it again.
    system.waiting("nanite-fred", 1).await;
    // With the answer sent, it is.
    transport.refuse(false);
    connection.reconnect();
    let outcome = async {
        while let Some(event) = events.next().await {
            if let nanite::request::Event::Outcome { result, .. } = event {
                return result;
            }
        }
        panic!("no outcome");
    };
    assert_eq!(tokio::time::timeout(WAIT_TIMEOUT, outcome).await.unwrap(), Ok(json!(0).into()));
    wait_until("it is acknowledged", async || {
        connection.disconnect();
        let waits = !system.broker.queued_messages("nanite-fred").is_empty();
        connection.reconnect();
        !waits
    })
    .await;
    assert_eq!(job.calls(), 1);
}

/// Only `nanite-boss` may call anything.
#[derive(Debug)]
struct OnlyBoss;

impl Policy for OnlyBoss {
    fn authorize_registration(&self, _: &Caller<'_>, _: &Register) -> Decision {
        Decision::allow()
    }

    fn authorize_request(&self, caller: &Caller<'_>, _: &Request) -> Decision {
        if caller.origin().name() == "boss" { Decision::allow() } else { Decision::denied() }
    }
}

#[tokio::test]
async fn n11_agent_cannot_request_on_behalf_of_another_node() {
    let system = System::settled();
    let (work, job) = Work::new();
    job.gate.add_permits(1);
    let _fred = start(system.agent("fred").actor(work)).await;
    let m1 = system.mapper("m1").policy(OnlyBoss).start().await.unwrap();
    wait_until_known(&m1, &["fred"]).await;
    let eve = agent("eve");
    let link = Link::builder(system.serializer(&eve), system.connect()).build();
    let control = topology::agent_control(eve.as_str(), link.instance());
    let mut answers = link.subscribe(&control, InboundQueue::AgentControl, 10).await.unwrap();
    let request = Request::new("/work/do".parse().unwrap(), Payload::default()).with_on_behalf_of(agent("boss"));
    let request = request.with_token(Token::random().unwrap()).with_origin_token(Token::random().unwrap());
    let requests = Destination::Queue(topology::REQUEST.into());
    link.send(Outbound::new(Packet::Request(request), Audience::Mappers), requests).await.unwrap();
    let failure = loop {
        let received = tokio::time::timeout(WAIT_TIMEOUT, answers.next()).await.expect("an answer").unwrap();
        if let Packet::Outcome(outcome) = received.accept().await.packet {
            break outcome.into_result().unwrap_err();
        }
    };
    assert_eq!(failure, Failure::new(FailureCode::Denied, "Denied"));
    assert_eq!(job.calls(), 0);
}

#[tokio::test]
async fn n01_agent_itself_refuses_services_that_it_does_not_expose() {
    let system = System::settled();
    let (work, job) = Work::new();
    let fred = agent("fred");
    let _fred = start(system.agent("fred").actor(work)).await;
    let mut m1 = HostileMapper::start(&system, "m1").await;
    for service in ["/work/drop", "/work", "/other/do", "/work/do/more"] {
        let request = Request::new(service.parse().unwrap(), Payload::default()).with_token(Token::random().unwrap());
        m1.send(&fred, request.with_from(mapper("m1"))).await;
        let failure = outcome(&mut m1).await.failure.unwrap();
        assert_eq!(failure.code, FailureCode::NoSuchService, "{service}");
    }
    assert_eq!(job.calls(), 0);
}

#[tokio::test]
async fn s05_outcome_of_another_process_or_to_another_request_is_ignored() {
    let system = System::settled();
    let m1 = system.started_mapper("m1").await;
    let fred = agent("fred");
    let link = || Link::builder(system.serializer(&fred), system.connect()).build();
    // Two processes of one agent; the newer one registers.
    let older = link();
    let newer = loop {
        let newer = link();
        if newer.instance() > older.instance() {
            break newer;
        }
    };
    let mut inbox = newer.subscribe(&topology::agent_inbox(fred.as_str()), InboundQueue::AgentInbox, 10).await.unwrap();
    let register = Register::new(fred.clone(), ["/work/do".parse().unwrap()]).with_status(Status::new(1.0));
    let registration = Destination::exchange(topology::REGISTRATION);
    newer.send(Outbound::new(register, Audience::Mappers), registration).await.unwrap();
    wait_until_known(&m1, &["fred"]).await;
    let request = m1.request("/work/do", ()).timeout(Duration::from_secs(40));
    let asked = tokio::spawn(request.into_future());
    let received = tokio::time::timeout(WAIT_TIMEOUT, inbox.next()).await.expect("a request").unwrap().accept().await;
    let signer = received.signer().unwrap().clone();
    let Packet::Request(request) = received.packet else { panic!("{:?}", received.packet) };
    let queue = topology::process_queue_name("mapper-m1", signer.instance());
    let answer = async |by: &Link, value: &str, to: Option<MessageId>| {
        let outcome = Outcome::new(request.token.unwrap(), mapper("m1"), fred.clone(), Ok(value.into()));
        let message = Outbound::new(outcome, mapper("m1")).in_reply_to(to);
        by.send(message, Destination::Queue(queue.clone())).await.unwrap();
    };
    answer(&older, "of another process", Some(signer.id())).await;
    answer(&newer, "to another message", Some(MessageId::random().unwrap())).await;
    answer(&newer, "to no message", None).await;
    answer(&newer, "right", Some(signer.id())).await;
    let answers: Result<_, RequestError> = asked.await.unwrap();
    assert_eq!(answers.unwrap().outcomes[&fred], Ok("right".into()));
}
