//! `nanite mapper`: knows the agents, and says who comes and goes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::config::Config;
use super::daemon::Control;
use super::error::{CliError, Exit};
use super::text::counted;
use super::{Global, daemon, duration, guard, node, remedy, runtime, signals};
use crate::mapper::{AgentEvent, AgentRecord, Mapper};
use crate::packet::{Identity, Role, Service, Tag};

/// How many agents at work are logged one by one.
const AGENTS: usize = 256;

/// Run a mapper: it knows the agents, and says who comes and goes.
///
/// It dispatches what agents, and programs with `--via-mapper`, have asked the mappers for, and delivers what waits in the offline
/// queue. Programs that embed a mapper, and `nanite request`, do not need it: each is a mapper itself. It runs until SIGINT or
/// SIGTERM. At SIGUSR1 it logs the requests under way.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    control: Option<Control>,
    #[command(flatten)]
    node: node::Args,
    /// After how long a silent agent counts as gone [default: 60s].
    #[arg(long, value_name = "TIME", value_parser = duration::parse, help_heading = "Mapper")]
    agent_timeout: Option<Duration>,
    /// Let requests and pushes of others wait in the offline queue when nobody offers their service.
    #[arg(long, help_heading = "Mapper")]
    offline_failsafe: bool,
    /// How often what waits in the offline queue is tried again, beside when an agent comes [default: 10s].
    #[arg(long, value_name = "TIME", value_parser = duration::parse, help_heading = "Mapper")]
    offline_redelivery_frequency: Option<Duration>,
    #[cfg(feature = "redis")]
    #[command(flatten)]
    redis: super::redis::Args,
    #[command(flatten)]
    guard: guard::Args,
    #[command(flatten)]
    daemon: daemon::Options,
}

impl Args {
    /// Whether the log goes into a file.
    pub(super) fn logs_to_file(&self, config: &Config) -> bool {
        self.control.is_none() && self.daemon.logs_to_file(config)
    }
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit, CliError> {
    if let Some(control) = &args.control {
        return control.run(global, Role::Mapper);
    }
    if args.daemon.is_launch() {
        return args.daemon.launch(global);
    }
    let node = args.node.node(global, Role::Mapper)?;
    let guard = args.guard.guard(global)?;
    let mut process = args.daemon.begin(global, &node.identity)?;
    runtime::run(async {
        let reports = signals::Reports::take()?;
        let transport = node.connect().await?;
        let mut mapper = Mapper::builder(node.serializer.clone(), transport.clone());
        if let Some(timeout) = args.agent_timeout.or(global.config.file.mapper.agent_timeout) {
            mapper = mapper.agent_timeout(timeout);
        }
        #[cfg(feature = "redis")]
        if let Some(state) = args.redis.connect(&global.config, &node.serializer).await? {
            mapper = mapper.state(state);
        }
        let file = &global.config.file.mapper;
        if args.offline_failsafe || file.offline_failsafe.unwrap_or(false) {
            mapper = mapper.offline_failsafe(true);
        }
        if let Some(every) = args.offline_redelivery_frequency.or(file.offline_redelivery_frequency) {
            mapper = mapper.offline_redelivery_frequency(every);
        }
        if let Some(rules) = guard.rules {
            mapper = mapper.policy(rules);
        }
        if let Some(audit) = guard.audit {
            mapper = mapper.audit(audit);
        }
        let roll = Roll::default();
        let mapper = mapper.on_agent(move |event| roll.note(event));
        signals::run(global, async |stopped| {
            let running = mapper.start().await.map_err(|error| remedy::mapper(&error, &node.broker()))?;
            let announcer = running.clone();
            let announce = move || {
                let mapper = announcer.clone();
                tokio::spawn(async move {
                    if let Err(error) = mapper.announce().await {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "the new certificate was not made known"
                        );
                    }
                });
            };
            let _follower = node.reload.clone().map(|files| files.follow(announce)).transpose()?;
            process.ready(global, &format!("{} is ready: {}", node.identity, node.describe()))?;
            reports.during(stopped.wait(), async || log_work(&running).await).await;
            process.stopping();
            drop(running);
            transport.close().await;
            global.note(&format!("{} has stopped", node.identity));
            Ok(Exit::Success)
        })
        .await
    })
}

