//! The nodes of the demonstration: a CA, a mapper, two agents, and the broker in memory between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::report::{Certificates, IssuedCertificate, millis};
use crate::agent::{Agent, Context, Handlers, actor, reply};
use crate::certs::{CertificateAuthority, Credentials, KeyType, StaticCertificateStore};
use crate::cli::error::{CliError, Exit, Result};
use crate::clock::{Clock, SystemClock, Timestamp};
use crate::mapper::Mapper;
use crate::packet::{Identity, InvalidIdentity, Tag};
use crate::security::SecureSerializer;
use crate::serializer::{PlainSerializer, Serializer};
use crate::transport::{MemoryBroker, Tap};

const DOMAIN: &str = "demo.example";
/// The tag of one of the agents.
pub(super) const TAG: &str = "top-secret";
pub(super) const SHOUT: &str = "/message/shout";
pub(super) const WORDS: &str = "/message/words";
pub(super) const NUMBER: &str = "/message/number";
/// The payload of all requests, and the answer of [`SHOUT`].
pub(super) const TEXT: &str = "the eagle lands at midnight";
pub(super) const SHOUTED: &str = "THE EAGLE LANDS AT MIDNIGHT";
/// Far more messages than the demonstration sends.
const MAX_RECORDED_MESSAGES: usize = 10_000;
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(60);

/// An error that ends the demonstration.
pub(super) fn failed<E: std::error::Error + 'static>(what: &'static str) -> impl FnOnce(E) -> CliError {
    move |error| CliError::of(Exit::Failure, &error).context(what)
}

/// A CA and the nodes that it has issued certificates for, all in memory.
pub(super) struct Pki {
    ca: CertificateAuthority,
    store: Arc<StaticCertificateStore>,
    pub tower: Credentials,
    pub ada: Credentials,
    pub bob: Credentials,
}

impl Pki {
    pub(super) fn create() -> Result<Self> {
        let ca = create_ca()?;
        let node = |identity: Result<Identity, InvalidIdentity>| issue(&ca, &identity.map_err(failed("invalid name"))?);
        let (tower, ada, bob) =
            (node(Identity::mapper("tower"))?, node(Identity::agent("ada"))?, node(Identity::agent("bob"))?);
        let store = StaticCertificateStore::new([&tower, &ada, &bob].map(|node| node.certificate().clone()));
        Ok(Self { ca, store: Arc::new(store), tower, ada, bob })
    }

    pub(super) fn serializer(&self, credentials: &Credentials) -> Result<Arc<dyn Serializer>> {
        let trust = self.ca.trust().map_err(failed("cannot trust the CA"))?;
        let serializer = SecureSerializer::builder(credentials.clone(), self.store.clone(), trust).build();
        Ok(Arc::new(serializer.map_err(failed("cannot create a serializer"))?))
    }

    /// A node with the name of another, and a certificate of a different CA.
    pub(super) fn impostor(&self, of: &Credentials) -> Result<Arc<dyn Serializer>> {
        self.serializer(&issue(&create_ca()?, of.certificate().identity())?)
    }

    pub(super) fn certificates(&self, start: Instant) -> Certificates {
        let issued = |name: String, uri: String, not_after: Timestamp| IssuedCertificate {
            name,
            uri,
            key: KeyType::P256.as_str(),
            not_after: not_after.to_string().split('T').next().unwrap_or_default().to_owned(),
        };
        let ca = issued("the CA".to_owned(), format!("spiffe://{}", self.ca.domain()), self.ca.not_after());
        let nodes = [&self.tower, &self.ada, &self.bob].map(|credentials| {
            let (certificate, identity) = (credentials.certificate(), credentials.certificate().identity());
            issued(identity.to_string(), identity.uri(certificate.domain()), certificate.not_after())
        });
        Certificates { issued: std::iter::once(ca).chain(nodes).collect(), millis: millis(start) }
    }
}

