//! n20: memory use of the Control Tower with a thousand agents.
//!
//! `cargo bench --bench admin_memory --features admin` starts the program and a broker, registers the agents, sends more heartbeats than
//! the history stores, and opens pages. After each step it prints the resident memory of the program, and the ratio to the memory without
//! agents. `-- --agents N` and `-- --heartbeats N` change the load.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../tests/suite/harness/mod.rs"]
#[allow(unused_imports, unused_macros)]
mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nanite::certs::{CertificateAuthority, CertificateDirectory, DirectoryCertificateStore, KeyType, PrivateKey};
use nanite::clock::{Clock, SystemClock};
use nanite::link::{Link, Outbound};
use nanite::packet::{Identity, Ping, Register, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::Audience;
use nanite::transport::{Destination, topology};

use harness::program::Running;
use harness::site::Site;
use harness::web::{self, events};

/// The default number of agents.
const AGENTS: usize = 1000;
/// The default number of heartbeats of each agent: more than the history stores.
const HEARTBEATS_PER_AGENT: usize = 125;

/// The resident memory of the program, in MiB.
fn resident_mib(tower: &Running) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", tower.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

fn main() {
    let agents = option("--agents", AGENTS);
    let heartbeats = option("--heartbeats", HEARTBEATS_PER_AGENT);
    tokio::runtime::Runtime::new().unwrap().block_on(measure(agents, heartbeats));
}

/// Prints the resident memory, and its ratio to the first measurement.
fn report(tower: &Running, step: &str, first: &mut Option<f64>) {
    let resident = resident_mib(tower);
    println!("{step:<36}{resident:>8.1} MiB {:>6.2}", resident / *first.get_or_insert(resident));
}

async fn measure(agents: usize, heartbeats: usize) {
    let mut first = None;
    let site = Site::new(&["mapper tower"]);
    let now = SystemClock.now();
    let directory = CertificateDirectory::new(site.path("certs"));
    let key = PrivateKey::from_file(&site.path("certs/ca-key.pem"), None).unwrap();
    let authority = std::fs::read(site.path("certs/ca.pem")).unwrap();
    let authority = CertificateAuthority::from_pem(&authority, key, None).unwrap();
    let valid_for = CertificateAuthority::LEAF_VALID_FOR;
    let issued: Vec<_> = (0..agents)
        .map(|number| {
            let identity = Identity::agent(&format!("worker-{number:04}")).unwrap();
            let credentials = authority.issue(&identity, KeyType::P256, valid_for, now).unwrap();
            let pem = String::from_utf8(credentials.certificate().to_pem()).unwrap();
            site.write(&format!("certs/agent-{}.pem", identity.name()), &pem, 0o644);
            credentials
        })
        .collect();
    let mut tower = site.start(&["admin", "--token", "tower", "--listen", "127.0.0.1:0"]);
    tower.wait_for("lets one browser in, once");
    report(&tower, "no agents", &mut first);

    let transport = Arc::new(site.broker.connect().await);
    let store = Arc::new(DirectoryCertificateStore::open(directory.path(), now).unwrap());
    let links: Vec<Link> = issued
        .into_iter()
        .map(|credentials| {
            let trust = directory.trust().unwrap();
            let serializer = SecureSerializer::builder(credentials, store.clone(), trust).build().unwrap();
            Link::builder(Arc::new(serializer), transport.clone()).build()
        })
        .collect();
    // From then on the new mapper accepts registrations that do not name it.
    tokio::time::sleep(Duration::from_secs(31)).await;
    for link in &links {
        let register = Register::new(
            link.identity().clone(),
            (0..8).map(|number| format!("/service/number{number}").parse().unwrap()),
        )
        .with_status(Status::new(1.0))
        .with_tags(["eu-west", "big"].map(|tag| tag.parse().unwrap()));
        let destination = Destination::exchange(topology::REGISTRATION);
        link.send(Outbound::new(register, Audience::Mappers), destination).await.unwrap();
    }
    let (_, err) = tower.output();
    let (_, rest) = err.split_once("http://127.0.0.1:").unwrap();
    let (port, link) = rest.split_once('/').unwrap();
    let port: u16 = port.parse().unwrap();
    let login = web::get(port, &format!("/{}", link.split_whitespace().next().unwrap()), "");
    let cookie = format!("Cookie: {}\r\n", login.cookie("nanite-").unwrap());
    let total = format!("<dd>{agents}</dd>");
    harness::wait_until("all agents are known", async || web::get(port, "/", &cookie).body.contains(&total)).await;
    report(&tower, &format!("{agents} agents registered"), &mut first);

    for round in 0..heartbeats {
        let round_start = Instant::now();
        for link in &links {
            let status = Status::new((round % 7) as f64);
            let ping = Ping::new(link.identity().clone(), status);
            let destination = Destination::exchange(topology::HEARTBEAT);
            link.send(Outbound::new(ping, Audience::Mappers), destination).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1100).saturating_sub(round_start.elapsed())).await;
    }
    report(&tower, &format!("{heartbeats} heartbeats of each agent"), &mut first);
    let pages: Vec<_> =
        (1..=32).map(|page| events(port, &format!("/events?page={}", page % 10 + 1), &cookie)).collect();
    assert!(pages.iter().all(|(status, _)| *status == 200));
    tokio::time::sleep(Duration::from_secs(5)).await;
    report(&tower, "32 open pages", &mut first);
}

fn option(name: &str, default: usize) -> usize {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match (arguments.next(), arguments.next()) {
        (Some(_), value) => value.and_then(|value| value.parse().ok()).expect("a number after the option"),
        (None, _) => default,
    }
}
