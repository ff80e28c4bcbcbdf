//! How many round trips a second there are.

use std::time::{Duration, Instant};

use super::facts::Rate;
use super::stopped;
use super::world::{SHOUT, TEXT, World};
use crate::cli::error::CliError;
use crate::packet::SelectorName;

/// How many requests are under way at a time.
pub(super) const IN_FLIGHT: [usize; 2] = [1, 64];
/// How long each is measured.
const MEASURED: Duration = Duration::from_millis(500);

/// Measures one world.
pub(super) async fn measure(world: &World) -> Result<Vec<Rate>, CliError> {
    let mut rates = Vec::new();
    for in_flight in IN_FLIGHT {
        rates.push(rate(world, in_flight).await?);
    }
    Ok(rates)
}

async fn rate(world: &World, in_flight: usize) -> Result<Rate, CliError> {
    let began = Instant::now();
    let askers: Vec<_> = (0..in_flight)
        .map(|_| {
            let mapper = world.mapper.clone();
            tokio::spawn(async move {
                let (mut answered, mut failed) = (0, 0);
                while began.elapsed() < MEASURED {
                    match mapper.request(SHOUT, TEXT).selector(SelectorName::RoundRobin).await {
                        Ok(answers) if answers.results().count() == 1 => answered += 1,
                        _ => failed += 1,
                    }
                }
                (answered, failed)
            })
        })
        .collect();
    let (mut round_trips, mut failed) = (0, 0);
    for asker in askers {
        let (answered, not) = asker.await.map_err(stopped("a measurement ended early"))?;
        round_trips += answered;
        failed += not;
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok(Rate { in_flight, round_trips, failed, seconds, per_second: round_trips as f64 / seconds })
}
