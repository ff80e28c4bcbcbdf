//! The smallest whole system: an agent with an actor, and a mapper that asks it, in one process.
//!
//!     cargo run --example simple                                        in memory, without a broker
//!     NANITE_BROKER=amqp://localhost cargo run --example simple         through RabbitMQ
//!
//! It makes its certificates itself and keeps them in memory. Nodes on different machines read theirs from files: see
//! `examples/secure`.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Agent, Context, Reply, actor};
use nanite::certs::{CertificateAuthority, Credentials, IssueError, KeyType, StaticCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::Mapper;
use nanite::packet::Identity;
use nanite::request::Event;
use nanite::security::SecureSerializer;
use nanite::serializer::Serializer;
use nanite::transport::{AmqpOptions, AmqpTransport, MemoryBroker, Transport};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Who takes part, and certificates for both.
    let (fred, desk) = (Identity::agent("fred")?, Identity::mapper("desk")?);
    let now = SystemClock.now();
    let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
    let issue = |node: &Identity| -> Result<Credentials, IssueError> {
        ca.issue(node, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now)
    };
    let (of_fred, of_desk) = (issue(&fred)?, issue(&desk)?);
    let known = [&of_fred, &of_desk].map(|credentials| credentials.certificate().clone());
    let store = Arc::new(StaticCertificateStore::new(known));
    let speaking_as = |own: Credentials| -> Result<Arc<dyn Serializer>, Box<dyn Error>> {
        Ok(Arc::new(SecureSerializer::builder(own, store.clone(), ca.trust()?).build()?))
    };

    // What the agent can do: the services /simple/echo, /simple/sum and /simple/count.
    let simple = actor("simple")
        .expose("echo", |text: String| async move { Reply::Ok(text) })
        .expose("sum", |numbers: Vec<i64>| async move { Reply::Ok(numbers.iter().sum::<i64>()) })
        .expose("count", |to: u32, context: Context| async move {
            for number in 1..=to {
                context.emit("counted", number).await?;
            }
            Reply::Ok("done")
        });

    let broker = MemoryBroker::new();
    let agent = Agent::builder(fred, speaking_as(of_fred)?, connect(&broker).await?).actor(simple).build()?;
    let agent = agent.start().await?;
    let mapper = Mapper::builder(desk, speaking_as(of_desk)?, connect(&broker).await?).start().await?;

    // A request gives the answers of all who were asked. The first one waits until the mapper knows an agent.
    let patience = Duration::from_secs(10);
    let answers = mapper.request("/simple/echo", "hello").wait_for_agents(patience).await?;
    for (from, value) in answers.results() {
        println!("/simple/echo: {from} says {value}");
    }
    for (from, value) in mapper.request("/simple/sum", [1, 2, 39]).await?.results() {
        println!("/simple/sum: {from} says {value}");
    }
    // What a handler cannot read is a failure.
    for (from, failure) in mapper.request("/simple/sum", "one and two").await?.failures() {
        println!("/simple/sum: {from} fails: {}", failure.code);
    }
    // Events come as they happen.
    let mut events = mapper.request("/simple/count", 3).events().await?;
    while let Some(event) = events.next().await {
        match event {
            Event::Intermediate { from, key, value, .. } => println!("/simple/count: {from} {key} {value}"),
            Event::Outcome { from, result: Ok(value) } => println!("/simple/count: {from} says {value}"),
            Event::Outcome { result: Err(failure), .. } | Event::Failed(failure) => {
                return Err(failure.to_string().into());
            }
        }
    }
    agent.stop().await?;
    Ok(())
}

/// A connection: to the RabbitMQ that NANITE_BROKER names, or else to the broker in memory.
async fn connect(memory: &MemoryBroker) -> Result<Arc<dyn Transport>, Box<dyn Error>> {
    Ok(match std::env::var("NANITE_BROKER") {
        Ok(url) => Arc::new(AmqpTransport::connect(AmqpOptions::new(&url)?).await?),
        Err(_) => Arc::new(memory.connect()),
    })
}
