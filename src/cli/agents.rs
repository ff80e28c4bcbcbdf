//! `nanite agents` and `nanite services`: who is there, and what is offered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::answers::ByAgent;
use super::error::{CliError, Exit};
use super::fleet::Fleet;
use super::text::counted;
use super::{Global, duration, node, output, runtime, table};
use crate::mapper::AgentRecord;
use crate::packet::{Identity, Role, Service, Status, Tag};

/// Whom to listen to.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: node::Args,
    /// How many agents to wait for; fewer is exit code 4.
    #[arg(long, value_name = "N", default_value_t = 1)]
    at_least: usize,
    /// How long to wait for them.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration::parse)]
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

/// Shows the agents that are there.
pub(super) fn agents(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let (known, exit) = known(global, args)?;
    show_agents(&known, args.json)?;
    Ok(exit)
}

/// Shows these agents.
pub(super) fn show_agents(known: &[Arc<AgentRecord>], json: bool) -> Result<(), CliError> {
    if json {
        let agents = known
            .iter()
            .map(|record| {
                let AgentRecord { identity, status, services, tags, files, .. } = record.as_ref();
                (identity.clone(), Agent { status: *status, services, tags, files })
            })
            .collect();
        return output::json(&Agents { agents });
    }
    let rows: Vec<_> = known
        .iter()
        .map(|record| {
            [record.identity.to_string(), record.status.to_string(), lines(&record.services), lines(&record.tags)]
        })
        .collect();
    if !rows.is_empty() {
        table::print(["AGENT", "LOAD", "SERVICES", "TAGS"], &rows)?;
    }
    Ok(())
}

/// Shows the services that are offered.
pub(super) fn services(global: &Global, args: &Args) -> Result<Exit, CliError> {
    let (known, exit) = known(global, args)?;
    show_services(&known, args.json)?;
    Ok(exit)
}

/// Shows what these agents offer.
pub(super) fn show_services(known: &[Arc<AgentRecord>], json: bool) -> Result<(), CliError> {
    let mut services: BTreeMap<&Service, Vec<&Identity>> = BTreeMap::new();
    for record in known {
        for service in &record.services {
            services.entry(service).or_default().push(&record.identity);
        }
    }
    if json {
        return output::json(&Services { services });
    }
    let rows: Vec<_> = services.iter().map(|(service, agents)| [service.to_string(), lines(agents)]).collect();
    if !rows.is_empty() {
        table::print(["SERVICE", "AGENTS"], &rows)?;
    }
    Ok(())
}

/// The agents, and what their number comes to.
fn known(global: &Global, args: &Args) -> Result<(Vec<Arc<AgentRecord>>, Exit), CliError> {
    let node = args.node.node(global, Role::Mapper)?;
    runtime::run(async {
        let mut fleet = Fleet::start(&node).await?;
        let agents = fleet.settle(args.look, |agents| agents.len() >= args.at_least.max(1)).await;
        let refused = fleet.refused();
        fleet.close().await;
        let agents = agents?;
        match refused {
            _ if !agents.is_empty() => global.note(&counted(agents.len(), "agent")),
            Some(refused) => global.note(&format!("no agents; {refused}")),
            None => global.note("no agents"),
        }
        // Nobody is a good answer to the question who is there, unless somebody has to be.
        let few = agents.len() < args.at_least && args.at_least > 1;
        Ok((agents, if few { Exit::Incomplete } else { Exit::Success }))
    })
}

fn lines<T: ToString>(all: &[T]) -> String {
    let all: Vec<String> = all.iter().map(T::to_string).collect();
    all.join("\n")
}
