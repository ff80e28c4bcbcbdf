//! An agent that has other agents do part of its work: it sends them requests through a mapper.
//!
//!     cargo run --example client_agent                                        in memory, without a broker
//!     NANITE_BROKER=amqp://localhost cargo run --example client_agent         through RabbitMQ

mod common;

use nanite::agent::{Context, actor, reply};
use nanite::packet::SelectorName;

#[tokio::main]
async fn main() -> common::Result<()> {
    let world = common::World::new()?;
    let stock = |place: &'static str| {
        actor("stock").expose("count", move |thing: String, context: Context| async move {
            // The caller is the agent that makes the request, not the mapper that dispatches it.
            println!("{place}: {} asks for {thing}", context.caller());
            reply(thing.len())
        })
    };
    let cook = actor("cook").expose("soup", |(): (), context: Context| async move {
        let answers = context.proxy().request("/stock/count", "onions").selector(SelectorName::All).await?;
        let onions: u64 = answers.results().filter_map(|(_, count)| count.as_u64()).sum();
        reply(format!("soup of {onions} onions"))
    });
    let fridge = world.agent("fridge").await?.actor(stock("fridge")).start().await?;
    let cellar = world.agent("cellar").await?.actor(stock("cellar")).start().await?;
    let cook = world.agent("cook").await?.actor(cook).start().await?;
    let mapper = world.mapper("house").await?.start().await?;
    common::wait_for_agents(&mapper, 3).await?;
    for (from, soup) in mapper.request("/cook/soup", ()).await?.results() {
        println!("{from}: {soup}");
    }
    for agent in [fridge, cellar, cook] {
        agent.stop().await?;
    }
    Ok(())
}
