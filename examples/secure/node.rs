//! What the two programs share: a node's certificate and key from files, and its way to the broker.

use std::error::Error;
use std::sync::Arc;

use nanite::certs::{CertificateDirectory, DirectoryCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::packet::Identity;
use nanite::security::SecureSerializer;
use nanite::serializer::Serializer;
use nanite::transport::{AmqpOptions, AmqpTransport, Transport};

/// The two arguments of a program: the directory of certificates, and the node's name.
pub fn arguments() -> Result<(String, String), Box<dyn Error>> {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(directory), Some(name), None) => Ok((directory, name)),
        _ => Err(format!("usage: {program} DIRECTORY NAME").into()),
    }
}

/// A serializer that signs with the node's key, encrypts for the nodes whose certificates are in the directory, and believes what
/// the CA in its `ca.pem` has issued.
pub fn serializer(directory: &str, node: &Identity) -> Result<Arc<dyn Serializer>, Box<dyn Error>> {
    let now = SystemClock.now();
    let credentials = CertificateDirectory::new(directory).credentials(node, None, now)?;
    // The store reads the directory again when it changes: a new node is known without a restart.
    let store = DirectoryCertificateStore::open(directory, now)?;
    let trust = store.trust().ok_or("there is no ca.pem in the directory")?;
    Ok(Arc::new(SecureSerializer::builder(credentials, Arc::new(store), trust).build()?))
}

/// A connection to the broker. Its URL may hold a password, so it comes from the environment and not from the command line.
pub async fn connect(node: &Identity) -> Result<Arc<dyn Transport>, Box<dyn Error>> {
    let url = std::env::var("NANITE_BROKER").unwrap_or_else(|_| "amqp://localhost".to_owned());
    Ok(Arc::new(AmqpTransport::connect(AmqpOptions::new(&url)?.name(node.as_str())).await?))
}
