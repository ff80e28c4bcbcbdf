//! s04: what a running mapper does when a CA between it and its agents is revoked, and when a revocation list becomes out of date while
//! it runs: real agents with certificates of two CAs below one root, a scripted clock, and the mapper's audit log as the witness.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nanite::agent::{Agent, actor};
use nanite::audit::{AuditLog, AuditOptions};
use nanite::certs::{
    Certificate, CertificateStore, Credentials, PrivateKey, StaticCertificateStore, Trust, TrustStore,
};
use nanite::clock::{Clock, ManualClock, Timestamp};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, Identity, Payload};
use nanite::security::SecureSerializer;
use nanite::transport::MemoryBroker;
use openssl::nid::Nid;
use openssl::x509::{X509, X509Crl};
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::forge::{Forge, Forged};
use crate::harness::pki::{T0, agent, at, mapper};
use crate::harness::system::knows;
use crate::harness::{PATIENCE, wait_until};

/// One clock for all nodes.
#[derive(Clone, Debug)]
struct Shared(Arc<ManualClock>);

impl Clock for Shared {
    fn now(&self) -> Timestamp {
        self.0.now()
    }
}

/// A root, two CAs below it, a broker, and a mapper's audit log.
struct World {
    root: Forged,
    one: Forged,
    other: Forged,
    broker: MemoryBroker,
    clock: Shared,
    dir: TempDir,
}

impl World {
    fn new() -> Self {
        let root = Forge::ca("root").self_signed();
        let (one, other) = (Forge::ca("one").signed_by(&root), Forge::ca("other").signed_by(&root));
        let clock = Shared(Arc::new(ManualClock::new(T0)));
        Self { root, one, other, broker: MemoryBroker::new(), clock, dir: TempDir::new().unwrap() }
    }

    fn believing(&self) -> Trust {
        Trust::authorities([self.root.x509.clone()]).unwrap()
    }

    /// Believes the root, with lists of all three CAs that hold until this moment; the root revokes these.
    fn with_lists(&self, revoked: &[&X509], until: Timestamp) -> Trust {
        let from = T0.saturating_sub(Duration::from_secs(3600));
        let lists: [X509Crl; 3] =
            [self.root.crl(revoked, from, until), self.one.crl(&[], from, until), self.other.crl(&[], from, until)];
        self.believing().with_crls(&lists).unwrap()
    }

    fn serializer(&self, ca: &Forged, identity: &Identity, trust: Arc<Trust>) -> Arc<SecureSerializer> {
        let uri = format!("URI:spiffe://example.org/{}/{}", identity.role(), identity.name());
        let leaf = Forge::leaf().set(Nid::SUBJECT_ALT_NAME, &uri).signed_by(ca);
        let certificate = Arc::new(Certificate::from_der(&leaf.der()).unwrap());
        let own = StaticCertificateStore::new([certificate.clone()]);
        let key = PrivateKey::new(leaf.key).unwrap();
        let credentials = Credentials::new(certificate, key).unwrap().with_intermediates(vec![ca.der()]);
        let store: Arc<dyn CertificateStore> = Arc::new(TrustStore::new(trust.clone()).with_known(Arc::new(own)));
        let builder = SecureSerializer::builder(credentials, store, trust);
        Arc::new(builder.started_at(self.clock.now()).build().unwrap())
    }

    async fn agent(&self, ca: &Forged, name: &str) -> Agent {
        let identity = agent(name);
        let serializer = self.serializer(ca, &identity, Arc::new(self.believing()));
        let echo = actor("simple").expose("echo", async |payload: Payload| Ok::<_, Failure>(payload));
        let builder = Agent::builder(serializer, Arc::new(self.broker.connect())).actor(echo);
        let builder = builder.clock(self.clock.clone()).ping_time(Duration::from_millis(20)).status(|| 1.0);
        builder.start().await.unwrap()
    }

    async fn mapper(&self, trust: &Arc<Trust>) -> Mapper {
        let serializer = self.serializer(&self.other, &mapper("m1"), trust.clone());
        let builder = Mapper::builder(serializer, Arc::new(self.broker.connect()));
        let audit = AuditLog::open(self.log(), AuditOptions::default()).unwrap();
        builder.clock(self.clock.clone()).audit(audit).start().await.unwrap()
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("m1.log")
    }

