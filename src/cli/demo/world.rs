//! Who takes part: a CA, a mapper, two agents, and the broker in memory between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::facts::{Certificates, Issued};
use super::stopped;
use crate::agent::{Agent, Context, HandlerResult, Handlers, actor};
use crate::certs::{CertificateAuthority, Credentials, KeyType, StaticCertificateStore};
use crate::cli::error::{CliError, Exit};
use crate::clock::{Clock, SystemClock};
use crate::mapper::Mapper;
use crate::packet::{Identity, Service, Tag};
use crate::security::SecureSerializer;
use crate::serializer::{PlainSerializer, Serializer};
use crate::transport::{MemoryBroker, Tap};

/// The trust domain.
const DOMAIN: &str = "demo.example";
/// The tag that one of the agents carries.
pub(super) const TAG: &str = "top-secret";
/// What is asked, and what is answered.
pub(super) const SHOUT: &str = "/message/shout";
pub(super) const WORDS: &str = "/message/words";
pub(super) const NUMBER: &str = "/message/number";
pub(super) const TEXT: &str = "the eagle lands at midnight";
pub(super) const SHOUTED: &str = "THE EAGLE LANDS AT MIDNIGHT";
/// How many messages of one pass are looked at: far more than there are.
const LOOKED_AT: usize = 10_000;
/// How long the mapper may take to know the agents.
const PATIENCE: Duration = Duration::from_secs(10);

/// A CA and the nodes that it has issued certificates for. All of it is in memory.
pub(super) struct Pki {
    ca: CertificateAuthority,
    store: Arc<StaticCertificateStore>,
    pub tower: Credentials,
    pub ada: Credentials,
    pub bob: Credentials,
}

impl Pki {
    pub fn make() -> Result<Self, CliError> {
        let ca = authority(DOMAIN)?;
        let tower = issue(&ca, &identity(Identity::mapper("tower"))?)?;
        let ada = issue(&ca, &identity(Identity::agent("ada"))?)?;
        let bob = issue(&ca, &identity(Identity::agent("bob"))?)?;
        let known = [&tower, &ada, &bob].map(|credentials| credentials.certificate().clone());
        Ok(Self { ca, store: Arc::new(StaticCertificateStore::new(known)), tower, ada, bob })
    }

    /// A serializer for a node with these credentials.
    pub fn serializer(&self, credentials: &Credentials) -> Result<Arc<dyn Serializer>, CliError> {
        let trust = self.ca.trust().map_err(stopped("cannot trust the CA"))?;
        let serializer = SecureSerializer::builder(credentials.clone(), self.store.clone(), trust).build();
        Ok(Arc::new(serializer.map_err(stopped("cannot make a serializer"))?))
    }

    /// A node with the name of another, and a certificate of a CA of its own.
    pub fn stranger(&self, name: &Identity) -> Result<Arc<dyn Serializer>, CliError> {
        self.serializer(&issue(&authority(DOMAIN)?, name)?)
    }

    pub fn facts(&self) -> Certificates {
        let day = |at: crate::clock::Timestamp| at.to_string().split('T').next().unwrap_or_default().to_owned();
        let ca = Issued {
            name: "the CA".to_owned(),
            uri: format!("spiffe://{}", self.ca.domain()),
            key: KeyType::P256.as_str(),
            not_after: day(self.ca.not_after()),
        };
        let nodes = [&self.tower, &self.ada, &self.bob].map(|credentials| {
            let certificate = credentials.certificate();
            Issued {
                name: certificate.identity().to_string(),
                uri: certificate.identity().uri(certificate.domain()),
                key: KeyType::P256.as_str(),
                not_after: day(certificate.not_after()),
            }
        });
        Certificates { issued: std::iter::once(ca).chain(nodes).collect(), millis: 0.0 }
    }
}

fn authority(domain: &str) -> Result<CertificateAuthority, CliError> {
    CertificateAuthority::create(domain, KeyType::P256, CertificateAuthority::VALID_FOR, SystemClock.now())
        .map_err(stopped("cannot make a CA"))
}

fn issue(ca: &CertificateAuthority, identity: &Identity) -> Result<Credentials, CliError> {
    ca.issue(identity, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, SystemClock.now())
        .map_err(stopped("cannot issue a certificate"))
}

fn identity(made: Result<Identity, crate::packet::InvalidIdentity>) -> Result<Identity, CliError> {
    made.map_err(stopped("cannot name a node"))
}

