//! n14: finding the agents for one request among 1,000, in the local state and in Redis.
//!
//! `cargo bench --bench state --features redis` starts a private `redis-server` on a socket, measures, then prints ratios of
//! medians of this run. `one in ten` requires a tag that a tenth of the agents have.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod report;

use std::hint::black_box;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use nanite::clock::{Clock, SystemClock};
use nanite::mapper::{AgentQuery, AgentRecord, ClusterState, LocalState, RedisOptions, RedisState, StateContext};
use nanite::packet::{Identity, Register, Status};
use nanite::policy::AllowVerified;
use nanite::serializer::PlainSerializer;
use report::{median, micros, ratio};

const AGENTS: usize = 1_000;
const QUERIES: [(&str, &[&str]); 2] = [("all", &[]), ("one in ten", &["few"])];

/// A server process; killed on drop.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn record(n: usize) -> AgentRecord {
    let mut tags = vec!["every".parse().unwrap()];
    if n.is_multiple_of(10) {
        tags.push("few".parse().unwrap());
    }
    let register = Register::new(Identity::agent(&format!("agent-{n}")).unwrap(), ["/simple/echo".parse().unwrap()])
        .with_status(Status::new((n * 7919 % 1000) as f64 / 100.0))
        .with_tags(tags)
        .with_instance(1);
    AgentRecord::new(register, 1, SystemClock.now(), None)
}

async fn filled(state: impl ClusterState + 'static, query: &AgentQuery) -> Arc<dyn ClusterState> {
    let context = StateContext::new(AllowVerified, SystemClock, Duration::from_secs(3600));
    state.start(context).await.unwrap();
    for n in 0..AGENTS {
        state.register(record(n)).await.unwrap();
    }
    while state.find(query).await.unwrap().len() < AGENTS {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Arc::new(state)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut server = Command::new("redis-server");
    server.args(["--port", "0", "--save", "", "--unixsocket"]).arg(&socket).stdout(Stdio::null());
    let _server = Server(server.spawn().expect("this benchmark needs redis-server"));
    let url = format!("unix://{}", socket.display());
    let query = |tags: &[&str]| {
        AgentQuery::new("/simple/echo".parse().unwrap(), tags.iter().map(|tag| tag.parse().unwrap()).collect())
    };
    // Proofs are verified when the replica is updated, not at lookups, so signing would not change what is measured.
    let connect = || {
        RedisState::connect(
            &url,
            RedisOptions::new(PlainSerializer::json(Identity::mapper("m1").unwrap())).dangerous().accept_unsigned(),
        )
    };
    let states = runtime.block_on(async {
        let writer = loop {
            match connect().await {
                Ok(state) => break state,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let local = filled(LocalState::new(), &query(&[])).await;
        let writer = filled(writer, &query(&[])).await;
        // The state of another mapper, which has read everything from Redis.
        let reader = connect().await.unwrap();
        let context = StateContext::new(AllowVerified, SystemClock, Duration::from_secs(3600));
        reader.start(context).await.unwrap();
        while reader.find(&query(&[])).await.unwrap().len() < AGENTS {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        [("local", local), ("redis", writer), ("redis, read", Arc::new(reader) as Arc<dyn ClusterState>)]
    });
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
        .configure_from_args();
    for (what, tags) in QUERIES {
        let query = query(tags);
        let mut group = criterion.benchmark_group(format!("state-{what}"));
        for (name, state) in &states {
            group.bench_function(*name, |b| b.iter(|| runtime.block_on(state.find(black_box(&query))).unwrap()));
        }
    }
    criterion.final_summary();

    println!("\nfinding the agents for one request among {AGENTS}: medians in microseconds");
    println!("{:<14}{:>10}{:>10}{:>10}{:>14}{:>10}", "", "local", "redis", "ratio", "redis, read", "ratio");
    for (what, _) in QUERIES {
        let [local, redis, read] = ["local", "redis", "redis, read"].map(|name| median(&format!("state-{what}"), name));
        println!(
            "{what:<14}{:>10}{:>10}{:>10}{:>14}{:>10}",
            micros(local),
            micros(redis),
            ratio(redis, local),
            micros(read),
            ratio(read, local)
        );
    }
}
