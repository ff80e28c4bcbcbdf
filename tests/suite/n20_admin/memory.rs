//! How much memory the Control Tower takes with a thousand agents: measured, not asserted.
//! `cargo test --release --all-features --test suite n20_memory -- --ignored --nocapture`

use std::sync::Arc;
use std::time::{Duration, Instant};

use nanite::certs::{CertificateAuthority, CertificateDirectory, DirectoryCertificateStore, KeyType, PrivateKey};
use nanite::clock::{Clock, SystemClock};
use nanite::link::{Letter, Link};
use nanite::packet::{Identity, Ping, Register, Status};
use nanite::security::SecureSerializer;
use nanite::serializer::Audience;
use nanite::transport::{Destination, Exchange, topology};

use super::http::events;
use crate::harness::program::Running;
use crate::harness::site::Site;
use crate::harness::web;

const AGENTS: usize = 1000;
/// More heartbeats than are remembered of each agent.
const ROUNDS: usize = 125;

fn resident(tower: &Running) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/status", tower.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    format!("{:.1} MiB", kib / 1024.0)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of some minutes"]
async fn n20_memory_with_a_thousand_agents() {
    let site = Site::new(&["mapper tower"]);
    let now = SystemClock.now();
    let directory = CertificateDirectory::new(site.path("certs"));
    let key = PrivateKey::from_file(&site.path("certs/ca-key.pem"), None).unwrap();
    let authority = std::fs::read(site.path("certs/ca.pem")).unwrap();
    let authority = CertificateAuthority::from_pem(&authority, key, None).unwrap();
    let valid = CertificateAuthority::LEAF_VALID_FOR;
    let issued: Vec<_> = (0..AGENTS)
        .map(|number| {
            let identity = Identity::agent(&format!("worker-{number:04}")).unwrap();
            let credentials = authority.issue(&identity, KeyType::P256, valid, now).unwrap();
            let pem = String::from_utf8(credentials.certificate().to_pem()).unwrap();
            site.write(&format!("certs/agent-{}.pem", identity.name()), &pem, 0o644);
            (identity, credentials)
        })
        .collect();
    let mut tower = site.start(&["admin", "--token", "tower", "--listen", "127.0.0.1:0"]);
    tower.wait_for("lets one browser in, once");
    println!("no agents:                          {}", resident(&tower));

    let transport = Arc::new(site.broker.connect().await);
    let store = Arc::new(DirectoryCertificateStore::open(directory.path(), now).unwrap());
    let links: Vec<Link> = issued
        .into_iter()
        .map(|(identity, credentials)| {
            let trust = directory.trust().unwrap();
            let serializer = SecureSerializer::builder(credentials, store.clone(), trust).build().unwrap();
            Link::new(identity, Arc::new(serializer), transport.clone(), Arc::new(SystemClock)).unwrap()
        })
        .collect();
    for link in &links {
        let register = Register {
            identity: link.identity().clone(),
            services: (0..8).map(|number| format!("/service/number{number}").parse().unwrap()).collect(),
            status: Status::new(1.0),
            tags: ["eu-west", "big"].map(|tag| tag.parse().unwrap()).into(),
            files: Vec::new(),
            instance: None,
        };
        let place = Destination::Exchange(Exchange(topology::REGISTRATION.into()));
        link.send(Letter::new(register, Audience::Mappers), place).await.unwrap();
    }
    let (_, err) = tower.said();
    let (_, rest) = err.split_once("http://127.0.0.1:").unwrap();
    let (port, link) = rest.split_once('/').unwrap();
    let port: u16 = port.parse().unwrap();
    let entered = web::get(port, &format!("/{}", link.split_whitespace().next().unwrap()), "");
    let cookie = format!("Cookie: {}\r\n", entered.cookie("nanite-").unwrap());
    let known = async || web::get(port, "/", &cookie).body.contains("<dd>1000</dd>");
    crate::harness::wait_until("all are known", known).await;
    println!("{AGENTS} agents registered:             {}", resident(&tower));

    for round in 0..ROUNDS {
        let began = Instant::now();
        for link in &links {
            let status = Status::new((round % 7) as f64);
            let ping = Ping { identity: link.identity().clone(), status, instance: None };
            let place = Destination::Exchange(Exchange(topology::HEARTBEAT.into()));
            link.send(Letter::new(ping, Audience::Mappers), place).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1100).saturating_sub(began.elapsed())).await;
    }
    println!("{ROUNDS} heartbeats of each later:     {}", resident(&tower));
    let pages: Vec<_> =
        (1..=32).map(|page| events(port, &format!("/events?page={}", page % 10 + 1), &cookie)).collect();
    assert!(pages.iter().all(|(status, _)| *status == 200));
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!("32 pages kept up to date:           {}", resident(&tower));
}
