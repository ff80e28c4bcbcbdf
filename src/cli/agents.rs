//! `nanite agents`, `nanite services` and `nanite ping`: the registered agents, what they offer, and whether they respond.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::error::{Exit, Result};
use super::fleet::{self, DiscoveryArgs, Fleet};
use super::node::{NodeArgs, WithNode};
use super::output::counted;
use super::request::{failure_line, or_empty_json};
use super::runtime::Global;
use super::{args, output};
use crate::mapper::AgentRecord;
use crate::packet::{Failure, Identity, Service, Status, Tag};

/// How to find the agents.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    discovery: DiscoveryArgs,
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

/// Finds the agents, and shows them with [`show_agents`] or [`show_services`].
pub(super) fn list(global: &Global, args: &Args, show: fn(&[Arc<AgentRecord>], bool) -> Result<()>) -> Result<Exit> {
    let DiscoveryArgs { at_least, look } = args.discovery;
    fleet::run(global, &args.node, async |fleet| {
        let (agents, count) = fleet.discover(at_least, look, |_| true).await?;
        show(&agents, args.json)?;
        match fleet.refusals() {
            _ if count > 0 => global.note(&counted(count, "agent")),
            Some(refusals) => global.note(&format!("no agents; {refusals}")),
            None => global.note("no agents"),
        }
        // An empty list is a success, unless `--at-least` asks for more.
        let too_few = count < at_least && at_least > 1;
        Ok(if too_few { Exit::Incomplete } else { Exit::Success })
    })
}

pub(super) fn show_agents(records: &[Arc<AgentRecord>], json: bool) -> Result<()> {
    if json {
        let agents = records.iter().map(|record| {
            let AgentRecord { identity, status, services, tags, files, .. } = record.as_ref();
            (identity.clone(), Agent { status: *status, services, tags, files })
        });
        return output::json(&BTreeMap::from([("agents", agents.collect::<BTreeMap<_, _>>())]));
    }
    let row = |record: &Arc<AgentRecord>| {
        [record.identity.to_string(), record.status.to_string(), lines(&record.services), lines(&record.tags)]
    };
    output::table(["AGENT", "LOAD", "SERVICES", "TAGS"], &records.iter().map(row).collect::<Vec<_>>())
}

pub(super) fn show_services(records: &[Arc<AgentRecord>], json: bool) -> Result<()> {
    let mut services: BTreeMap<&Service, Vec<&Identity>> = BTreeMap::new();
    for record in records {
        for service in &record.services {
            services.entry(service).or_default().push(&record.identity);
        }
    }
    if json {
        return output::json(&BTreeMap::from([("services", services)]));
    }
    let rows = services.iter().map(|(service, agents)| [service.to_string(), lines(agents)]);
    output::table(["SERVICE", "AGENTS"], &rows.collect::<Vec<_>>())
}

fn lines<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join("\n")
}

/// Ping agents: whether they respond, and how long a round trip takes.
///
/// Each agent is asked to register again. Request and registration are signed, encrypted, sent through the broker and verified. No
/// service is called, so it works with every agent.
#[derive(Debug, clap::Args)]
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
    results: BTreeMap<Identity, RoundTrips>,
    failures: BTreeMap<Identity, Failure>,
}

#[derive(Default, Serialize)]
struct RoundTrips {
    ms: Vec<f64>,
}

pub(super) fn ping(global: &Global, WithNode { node, args }: &WithNode<PingArgs>) -> Result<Exit> {
    fleet::run(global, node, async |fleet| args.run(global, fleet).await)
}

impl PingArgs {
    /// Pings, and shows the results.
    pub(super) async fn run(&self, global: &Global, fleet: &mut Fleet) -> Result<Exit> {
        let report = self.ping(fleet).await;
        let report = or_empty_json(report, self.json, &PingReport::default())?;
        if self.json {
            output::json(&report)?;
        }
        let (answered, missing) = (report.results.len(), report.failures.len());
        global.note(&format!("{answered} answered, {missing} missing"));
        let complete = missing == 0 && (self.target != PingTarget::All || answered >= self.at_least);
        Ok(if complete { Exit::Success } else { Exit::Incomplete })
    }

    async fn ping(&self, fleet: &mut Fleet) -> Result<PingReport> {
        let agents = match &self.target {
            PingTarget::All => fleet.discover(self.at_least, self.timeout, |_| true).await?.0,
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
            for (agent, result) in fleet.ping(&agents, self.timeout).await {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_ping_target_all_means_every_agent() {
        let agent = |name| Ok(PingTarget::Agent(Identity::agent(name).unwrap()));
        for (text, target) in [("all", Ok(PingTarget::All)), ("fred", agent("fred")), ("nanite-all", agent("all"))] {
            assert_eq!(PingTarget::parse(text), target);
        }
    }
}
