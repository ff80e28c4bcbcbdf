//! p01, p03: round trips per second through RabbitMQ: lapin alone, this project's transport, nanite plain and nanite secure, and
//! both through a proxy and a mapper.
//!
//! `cargo bench --bench end_to_end` starts a broker of its own and measures all of them in turn, several times over, so that they
//! meet the same machine in the same mood; it prints medians, and ratios of them. All clients and servers are in this one
//! process, each with a connection of its own; a request carries 256 bytes and comes back as it went. `-- --rounds N` and
//! `-- --seconds S` (for one measurement) change how long it takes.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod bare;
#[path = "../../tests/suite/harness/broker.rs"]
#[allow(dead_code)]
mod broker;
#[path = "../../tests/suite/harness/http.rs"]
mod http;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nanite::agent::{Agent, actor, reply};
use nanite::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::Mapper;
use nanite::packet::Identity;
use nanite::proxy::MapperProxy;
use nanite::security::SecureSerializer;
use nanite::serializer::{PlainSerializer, Serializer};
use nanite::transport::{Destination, PublishRequest, Queue, Transport};

use bare::Bare;
use broker::Broker;

const PAYLOAD: usize = 256;
const IN_FLIGHT: [usize; 2] = [1, 100];
const PATIENCE: Duration = Duration::from_secs(30);

type Trip = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// One way of making a round trip.
struct Way {
    name: &'static str,
    trip: Trip,
    /// What was measured, by how many were in flight.
    measured: [Vec<Measured>; IN_FLIGHT.len()],
}

#[derive(Clone, Copy)]
struct Measured {
    /// Round trips per second.
    rate: f64,
    /// What one of them cost this process, clients and servers together, in microseconds of CPU.
    cpu: f64,
}

impl Way {
    fn new<F: Future<Output = ()> + Send + 'static>(
        name: &'static str,
        trip: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self {
        Self { name, trip: Arc::new(move || Box::pin(trip())), measured: Default::default() }
    }
}

fn main() {
    p01_round_trips();
}

fn p01_round_trips() {
    let rounds = option("--rounds", 7.0) as usize;
    let length = Duration::from_secs_f64(option("--seconds", 1.5));
    let broker = Broker::private();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut ways = Vec::new();
    let mut alive: Vec<Box<dyn std::any::Any>> = Vec::new();
    runtime.block_on(async {
        for (name, confirms) in [("lapin, acknowledgements only", false), ("lapin, with confirms", true)] {
            let bare = Arc::new(Bare::start(&broker.url(), confirms).await);
            ways.push(Way::new(name, move || {
                let bare = Arc::clone(&bare);
                async move { bare.round_trip(&[b'x'; PAYLOAD]).await }
            }));
        }
        ways.push(over_transport(&broker).await);
        for (name, secure) in [("nanite plain", false), ("nanite secure", true)] {
            let (way, agent) = over_nanite(&broker, name, secure).await;
            ways.push(way);
            alive.push(Box::new(agent));
        }
        for (name, secure) in [("plain, through a mapper", false), ("secure, through a mapper", true)] {
            // Mappers of one virtual host take each other's requests.
            let place = broker.new_vhost();
            let (way, nodes) = over_proxy(&place, name, secure).await;
            ways.push(way);
            alive.push(Box::new((nodes, place)));
        }
        for round in 0..=rounds {
            for way in &mut ways {
                for (n, in_flight) in IN_FLIGHT.into_iter().enumerate() {
                    let measured = measure(&way.trip, in_flight, length).await;
                    // The first round warms up.
                    if round > 0 {
                        way.measured[n].push(measured);
                    }
                }
            }
        }
    });
    report(&ways, rounds);
}

