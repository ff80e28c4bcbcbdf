//! s18: what users of a real RabbitMQ can do to running nodes. No message disables a node, and deleted exchanges, bindings and queues
//! come back.

use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Agent, actor, reply};
use nanite::certs::KeyType;
use nanite::mapper::Mapper;
use nanite::packet::Identity;
use nanite::proxy::MapperProxy;
use nanite::security::SecureSerializer;
use nanite::serializer::Serializer;
use nanite::transport::{MAX_BODY_BYTES, Queue, Transport, topology};
use serde_json::json;

use crate::harness::broker::Broker;
use crate::harness::fake_broker::{long, short};
use crate::harness::pki::Pki;
use crate::harness::raw_client::{FRAME_MAX, RawClient};
use crate::harness::site::Site;
use crate::harness::{WAIT_TIMEOUT, wait_until};
use crate::transport::{durable, next, to_exchange, to_queue};

/// Properties with every field at its largest, and a table of headers that fills the frame.
fn largest_properties(content_type: &[u8], table: impl Fn(usize) -> Vec<u8>) -> Vec<u8> {
    let text = |text: &[u8]| [&[u8::try_from(text.len()).unwrap()][..], text].concat();
    let longest = short(&"x".repeat(255));
    let before = [text(content_type), longest.clone()].concat();
    let after = [
        vec![2, 255],
        // Correlation id, reply-to.
        longest.clone(),
        longest.clone(),
        short(&format!("{:0255}", 99_999_999)),
        longest.clone(),
        vec![0xFF; 8],
        // Type, user, application, cluster.
        longest.clone(),
        short("guest"),
        longest.clone(),
        longest,
    ]
    .concat();
    let room = FRAME_MAX - 8 - 14 - before.len() - after.len() - 4;
    let table = table(room);
    assert!(table.len() <= room && table.len() > room - 600, "{} of {room} bytes", table.len());
    [before, long(&table), after].concat()
}

/// Names of 255 bytes with long strings.
fn wide_table(length: usize) -> Vec<u8> {
    let entry = [short(&"n".repeat(255)), vec![b'S'], long(&[b'v'; 255])].concat();
    let mut table = Vec::new();
    for n in 0..length / entry.len() {
        let mut entry = entry.clone();
        let number = format!("{n:05}");
        entry[1..6].copy_from_slice(number.as_bytes());
        table.extend(entry);
    }
    table
}

/// Arrays within arrays.
fn deep_table(length: usize) -> Vec<u8> {
    let levels = (length - 2) / 5;
    let mut table = short("a");
    for level in (0..levels).rev() {
        table.push(b'A');
        table.extend(u32::try_from(level * 5).unwrap().to_be_bytes());
    }
    table
}

async fn connect(broker: &Broker) -> Arc<dyn Transport> {
    Arc::new(broker.connect().await)
}

fn queues(broker: &Broker) -> Vec<serde_json::Value> {
    let (status, queues) = broker.api("GET", &format!("/api/queues/{}", broker.vhost()), &json!(null));
    assert_eq!(status, 200);
    queues.as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s18_messages_with_the_largest_properties_are_refused_and_acknowledged_in_every_queue() {
    let broker = Broker::shared();
    let pki = Pki::new(KeyType::P256);
    let serializer = |identity: &Identity| -> Arc<dyn Serializer> {
        let builder = SecureSerializer::builder(pki.credentials(identity), pki.peers.clone(), pki.ca.trust().unwrap());
        Arc::new(builder.build().unwrap())
    };
    let (fred, desk, tool) =
        (Identity::agent("fred").unwrap(), Identity::mapper("desk").unwrap(), Identity::mapper("tool").unwrap());
    let (at_desk, at_tool, at_fred) = (serializer(&desk), serializer(&tool), serializer(&fred));
    let mapper = Mapper::builder(at_desk, connect(&broker).await).start().await.unwrap();
    let echo = actor("simple").expose("echo", |text: String| async move { reply(text) });
    let agent = Agent::builder(at_fred, connect(&broker).await).actor(echo).start().await.unwrap();
    let proxy = MapperProxy::builder(at_tool, connect(&broker).await).start().await.unwrap();
    wait_until("the agent is known", async || !mapper.agents().await.unwrap().is_empty()).await;
    let names: Vec<String> = queues(&broker).iter().map(|queue| queue["name"].as_str().unwrap().to_owned()).collect();
    for part in
        ["nanite-fred", "nanite-fred.", "mapper-desk.", ".presence", "request", "mapper-offline", "mapper-tool."]
    {
        assert!(names.iter().any(|name| name.contains(part)), "no {part} in {names:?}");
    }
    wait_until("the broker lists the connections", async || broker.connections().len() == 3).await;
    let connections = broker.connections();

    let messages = [
        (0xFFFC, largest_properties(&[0xFF; 255], wide_table)),
        (0xFFFC, largest_properties(&[b't'; 255], deep_table)),
    ];
    let published = tokio::task::block_in_place(|| {
        let mut client = RawClient::connect(broker.port(), broker.vhost());
        let mut published = 0;
        for (flags, properties) in &messages {
            for name in &names {
                client.publish("", name.as_bytes(), *flags, properties);
                published += 1;
            }
            for exchange in topology::EXCHANGES {
                client.publish(exchange, &[0xFF; 255], *flags, properties);
                published += 1;
            }
        }
        published
    });
    let refused = || {
        let refusals = [mapper.refusals(), agent.refusals()].concat();
        refusals.iter().map(|(_, count)| count).sum::<u64>()
    };
    // The proxy's refusals are its own; each exchange reaches at least one queue.
    wait_until("all are refused", async || refused() >= published - 2 * messages.len() as u64).await;
    wait_until("all queues are empty", async || {
        queues(&broker).iter().all(|queue| queue["messages"] == 0 && queue["consumers"] != 0)
    })
    .await;
    let now = broker.connections();
    assert!(connections.iter().all(|connection| now.contains(connection)), "no node has lost its connection");
    let answers = mapper.request("/simple/echo", "hello").await.unwrap();
    assert!(format!("{answers:?}").contains("hello"), "{answers:?}");
    let answers = proxy.request("/simple/echo", "hello").await.unwrap();
    assert!(format!("{answers:?}").contains("hello"), "{answers:?}");
}

/// One connection holds 128 MiB of unsettled messages at most. The others wait in the queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s18_unsettled_messages_over_the_byte_limit_are_delivered_later() {
    let broker = Broker::shared();
    let transport = broker.connect().await;
    transport.declare(&durable("q")).await.unwrap();
    let body = vec![b'x'; MAX_BODY_BYTES];
    for _ in 0..10 {
        transport.publish(to_queue("q", &body), WAIT_TIMEOUT).await.unwrap();
    }
    let mut consumer = transport.consume(&durable("q"), 100).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(next(&mut consumer).await);
    }
    wait_until("all are delivered", async || {
        let queue = broker.queue("q");
        queue["messages_ready"] == 0 && queue["messages_unacknowledged"] == 10
    })
    .await;
    let ninth = tokio::time::timeout(Duration::from_millis(500), consumer.next()).await;
    assert!(ninth.is_err(), "the ninth is withheld");
    for delivery in held {
        assert!(!delivery.redelivered);
        delivery.acker.ack().await.unwrap();
    }
    for _ in 0..2 {
        let delivery = next(&mut consumer).await;
        assert!(delivery.redelivered && *delivery.body == *body);
        delivery.acker.ack().await.unwrap();
    }
    wait_until("the queue is empty", async || broker.queue("q")["messages"] == 0).await;
}

