//! `nanite ping`: whether agents live, and how long a round trip to them takes.
//!
//! An agent that is asked to register again answers with a registration made now: two messages, both signed, sealed, carried by the
//! broker and checked. No service is called, so it works with every agent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::answers::ByAgent;
use super::ask::{agent, with_refusals};
use super::error::{CliError, Exit};
use super::fleet::Fleet;
use super::{Global, duration, node, output, runtime};
use crate::mapper::{AgentEvent, AgentRecord};
use crate::packet::{Failure, FailureCode, Identity, Role};

/// How many registrations wait to be counted.
pub(super) const QUEUED: usize = 4096;

/// See whether agents live, and how long a round trip takes.
#[derive(Debug, clap::Args)]
pub(super) struct Command {
    #[command(flatten)]
    args: Args,
    #[command(flatten)]
    node: node::Args,
}

/// Whom to ask, and how often.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// An agent, by its name or as nanite-NAME; `all` for every agent.
    #[arg(value_name = "NAME|all", value_parser = whom)]
    whom: Whom,
    /// How often to ask.
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// With `all`: how many agents to wait for; fewer is exit code 4.
    #[arg(long, value_name = "N", default_value_t = 1)]
    at_least: usize,
    /// How long an answer may take.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration::parse)]
    timeout: Duration,
    /// One JSON object on stdout: {"results": {ID: {"ms": [..]}}, "failures": {ID: {"code": .., "message": ..}}}.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Whom {
    All,
    One(Identity),
}

fn whom(text: &str) -> Result<Whom, String> {
    if text == "all" { Ok(Whom::All) } else { agent(text).map(Whom::One) }
}

#[derive(Default, Serialize)]
struct Pinged {
    results: ByAgent<Times>,
    failures: ByAgent<Failure>,
}

#[derive(Default, Serialize)]
struct Times {
    ms: Vec<f64>,
}

/// Registrations that a mapper hears, each with the timestamp when.
pub(super) type Registrations = mpsc::Receiver<(Identity, Instant)>;

/// A hook for a mapper, and what it hears.
pub(super) fn registrations() -> (impl Fn(&AgentEvent) + Send + Sync + 'static, Registrations) {
    let (note, registered) = mpsc::channel(QUEUED);
    let hook = move |event: &AgentEvent| {
        if let AgentEvent::Registered(record) = event {
            // When it is full, that round trip is not measured.
            let _ = note.try_send((record.identity.clone(), Instant::now()));
        }
    };
    (hook, registered)
}

pub(super) fn run(global: &Global, command: &Command) -> Result<Exit, CliError> {
    let Command { args, node } = command;
    let node = node.node(global, Role::Mapper)?;
    runtime::run(async {
        let (note, mut registered) = registrations();
        let mut fleet = Fleet::start_with(&node, |mapper| mapper.on_agent(note)).await?;
        let pinged = send(global, args, &mut fleet, &mut registered).await;
        fleet.close().await;
        pinged
    })
}

/// Pings with a mapper that stays, and shows what comes of it.
///
/// # Errors
/// [`CliError`] when nobody is there.
pub(super) async fn send(
    global: &Global,
    args: &Args,
    fleet: &mut Fleet,
    registered: &mut Registrations,
) -> Result<Exit, CliError> {
    let pinged = match ping(global, args, fleet, registered).await {
        Err(error) if args.json && error.exit() == Exit::NotOffered => {
            output::json(&Pinged::default())?;
            return Err(error);
        }
        pinged => pinged?,
    };
    if args.json {
        output::json(&pinged)?;
    }
    let complete = pinged.failures.is_empty() && (args.whom != Whom::All || pinged.results.len() >= args.at_least);
    Ok(if complete { Exit::Success } else { Exit::Incomplete })
}

async fn ping(
    global: &Global,
    args: &Args,
    fleet: &mut Fleet,
    registered: &mut Registrations,
) -> Result<Pinged, CliError> {
    let agents = match &args.whom {
        Whom::All => fleet.settle(args.timeout, |agents| agents.len() >= args.at_least.max(1)).await?,
        Whom::One(agent) => fleet.present(agent, args.timeout).await?.into_iter().collect(),
    };
    if agents.is_empty() {
        let what = match &args.whom {
            Whom::All => "no agent is there".to_owned(),
            Whom::One(agent) => format!("{agent} is not there"),
        };
        let help = "it has to be at the same broker and virtual host, with a certificate that is known here";
        return Err(with_refusals(CliError::new(Exit::NotOffered, what), fleet, help));
    }
    let mut pinged = Pinged::default();
    for _ in 0..args.count {
        for (agent, result) in once(fleet, &agents, registered, args.timeout).await {
            match result {
                Ok(took) => {
                    let ms = took.as_secs_f64() * 1e3;
                    if !args.json {
                        output::line(&format!("{agent}: {ms:.1} ms"))?;
                    }
                    // To the microsecond: the clock says no more.
                    pinged.results.entry(agent).or_default().ms.push((ms * 1e3).round() / 1e3);
                }
                Err(failure) => {
                    output::note(&output::stderr_paint().red(&format!("{agent}: {failure}")));
                    pinged.failures.insert(agent, failure);
                }
            }
        }
    }
    global.note(&format!("{} answered, {} missing", pinged.results.len(), pinged.failures.len()));
    Ok(pinged)
}

/// Asks each agent once, one after the other, so that none waits for another.
pub(super) async fn once(
    fleet: &Fleet,
    agents: &[Arc<AgentRecord>],
    registered: &mut Registrations,
    patience: Duration,
) -> BTreeMap<Identity, Result<Duration, Failure>> {
    let mut results = BTreeMap::new();
    for record in agents {
        // What was said before it was asked is no answer.
        while registered.try_recv().is_ok() {}
        let asked = Instant::now();
        let result = match fleet.mapper.request_registration(record).await {
            Ok(()) => answer(record, registered, asked, patience).await,
            Err(error) => Err(Failure::new(FailureCode::Lost, super::error::chain(&error))),
        };
        results.insert(record.identity.clone(), result);
    }
    results
}

async fn answer(
    record: &AgentRecord,
    registered: &mut Registrations,
    asked: Instant,
    patience: Duration,
) -> Result<Duration, Failure> {
    loop {
        match timeout_at(asked + patience, registered.recv()).await {
            Ok(Some((agent, at))) if agent == record.identity => return Ok(at.saturating_duration_since(asked)),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                return Err(Failure::new(FailureCode::TimedOut, format!("no answer within {patience:?}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_all_is_everybody_and_an_agent_of_that_name_has_a_longer_one() {
        assert_eq!(whom("all"), Ok(Whom::All));
        assert_eq!(whom("fred"), Ok(Whom::One(Identity::agent("fred").unwrap())));
        assert_eq!(whom("nanite-all"), Ok(Whom::One(Identity::agent("all").unwrap())));
    }
}