/// A broker, a mapper and two agents.
pub(super) struct World {
    pub broker: MemoryBroker,
    pub tap: Tap,
    pub mapper: Mapper,
    pub ada: Worker,
    pub bob: Worker,
}

/// An agent at work.
pub(super) struct Worker {
    pub identity: Identity,
    pub handle: Agent,
    ran: Arc<AtomicU64>,
}

impl Worker {
    /// How often a handler of it ran.
    pub fn ran(&self) -> u64 {
        self.ran.load(Ordering::SeqCst)
    }
}

impl World {
    /// Everybody signs and encrypts.
    pub async fn secure(pki: &Pki) -> Result<Self, CliError> {
        Self::start(|credentials| pki.serializer(credentials), [&pki.tower, &pki.ada, &pki.bob]).await
    }

    /// Nobody does, with the same names: what the secure one is held against.
    pub async fn plain(pki: &Pki) -> Result<Self, CliError> {
        let plain = |credentials: &Credentials| -> Result<Arc<dyn Serializer>, CliError> {
            Ok(Arc::new(PlainSerializer::json(credentials.certificate().identity().clone())))
        };
        Self::start(plain, [&pki.tower, &pki.ada, &pki.bob]).await
    }

    async fn start(
        speaks: impl Fn(&Credentials) -> Result<Arc<dyn Serializer>, CliError>,
        [tower, ada, bob]: [&Credentials; 3],
    ) -> Result<Self, CliError> {
        let broker = MemoryBroker::new();
        let tap = broker.tap(LOOKED_AT);
        let ada = start_agent(&broker, ada, speaks(ada)?, 0.2, Some(TAG)).await?;
        let bob = start_agent(&broker, bob, speaks(bob)?, 0.9, None).await?;
        let mapper = Mapper::builder(speaks(tower)?, Arc::new(broker.connect()))
            .request_timeout(Duration::from_secs(5))
            .start()
            .await
            .map_err(stopped("cannot start the mapper"))?;
        let both_known = async {
            loop {
                let registered = mapper.agent_registered();
                if mapper.agents().await.map_err(stopped("cannot look at the agents"))?.len() >= 2 {
                    return Ok(());
                }
                registered.await;
            }
        };
        match tokio::time::timeout(PATIENCE, both_known).await {
            Ok(known) => known?,
            Err(_) => return Err(CliError::new(Exit::Failure, "the mapper does not come to know the agents")),
        }
        Ok(Self { broker, tap, mapper, ada, bob })
    }
}

async fn start_agent(
    broker: &MemoryBroker,
    credentials: &Credentials,
    serializer: Arc<dyn Serializer>,
    load: f64,
    tag: Option<&str>,
) -> Result<Worker, CliError> {
    let identity = credentials.certificate().identity().clone();
    let ran = Arc::new(AtomicU64::new(0));
    let mut agent = Agent::builder(serializer, Arc::new(broker.connect()))
        .actor(messages(&ran))
        .status(move || load)
        .concurrency(64);
    if let Some(tag) = tag {
        agent = agent.tag(tag.parse::<Tag>().map_err(stopped("cannot name a tag"))?);
    }
    let handle = agent.start().await.map_err(stopped("cannot start an agent"))?;
    Ok(Worker { identity, handle, ran })
}

/// What the agents can do.
fn messages(ran: &Arc<AtomicU64>) -> Handlers {
    let count = |ran: &Arc<AtomicU64>| {
        let ran = ran.clone();
        move || {
            ran.fetch_add(1, Ordering::SeqCst);
        }
    };
    let (shout, words, number) = (count(ran), count(ran), count(ran));
    actor("message")
        .expose("shout", move |text: String| {
            shout();
            async move { HandlerResult::Ok(text.to_uppercase()) }
        })
        .expose("words", move |text: String, context: Context| {
            words();
            async move {
                let mut count = 0;
                for word in text.split_whitespace() {
                    count += 1;
                    context.emit(format!("word {count}"), word).await?;
                }
                HandlerResult::Ok(format!("{count} words"))
            }
        })
        .expose("number", move |text: String| {
            number();
            async move { text.parse::<i64>() }
        })
}

/// A service by its name.
pub(super) fn service(name: &str) -> Result<Service, CliError> {
    name.parse().map_err(stopped("cannot name a service"))
}
