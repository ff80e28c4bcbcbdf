//! `nanite agents`, `nanite services` and `nanite ping`: the registered agents, what they offer, and whether they respond.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::error::{CliError, Exit, chain};
use super::fleet::Fleet;
use super::node::NodeArgs;
use super::output::counted;
use super::request::{ByAgent, failure_line, or_empty_json};
use super::runtime::{self, Global};
use super::{args, output};
use crate::mapper::{AgentEvent, AgentRecord};
use crate::packet::{Failure, FailureCode, Identity, Role, Service, Status, Tag};

/// How many registrations wait to be counted by `ping`.
pub(super) const REGISTRATION_QUEUE: usize = 4096;

/// How to find the agents.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// How many agents to wait for; fewer is exit code 4.
    #[arg(long, value_name = "N", default_value_t = 1)]
    at_least: usize,
    /// How long to wait for them.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = args::duration)]
    look: Duration,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Agent<'a> {
    status: Status,
    services: &'a [Service],
    tags: &'a [Tag],
    files: &'a [Tag],
}

#[derive(Serialize)]
struct Agents<'a> {
    agents: ByAgent<Agent<'a>>,
}

#[derive(Serialize)]
struct Services<'a> {
    services: BTreeMap<&'a Service, Vec<&'a Identity>>,
}

pub(super) fn agents(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let (agents, exit) = args.find(global)?;
    show_agents(&agents, args.json)?;
    Ok(exit)
}

pub(super) fn services(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let (agents, exit) = args.find(global)?;
    show_services(&agents, args.json)?;
    Ok(exit)
}

impl Args {
    /// The registered agents, and the exit code for their number.
    fn find(&self, global: &Global) -> Result<(Vec<Arc<AgentRecord>>, Exit), CliError> {
        let node = self.node.node(global, Role::Mapper)?;
        runtime::run(async {
            let mut fleet = Fleet::start(&node).await?;
            let agents = fleet.wait_for_agents(self.look, |agents| agents.len() >= self.at_least.max(1)).await;
            let refusals = fleet.refusals();
            fleet.close().await;
            let agents = agents?;
            match refusals {
                _ if !agents.is_empty() => global.note(&counted(agents.len(), "agent")),
                Some(refusals) => global.note(&format!("no agents; {refusals}")),
                None => global.note("no agents"),
            }
            // An empty list is a success, unless `--at-least` asks for more.
            let too_few = agents.len() < self.at_least && self.at_least > 1;
            Ok((agents, if too_few { Exit::Incomplete } else { Exit::Success }))
        })
    }
}

pub(super) fn show_agents(records: &[Arc<AgentRecord>], json: bool) -> Result<(), CliError> {
    if json {
        let agents = records.iter().map(|record| {
            let AgentRecord { identity, status, services, tags, files, .. } = record.as_ref();
            (identity.clone(), Agent { status: *status, services, tags, files })
        });
        return output::json(&Agents { agents: agents.collect() });
    }
    let row = |record: &Arc<AgentRecord>| {
        [record.identity.to_string(), record.status.to_string(), lines(&record.services), lines(&record.tags)]
    };
    table(["AGENT", "LOAD", "SERVICES", "TAGS"], records.iter().map(row).collect())
}

pub(super) fn show_services(records: &[Arc<AgentRecord>], json: bool) -> Result<(), CliError> {
    let mut services: BTreeMap<&Service, Vec<&Identity>> = BTreeMap::new();
    for record in records {
        for service in &record.services {
            services.entry(service).or_default().push(&record.identity);
        }
    }
    if json {
        return output::json(&Services { services });
    }
    table(
        ["SERVICE", "AGENTS"],
        services.iter().map(|(service, agents)| [service.to_string(), lines(agents)]).collect(),
    )
}

fn table<const N: usize>(headings: [&str; N], rows: Vec<[String; N]>) -> Result<(), CliError> {
    if rows.is_empty() { Ok(()) } else { output::table(headings, &rows) }
}

fn lines<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join("\n")
}

/// Ping agents: whether they respond, and how long a round trip takes.
///
/// Each agent is asked to register again. Request and registration are signed, encrypted, sent through the broker and verified. No
/// service is called, so it works with every agent.
#[derive(Debug, clap::Args)]
pub(super) struct PingCommand {
    #[command(flatten)]
    args: PingArgs,
    #[command(flatten)]
    node: NodeArgs,
}

/// The agents to ping.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct PingArgs {
    /// An agent, by its name or as nanite-NAME; `all` for every agent.
    #[arg(value_name = "NAME|all", value_parser = PingTarget::parse)]
    target: PingTarget,
    /// How many times to ping.
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// With `all`: how many agents to wait for; fewer is exit code 4.
    #[arg(long, value_name = "N", default_value_t = 1)]
    at_least: usize,
    /// How long to wait for a response.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = args::duration)]
    timeout: Duration,
    /// One JSON object on stdout: {"results": {ID: {"ms": [..]}}, "failures": {ID: {"code": .., "message": ..}}}.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum PingTarget {
    All,
    Agent(Identity),
}

impl PingTarget {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "all" { Ok(Self::All) } else { args::agent(text).map(Self::Agent) }
    }
}

