//! A secure agent: it adds up orders. Run it with a directory of certificates and its name; see README.md in this folder.

mod node;

use std::error::Error;

use nanite::agent::{Context, actor, reply};
use nanite::packet::Failure;
use serde::{Deserialize, Serialize};

/// One line of an order.
#[derive(Deserialize)]
struct Line {
    item: String,
    pieces: u64,
    cents: u64,
}

/// The answer.
#[derive(Serialize)]
struct Total {
    cents: u64,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Refused messages are logged as warnings.
    tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_writer(std::io::stderr).init();
    let node = node::connect().await?;

    let orders = actor("orders").expose("total", |order: Vec<Line>, context: Context| async move {
        // The caller is the verified signer of the request: no other node can use this name.
        println!("an order of {} lines from {}", order.len(), context.caller());
        let mut cents = 0u64;
        for line in order {
            context.emit("added", &line.item).await?;
            let price = line.pieces.checked_mul(line.cents).and_then(|price| cents.checked_add(price));
            cents = price.ok_or_else(|| Failure::other("too_much", "the total is too large"))?;
        }
        reply(Total { cents })
    });

    let agent = node.agent().actor(orders).start().await?;
    println!("{} is ready; stop it with Ctrl-C", node.identity());
    agent.run().await?;
    node.close().await;
    Ok(())
}
