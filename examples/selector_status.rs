//! A status and a selector of one's own: agents say how much disk they have left, and the roomiest gets the work.
//!
//!     cargo run --example selector_status

mod common;

use std::sync::Arc;

use nanite::agent::{actor, reply};
use nanite::mapper::{Candidate, Selector};
use nanite::packet::Service;

/// The agent with the highest status; one that says none is never chosen.
#[derive(Debug)]
struct Roomiest;

impl Selector for Roomiest {
    fn select(&self, _: &Service, candidates: &[Candidate]) -> Vec<usize> {
        let room = |candidate: &Candidate| candidate.record.status.load();
        let known = candidates.iter().enumerate().filter_map(|(at, candidate)| Some((at, room(candidate)?)));
        known.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(at, _)| at).into_iter().collect()
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
    common::know(&mapper, 3).await?;
    let roomiest = Arc::new(Roomiest);
    for (from, answer) in mapper.request("/disk/store", "backup.tar").selector_by(roomiest).await?.results() {
        println!("{from}: {answer}");
    }
    for agent in agents {
        agent.stop().await?;
    }
    Ok(())
}
