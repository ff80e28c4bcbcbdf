//! s07: certificates are renewed while requests run, and no request is lost.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nanite::agent::{Agent, actor};
use nanite::certs::{CertificateAuthority, KeyType, TrustStore};
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::Mapper;
use nanite::packet::{Failure, Identity, Payload};
use nanite::security::SecureSerializer;
use nanite::transport::MemoryBroker;
use nix::sys::signal::Signal;

use crate::harness::pki::{agent, mapper};
use crate::harness::program::run;
use crate::harness::site::Site;
use crate::harness::system::{json, wait_until_known};
use crate::harness::wait_until;

const HOUR: Duration = Duration::from_secs(3600);
/// The rotation grace period of these tests: longer than other nodes take to learn a new certificate, on a busy machine too.
const ROTATION_GRACE_PERIOD: Duration = Duration::from_secs(3);

struct World {
    ca: CertificateAuthority,
    broker: MemoryBroker,
}

impl World {
    fn new() -> Self {
        let ca = CertificateAuthority::create("example.org", KeyType::P256, HOUR * 24, SystemClock.now()).unwrap();
        Self { ca, broker: MemoryBroker::new() }
    }

    fn serializer(&self, identity: &Identity) -> Arc<SecureSerializer> {
        let credentials = self.ca.issue(identity, KeyType::P256, HOUR, SystemClock.now()).unwrap();
        let trust = Arc::new(self.ca.trust().unwrap());
        let store = Arc::new(TrustStore::new(trust.clone()));
        Arc::new(
            SecureSerializer::builder(credentials, store, trust)
                .rotation_grace_period(ROTATION_GRACE_PERIOD)
                .build()
                .unwrap(),
        )
    }

    async fn agent(&self, name: &str) -> (Arc<SecureSerializer>, Agent) {
        let serializer = self.serializer(&agent(name));
        let echo = actor("simple").expose("echo", async |payload: Payload| Ok::<_, Failure>(payload));
        let connection = Arc::new(self.broker.connect());
        let built = Agent::builder(serializer.clone(), connection).actor(echo);
        let built = built.ping_time(Duration::from_millis(50)).status(|| 1.0);
        (serializer, built.start().await.unwrap())
    }

    fn renew(&self, serializer: &SecureSerializer) {
        let now = SystemClock.now();
        let identity = serializer.certificate().identity().clone();
        let new = self.ca.issue(&identity, KeyType::P256, HOUR, now).unwrap();
        let fingerprint = *new.certificate().fingerprint();
        serializer.replace_credentials(new, Vec::new(), now).unwrap();
        assert_eq!(*serializer.certificate().fingerprint(), fingerprint);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s07_renewal_under_load_loses_no_request() {
    let world = World::new();
    let by_mapper = world.serializer(&mapper("m1"));
    let connection = Arc::new(world.broker.connect());
    let m1 = Mapper::builder(by_mapper.clone(), connection).start().await.unwrap();
    let agents = [world.agent("a").await, world.agent("b").await];
    wait_until_known(&m1, &["a", "b"]).await;

    let (finished, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = ["a", "b", "a", "b"].map(|name| {
        let (m1, finished, answered) = (m1.clone(), finished.clone(), answered.clone());
        tokio::spawn(async move {
            while !finished.load(Ordering::SeqCst) {
                let request = m1.request("/simple/echo", json("[1]")).target(agent(name));
                let answers = request.timeout(Duration::from_secs(20)).await.unwrap();
                assert_eq!(answers.results().count(), 1, "{answers:?}");
                answered.fetch_add(1, Ordering::SeqCst);
            }
        })
    });
    let wait_for_answers = async |what: &str| {
        let before = answered.load(Ordering::SeqCst);
        wait_until(what, async || answered.load(Ordering::SeqCst) >= before + 40).await;
    };
    wait_for_answers("requests are answered").await;
    let mut certificates = HashSet::new();
    for _ in 0..2 {
        for (serializer, handle) in &agents {
            certificates.insert(*serializer.certificate().fingerprint());
            world.renew(serializer);
            handle.announcer().announce();
            wait_for_answers("requests are answered after an agent's renewal").await;
        }
        certificates.insert(*by_mapper.certificate().fingerprint());
        world.renew(&by_mapper);
        m1.announce().await.unwrap();
        let renewed = SystemClock.now();
        wait_for_answers("requests are answered after the mapper's renewal").await;
        // Until every message is signed with the new keys.
        wait_until("the rotation grace period has passed", async || {
            SystemClock.now().since(renewed) > ROTATION_GRACE_PERIOD
        })
        .await;
        wait_for_answers("requests are answered by the new certificates").await;
    }
    finished.store(true, Ordering::SeqCst);
    for task in clients {
        task.await.unwrap();
    }
    assert_eq!(certificates.len(), 6);
    assert!(m1.refusals().iter().all(|(_, count)| *count == 0), "{:?}", m1.refusals());
    for (_, handle) in &agents {
        assert!(handle.refusals().iter().all(|(_, count)| *count == 0), "{:?}", handle.refusals());
    }
}

#[test]
fn s07_rejects_credentials_of_another_identity() {
    let world = World::new();
    let serializer = world.serializer(&agent("a"));
    let before = *serializer.certificate().fingerprint();
    let other = world.ca.issue(&agent("b"), KeyType::P256, HOUR, SystemClock.now()).unwrap();
    let refused = serializer.replace_credentials(other, Vec::new(), SystemClock.now());
    assert_eq!(refused.unwrap_err().found, agent("b"));
    assert_eq!(*serializer.certificate().fingerprint(), before);
}

#[test]
fn s07_running_processes_reload_renewed_certificates() {
    let site = Site::new(&["agent fred", "mapper m1", "mapper ctl"]);
    site.program("simple/echo", "cat");
    let mut m1 = site.start(&["mapper", "--token", "m1"]);
    let mut fred = site.agent("fred", &[]);
    let request = |options: &[&str]| {
        let arguments = ["request", "/simple/echo", "[7]", "--token", "ctl", "--json", "--timeout", "60s"];
        let arguments: Vec<&str> = arguments.iter().chain(options).copied().collect();
        let ended = run(&mut site.nanite(&arguments));
        assert_eq!(ended.code(), 0, "{ended:?}");
    };
    request(&["--look", "60s"]);
    // Without a signal: the agent sees that the files change.
    site.ok(&["certs", "renew", "agent", "fred", "--dir", "certs"]);
    fred.wait_for("nanite-fred has a new certificate, valid until ");
    request(&["--via-mapper"]);
    let hup = format!("kill -HUP {}", m1.id());
    site.ok(&["certs", "renew", "mapper", "m1", "--exec", &hup, "--dir", "certs"]);
    m1.wait_for("mapper-m1 has a new certificate, valid until ");
    request(&["--via-mapper"]);
    request(&["--look", "60s"]);
    // A node that others refuse logs that, until it has another certificate.
    site.ok(&["certs", "revoke", "agent", "fred", "--dir", "certs"]);
    fred.wait_for("other nodes refuse messages of nanite-fred");
    m1.wait_for("claimed=nanite-fred");
    site.ok(&["certs", "issue", "agent", "fred", "--force", "--dir", "certs"]);
    fred.wait_for("the certificate of nanite-fred is valid");
    request(&["--via-mapper"]);
    // An unusable file changes nothing.
    site.write("certs/agent-fred.pem", "no certificate", 0o644);
    fred.signal(Signal::SIGHUP);
    fred.wait_for("the certificate of nanite-fred stays as it is");
    let said = fred.output().1;
    assert!(!said.contains("panicked"), "{said}");
}