    /// What the mapper has written of this agent's messages: that each was accepted, or refused, and why.
    fn said_of(&self, name: &str) -> Vec<(String, String)> {
        let text = fs::read_to_string(self.log()).unwrap();
        // The last line may be half written.
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of = lines.filter(|line| line["from"] == agent(name).as_str() && line["verdict"] != "allowed");
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        of.map(|line| (word(&line["verdict"]), word(&line["why"]))).collect()
    }

    /// Waits until messages of this agent are refused, and why that is; none is accepted after the first that is refused.
    async fn refused(&self, name: &str) -> String {
        let refusals = || self.said_of(name).iter().filter(|(verdict, _)| verdict == "refused").count();
        let before = refusals();
        wait_until("several of its messages are refused", async || refusals() >= before + 5).await;
        let said = self.said_of(name);
        let since = said.iter().skip_while(|(verdict, _)| verdict != "refused");
        assert!(since.clone().all(|(verdict, _)| verdict == "refused"), "{said:?}");
        since.last().unwrap().1.clone()
    }
}

/// What this agent answers.
async fn echo(mapper: &Mapper, name: &str) -> Result<Payload, String> {
    let request = mapper.request("/simple/echo", name).target(agent(name)).wait_for_agents(PATIENCE);
    let answers = request.await.map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source}")
    })?;
    answers.outcomes[&agent(name)].clone().map_err(|failure| failure.message)
}

#[tokio::test]
async fn s04_a_running_mapper_refuses_whoever_a_revoked_ca_vouches_for() {
    let world = World::new();
    let trust = Arc::new(world.with_lists(&[], at(3600)));
    let mapper = world.mapper(&trust).await;
    let _fred = world.agent(&world.one, "fred").await;
    let _bob = world.agent(&world.other, "bob").await;
    knows(&mapper, &["bob", "fred"]).await;
    for name in ["fred", "bob"] {
        assert_eq!(echo(&mapper, name).await, Ok(name.into()));
    }
    trust.replace_authorities(&world.with_lists(&[&world.one.x509], at(3600)));
    assert_eq!(world.refused("fred").await, "a CA certificate above it is revoked");
    let error = echo(&mapper, "fred").await.unwrap_err();
    assert!(error.contains("nanite-fred") && error.contains("revoked"), "nor is it given work: {error}");
    assert_eq!(echo(&mapper, "bob").await, Ok("bob".into()));
    assert!(world.said_of("bob").iter().all(|(verdict, _)| verdict != "refused"));
}

#[tokio::test]
async fn s04_a_list_that_becomes_out_of_date_under_a_running_mapper_refuses_everybody_until_there_is_a_new_one() {
    let world = World::new();
    let trust = Arc::new(world.with_lists(&[], at(600)));
    let mapper = world.mapper(&trust).await;
    let _fred = world.agent(&world.one, "fred").await;
    knows(&mapper, &["fred"]).await;
    assert_eq!(echo(&mapper, "fred").await, Ok("fred".into()));
    world.clock.0.set(at(599));
    assert_eq!(echo(&mapper, "fred").await, Ok("fred".into()), "to the last second");
    let late: Vec<_> = world.said_of("fred").into_iter().filter(|(verdict, _)| verdict == "refused").collect();
    assert_eq!(late, []);
    world.clock.0.set(at(600));
    assert_eq!(world.refused("fred").await, "the revocation list of its issuer is out of date");
    let error = echo(&mapper, "fred").await.unwrap_err();
    assert!(error.contains("nanite-fred") && error.contains("out of date"), "{error}");
    trust.replace_authorities(&world.with_lists(&[], at(7200)));
    let accepted = world.said_of("fred").len();
    wait_until("it is heard again", async || {
        world.said_of("fred").iter().skip(accepted).any(|(verdict, _)| verdict == "accepted")
    })
    .await;
    assert_eq!(echo(&mapper, "fred").await, Ok("fred".into()));
}
