//! The front door: a node with its credentials and a connection, from which agents, mappers and proxies are started.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::agent::{Agent, AgentBuilder};
use crate::audit::AuditLog;
use crate::certs::{
    CertificateDirectory, CertificateStore, Credentials, DirectoryCertificateStore, DirectoryError,
    StaticCertificateStore, Trust, TrustStore,
};
use crate::clock::{Clock, SystemClock};
use crate::mapper::{Mapper, MapperBuilder};
use crate::packet::{Identity, InvalidIdentity, Role};
use crate::policy::Policy;
use crate::proxy::{MapperProxy, MapperProxyBuilder};
use crate::security::{BuildError, SecureSerializer, SecureSerializerBuilder};
use crate::serializer::{Codec, Serializer};
use crate::transport::Transport;
#[cfg(feature = "amqp")]
use crate::transport::{AmqpOptions, AmqpTransport, TransportError};

/// A node: its identity, by its certificate, and its connection to the broker. Start one [agent](Node::agent), [mapper](Node::mapper) or
/// [proxy](Node::proxy) from it: they share the queues of its identity. Cloning it is cheap.
///
/// ```no_run
/// use nanite::Node;
/// use nanite::agent::{actor, reply};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let node = Node::from_dir("certs", "fred")?.connect("amqp://localhost").await?;
/// let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
/// node.agent().actor(text).start().await?.run().await?;
/// # Ok(())
/// # }
/// ```
///
/// Without files and without a broker, as in a test:
///
/// ```
/// use nanite::Node;
/// use nanite::agent::{actor, reply};
/// use nanite::certs::{CertificateAuthority, KeyType};
/// use nanite::clock::{Clock, SystemClock};
/// use nanite::packet::Identity;
/// use nanite::transport::MemoryBroker;
/// use std::time::Duration;
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let now = SystemClock.now();
/// let ca = CertificateAuthority::create("example.org", KeyType::P256, CertificateAuthority::VALID_FOR, now)?;
/// let issue = |identity: &Identity| ca.issue(identity, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now);
/// let fred = issue(&Identity::agent("fred")?)?;
/// let desk = issue(&Identity::mapper("desk")?)?;
///
/// let broker = MemoryBroker::new();
/// let fred = Node::from_credentials(fred, ca.trust()?).attach(broker.connect())?;
/// let desk = Node::from_credentials(desk, ca.trust()?).attach(broker.connect())?;
///
/// let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
/// let agent = fred.agent().actor(text).start().await?;
/// let mapper = desk.mapper().start().await?;
/// let answers = mapper.request("/text/upper", "hello").wait_for_agents(Duration::from_secs(10)).await?;
/// assert!(answers.results().all(|(_, value)| value.as_str() == Some("HELLO")));
/// agent.stop().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Node {
    serializer: Arc<dyn Serializer>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    policy: Option<Arc<dyn Policy>>,
    audit: Option<AuditLog>,
}

/// Configures a [`Node`], then connects it. Everything has a default; see [`Node::from_dir`] and [`Node::from_credentials`].
#[derive(Debug)]
#[must_use = "a node does nothing until it is connected"]
pub struct NodeBuilder {
    serializer: SecureSerializerBuilder,
    identity: Identity,
    clock: Arc<dyn Clock>,
    policy: Option<Arc<dyn Policy>>,
    audit: Option<AuditLog>,
}

