//! Common code of the two programs: their arguments, and a node with its certificate from files, connected to the broker.

use std::error::Error;

use nanite::Node;

/// The two arguments of a program: the directory of certificates, and the node's name.
fn arguments() -> Result<(String, String), Box<dyn Error>> {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(directory), Some(name), None) => Ok((directory, name)),
        _ => Err(format!("usage: {program} DIRECTORY NAME").into()),
    }
}

/// The node with this name, connected to the broker. The broker's URL may contain a password, so it comes from the environment and not
/// from the command line.
pub async fn connect() -> Result<Node, Box<dyn Error>> {
    let (directory, name) = arguments()?;
    let url = std::env::var("NANITE_BROKER").unwrap_or_else(|_| "amqp://localhost".to_owned());
    Ok(Node::from_dir(directory, &name)?.connect(&url).await?)
}
