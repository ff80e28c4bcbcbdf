//! The nodes of `tests/vectors/envelope`, with fixed keys, certificates and times.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use nanite::certs::{Certificate, Credentials, PrivateKey, StaticCertificateStore, Trust};
use nanite::clock::Timestamp;
use nanite::packet::{Identity, Role};
use nanite::security::SecureSerializer;
use nanite::serializer::{Audience, InboundQueue};

/// The start time of the readers.
pub const START: Timestamp = Timestamp::from_secs(1_795_499_940);
/// The time when messages arrive.
pub const NOW: Timestamp = Timestamp::from_secs(1_795_500_020);

/// Every kind of queue.
pub const CHANNELS: [InboundQueue; 6] = [
    InboundQueue::AgentInbox,
    InboundQueue::AgentControl,
    InboundQueue::MapperInbox,
    InboundQueue::Presence,
    InboundQueue::Requests,
    InboundQueue::Offline,
];

/// The nodes, the certificates that they know, and their trust.
pub struct World {
    /// Nodes with a certificate of the CA, and as the last a stranger with a certificate of another CA.
    pub nodes: Vec<Credentials>,
    store: Arc<StaticCertificateStore>,
    trust: Arc<Trust>,
}

/// The world, created once.
pub fn world() -> &'static World {
    static WORLD: LazyLock<World> = LazyLock::new(World::new);
    &WORLD
}

/// The root of the project.
pub fn root() -> PathBuf {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    own.ancestors().find(|folder| folder.join("tests/vectors").is_dir()).unwrap().to_owned()
}

/// A file of the project.
pub fn read(path: &str) -> Vec<u8> {
    std::fs::read(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

impl World {
    fn new() -> Self {
        let pem = |name: &str| read(&format!("tests/vectors/envelope/pki/{name}.pem"));
        let names = ["m1", "m2", "fred", "bob", "rsa-m3", "rsa-carl", "stranger"];
        let nodes = names.map(|name| {
            let certificate = Arc::new(Certificate::from_pem(&pem(name)).unwrap());
            let key = PrivateKey::from_pem(&pem(&format!("{name}-key")), None).unwrap();
            Credentials::new(certificate, key).unwrap()
        });
        let store = StaticCertificateStore::new(nodes.iter().map(|node| node.certificate().clone()));
        let trust = Trust::from_pem(&pem("ca")).unwrap();
        Self { nodes: nodes.into(), store: Arc::new(store), trust: Arc::new(trust) }
    }

    /// A new serializer, with an empty replay memory.
    pub fn serializer(&self, node: &Credentials) -> SecureSerializer {
        let builder = SecureSerializer::builder(node.clone(), self.store.clone(), self.trust.clone());
        builder.started_at(START).build().unwrap()
    }

    /// The receivers of a message, without the stranger.
    pub fn readers(&self, to: &Audience) -> Vec<&Credentials> {
        let is_receiver = |identity: &Identity| match to {
            Audience::One(one) => one == identity,
            Audience::Many(many) => many.contains(identity),
            Audience::Mappers => identity.role() == Role::Mapper,
            Audience::Agents => identity.role() == Role::Agent,
            _ => false,
        };
        self.nodes.iter().take(6).filter(|node| is_receiver(node.certificate().identity())).collect()
    }
}