async fn measure(trip: &Trip, in_flight: usize, length: Duration) -> Measured {
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let (start, cpu) = (Instant::now(), cpu_time());
    let workers: Vec<_> = (0..in_flight)
        .map(|_| {
            let (trip, stop, count) = (Arc::clone(trip), Arc::clone(&stop), Arc::clone(&count));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    trip().await;
                    count.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    tokio::time::sleep(length).await;
    let trips = count.load(Ordering::Relaxed) as f64;
    let rate = trips / start.elapsed().as_secs_f64();
    let cpu = (cpu_time() - cpu).as_secs_f64() * 1e6 / trips;
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await.unwrap();
    }
    Measured { rate, cpu }
}

/// The CPU time that this process has used so far. The kernel counts it in hundredths of a second.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let ticks = |n: usize| after_name.split_whitespace().nth(n).unwrap().parse::<u64>().unwrap();
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

/// An echo by the transport alone: confirmed, mandatory, acknowledged after the reply, and nothing else.
async fn over_transport(broker: &Broker) -> Way {
    let queue = |name: &str| Queue::durable(name);
    let message = |queue: &str, id: String, body: Arc<[u8]>| {
        // There is no other place for the id here.
        PublishRequest::new(Destination::queue(queue), body)
            .content_type(id)
            .message_id("0")
            .expires_in(PATIENCE)
            .persistent(false)
    };
    let (client, server) = (Arc::new(broker.connect().await), Arc::new(broker.connect().await));
    let mut requests = server.consume(&queue("transport-work"), 256).await.unwrap();
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                let reply = message("transport-replies", request.content_type, request.body);
                server.publish(reply, PATIENCE).await.unwrap();
                request.acker.ack().await.unwrap();
            });
        }
    });
    let mut answers = client.consume(&queue("transport-replies"), 256).await.unwrap();
    let pending: Arc<std::sync::Mutex<std::collections::HashMap<String, tokio::sync::oneshot::Sender<usize>>>> =
        Arc::default();
    let waiting = Arc::clone(&pending);
    tokio::spawn(async move {
        while let Some(answer) = answers.next().await {
            answer.acker.ack().await.unwrap();
            if let Some(asked) = waiting.lock().unwrap().remove(&answer.content_type) {
                let _ = asked.send(answer.body.len());
            }
        }
    });
    let next = Arc::new(AtomicU64::new(0));
    Way::new("the transport alone", move || {
        let (client, pending, next) = (Arc::clone(&client), Arc::clone(&pending), Arc::clone(&next));
        async move {
            let id = next.fetch_add(1, Ordering::Relaxed).to_string();
            let (asked, answered) = tokio::sync::oneshot::channel();
            pending.lock().unwrap().insert(id.clone(), asked);
            client.publish(message("transport-work", id, [b'x'; PAYLOAD].into()), PATIENCE).await.unwrap();
            assert_eq!(answered.await.unwrap(), PAYLOAD);
        }
    })
}

/// A mapper and an agent.
async fn over_nanite(broker: &Broker, name: &'static str, secure: bool) -> (Way, Agent) {
    let kind = if secure { "secure" } else { "plain" };
    let (fred, desk) = (Identity::agent(kind).unwrap(), Identity::mapper(kind).unwrap());
    let [of_fred, of_desk] = serializers([&fred, &desk], secure);
    let simple = actor(kind).expose("echo", |text: String| async move { reply(text) });
    let agent = Agent::builder(of_fred, Arc::new(broker.connect().await)).actor(simple).concurrency(256);
    let agent = agent.prefetch(256).start().await.unwrap();
    let mapper = Mapper::builder(of_desk, Arc::new(broker.connect().await)).start().await.unwrap();
    let service = format!("/{kind}/echo");
    let payload = "x".repeat(PAYLOAD);
    mapper.request(&service, &payload).wait_for_agents(PATIENCE).await.unwrap();
    let way = Way::new(name, move || {
        let request = mapper.request(&service, &payload);
        async move {
            let answers = request.await.unwrap();
            assert_eq!(answers.results().count(), 1);
        }
    });
    (way, agent)
}