/// Why a node cannot be built or connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The name is not a valid name of a node.
    #[error("invalid node name")]
    Name(#[from] InvalidIdentity),
    /// The directory has certificates of an agent and of a mapper of this name.
    #[error("{} has certificates of an agent and of a mapper named {name}; use \"nanite-{name}\" or \"mapper-{name}\"", path.display())]
    Ambiguous {
        /// The directory.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A file in the directory is missing or cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The options of the serializer do not fit together.
    #[error(transparent)]
    Serializer(#[from] BuildError),
    /// The broker cannot be reached, or refuses.
    #[cfg(feature = "amqp")]
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl Node {
    /// A node with the certificate and key of `name` from a directory that `nanite certs` made. It trusts the CA in `ca.pem`, respects
    /// the revocation lists in `crl.pem`, and learns the certificates of its peers from their messages. Certificates of peers that are in the
    /// directory are known from the start. The directory is read now; later changes to the certificates of peers, the CA and the revocation
    /// lists take effect by themselves.
    ///
    /// `name` is the name in the certificate, such as `fred`. Where an agent and a mapper have the same name, write `nanite-fred` or
    /// `mapper-fred`.
    ///
    /// # Errors
    /// [`NodeError`] names the file that is missing or cannot be used.
    pub fn from_dir(path: impl AsRef<Path>, name: &str) -> Result<NodeBuilder, NodeError> {
        Self::read_dir(path.as_ref(), name, None)
    }

    /// The same as [`from_dir`](Self::from_dir), for a key that is encrypted under a passphrase.
    ///
    /// # Errors
    /// [`NodeError`] names the file that is missing or cannot be used.
    pub fn from_dir_with_passphrase(
        path: impl AsRef<Path>,
        name: &str,
        passphrase: impl AsRef<[u8]>,
    ) -> Result<NodeBuilder, NodeError> {
        Self::read_dir(path.as_ref(), name, Some(passphrase.as_ref()))
    }

    fn read_dir(path: &Path, name: &str, passphrase: Option<&[u8]>) -> Result<NodeBuilder, NodeError> {
        let now = SystemClock.now();
        let directory = CertificateDirectory::new(path);
        let identity = find_identity(&directory, name)?;
        let credentials = directory.credentials(&identity, passphrase, now)?;
        let older = directory.previous_credentials(&identity, passphrase, now)?;
        let files = DirectoryCertificateStore::open(path, now)?;
        let trust = match files.trust() {
            Some(trust) => trust,
            None => Arc::new(directory.trust()?),
        };
        let store = TrustStore::new(trust.clone()).with_store(Arc::new(files));
        let mut serializer = SecureSerializer::builder(credentials, store, trust);
        if let Some(older) = older {
            serializer = serializer.previous_credentials(older);
        }
        Ok(NodeBuilder::new(identity, serializer))
    }

    /// A node with these credentials, which trusts `trust` and learns the certificates of its peers from their messages.
    pub fn from_credentials(credentials: Credentials, trust: impl Into<Arc<Trust>>) -> NodeBuilder {
        let trust = trust.into();
        let own = StaticCertificateStore::new([credentials.certificate().clone()]);
        let store = TrustStore::new(trust.clone()).with_store(Arc::new(own));
        Self::with_store(credentials, trust, store)
    }

    /// A node with these credentials, which trusts `trust` and finds the certificates of its peers in `store`: your own, or one of
    /// [`certs`](crate::certs). A [`DirectoryCertificateStore`] alone accepts only the peers whose certificates are in its directory.
    pub fn with_store(
        credentials: Credentials,
        trust: impl Into<Arc<Trust>>,
        store: impl CertificateStore + 'static,
    ) -> NodeBuilder {
        let identity = credentials.certificate().identity().clone();
        NodeBuilder::new(identity, SecureSerializer::builder(credentials, store, trust))
    }

    /// A node with a serializer of its own, such as a [`PlainSerializer`](crate::serializer::PlainSerializer), which neither signs nor
    /// encrypts.
    pub fn new(serializer: impl Serializer + 'static, transport: impl Transport + 'static) -> Self {
        Self {
            serializer: Arc::new(serializer),
            transport: Arc::new(transport),
            clock: Arc::new(SystemClock),
            policy: None,
            audit: None,
        }
    }

    /// An agent with the identity of this node: add actors, then start it. The identity must be an agent's.
    pub fn agent(&self) -> AgentBuilder {
        let mut agent = Agent::builder(self.serializer.clone(), self.transport.clone()).clock(self.clock.clone());
        if let Some(policy) = &self.policy {
            agent = agent.policy(policy.clone());
        }
        if let Some(audit) = &self.audit {
            agent = agent.audit(audit.clone());
        }
        agent
    }

    /// A mapper with the identity of this node: start it, then make requests. The identity must be a mapper's.
    pub fn mapper(&self) -> MapperBuilder {
        let mut mapper = Mapper::builder(self.serializer.clone(), self.transport.clone()).clock(self.clock.clone());
        if let Some(policy) = &self.policy {
            mapper = mapper.policy(policy.clone());
        }
        if let Some(audit) = &self.audit {
            mapper = mapper.audit(audit.clone());
        }
        mapper
    }

    /// A proxy with the identity of this node: it has its requests dispatched by a mapper that runs elsewhere.
    pub fn proxy(&self) -> MapperProxyBuilder {
        let mut proxy = MapperProxy::builder(self.serializer.clone(), self.transport.clone()).clock(self.clock.clone());
        if let Some(audit) = &self.audit {
            proxy = proxy.audit(audit.clone());
        }
        proxy
    }

    /// The identity of this node.
    pub fn identity(&self) -> &Identity {
        self.serializer.identity()
    }

    /// The serializer.
    pub fn serializer(&self) -> &Arc<dyn Serializer> {
        &self.serializer
    }

    /// The transport.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Closes the connection to the broker. Stop agents before: their running jobs cannot answer afterwards.
    pub async fn close(&self) {
        self.transport.close().await;
    }
}

impl NodeBuilder {
    fn new(identity: Identity, serializer: SecureSerializerBuilder) -> Self {
        Self { serializer, identity, clock: Arc::new(SystemClock), policy: None, audit: None }
    }

    /// Encodes bodies in this codec; MessagePack by default where it is compiled in, else JSON.
    pub fn codec(self, codec: impl Codec + 'static) -> Self {
        self.configure(|serializer| serializer.codec(codec))
    }

    /// Changes any option of the serializer, such as its replay limits.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), nanite::NodeError> {
    /// use std::time::Duration;
    ///
    /// let node = nanite::Node::from_dir("certs", "fred")?
    ///     .configure(|serializer| serializer.rotation_grace_period(Duration::from_secs(60)));
    /// # drop(node);
    /// # Ok(())
    /// # }
    /// ```
    pub fn configure(mut self, change: impl FnOnce(SecureSerializerBuilder) -> SecureSerializerBuilder) -> Self {
        self.serializer = change(self.serializer);
        self
    }

    /// The clock; the system clock by default.
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self.serializer = self.serializer.started_at(self.clock.now());
        self
    }

    /// Authorizes registrations and requests, in agents and mappers of this node; by default every node with a valid certificate may do
    /// everything that its role allows.
    pub fn policy(mut self, policy: impl Policy + 'static) -> Self {
        self.policy = Some(Arc::new(policy));
        self
    }

    /// Records every accepted and refused message, and every decision, in this log; none by default.
    pub fn audit(mut self, log: AuditLog) -> Self {
        self.audit = Some(log);
        self
    }

    /// The identity of the node.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Connects to RabbitMQ. The URL is `amqp://USER:PASSWORD@HOST:PORT/VHOST`; for TLS and client certificates use
    /// [`connect_with`](Self::connect_with).
    ///
    /// # Errors
    /// [`NodeError`] when an option is wrong or the broker cannot be reached.
    #[cfg(feature = "amqp")]
    pub async fn connect(self, url: &str) -> Result<Node, NodeError> {
        let options = AmqpOptions::new(url)?;
        self.connect_with(options).await
    }

    /// Connects to RabbitMQ with these options. The connection is named after the node.
    ///
    /// # Errors
    /// [`NodeError`] when an option is wrong or the broker cannot be reached.
    #[cfg(feature = "amqp")]
    pub async fn connect_with(self, options: AmqpOptions) -> Result<Node, NodeError> {
        let options = options.connection_name(self.identity.as_str());
        let (serializer, clock, policy, audit) = (self.serializer.build()?, self.clock, self.policy, self.audit);
        let transport = Arc::new(AmqpTransport::connect(options).await?);
        Ok(Node { serializer: Arc::new(serializer), transport, clock, policy, audit })
    }

    /// Uses this transport, such as a connection to a [`MemoryBroker`](crate::transport::MemoryBroker) or one of your own.
    ///
    /// # Errors
    /// [`NodeError::Serializer`] when an option is wrong.
    pub fn attach(self, transport: impl Transport + 'static) -> Result<Node, NodeError> {
        Ok(Node {
            serializer: Arc::new(self.serializer.build()?),
            transport: Arc::new(transport),
            clock: self.clock,
            policy: self.policy,
            audit: self.audit,
        })
    }
}

/// The identity with this name in a directory: `nanite-NAME`, `mapper-NAME`, or a name that only one role has a certificate for.
fn find_identity(directory: &CertificateDirectory, name: &str) -> Result<Identity, NodeError> {
    if let Ok(identity) = name.parse::<Identity>()
        && directory.certificate_path(&identity)?.exists()
    {
        return Ok(identity);
    }
    let (agent, mapper) = (Identity::new(Role::Agent, name)?, Identity::new(Role::Mapper, name)?);
    match (directory.certificate_path(&agent)?.exists(), directory.certificate_path(&mapper)?.exists()) {
        (true, true) => Err(NodeError::Ambiguous { path: directory.path().to_owned(), name: name.to_owned() }),
        (false, true) => Ok(mapper),
        // When there is neither, reading the agent's certificate says so.
        (_, false) => Ok(agent),
    }
}