#[derive(Default, Serialize)]
struct PingReport {
    results: ByAgent<RoundTrips>,
    failures: ByAgent<Failure>,
}

#[derive(Default, Serialize)]
struct RoundTrips {
    ms: Vec<f64>,
}

/// The registrations that a mapper receives, and when.
pub(super) type Registrations = mpsc::Receiver<(Identity, Instant)>;

/// A hook for a mapper, and the registrations from it.
pub(super) fn registrations() -> (impl Fn(&AgentEvent) + Send + Sync + 'static, Registrations) {
    let (sender, registrations) = mpsc::channel(REGISTRATION_QUEUE);
    let hook = move |event: &AgentEvent| {
        if let AgentEvent::Registered(record) = event {
            // When the queue is full, that round trip is not measured.
            let _ = sender.try_send((record.identity.clone(), Instant::now()));
        }
    };
    (hook, registrations)
}

pub(super) fn ping(global: &Global, PingCommand { args, node }: &PingCommand) -> Result<Exit, CliError> {
    let node = node.node(global, Role::Mapper)?;
    runtime::run(async {
        let (hook, mut registrations) = registrations();
        let mut fleet = Fleet::start_with(&node, |mapper| mapper.on_agent(hook)).await?;
        let exit = args.run(global, &mut fleet, &mut registrations).await;
        fleet.close().await;
        exit
    })
}

impl PingArgs {
    /// Pings, and shows the results.
    pub(super) async fn run(
        &self,
        global: &Global,
        fleet: &mut Fleet,
        registrations: &mut Registrations,
    ) -> Result<Exit, CliError> {
        let report = self.ping(fleet, registrations).await;
        let report = or_empty_json(report, self.json, &PingReport::default())?;
        if self.json {
            output::json(&report)?;
        }
        let (answered, missing) = (report.results.len(), report.failures.len());
        global.note(&format!("{answered} answered, {missing} missing"));
        let complete = missing == 0 && (self.target != PingTarget::All || answered >= self.at_least);
        Ok(if complete { Exit::Success } else { Exit::Incomplete })
    }

    async fn ping(&self, fleet: &mut Fleet, registrations: &mut Registrations) -> Result<PingReport, CliError> {
        let agents = match &self.target {
            PingTarget::All => {
                fleet.wait_for_agents(self.timeout, |agents| agents.len() >= self.at_least.max(1)).await?
            }
            PingTarget::Agent(agent) => fleet.wait_for(agent, self.timeout).await?.into_iter().collect(),
        };
        if agents.is_empty() {
            let message = match &self.target {
                PingTarget::All => "no agent is registered".to_owned(),
                PingTarget::Agent(agent) => format!("{agent} is not registered"),
            };
            let help = "it must use the same broker and virtual host, and a certificate that this node trusts";
            return Err(fleet.not_offered(message, help));
        }
        let mut report = PingReport::default();
        for _ in 0..self.count {
            for (agent, result) in ping_each(fleet, &agents, registrations, self.timeout).await {
                match result {
                    Ok(round_trip) => {
                        let ms = round_trip.as_secs_f64() * 1e3;
                        if !self.json {
                            output::line(&format!("{agent}: {ms:.1} ms"))?;
                        }
                        // To the microsecond: the clock is not more precise.
                        report.results.entry(agent).or_default().ms.push((ms * 1e3).round() / 1e3);
                    }
                    Err(failure) => {
                        output::note(&output::stderr_paint().red(&failure_line(&agent, &failure)));
                        report.failures.insert(agent, failure);
                    }
                }
            }
        }
        Ok(report)
    }
}

/// Pings each agent once, one after the other, so that they do not delay each other.
pub(super) async fn ping_each(
    fleet: &Fleet,
    agents: &[Arc<AgentRecord>],
    registrations: &mut Registrations,
    timeout: Duration,
) -> BTreeMap<Identity, Result<Duration, Failure>> {
    let mut results = BTreeMap::new();
    for record in agents {
        // Earlier registrations are no responses.
        while registrations.try_recv().is_ok() {}
        let sent = Instant::now();
        let result = match fleet.mapper.ask(record).await {
            Ok(()) => response(record, registrations, sent, timeout).await,
            Err(error) => Err(Failure::new(FailureCode::Lost, chain(&error))),
        };
        results.insert(record.identity.clone(), result);
    }
    results
}

async fn response(
    record: &AgentRecord,
    registrations: &mut Registrations,
    sent: Instant,
    timeout: Duration,
) -> Result<Duration, Failure> {
    loop {
        match timeout_at(sent + timeout, registrations.recv()).await {
            Ok(Some((agent, at))) if agent == record.identity => return Ok(at.saturating_duration_since(sent)),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                return Err(Failure::new(FailureCode::TimedOut, format!("no answer within {timeout:?}")));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_all_is_everybody_and_an_agent_of_that_name_has_a_longer_one() {
        let agent = |name| Ok(PingTarget::Agent(Identity::agent(name).unwrap()));
        for (text, target) in [("all", Ok(PingTarget::All)), ("fred", agent("fred")), ("nanite-all", agent("all"))] {
            assert_eq!(PingTarget::parse(text), target);
        }
    }
}
