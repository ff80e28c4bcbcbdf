//! One node cannot block the mappers for the others: not with many long requests through the shared queue, and not with messages in the
//! offline queue that no agent can take or no mapper can open. Against RabbitMQ.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::{FutureExt, join_all};
use nanite::agent::{Actor, Agent, actor, reply};
use nanite::certs::{KeyType, StaticCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::{Mapper, MapperBuilder};
use nanite::packet::{Failure, FailureCode, Identity, Payload, Register, Request};
use nanite::policy::{Caller, Decision, Policy};
use nanite::proxy::MapperProxy;
use nanite::request::{Event, Events, RequestError};
use nanite::security::{SecureSerializer, SecureSerializerBuilder};
use nanite::serializer::MessageClass;
use nanite::transport::topology;
use tokio::sync::Semaphore;

use crate::harness::broker::Broker;
use crate::harness::pki::{Pki, agent, mapper};
use crate::harness::system::{System, wait_until_known};
use crate::harness::{WAIT_TIMEOUT, wait_until};

const DAYS: Duration = Duration::from_secs(3 * 24 * 3600);
/// More than a mapper holds of any queue: see `MAX_RUNNING` and `OFFLINE_PREFETCH`.
const FLOOD: usize = 1200;

/// A CA, a broker, and nodes with the secure envelope.
struct Net {
    pki: Pki,
    broker: Broker,
    live_lifetime: Duration,
}

impl Net {
    fn new() -> Self {
        let pki = Pki::starting(KeyType::P256, SystemClock.now());
        Self { pki, broker: Broker::shared(), live_lifetime: Duration::from_secs(60) }
    }

    fn secure(&self, builder: SecureSerializerBuilder) -> Arc<SecureSerializer> {
        Arc::new(builder.max_lifetime(MessageClass::Live, self.live_lifetime).build().unwrap())
    }

    fn serializer(&self, identity: &Identity) -> Arc<SecureSerializer> {
        let credentials = self.pki.credentials(identity);
        self.secure(SecureSerializer::builder(credentials, self.pki.peers.clone(), self.pki.ca.trust().unwrap()))
    }

    async fn agent(&self, name: &str, work: impl Actor + 'static) -> Agent {
        let transport = self.broker.connect().await;
        Agent::builder(self.serializer(&agent(name)), transport).actor(work).start().await.unwrap()
    }

    async fn mapper(&self, name: &str) -> MapperBuilder {
        Mapper::builder(self.serializer(&mapper(name)), self.broker.connect().await)
            .offline_redelivery_frequency(Duration::from_millis(200))
    }

    async fn proxy(&self, name: &str) -> MapperProxy {
        let transport = self.broker.connect().await;
        MapperProxy::builder(self.serializer(&agent(name)), transport).start().await.unwrap()
    }
}

fn echo() -> impl Actor {
    actor("simple").expose("echo", |text: String| async move { reply(text) })
}

/// Waits as long as `gate` has no permit.
fn gated(gate: &Arc<Semaphore>) -> impl Actor + use<> {
    let gate = gate.clone();
    actor("long").expose("work", move |(): ()| {
        let gate = gate.clone();
        async move {
            let _ = gate.acquire().await?;
            reply("done")
        }
    })
}

/// The failure of a request that was refused as a whole, if it has arrived.
fn refused(events: &mut Events) -> Option<Failure> {
    match events.next().now_or_never() {
        Some(Some(Event::Failed(failure))) => Some(failure),
        Some(other) => panic!("{other:?}"),
        None => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn d12_flood_of_long_proxied_requests_leaves_room_for_other_nodes() {
    let net = Net::new();
    let gate = Arc::new(Semaphore::new(0));
    let _slow = net.agent("slow", gated(&gate)).await;
    let _fast = net.agent("fast", echo()).await;
    let m1 = net.mapper("m1").await.start().await.unwrap();
    wait_until_known(&m1, &["fast", "slow"]).await;
    let (flooder, other) = (net.proxy("flooder").await, net.proxy("other").await);

    let requests = (0..FLOOD).map(|_| flooder.request("/long/work", ()).timeout(DAYS).events());
    let mut open: Vec<Events> = join_all(requests).await.into_iter().map(Result::unwrap).collect();
    let ask = async || other.request("/simple/echo", "hello").timeout(Duration::from_secs(20)).await;
    let answers = ask().await.unwrap();
    assert_eq!(answers.outcomes[&agent("fast")], Ok(Payload::from("hello")));

    // The flooder is told, and not only by silence.
    let mut overloaded = 0;
    wait_until("most of the flood is refused", async || {
        let mut still_open = Vec::new();
        for mut events in open.drain(..) {
            match refused(&mut events) {
                Some(failure) => {
                    assert_eq!(failure.code, FailureCode::Overloaded, "{failure}");
                    overloaded += 1;
                }
                None => still_open.push(events),
            }
        }
        open = still_open;
        overloaded >= FLOOD / 4
    })
    .await;
    let refused = flooder.request("/long/work", ()).timeout(Duration::from_secs(20)).await.unwrap_err();
    assert!(matches!(refused, RequestError::Overloaded(_)), "{refused:?}");
    assert!(ask().await.is_ok(), "another node is still served");

    // When its requests have ended, it is served again.
    gate.add_permits(FLOOD);
    wait_until("the flooder is served again", async || {
        flooder.request("/long/work", ()).timeout(Duration::from_secs(5)).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d12_long_proxied_request_does_not_hold_its_delivery_and_is_answered() {
    let mut net = Net::new();
    // As long as messages live, a delivery is held.
    net.live_lifetime = Duration::from_secs(3);
    let gate = Arc::new(Semaphore::new(0));
    let _slow = net.agent("slow", gated(&gate)).await;
    let m1 = net.mapper("m1").await.start().await.unwrap();
    wait_until_known(&m1, &["slow"]).await;
    let proxy = net.proxy("caller").await;
    let mut events = proxy.request("/long/work", ()).timeout(DAYS).events().await.unwrap();
    wait_until("the delivery is acknowledged", async || {
        net.broker.queue(topology::REQUEST)["message_stats"]["ack"] == 1
    })
    .await;
    gate.add_permits(1);
    match tokio::time::timeout(WAIT_TIMEOUT, events.next()).await.unwrap() {
        Some(Event::Outcome { from, result, .. }) => {
            assert_eq!((from, result), (agent("slow"), Ok(Payload::from("done"))));
        }
        other => panic!("{other:?}"),
    }
}

/// Counts the calls of `/log/write`.
fn log(calls: &Arc<AtomicUsize>) -> impl Actor + use<> {
    let calls = calls.clone();
    actor("log").expose("write", move |_: Payload| {
        calls.fetch_add(1, Ordering::SeqCst);
        async move { reply(()) }
    })
}

/// Stores pushes in the offline queue.
async fn store(from: &Mapper, service: &str, count: usize) {
    let pushes = (0..count).map(|n| from.request(service, n).offline_failsafe(true).push());
    for sent in join_all(pushes).await {
        assert_eq!(sent.unwrap(), [], "it is stored");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn d12_offline_messages_that_no_agent_takes_do_not_hold_up_the_rest() {
    let net = Net::new();
    let calls = Arc::default();
    let desk = net.mapper("desk").await.short_lived().start().await.unwrap();
    net.serializer(&mapper("m1"));
    store(&desk, "/none/there", FLOOD).await;
    store(&desk, "/log/write", 3).await;
    let _m1 = net.mapper("m1").await.start().await.unwrap();
    let _agent = net.agent("writer", log(&calls)).await;
    wait_until("the messages behind them are delivered", async || calls.load(Ordering::SeqCst) == 3).await;
    // Those that wait are still there, each once.
    let _none = net
        .agent(
            "none",
            actor("none").expose("there", {
                let calls = calls.clone();
                move |_: Payload| {
                    calls.fetch_add(1, Ordering::SeqCst);
                    async move { reply(()) }
                }
            }),
        )
        .await;
    wait_until("the others are delivered", async || calls.load(Ordering::SeqCst) == 3 + FLOOD).await;
    wait_until("the queue is empty", async || net.broker.queue(topology::OFFLINE)["messages"] == 0).await;
    assert_eq!(calls.load(Ordering::SeqCst), 3 + FLOOD);
}

#[tokio::test(flavor = "multi_thread")]
async fn d12_offline_messages_that_no_mapper_opens_do_not_hold_up_the_rest() {
    let net = Net::new();
    let calls = Arc::default();
    // This mapper knows only itself: no other node can open what it stores.
    let (eve, desk) = (mapper("eve"), net.mapper("desk").await.short_lived().start().await.unwrap());
    let known = StaticCertificateStore::new([net.pki.credentials(&eve).certificate().clone()]);
    let own = SecureSerializer::builder(net.pki.credentials(&eve), Arc::new(known), net.pki.ca.trust().unwrap());
    let eve = Mapper::builder(net.secure(own), net.broker.connect().await).short_lived().start().await.unwrap();
    net.serializer(&mapper("m1"));
    store(&eve, "/none/there", FLOOD).await;
    store(&desk, "/log/write", 3).await;
    let _m1 = net.mapper("m1").await.start().await.unwrap();
    let _agent = net.agent("writer", log(&calls)).await;
    wait_until("the messages behind them are delivered", async || calls.load(Ordering::SeqCst) == 3).await;
    let left = async || net.broker.queue(topology::OFFLINE)["messages"] == FLOOD;
    wait_until("those of the other mapper are left to it", left).await;
}

/// Denies nothing, and counts the questions about requests.
#[derive(Debug)]
struct Asked(Arc<AtomicUsize>);

impl Policy for Asked {
    fn authorize_registration(&self, _: &Caller<'_>, _: &Register) -> Decision {
        Decision::allow()
    }

    fn authorize_request(&self, _: &Caller<'_>, _: &Request) -> Decision {
        self.0.fetch_add(1, Ordering::SeqCst);
        Decision::allow()
    }
}

#[tokio::test(start_paused = true)]
async fn d12_offline_messages_are_not_held_unacknowledged_for_half_an_hour() {
    let system = System::plain();
    let desk = system.mapper("desk").short_lived().start().await.unwrap();
    store(&desk, "/none/there", 3).await;
    let (first, second) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let start = async |name: &str, asked: &Arc<AtomicUsize>| {
        system.mapper(name).policy(Asked(asked.clone())).start().await.unwrap()
    };
    let _m1 = start("m1", &first).await;
    wait_until("the first mapper has them", async || first.load(Ordering::SeqCst) >= 3).await;
    let _m2 = start("m2", &second).await;
    // RabbitMQ ends the channel of a delivery that is held for 30 minutes.
    tokio::time::sleep(Duration::from_secs(20 * 60)).await;
    wait_until("the other mapper has had them", async || second.load(Ordering::SeqCst) >= 3).await;
}
