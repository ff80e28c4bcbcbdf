//! n19: the throughput of file broadcast, compared with `cp`, and with lapin alone that transfers the same chunks.
//!
//! `cargo bench --bench broadcast` starts its own broker, runs all of them in turn for several rounds, and prints medians and their
//! ratios. Lapin alone publishes chunks of the same size, mandatory and confirmed, with as many in flight as a transfer, to one consumer
//! that writes them to a file and acknowledges them. All nodes run in this process. `-- --rounds N` and `-- --mebibytes N` (the file)
//! change how long it takes.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../tests/suite/harness/broker.rs"]
#[allow(dead_code)]
mod broker;
#[path = "../tests/suite/harness/http.rs"]
mod http;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use nanite::agent::Agent;
use nanite::certs::{CertificateAuthority, KeyType, StaticCertificateStore};
use nanite::clock::{Clock, SystemClock};
use nanite::files::{Broadcast, FileRoot};
use nanite::mapper::Mapper;
use nanite::packet::{Identity, Tag};
use nanite::security::SecureSerializer;
use nanite::serializer::{PlainSerializer, Serializer};

use broker::Broker;

/// The size of a chunk, as in a file transfer.
const CHUNK_BYTES: usize = 256 * 1024;
/// The most chunks in flight, as in a file transfer.
const MAX_IN_FLIGHT: usize = 16;

fn main() {
    let rounds = option("--rounds", 5);
    let mebibytes = option("--mebibytes", 64);
    let broker = Broker::private();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    random_file(&file, mebibytes);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut measured: Vec<(&str, Vec<f64>)> =
        ["cp", "lapin, with confirms", "nanite plain", "nanite secure", "nanite secure, to two"]
            .map(|name| (name, vec![]))
            .into();
    runtime.block_on(async {
        let lapin_alone = LapinAlone::start(&broker.url()).await;
        let brokers = [broker.new_vhost(), broker.new_vhost(), broker.new_vhost()];
        let fleets = [
            Fleet::start(&brokers[0], dir.path(), 1, false).await,
            Fleet::start(&brokers[1], dir.path(), 1, true).await,
            Fleet::start(&brokers[2], dir.path(), 2, true).await,
        ];
        for round in 0..=rounds {
            let mut took = vec![
                copy(&file, &dir.path().join("copy")),
                lapin_alone.transfer(&file, &dir.path().join("transferred")).await,
            ];
            for fleet in &fleets {
                took.push(fleet.send(&file).await);
            }
            for ((_, values), took) in measured.iter_mut().zip(took) {
                // The first round warms up.
                if round > 0 {
                    values.push(mebibytes as f64 / took.as_secs_f64());
                }
            }
        }
    });
    report(&mut measured, mebibytes, rounds);
}

fn random_file(path: &Path, mebibytes: usize) {
    let mut file = File::create(path).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..mebibytes {
        openssl::rand::rand_bytes(&mut bytes).unwrap();
        file.write_all(&bytes).unwrap();
    }
}

fn copy(from: &Path, to: &Path) -> Duration {
    let _ = std::fs::remove_file(to);
    let start = Instant::now();
    assert!(Command::new("cp").args([from, to]).status().unwrap().success());
    start.elapsed()
}

/// A publisher and a consumer that use lapin alone.
struct LapinAlone {
    _connections: [Connection; 2],
    publish: Channel,
    consume: Channel,
}

impl LapinAlone {
    async fn start(url: &str) -> Self {
        let connect = || Connection::connect(url, ConnectionProperties::default());
        let (client, server) = (connect().await.unwrap(), connect().await.unwrap());
        let (publish, consume) = (client.create_channel().await.unwrap(), server.create_channel().await.unwrap());
        publish.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        consume.queue_declare("chunks".into(), options, FieldTable::default()).await.unwrap();
        consume.basic_qos(u16::try_from(MAX_IN_FLIGHT).unwrap(), BasicQosOptions::default()).await.unwrap();
        Self { _connections: [client, server], publish, consume }
    }

    async fn transfer(&self, from: &Path, to: &Path) -> Duration {
        let size = std::fs::metadata(from).unwrap().len();
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        let mut chunks =
            self.consume.basic_consume("chunks".into(), "writer".into(), options, arguments).await.unwrap();
        let start = Instant::now();
        let mut written = File::create(to).unwrap();
        let receive = async {
            let mut received = 0;
            while received < size {
                let chunk = chunks.next().await.unwrap().unwrap();
                tokio::task::block_in_place(|| written.write_all(&chunk.data)).unwrap();
                chunk.ack(BasicAckOptions::default()).await.unwrap();
                received += chunk.data.len() as u64;
            }
        };
        let mut file = File::open(from).unwrap();
        let send = async {
            let mut in_flight = FuturesOrdered::new();
            let mut bytes = vec![0; CHUNK_BYTES];
            loop {
                let length = tokio::task::block_in_place(|| file.read(&mut bytes)).unwrap();
                if length == 0 {
                    break;
                }
                let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                let confirm = self.publish.basic_publish(
                    "".into(),
                    "chunks".into(),
                    options,
                    &bytes[..length],
                    BasicProperties::default(),
                );
                in_flight.push_back(confirm.await.unwrap());
                if in_flight.len() >= MAX_IN_FLIGHT {
                    in_flight.next().await.unwrap().unwrap();
                }
            }
            while in_flight.next().await.is_some() {}
        };
        tokio::join!(send, receive);
        let took = start.elapsed();
        self.consume.basic_cancel("writer".into(), lapin::options::BasicCancelOptions::default()).await.unwrap();
        took
    }
}

