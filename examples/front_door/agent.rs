//! The agent of the README: offers /text/upper.

use nanite::Node;
use nanite::agent::{actor, reply};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let node = Node::from_dir("certs", "fred")?.connect(&broker()).await?;
    let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
    node.agent().actor(text).start().await?.run().await?;
    Ok(())
}

// Beyond the README: another broker for tests.
fn broker() -> String {
    std::env::var("NANITE_BROKER").unwrap_or_else(|_| "amqp://localhost".to_owned())
}
