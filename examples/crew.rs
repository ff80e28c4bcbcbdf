//! Many agents, and how requests are distributed among them.
//!
//!     cargo run --release --example crew -- 200 1000        200 agents, 1,000 requests

mod common;

use std::collections::BTreeMap;
use std::time::Instant;

use futures_util::future::join_all;
use nanite::agent::{actor, reply};
use nanite::packet::SelectorName;

#[tokio::main]
async fn main() -> common::Result<()> {
    let mut numbers = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let agents = numbers.next().transpose()?.unwrap_or(20);
    let requests = numbers.next().transpose()?.unwrap_or(100);
    let world = common::World::new()?;
    let mut crew = Vec::new();
    for n in 0..agents {
        let deck = actor("deck").expose("swab", move |(): ()| async move { reply(n) });
        crew.push(world.agent(&format!("hand{n}")).await?.status(|| 0.0).actor(deck).start().await?);
    }
    let mapper = world.mapper("captain").await?.start().await?;
    common::wait_for_agents(&mapper, agents).await?;
    for selector in [SelectorName::LeastLoaded, SelectorName::RoundRobin, SelectorName::Random] {
        let started = Instant::now();
        let send = |_| async { mapper.request("/deck/swab", ()).selector(selector).await };
        let mut counts = BTreeMap::new();
        for answers in join_all((0..requests).map(send)).await {
            for (from, _) in answers?.results() {
                *counts.entry(from.clone()).or_insert(0_usize) += 1;
            }
        }
        let (least, most) = (counts.values().min().unwrap_or(&0), counts.values().max().unwrap_or(&0));
        println!(
            "{selector}: {} answers from {} agents, {least} to {most} each, in {:.2} s",
            counts.values().sum::<usize>(),
            counts.len(),
            started.elapsed().as_secs_f64()
        );
    }
    for agent in crew {
        agent.stop().await?;
    }
    Ok(())
}
