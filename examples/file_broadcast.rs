//! Sends a file to every agent that subscribed to its domain.
//!
//!     cargo run --example file_broadcast -- FILE
//!
//! The agents write into directories below a temporary one, which is removed at the end.

mod common;

use nanite::files::{Broadcast, FileRoot};
use nanite::packet::Tag;

#[tokio::main]
async fn main() -> common::Result<()> {
    let file = std::env::args_os().nth(1).ok_or("usage: file_broadcast FILE")?;
    let photos: Tag = "photos".parse()?;
    let world = common::World::new()?;
    let place = std::env::temp_dir().join(format!("nanite-example-{}", std::process::id()));
    let mut agents = Vec::new();
    for name in ["a", "b"] {
        let root = place.join(name);
        std::fs::create_dir_all(&root)?;
        let files = FileRoot::new(&root, [photos.clone()])?
            .on_file(|file| println!("{} has come from {}: {} bytes", file.path.display(), file.sender, file.size));
        agents.push(world.agent(name).await?.files(files).start().await?);
    }
    // An agent that accepts no files.
    agents.push(world.agent("c").await?.start().await?);
    let mapper = world.mapper("m").await?.start().await?;
    common::wait_for_agents(&mapper, 3).await?;
    let answers = mapper.broadcast(Broadcast::new(file, photos), |_| ()).await?;
    println!("{} have it, {} do not", answers.results().count(), answers.failures().count());
    for agent in agents {
        agent.stop().await?;
    }
    std::fs::remove_dir_all(place)?;
    Ok(())
}
