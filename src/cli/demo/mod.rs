//! `nanite demo`: a whole system in this process, made to be looked at. It needs no broker and leaves nothing behind.
//!
//! Here: the order of the scenes, and what the end says. What happens is in `world` (who takes part), `scenes` (requests and what
//! the broker saw of them), `attacks` and `rates`; what was seen is in `facts`, and how it looks in `show`.

mod attacks;
mod facts;
mod rates;
mod scenes;
mod show;
mod world;

use std::time::Instant;

use super::error::{CliError, Exit};
use super::{output, runtime};
use facts::Facts;
use show::Show;
use world::{Pki, World};

/// The arguments of the command.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print one JSON object with everything that was seen.
    #[arg(long)]
    json: bool,
}

/// Something without which the demonstration cannot go on.
fn stopped<E: std::error::Error + 'static>(what: &'static str) -> impl FnOnce(E) -> CliError {
    move |error| CliError::of(Exit::Failure, &error).context(what)
}

impl Args {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let facts = runtime::run(play(&Show::new(!self.json)))?;
        if self.json {
            output::json(&facts)?;
        }
        Ok(if facts.ok { Exit::Success } else { Exit::Failure })
    }
}

/// Everything, in order. What is not as it should be is in the facts; an error means that it could not be seen to the end.
async fn play(show: &Show) -> Result<Facts, CliError> {
    let began = Instant::now();
    let mut facts = Facts::default();
    show.title()?;

    let pki = Pki::make()?;
    facts.certificates = pki.facts();
    facts.certificates.millis = millis(began);
    show.certificates(&facts.certificates)?;

    let started = Instant::now();
    let (secure, plain) = (World::secure(&pki).await?, World::plain(&pki).await?);
    facts.agents = scenes::agents(&secure).await?;
    show.agents(&facts.agents, millis(started))?;

    let (seen, control) = (scenes::play(&secure).await?, scenes::play(&plain).await?);
    (facts.requests, facts.parts, facts.failures) = (seen.requests, seen.parts, seen.failures);
    facts.broker = scenes::what_the_broker_saw(&seen.passed, &control.passed);
    show.requests(&facts.requests)?;
    show.parts_and_failures(&facts.parts, &facts.failures)?;
    show.broker(&facts.broker)?;

    facts.refusals = attacks::play(&pki, &secure, &seen.passed).await?;
    show.refusals(&facts.refusals)?;

    show.rates_begin()?;
    for (world, of) in [(&secure, "secure"), (&plain, "plain")] {
        let rates = rates::measure(world).await?;
        show.rates(of, &rates)?;
        facts.rates.push(facts::Rates { of, at: rates });
    }
    facts.seconds = began.elapsed().as_secs_f64();
    facts.judge();
    show.end(&facts)?;
    Ok(facts)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
