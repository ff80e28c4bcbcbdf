//! The smallest complete system: an agent with an actor, and a mapper that sends it requests, in one process.
//!
//!     cargo run --example simple                                        in memory, without a broker
//!     NANITE_BROKER=amqp://localhost cargo run --example simple         through RabbitMQ
//!
//! It creates its certificates in memory. Nodes on different machines read theirs from files: see `examples/secure`.

use std::error::Error;
use std::time::Duration;

use nanite::agent::{Context, actor, reply};
use nanite::certs::{CertificateAuthority, KeyType};
use nanite::clock::{Clock, SystemClock};
use nanite::packet::Identity;
use nanite::request::Event;
use nanite::transport::MemoryBroker;
use nanite::{Node, NodeBuilder, NodeError};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // A CA, and a certificate for each node.
    let now = SystemClock.now();
    let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    let issue = |identity: Identity| ca.issue(&identity, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now);
    let (fred, desk) = (issue(Identity::agent("fred")?)?, issue(Identity::mapper("desk")?)?);
    let broker = MemoryBroker::new();
    let fred = connect(Node::from_credentials(fred, ca.trust()?), &broker).await?;
    let desk = connect(Node::from_credentials(desk, ca.trust()?), &broker).await?;

    // The agent's services: /simple/echo, /simple/sum and /simple/count.
    let simple = actor("simple")
        .expose("echo", |text: String| async move { reply(text) })
        .expose("sum", |numbers: Vec<i64>| async move { reply(numbers.iter().sum::<i64>()) })
        .expose("count", |to: u32, context: Context| async move {
            for number in 1..=to {
                context.emit("counted", number).await?;
            }
            reply("done")
        });

    let agent = fred.agent().actor(simple).start().await?;
    let mapper = desk.mapper().start().await?;

    // A request returns the answers of all its targets. The first request waits until the mapper knows an agent.
    let answers = mapper.request("/simple/echo", "hello").wait_for_agents(Duration::from_secs(10)).await?;
    for (from, value) in answers.results() {
        println!("/simple/echo: {from} says {value}");
    }
    for (from, value) in mapper.request("/simple/sum", [1, 2, 39]).await?.results() {
        println!("/simple/sum: {from} says {value}");
    }
    // A payload of the wrong type is a failure.
    for (from, failure) in mapper.request("/simple/sum", "one and two").await?.failures() {
        println!("/simple/sum: {from} fails: {}", failure.code);
    }
    // Events arrive as they happen.
    let mut events = mapper.request("/simple/count", 3).events().await?;
    while let Some(event) = events.next().await {
        match event {
            Event::Intermediate { from, key, value, .. } => println!("/simple/count: {from} {key} {value}"),
            Event::Outcome { from, result: Ok(value), .. } => println!("/simple/count: {from} says {value}"),
            Event::Outcome { result: Err(failure), .. } | Event::Failed(failure) => {
                return Err(failure.to_string().into());
            }
            _ => {}
        }
    }
    agent.stop().await?;
    Ok(())
}

/// A connection to the RabbitMQ that NANITE_BROKER names, or else to the broker in memory.
async fn connect(node: NodeBuilder, memory: &MemoryBroker) -> Result<Node, NodeError> {
    match std::env::var("NANITE_BROKER") {
        Ok(url) => node.connect(&url).await,
        Err(_) => node.attach(memory.connect()),
    }
}