fn create_ca() -> Result<CertificateAuthority> {
    CertificateAuthority::create(DOMAIN, KeyType::P256, CertificateAuthority::VALID_FOR, SystemClock.now())
        .map_err(failed("cannot create a CA"))
}

fn issue(ca: &CertificateAuthority, identity: &Identity) -> Result<Credentials> {
    ca.issue(identity, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, SystemClock.now())
        .map_err(failed("cannot issue a certificate"))
}

/// A broker, a mapper and two agents.
pub(super) struct System {
    pub broker: MemoryBroker,
    pub tap: Tap,
    pub mapper: Mapper,
    pub ada: RunningAgent,
    pub bob: RunningAgent,
}

pub(super) struct RunningAgent {
    pub agent: Agent,
    calls: Arc<AtomicU64>,
}

impl RunningAgent {
    /// How often one of its handlers was called.
    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }
}

impl System {
    /// Nodes that sign and encrypt.
    pub(super) async fn secure(pki: &Pki) -> Result<Self> {
        Self::start(pki, |credentials| pki.serializer(credentials)).await
    }

    /// Nodes with the same names that do not: for comparison.
    pub(super) async fn plain(pki: &Pki) -> Result<Self> {
        let plain = |credentials: &Credentials| -> Result<Arc<dyn Serializer>> {
            Ok(Arc::new(PlainSerializer::json(credentials.certificate().identity().clone())))
        };
        Self::start(pki, plain).await
    }

    async fn start(pki: &Pki, serializer: impl Fn(&Credentials) -> Result<Arc<dyn Serializer>>) -> Result<Self> {
        let broker = MemoryBroker::new();
        let tap = broker.tap(MAX_RECORDED_MESSAGES);
        let ada = start_agent(&broker, serializer(&pki.ada)?, 0.2, Some(TAG)).await?;
        let bob = start_agent(&broker, serializer(&pki.bob)?, 0.9, None).await?;
        let mapper =
            Mapper::builder(serializer(&pki.tower)?, broker.connect()).request_timeout(Duration::from_secs(30));
        let mapper = mapper.start().await.map_err(failed("cannot start the mapper"))?;
        let both_registered = async {
            loop {
                let registered = mapper.agent_registered();
                match mapper.agents().await {
                    Ok(agents) if agents.len() < 2 => registered.await,
                    agents => break agents.map_err(failed("cannot list the agents")),
                }
            }
        };
        match tokio::time::timeout(REGISTRATION_TIMEOUT, both_registered).await {
            Ok(agents) => agents?,
            Err(_) => return Err(CliError::new(Exit::Failure, "the agents did not register with the mapper")),
        };
        Ok(Self { broker, tap, mapper, ada, bob })
    }
}

async fn start_agent(
    broker: &MemoryBroker,
    serializer: Arc<dyn Serializer>,
    load: f64,
    tag: Option<&str>,
) -> Result<RunningAgent> {
    let calls = Arc::new(AtomicU64::new(0));
    let mut agent =
        Agent::builder(serializer, broker.connect()).actor(handlers(&calls)).status(move || load).concurrency(64);
    if let Some(tag) = tag {
        agent = agent.tag(tag.parse::<Tag>().map_err(failed("invalid tag"))?);
    }
    Ok(RunningAgent { agent: agent.start().await.map_err(failed("cannot start an agent"))?, calls })
}

fn handlers(calls: &Arc<AtomicU64>) -> Handlers {
    let counter = || {
        let calls = calls.clone();
        move || calls.fetch_add(1, Ordering::SeqCst)
    };
    let (shout, words, number) = (counter(), counter(), counter());
    actor("message")
        .expose("shout", move |text: String| {
            shout();
            async move { reply(text.to_uppercase()) }
        })
        .expose("words", move |text: String, context: Context| {
            words();
            async move {
                let mut count = 0;
                for word in text.split_whitespace() {
                    count += 1;
                    context.emit(format!("word {count}"), word).await?;
                }
                reply(format!("{count} words"))
            }
        })
        .expose("number", move |text: String| {
            number();
            async move { text.parse::<i64>() }
        })
}
