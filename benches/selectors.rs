//! p01: selecting an agent among 10, 1,000 and 100,000 that offer the service: the time to find them, and the time of each selector.
//!
//! `cargo bench --bench selectors` measures, then prints the medians of this run and how they grow.

#![allow(missing_docs)]
#![allow(clippy::unwrap_used)]

mod report;

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
use futures_util::FutureExt;
use nanite::clock::Timestamp;
use nanite::mapper::{
    AgentQuery, AgentRecord, All, Candidate, ClusterState, LeastLoaded, LocalState, Random, RoundRobin, Selector,
};
use nanite::packet::{Identity, Register, Service, Status};
use report::{median, micros, ratio};

const AGENTS: [usize; 3] = [10, 1_000, 100_000];

/// The state of a mapper with agents of different loads.
fn state_with(agents: usize, service: &Service) -> LocalState {
    let state = LocalState::new();
    for n in 0..agents {
        let register = Register::new(Identity::agent(&format!("agent-{n}")).unwrap(), [service.clone()])
            .with_status(Status::new((n * 7919 % 1000) as f64 / 100.0));
        let record = AgentRecord::new(register, 1, Timestamp::from_secs(1), None);
        state.register(record).now_or_never().unwrap().unwrap();
    }
    state
}

fn main() {
    p01_selectors();
}

fn p01_selectors() {
    let round_robin = RoundRobin::default();
    let selectors: [(&str, &dyn Selector); 4] =
        [("least_loaded", &LeastLoaded), ("random", &Random), ("rr", &round_robin), ("all", &All)];
    let service: Service = "/simple/echo".parse().unwrap();
    let query = AgentQuery::new(service.clone(), Vec::new());
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .sample_size(20)
        .configure_from_args();
    for agents in AGENTS {
        let state = state_with(agents, &service);
        let find = || state.find(black_box(&query)).now_or_never().unwrap().unwrap();
        let mut group = criterion.benchmark_group(format!("select-{agents}"));
        group.bench_function("find", |b| b.iter(find));
        let candidates: Vec<Candidate> = find().into_iter().map(|record| Candidate::new(record, 0)).collect();
        for (name, selector) in selectors {
            group.bench_function(name, |b| b.iter(|| selector.select(&service, black_box(&candidates))));
        }
    }
    criterion.final_summary();

    println!("\nmedians in microseconds for a number of agents; ratios are to a hundredth of them");
    println!("{:<14}{:>10}{:>10}{:>8}{:>12}{:>8}", "", "10", "1,000", "ratio", "100,000", "ratio");
    for name in ["find", "least_loaded", "random", "rr", "all"] {
        let [few, many, most] = AGENTS.map(|agents| median(&format!("select-{agents}"), name));
        println!(
            "{name:<14}{:>10}{:>10}{:>8}{:>12}{:>8}",
            micros(few),
            micros(many),
            ratio(many, few),
            micros(most),
            ratio(most, many)
        );
    }
}
