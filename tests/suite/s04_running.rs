//! s04: a running mapper when an intermediate CA of its agents is revoked, and when a revocation list becomes outdated: real agents with
//! certificates of two CAs below one root, and a manual clock. The mapper's audit log shows its decisions.

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
use crate::harness::system::wait_until_known;
use crate::harness::{WAIT_TIMEOUT, wait_until};

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

    fn trust(&self) -> Trust {
        Trust::authorities([self.root.x509.clone()]).unwrap()
    }

    /// Trust in the root, with revocation lists of all three CAs with this next update. The root revokes the given certificates.
    fn trust_with_lists(&self, revoked: &[&X509], next_update: Timestamp) -> Trust {
        let from = T0.saturating_sub(Duration::from_secs(3600));
        let lists: [X509Crl; 3] = [
            self.root.crl(revoked, from, next_update),
            self.one.crl(&[], from, next_update),
            self.other.crl(&[], from, next_update),
        ];
        self.trust().with_crls(&lists).unwrap()
    }

    fn serializer(&self, ca: &Forged, identity: &Identity, trust: Arc<Trust>) -> Arc<SecureSerializer> {
        let uri = format!("URI:spiffe://example.org/{}/{}", identity.role(), identity.name());
        let leaf = Forge::leaf().set(Nid::SUBJECT_ALT_NAME, &uri).signed_by(ca);
        let certificate = Arc::new(Certificate::from_der(&leaf.der()).unwrap());
        let own = StaticCertificateStore::new([certificate.clone()]);
        let key = PrivateKey::new(leaf.key).unwrap();
        let credentials = Credentials::new(certificate, key).unwrap().with_intermediates(vec![ca.der()]);
        let store: Arc<dyn CertificateStore> = Arc::new(TrustStore::new(trust.clone()).with_store(Arc::new(own)));
        let builder = SecureSerializer::builder(credentials, store, trust);
        Arc::new(builder.started_at(self.clock.now()).build().unwrap())
    }

    async fn agent(&self, ca: &Forged, name: &str) -> Agent {
        let identity = agent(name);
        let serializer = self.serializer(ca, &identity, Arc::new(self.trust()));
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

    /// The verdicts and reasons in the mapper's audit log for this agent's messages.
    fn verdicts_of(&self, name: &str) -> Vec<(String, String)> {
        let text = fs::read_to_string(self.log()).unwrap();
        // The last line may be incomplete.
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of = lines.filter(|line| line["from"] == agent(name).as_str() && line["verdict"] != "allowed");
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        of.map(|line| (word(&line["verdict"]), word(&line["why"]))).collect()
    }

    /// Waits until messages of this agent are refused, and returns the reason. None may be accepted after the first refusal.
    async fn wait_for_refusal(&self, name: &str) -> String {
        let refusals = || self.verdicts_of(name).iter().filter(|(verdict, _)| verdict == "refused").count();
        let before = refusals();
        wait_until("several of its messages are refused", async || refusals() >= before + 5).await;
        let verdicts = self.verdicts_of(name);
        let since = verdicts.iter().skip_while(|(verdict, _)| verdict != "refused");
        assert!(since.clone().all(|(verdict, _)| verdict == "refused"), "{verdicts:?}");
        since.last().unwrap().1.clone()
    }
}

/// The agent's answer to an echo request.
async fn echo(mapper: &Mapper, name: &str) -> Result<Payload, String> {
    let request = mapper.request("/simple/echo", name).target(agent(name)).wait_for_agents(WAIT_TIMEOUT);
    let answers = request.await.map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source}")
    })?;
    answers.outcomes[&agent(name)].clone().map_err(|failure| failure.message)
}

#[tokio::test]
async fn s04_running_mapper_rejects_agents_of_revoked_ca() {
    let world = World::new();
    let trust = Arc::new(world.trust_with_lists(&[], at(3600)));
    let mapper = world.mapper(&trust).await;
    let _fred = world.agent(&world.one, "fred").await;
    let _bob = world.agent(&world.other, "bob").await;
    wait_until_known(&mapper, &["bob", "fred"]).await;
    for name in ["fred", "bob"] {
        assert_eq!(echo(&mapper, name).await, Ok(name.into()));
    }
    trust.replace_authorities(&world.trust_with_lists(&[&world.one.x509], at(3600)));
    assert_eq!(world.wait_for_refusal("fred").await, "a CA certificate above it is revoked");
    let error = echo(&mapper, "fred").await.unwrap_err();
    assert!(error.contains("nanite-fred") && error.contains("revoked"), "no request is sent to it: {error}");
    assert_eq!(echo(&mapper, "bob").await, Ok("bob".into()));
    assert!(world.verdicts_of("bob").iter().all(|(verdict, _)| verdict != "refused"));
}

#[tokio::test]
async fn s04_running_mapper_rejects_all_while_revocation_list_is_outdated() {
    let world = World::new();
    // Heartbeats are in flight when the clock moves: it moves by less than they are valid for, so that nothing is refused for its age.
    let trust = Arc::new(world.trust_with_lists(&[], at(20)));
    let mapper = world.mapper(&trust).await;
    let _fred = world.agent(&world.one, "fred").await;
    wait_until_known(&mapper, &["fred"]).await;
    assert_eq!(echo(&mapper, "fred").await, Ok("fred".into()));
    world.clock.0.set(at(19));
    assert_eq!(echo(&mapper, "fred").await, Ok("fred".into()), "until the last second");
    let late: Vec<_> = world.verdicts_of("fred").into_iter().filter(|(verdict, _)| verdict == "refused").collect();
    assert_eq!(late, []);
    world.clock.0.set(at(20));
    assert_eq!(world.wait_for_refusal("fred").await, "the revocation list of its issuer is out of date");
    let error = echo(&mapper, "fred").await.unwrap_err();
    assert!(error.contains("nanite-fred") && error.contains("out of date"), "{error}");
    trust.replace_authorities(&world.trust_with_lists(&[], at(7200)));
    let accepted = world.verdicts_of("fred").len();
    wait_until("its messages are accepted again", async || {
        world.verdicts_of("fred").iter().skip(accepted).any(|(verdict, _)| verdict == "accepted")
    })
    .await;
    assert_eq!(echo(&mapper, "fred").await, Ok("fred".into()));
}