/// Says in the log what is under way.
async fn log_work(mapper: &Mapper) {
    let agents = match mapper.agents().await {
        Ok(agents) => agents,
        Err(error) => return tracing::warn!(error = &error as &dyn std::error::Error, "the agents cannot be read"),
    };
    let work = mapper.workloads(agents.iter().map(|agent| &agent.identity));
    let under_way = work.iter().map(|work| work.in_flight).sum();
    tracing::info!("{}, {} under way", counted(agents.len(), "agent"), counted(under_way, "request"));
    for (agent, work) in agents.iter().zip(work).filter(|(_, work)| work.in_flight > 0).take(AGENTS) {
        tracing::info!("under way: {} at {}", counted(work.in_flight, "request"), agent.identity);
    }
}

/// Who is there, to tell who comes from who only says it again.
#[derive(Debug, Default)]
struct Roll(Mutex<BTreeMap<Identity, Offer>>);

/// Services and tags.
type Offer = (Vec<Service>, Vec<Tag>);

impl Roll {
    fn note(&self, event: &AgentEvent) {
        if let Some((agent, what)) = self.said(event) {
            tracing::info!("{agent} {what}");
        }
    }

    fn said(&self, event: &AgentEvent) -> Option<(Identity, String)> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            AgentEvent::Registered(record) => {
                let offer = (record.services.clone(), record.tags.clone());
                let what = match known.insert(record.identity.clone(), offer.clone()) {
                    None => "came",
                    Some(before) if before != offer => "now offers something else",
                    Some(_) => return None,
                };
                Some((record.identity.clone(), format!("{what}: {}", offered(record))))
            }
            AgentEvent::Unregistered(agent) => {
                known.remove(agent);
                Some((agent.clone(), "left".to_owned()))
            }
            AgentEvent::TimedOut(record) => {
                known.remove(&record.identity);
                Some((record.identity.clone(), "has been silent for too long: gone".to_owned()))
            }
        }
    }
}

fn offered(record: &AgentRecord) -> String {
    let services = counted(record.services.len(), "service");
    if record.tags.is_empty() {
        return services;
    }
    let tags: Vec<&str> = record.tags.iter().map(Tag::as_str).collect();
    format!("{services}, tags {}", tags.join(", "))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::Timestamp;
    use crate::packet::{Register, Status};

    fn registered(services: &[&str]) -> AgentEvent {
        let register = Register {
            identity: Identity::agent("fred").unwrap(),
            services: services.iter().map(|service| service.parse().unwrap()).collect(),
            status: Status::default(),
            tags: vec!["big".parse().unwrap()],
            files: Vec::new(),
            instance: None,
        };
        AgentEvent::Registered(Arc::new(AgentRecord::new(register, 0, Timestamp::from_secs(0), None)))
    }

    #[test]
    fn n04_only_what_is_new_is_said() {
        let roll = Roll::default();
        let said = |event: &AgentEvent| roll.said(event).map(|(_, what)| what);
        assert_eq!(said(&registered(&["/a/b"])).as_deref(), Some("came: 1 service, tags big"));
        assert_eq!(said(&registered(&["/a/b"])), None);
        let more = said(&registered(&["/a/b", "/a/c"]));
        assert_eq!(more.as_deref(), Some("now offers something else: 2 services, tags big"));
        let left = AgentEvent::Unregistered(Identity::agent("fred").unwrap());
        assert_eq!(said(&left).as_deref(), Some("left"));
        assert!(said(&registered(&["/a/b"])).unwrap().starts_with("came"));
    }
}
