//! A secure mapper: it waits for two agents, sends both the same order, and prints their answers. Run it with a directory of
//! certificates and its name; see README.md in this folder.

mod node;

use std::error::Error;
use std::time::Duration;

use nanite::mapper::{Mapper, StateError};
use nanite::packet::SelectorName;
use nanite::request::Event;
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).init();
    let node = node::connect().await?;
    let mapper = node.mapper().start().await?;
    tokio::time::timeout(Duration::from_secs(20), wait_for_agents(&mapper, 2)).await??;

    let order = json!([
        { "item": "bolts", "pieces": 40, "cents": 12 },
        { "item": "a hammer", "pieces": 1, "cents": 1999 },
    ]);
    let mut events = mapper
        .request("/orders/total", order)
        .selector(SelectorName::All)
        .timeout(Duration::from_secs(5))
        .events()
        .await?;
    while let Some(event) = events.next().await {
        match event {
            Event::Intermediate { from, key, value, .. } => println!("{from} {key} {value}"),
            Event::Outcome { from, result: Ok(total), .. } => println!("{from} answers {total}"),
            Event::Outcome { from, result: Err(failure), .. } => println!("{from} fails: {failure}"),
            Event::Failed(failure) => return Err(failure.to_string().into()),
            _ => {}
        }
    }
    node.close().await;
    Ok(())
}

/// Waits until the mapper knows this many agents. When it started, it asked all running agents to register; new ones register too.
async fn wait_for_agents(mapper: &Mapper, wanted: usize) -> Result<(), StateError> {
    loop {
        let registered = mapper.agent_registered();
        let agents = mapper.agents().await?;
        if agents.len() >= wanted {
            return Ok(());
        }
        println!("{} of {wanted} agents are known", agents.len());
        registered.await;
    }
}
