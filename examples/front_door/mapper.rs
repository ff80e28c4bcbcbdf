//! The mapper of the README: requests /text/upper.

use std::time::Duration;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let node = nanite::Node::from_dir("certs", "desk")?.connect(&broker()).await?;
    let mapper = node.mapper().start().await?;
    let answers = mapper.request("/text/upper", "hello").wait_for_agents(Duration::from_secs(10)).await?;
    println!("{}", serde_json::to_string(&answers)?);
    Ok(())
}

// Beyond the README: another broker for tests.
fn broker() -> String {
    std::env::var("NANITE_BROKER").unwrap_or_else(|_| "amqp://localhost".to_owned())
}