/// A mapper, and agents that receive files.
struct Fleet {
    mapper: Mapper,
    _agents: Vec<Agent>,
    inboxes: Vec<PathBuf>,
}

impl Fleet {
    async fn start(broker: &Broker, dir: &Path, agents: usize, secure: bool) -> Self {
        let names = (0..agents).map(|n| Identity::agent(&format!("agent-{n}")).unwrap());
        let nodes: Vec<Identity> = std::iter::once(Identity::mapper("desk").unwrap()).chain(names).collect();
        let mut serializers = serializers(&nodes, secure).into_iter();
        let desk = serializers.next().unwrap();
        let domain: Tag = "photos".parse().unwrap();
        let (mut handles, mut inboxes) = (Vec::new(), Vec::new());
        for (node, serializer) in nodes[1..].iter().zip(serializers) {
            let inbox = dir.join(format!("{}-{}-{node}", broker.vhost(), secure));
            std::fs::create_dir(&inbox).unwrap();
            let root = FileRoot::new(&inbox, vec![domain.clone()]).unwrap();
            let agent = Agent::builder(serializer, Arc::new(broker.connect().await)).files(root);
            handles.push(agent.start().await.unwrap());
            inboxes.push(inbox);
        }
        let mapper = Mapper::builder(desk, Arc::new(broker.connect().await)).start().await.unwrap();
        while mapper.agents().await.unwrap().len() < agents {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Self { mapper, _agents: handles, inboxes }
    }

    async fn send(&self, file: &Path) -> Duration {
        let start = Instant::now();
        let answers = self.mapper.broadcast(Broadcast::new(file, "photos".parse().unwrap()), |_| {}).await.unwrap();
        let took = start.elapsed();
        assert_eq!(answers.results().count(), self.inboxes.len(), "{answers:?}");
        for inbox in &self.inboxes {
            let name = file.file_name().unwrap();
            assert_eq!(std::fs::metadata(inbox.join(name)).unwrap().len(), std::fs::metadata(file).unwrap().len());
            std::fs::remove_file(inbox.join(name)).unwrap();
        }
        took
    }
}

fn serializers(nodes: &[Identity], secure: bool) -> Vec<Arc<dyn Serializer>> {
    if !secure {
        return nodes
            .iter()
            .cloned()
            .map(|node| Arc::new(PlainSerializer::json(node)) as Arc<dyn Serializer>)
            .collect();
    }
    let now = SystemClock.now();
    let valid_for = CertificateAuthority::VALID_FOR;
    let ca = CertificateAuthority::create("example.org", KeyType::P256, valid_for, now).unwrap();
    let issue = |node| ca.issue(node, KeyType::P256, CertificateAuthority::LEAF_VALID_FOR, now).unwrap();
    let credentials: Vec<_> = nodes.iter().map(issue).collect();
    let store =
        Arc::new(StaticCertificateStore::new(credentials.iter().map(|credentials| credentials.certificate().clone())));
    let serializers = credentials.into_iter().map(|credentials| {
        let secure = SecureSerializer::builder(credentials, store.clone(), ca.trust().unwrap()).build().unwrap();
        Arc::new(secure) as Arc<dyn Serializer>
    });
    serializers.collect()
}

fn report(measured: &mut [(&str, Vec<f64>)], mebibytes: usize, rounds: usize) {
    println!(
        "A file of {mebibytes} MiB, in MiB/s: medians of {rounds} rounds with (minimum to maximum), and ratios to the first two."
    );
    println!();
    let mut bases: Vec<f64> = Vec::new();
    for (name, values) in measured {
        values.sort_by(f64::total_cmp);
        let median = values[values.len() / 2];
        bases.push(median);
        let ratios: Vec<String> = bases.iter().take(2).map(|base| format!("{:.3}", median / base)).collect();
        println!(
            "{name:<24}{median:>9.1} ({:.1} to {:.1})   {}",
            values[0],
            values[values.len() - 1],
            ratios.join("  ")
        );
    }
}

fn option(name: &str, default: usize) -> usize {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match (arguments.next(), arguments.next()) {
        (Some(_), value) => value.and_then(|value| value.parse().ok()).expect("a number after the option"),
        (None, _) => default,
    }
}
