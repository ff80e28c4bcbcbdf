//! A deterministic simulation: agents and mappers run their real code, with the secure envelope, in one thread and in virtual time, over
//! a broker in memory. A seed decides delays, cuts, lost confirms, kills and restarts; the same seed gives the same trace.
//!
//! `SIMULATION_SEEDS=FIRST..LAST` runs these seeds; `SIMULATION_TRACE=1` prints the trace of each.

mod network;
mod world;

use std::sync::Arc;
use std::time::Duration;

use nanite::packet::FailureCode;

use world::{AGENTS, Domain, MAPPERS, Outcome, World};

/// How long the system may take until it works again after the last fault.
const WHOLE_AGAIN_WITHIN: Duration = Duration::from_secs(60);

/// Runs one seed; returns its trace, and what was wrong.
async fn simulate(domain: Arc<Domain>, seed: u64) -> (Vec<String>, Vec<String>) {
    let mut world = World::start(domain, seed).await;
    let network = world.network.clone();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let steps = 6 + network.below(14);
    for _ in 0..steps {
        tokio::time::sleep(network.pause(700)).await;
        match network.below(20) {
            0 | 1 => world.kill_agent(network.below(AGENTS.len() as u64) as usize),
            2 => world.kill_mapper(network.below(MAPPERS.len() as u64) as usize),
            3..6 => {
                for agent in 0..AGENTS.len() {
                    world.start_agent(agent).await;
                }
            }
            6 => {
                for mapper in 0..MAPPERS.len() {
                    world.start_mapper(mapper).await;
                }
            }
            7 => {
                network.note("the broker restarts");
                network.broker.restart();
            }
            8 => world.cut(network.below((AGENTS.len() + MAPPERS.len()) as u64) as usize, network.pause(3000)),
            9 => {
                let queue = format!("nanite-{}", AGENTS[network.below(AGENTS.len() as u64) as usize]);
                network.note(format_args!("the queue {queue} is deleted"));
                network.broker.delete_queue(&queue);
            }
            _ => world.request(network.below(MAPPERS.len() as u64) as usize),
        }
    }
    // Everything comes back, and every request ends.
    for agent in 0..AGENTS.len() {
        world.start_agent(agent).await;
    }
    for mapper in 0..MAPPERS.len() {
        world.start_mapper(mapper).await;
    }
    let mut wrong: Vec<String> =
        world.finish(WHOLE_AGAIN_WITHIN).await.iter().map(|number| format!("request {number} never ended")).collect();
    for (number, account) in world.accounts() {
        wrong.extend(check(&account).map(|what| format!("request {number} {what}: {account:?}")));
    }
    // The system works again: each mapper gets an answer.
    let before = world.accounts().len() as u64;
    for (mapper, name) in MAPPERS.into_iter().enumerate() {
        let deadline = tokio::time::Instant::now() + WHOLE_AGAIN_WITHIN;
        loop {
            world.request(mapper);
            world.finish(WHOLE_AGAIN_WITHIN).await;
            let (_, account) = world.accounts().pop_last().unwrap_or_default();
            if account.done > 0
                && matches!(account.outcomes[..], [Outcome::Answered(_) | Outcome::Failed(FailureCode::Failed)])
            {
                break;
            }
            if tokio::time::Instant::now() > deadline {
                wrong.push(format!("{name} gets no answer after the faults: {account:?}"));
                break;
            }
        }
    }
    for (number, account) in world.accounts().range(before..) {
        wrong.extend(check(account).map(|what| format!("request {number} {what}: {account:?}")));
    }
    tokio::time::sleep(WHOLE_AGAIN_WITHIN).await;
    wrong.extend(world.remains().await);
    (network.trace(), wrong)
}

/// What is wrong in an account: every request ends once and truly, and is done at most once.
fn check(account: &world::Account) -> Option<&'static str> {
    if account.begun > 1 {
        return Some("was done more than once");
    }
    let [outcome] = &account.outcomes[..] else { return Some("has not exactly one outcome") };
    match outcome {
        Outcome::Answered(_) | Outcome::Failed(FailureCode::Failed) if account.done == 0 => {
            Some("was answered and not done")
        }
        Outcome::Failed(FailureCode::Failed | FailureCode::Lost | FailureCode::TimedOut) => None,
        Outcome::Failed(_) => Some("failed for another reason"),
        Outcome::Answered(_) | Outcome::NotSent(_) | Outcome::Abandoned => None,
    }
}

fn run(domain: &Arc<Domain>, seed: u64) -> (Vec<String>, Vec<String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(simulate(domain.clone(), seed))
}

/// Runs these seeds; panics with the trace of the first one that is wrong.
fn run_all(seeds: std::ops::Range<u64>) {
    let domain = Arc::new(Domain::new());
    for seed in seeds {
        let (trace, wrong) = run(&domain, seed);
        if std::env::var_os("SIMULATION_TRACE").is_some() {
            println!("seed {seed}\n{}", trace.join("\n"));
        }
        assert!(wrong.is_empty(), "seed {seed}: {}\n{}", wrong.join("\n"), trace.join("\n"));
    }
}

#[test]
fn d11_the_same_seed_gives_the_same_trace() {
    let domain = Arc::new(Domain::new());
    for seed in 0..20 {
        let (first, second) = (run(&domain, seed).0, run(&domain, seed).0);
        assert!(first.len() > 20, "{first:?}");
        for (line, (first, second)) in first.iter().zip(&second).enumerate() {
            assert_eq!(first, second, "seed {seed}, line {line}");
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
    }
}

/// The seeds that are run: `SIMULATION_SEEDS`, or these.
fn seeds(or: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let Ok(given) = std::env::var("SIMULATION_SEEDS") else { return or };
    let (first, last) = given.split_once("..").expect("FIRST..LAST");
    first.parse().unwrap()..last.parse().unwrap()
}

#[test]
fn d11_every_request_ends_truly_and_once_in_all_seeds() {
    run_all(seeds(0..500));
}

#[test]
fn d11_every_request_ends_truly_and_once_in_more_seeds() {
    run_all(seeds(500..1000));
}
