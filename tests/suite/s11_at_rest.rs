//! s11: the broker has nothing readable. The test reads every queue of a real RabbitMQ, and copies of all messages to its exchanges.

use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Agent, actor, reply};
use nanite::certs::KeyType;
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::Mapper;
use nanite::packet::Identity;
use nanite::proxy::MapperProxy;
use nanite::security::SecureSerializer;
use nanite::serializer::{PlainSerializer, Serializer};
use nanite::transport::{Transport, topology};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::harness::broker::Broker;
use crate::harness::pki::Pki;
use crate::harness::wait_until;

/// Parts of payloads, services and tags, which must not be found.
const SECRETS: [&str; 5] = ["attack at dawn", "/topsecret/", "launch", "classified", "retreat"];

/// Serializers for the nodes of one system.
trait Formats {
    fn serializer(&self, identity: &Identity) -> Arc<dyn Serializer>;
}

struct Plain;

impl Formats for Plain {
    fn serializer(&self, identity: &Identity) -> Arc<dyn Serializer> {
        Arc::new(PlainSerializer::json(identity.clone()))
    }
}

impl Formats for Pki {
    fn serializer(&self, identity: &Identity) -> Arc<dyn Serializer> {
        let builder =
            SecureSerializer::builder(self.credentials(identity), self.peers.clone(), self.ca.trust().unwrap());
        Arc::new(builder.build().unwrap())
    }
}

/// The messages in a queue, from the management API: properties, headers and body.
fn messages(broker: &Broker, queue: &str) -> Vec<String> {
    let get = json!({ "count": 1000, "ackmode": "ack_requeue_true", "encoding": "base64" });
    let (status, messages) = broker.api("POST", &format!("/api/queues/{}/{queue}/get", broker.vhost()), &get);
    assert_eq!(status, 200, "{messages}");
    let as_text = |message: &Value| {
        let body = openssl::base64::decode_block(message["payload"].as_str().unwrap()).unwrap();
        format!("{} {}", message["properties"], String::from_utf8_lossy(&body))
    };
    messages.as_array().unwrap().iter().map(as_text).collect()
}

async fn connect(broker: &Broker) -> Arc<dyn Transport> {
    Arc::new(broker.connect().await)
}

/// Fills every kind of queue; returns the messages in each.
async fn fill(formats: &dyn Formats) -> Vec<(String, Vec<String>)> {
    let broker = Broker::shared();
    let (fred, desk, tool) =
        (Identity::agent("fred").unwrap(), Identity::mapper("desk").unwrap(), Identity::mapper("tool").unwrap());
    // The agents seal for the mappers, so these come first.
    let (at_desk, at_tool) = (formats.serializer(&desk), formats.serializer(&tool));
    let never = Arc::new(Semaphore::new(0));
    let launch = actor("topsecret").expose("launch", move |_: String| {
        let never = never.clone();
        async move {
            let _ = never.acquire().await;
            reply("retreat")
        }
    });
    let transport = connect(&broker).await;
    // Queues with copies of everything that goes through the exchanges.
    for exchange in [topology::REGISTRATION, topology::HEARTBEAT, topology::ADVERTISE] {
        let path = format!("/api/exchanges/{}/{exchange}", broker.vhost());
        broker.api("PUT", &path, &json!({ "type": "fanout", "durable": true }));
        let queue = format!("spy-{exchange}");
        broker.api("PUT", &format!("/api/queues/{}/{queue}", broker.vhost()), &json!({ "durable": true }));
        let path = format!("/api/bindings/{}/e/{exchange}/q/{queue}", broker.vhost());
        let (status, answer) = broker.api("POST", &path, &json!({}));
        assert_eq!(status, 201, "{answer}");
    }
    let agent = Agent::builder(formats.serializer(&fred), transport)
        .actor(launch)
        .tag("classified".parse().unwrap())
        .ping_time(Duration::from_millis(50))
        .concurrency(1)
        .prefetch(1);
    let agent = agent.start().await.unwrap();
    let mapper = Mapper::builder(at_desk, connect(&broker).await).short_lived().start().await.unwrap();
    wait_until("the agent is known", async || !mapper.agents().await.unwrap().is_empty()).await;
    for _ in 0..5 {
        mapper.push("/topsecret/launch", "attack at dawn").await.unwrap();
    }
    for _ in 0..5 {
        let offline = mapper.request("/topsecret/elsewhere", "attack at dawn").offline_failsafe(true);
        assert!(offline.push().await.unwrap().is_empty());
    }
    connect(&broker).await.declare(&topology::requests()).await.unwrap();
    let proxy = MapperProxy::builder(at_tool, connect(&broker).await).start().await.unwrap();
    for _ in 0..5 {
        proxy.push("/topsecret/launch", "attack at dawn").await.unwrap();
    }
    let queues =
        [&fred.to_string(), topology::OFFLINE, topology::REQUEST, "spy-registration", "spy-heartbeat", "spy-advertise"];
    let mut found = Vec::new();
    for queue in queues {
        let mut waiting = Vec::new();
        wait_until(&format!("{queue} has messages"), async || {
            waiting = messages(&broker, queue);
            !waiting.is_empty()
        })
        .await;
        found.push((queue.to_owned(), waiting));
    }
    drop(agent);
    found
}

fn found_secrets(found: &[(String, Vec<String>)]) -> Vec<(&str, &str)> {
    let all = found.iter().flat_map(|(queue, messages)| messages.iter().map(move |message| (queue, message)));
    all.flat_map(|(queue, message)| {
        SECRETS.iter().filter(move |secret| message.contains(**secret)).map(move |secret| (queue.as_str(), *secret))
    })
    .collect()
}

#[tokio::test]
async fn s11_no_queue_contains_readable_content() {
    let pki = Pki::starting(KeyType::P256, SystemClock.now());
    let found = fill(&pki).await;
    assert!(found.iter().all(|(_, messages)| !messages.is_empty()));
    assert_eq!(found_secrets(&found), []);
    // Without encryption the same search finds everything: the search works.
    let plain = fill(&Plain).await;
    let seen = found_secrets(&plain);
    for queue in ["nanite-fred", topology::OFFLINE, topology::REQUEST] {
        assert!(
            seen.contains(&(queue, "attack at dawn")) && seen.contains(&(queue, "/topsecret/")),
            "{queue}: {seen:?}"
        );
    }
    assert!(seen.contains(&("spy-registration", "classified")), "{seen:?}");
}
