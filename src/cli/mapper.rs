//! `nanite mapper`: tracks the agents, and dispatches the requests of others.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::signal::unix::SignalKind;

use super::daemon::DaemonArgs;
use super::error::{Exit, Result};
use super::node::{NodeArgs, PolicyArgs, WithOption};
use super::options::MapperOptions;
use super::output::counted;
use super::remedy;
use super::runtime::{self, Global};
use crate::mapper::{AgentEvent, AgentRecord, Mapper, MapperBuilder};
use crate::packet::{Identity, Role, Service, Tag};

/// How many busy agents are logged one by one.
const MAX_LOGGED_AGENTS: usize = 256;

/// Run a mapper: it tracks the agents, and logs when they register and leave.
///
/// It dispatches the requests of agents and of programs with `--via-mapper`, and delivers what waits in the offline queue. Programs
/// that embed a mapper, and `nanite request`, do not need it: each is a mapper itself. It runs until SIGINT or SIGTERM. At SIGUSR1 it
/// logs the requests in flight.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    options: MapperOptions,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

pub(super) fn run(global: &Global, args: &Args) -> Result<Exit> {
    if let Some(exit) = args.daemon.control(global, Role::Mapper)? {
        return Ok(exit);
    }
    let node = args.node.node(global, Role::Mapper)?;
    let (policy, audit) = (args.policy.policy(global)?, args.policy.audit(global)?);
    let options = args.options.or(&global.config.file.mapper);
    let mut process = args.daemon.begin(global, &node.identity)?;
    runtime::run(async {
        let report_signals = runtime::handle(SignalKind::user_defined1())?;
        let connection = node.connect().await?;
        let log = RegistrationLog::default();
        let mapper = connection
            .mapper()
            .with_option(policy, MapperBuilder::policy)
            .with_option(audit, MapperBuilder::audit)
            .with_option(options.agent_timeout, MapperBuilder::agent_timeout)
            .with_option(options.offline_redelivery_frequency, MapperBuilder::offline_redelivery_frequency)
            .offline_failsafe(options.offline_failsafe)
            .on_agent(move |event| log.log(event));
        #[cfg(feature = "redis")]
        let mapper = mapper.with_option(
            super::connection::redis(&args.options, &global.config, &node.serializer).await?,
            MapperBuilder::state,
        );
        runtime::until_stopped(global, async |stop| {
            let running = mapper.start().await.map_err(|error| remedy::mapper(&error, &node.broker()))?;
            let announcer = running.clone();
            let announce = move || {
                let mapper = announcer.clone();
                tokio::spawn(async move {
                    if let Err(error) = mapper.announce().await {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(error, "failed to announce the new certificate");
                    }
                });
            };
            let _watcher = node.secure.clone().map(|node| node.watch(announce)).transpose()?;
            process.ready(global, &format!("{} is ready: {}", node.identity, node.describe()))?;
            runtime::reporting(report_signals, stop.requested(), async || log_requests(&running).await).await;
            process.stopping();
            drop(running);
            connection.close().await;
            global.note(&format!("{} has stopped", node.identity));
            Ok(Exit::Success)
        })
        .await
    })
}

/// Logs the requests in flight.
async fn log_requests(mapper: &Mapper) {
    let agents = match mapper.agents().await {
        Ok(agents) => agents,
        Err(error) => {
            return tracing::warn!(error = &error as &dyn std::error::Error, "failed to read the agents");
        }
    };
    let work = mapper.workloads(agents.iter().map(|agent| &agent.identity));
    let in_flight = work.iter().map(|work| work.in_flight).sum();
    tracing::info!("{}, {} in flight", counted(agents.len(), "agent"), counted(in_flight, "request"));
    for (agent, work) in agents.iter().zip(work).filter(|(_, work)| work.in_flight > 0).take(MAX_LOGGED_AGENTS) {
        tracing::info!("in flight: {} at {}", counted(work.in_flight, "request"), agent.identity);
    }
}

/// Logs changes of the agents. It remembers their registrations, because agents repeat them.
#[derive(Debug, Default)]
struct RegistrationLog(Mutex<BTreeMap<Identity, Registration>>);

type Registration = (Vec<Service>, Vec<Tag>);

impl RegistrationLog {
    fn log(&self, event: &AgentEvent) {
        if let Some((agent, change)) = self.change(event) {
            tracing::info!("{agent} {change}");
        }
    }

    fn change(&self, event: &AgentEvent) -> Option<(Identity, String)> {
        let mut known = self.0.lock();
        match event {
            AgentEvent::Registered(record) => {
                let registration = (record.services.clone(), record.tags.clone());
                let change = match known.insert(record.identity.clone(), registration.clone()) {
                    None => "registered",
                    Some(before) if before != registration => "changed its registration",
                    Some(_) => return None,
                };
                Some((record.identity.clone(), format!("{change}: {}", offered(record))))
            }
            AgentEvent::Unregistered(agent) => {
                known.remove(agent);
                Some((agent.clone(), "unregistered".to_owned()))
            }
            AgentEvent::TimedOut(record) => {
                known.remove(&record.identity);
                Some((record.identity.clone(), "timed out: no heartbeat".to_owned()))
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
    fn n04_mapper_logs_only_changed_registrations() {
        let log = RegistrationLog::default();
        let change = |event: &AgentEvent| log.change(event).map(|(_, change)| change);
        assert_eq!(change(&registered(&["/a/b"])).as_deref(), Some("registered: 1 service, tags big"));
        assert_eq!(change(&registered(&["/a/b"])), None);
        let more = change(&registered(&["/a/b", "/a/c"]));
        assert_eq!(more.as_deref(), Some("changed its registration: 2 services, tags big"));
        let left = AgentEvent::Unregistered(Identity::agent("fred").unwrap());
        assert_eq!(change(&left).as_deref(), Some("unregistered"));
        assert!(change(&registered(&["/a/b"])).unwrap().starts_with("registered"));
    }
}