/// An agent, a mapper, and a node that asks through the mapper.
async fn over_proxy(broker: &Broker, name: &'static str, secure: bool) -> (Way, (Agent, Mapper)) {
    let (fred, desk, asker) = (Identity::agent("fred"), Identity::mapper("desk"), Identity::agent("asker"));
    let (fred, desk, asker) = (fred.unwrap(), desk.unwrap(), asker.unwrap());
    let [of_fred, of_desk, of_asker] = serializers([&fred, &desk, &asker], secure);
    let simple = actor("simple").expose("echo", |text: String| async move { reply(text) });
    let agent = Agent::builder(of_fred, Arc::new(broker.connect().await)).actor(simple).concurrency(256);
    let agent = agent.prefetch(256).start().await.unwrap();
    let mapper = Mapper::builder(of_desk, Arc::new(broker.connect().await)).start().await.unwrap();
    let payload = "x".repeat(PAYLOAD);
    mapper.request("/simple/echo", &payload).wait_for_agents(PATIENCE).await.unwrap();
    let proxy = MapperProxy::builder(of_asker, Arc::new(broker.connect().await)).start().await.unwrap();
    let way = Way::new(name, move || {
        let request = proxy.request("/simple/echo", &payload);
        async move {
            let answers = request.await.unwrap();
            assert_eq!(answers.results().count(), 1);
        }
    });
    (way, (agent, mapper))
}

fn serializers<const N: usize>(nodes: [&Identity; N], secure: bool) -> [Arc<dyn Serializer>; N] {
    if !secure {
        return nodes.map(|node| Arc::new(PlainSerializer::json(node.clone())) as Arc<dyn Serializer>);
    }
    let now = SystemClock.now();
    let valid_for = CertificateAuthority::VALID_FOR;
    let ca = CertificateAuthority::create("example.org", KeyType::P256, valid_for, now).unwrap();
    let own = nodes.map(|node| ca.issue(node, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now).unwrap());
    let known = own.each_ref().map(|credentials| credentials.certificate().clone());
    let store = Arc::new(StaticCertificateStore::new(known));
    own.map(|own| {
        let secure = SecureSerializer::builder(own, store.clone(), ca.trust().unwrap()).build().unwrap();
        Arc::new(secure) as Arc<dyn Serializer>
    })
}

fn report(ways: &[Way], rounds: usize) {
    let median = |values: &mut dyn Iterator<Item = f64>| {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let rate = |measured: &[Measured]| median(&mut measured.iter().map(|one| one.rate));
    let base = &ways[1];
    println!("Round trips per second with {PAYLOAD} bytes: medians of {rounds} and, in brackets, least and most;");
    println!("their ratio to `{}`; microseconds of this process's CPU for one.", base.name);
    println!();
    println!("{:<30}{:>42}{:>42}", "", "1 in flight", "100 in flight");
    for way in ways {
        print!("{:<30}", way.name);
        for (measured, base) in way.measured.iter().zip(&base.measured) {
            let least = measured.iter().map(|one| one.rate).fold(f64::MAX, f64::min);
            let most = measured.iter().map(|one| one.rate).fold(0.0, f64::max);
            let (middle, cpu) = (rate(measured), median(&mut measured.iter().map(|one| one.cpu)));
            let ratio = middle / rate(base);
            print!("{:>42}", format!("{middle:.0} ({least:.0} to {most:.0})  {ratio:.2}  {cpu:.0} us"));
        }
        println!();
    }
    println!();
    println!("Through a proxy and a mapper against directly from a mapper, as a ratio of round trips per second:");
    for (direct, through) in
        [("nanite plain", "plain, through a mapper"), ("nanite secure", "secure, through a mapper")]
    {
        let named = |name: &str| ways.iter().find(|way| way.name == name).unwrap();
        let ratio = |n: usize| rate(&named(through).measured[n]) / rate(&named(direct).measured[n]);
        println!("{direct:<30}{:>42.2}{:>42.2}", ratio(0), ratio(1));
    }
}

fn option(name: &str, default: f64) -> f64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match (arguments.next(), arguments.next()) {
        (Some(_), value) => value.and_then(|value| value.parse().ok()).expect("a number after the option"),
        (None, _) => default,
    }
}