fn delete(broker: &Broker, path: &str) {
    let (status, answer) = broker.api("DELETE", path, &json!(null));
    assert_eq!(status, 204, "{path}: {answer}");
}

/// Within 10 s, and the time that one message takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s18_deleted_exchange_and_binding_are_restored() {
    let broker = Broker::shared();
    let (mapper, agent) = (broker.connect().await, broker.connect().await);
    let presence = topology::mapper_presence("mapper-desk", 1);
    let mut consumer = mapper.consume(&presence, 10).await.unwrap();
    let heard = async |consumer: &mut nanite::transport::Consumer, exchange: &str| {
        agent.publish(to_exchange(exchange, exchange), WAIT_TIMEOUT).await.unwrap();
        let delivery = tokio::time::timeout(Duration::from_millis(200), consumer.next()).await;
        match delivery {
            Ok(delivery) => {
                delivery.unwrap().acker.ack().await.unwrap();
                true
            }
            Err(_) => false,
        }
    };
    assert!(heard(&mut consumer, "heartbeat").await);
    for exchange in [topology::HEARTBEAT, topology::REGISTRATION] {
        delete(&broker, &format!("/api/exchanges/{}/{exchange}", broker.vhost()));
    }
    for exchange in [topology::HEARTBEAT, topology::REGISTRATION] {
        wait_until("the exchange is bound again", async || heard(&mut consumer, exchange).await).await;
    }
}

/// Only the connection of an exclusive queue can unbind it; any user with permissions can unbind a durable one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s18_removed_binding_is_restored() {
    let broker = Broker::shared();
    let transport = broker.connect().await;
    let mut consumer = transport.consume(&durable("q").bind("news"), 10).await.unwrap();
    delete(&broker, &format!("/api/bindings/{}/e/news/q/q/~", broker.vhost()));
    transport.publish(to_exchange("news", "lost"), WAIT_TIMEOUT).await.unwrap();
    let received = async {
        loop {
            transport.publish(to_exchange("news", "heard"), WAIT_TIMEOUT).await.unwrap();
            if let Ok(delivery) = tokio::time::timeout(Duration::from_millis(200), consumer.next()).await {
                return delivery.unwrap();
            }
        }
    };
    let delivery = tokio::time::timeout(WAIT_TIMEOUT, received).await.expect("the queue is bound again");
    assert_eq!(&*delivery.body, b"heard");
}

#[test]
fn s18_deleted_exchange_and_queue_are_restored_and_logged_by_a_running_agent() {
    let site = Site::new(&["agent fred", "mapper ctl"]);
    site.program("simple/echo", "cat >&3");
    let mut agent = site.agent("fred", &[]);
    let path = format!("/api/exchanges/{}/advertise", site.broker.vhost());
    delete(&site.broker, &path);
    agent.wait_for("the exchange was missing; declared it and bound the queue again");
    assert_eq!(site.broker.api("GET", &path, &json!(null)).0, 200);
    site.broker.delete_queue("nanite-fred");
    agent.wait_for("consuming again");
    assert_eq!(site.broker.queue("nanite-fred")["name"], "nanite-fred");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s18_deleted_queue_without_consumer_is_restored() {
    let broker = Broker::shared();
    let transport = broker.connect().await;
    transport.declare(&Queue::durable("kept")).await.unwrap();
    broker.delete_queue("kept");
    assert_eq!(transport.depth("kept").await, Ok(None));
    wait_until("the queue is declared again", async || transport.depth("kept").await == Ok(Some(0))).await;
}
