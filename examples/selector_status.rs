//! Your own status and selector: agents report their free disk space, and the one with the most gets the work.
//!
//!     cargo run --example selector_status

mod common;

use nanite::agent::{actor, reply};
use nanite::mapper::{Candidate, Selector};
use nanite::packet::Service;

/// Chooses the agent with the highest status; an agent without a status is never chosen.
#[derive(Debug)]
struct MostFreeSpace;

impl Selector for MostFreeSpace {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        let free = |candidate: &Candidate| candidate.record.status.load();
        let with_status = candidates.iter().enumerate().filter_map(|(at, candidate)| Some((at, free(candidate)?)));
        with_status.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(at, _)| at).into_iter().collect()
    }
}

#[tokio::main]
async fn main() -> common::Result<()> {
    let world = common::World::new()?;
    let mut agents = Vec::new();
    for (name, free_gib) in [("a", 12.0), ("b", 512.0), ("c", 80.0)] {
        let store =
            actor("disk").expose("store", move |file: String| async move { reply(format!("{file} is stored")) });
        agents.push(world.agent(name).await?.status(move || free_gib).actor(store).start().await?);
    }
    let mapper = world.mapper("m").await?.start().await?;
    common::wait_for_agents(&mapper, 3).await?;
    for (from, answer) in mapper.request("/disk/store", "backup.tar").custom_selector(MostFreeSpace).await?.results() {
        println!("{from}: {answer}");
    }
    for agent in agents {
        agent.stop().await?;
    }
    Ok(())
}
