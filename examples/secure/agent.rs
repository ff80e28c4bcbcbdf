//! A secure agent: it adds up orders. Run it with a directory of certificates and its name; see the README beside it.

mod node;

use std::error::Error;

use nanite::agent::{Agent, Context, Reply, actor};
use nanite::packet::{Failure, Identity};
use serde::{Deserialize, Serialize};

/// What one line of an order says.
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
    let (directory, name) = node::arguments()?;
    let identity = Identity::agent(&name)?;
    let serializer = node::serializer(&directory, &identity)?;
    let transport = node::connect(&identity).await?;

    let orders = actor("orders").expose("total", |order: Vec<Line>, context: Context| async move {
        // The caller is who signed the request: nobody else can say this name.
        println!("an order of {} lines from {}", order.len(), context.caller());
        let mut cents = 0u64;
        for line in order {
            context.emit("added", &line.item).await?;
            let price = line.pieces.checked_mul(line.cents).and_then(|price| cents.checked_add(price));
            cents = price.ok_or_else(|| Failure::other("too_much", "nobody can pay that"))?;
        }
        Reply::Ok(Total { cents })
    });

    let agent = Agent::builder(identity.clone(), serializer, transport.clone()).actor(orders).build()?.start().await?;
    println!("{identity} is ready; end it with Ctrl-C");
    tokio::signal::ctrl_c().await?;
    // No new work from here on; what runs is finished.
    agent.stop().await?;
    transport.close().await;
    Ok(())
}
