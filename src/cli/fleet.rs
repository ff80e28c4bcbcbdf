//! The agents, as a command sees them: each command runs a short-lived mapper, which connects, waits for registrations, and ends.
//! `nanite agents`, `nanite services` and `nanite ping` show them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use super::error::{CliError, Exit, Result, chain};
use super::node::{Node, NodeArgs, WithNode};
use super::output::{counted, failure_line, or_empty_json};
use super::runtime::Global;
use super::{args, output, remedy, runtime};
use crate::mapper::{AgentEvent, AgentRecord, Mapper};
use crate::packet::{Failure, FailureCode, Identity, Role, Service, Status, Tag};

/// How long to wait for registrations at least, so that the choice is among all agents.
const MIN_DISCOVERY_TIME: Duration = Duration::from_millis(300);
/// All agents count as known when none has registered for this long.
const QUIET_PERIOD: Duration = Duration::from_millis(150);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How many registrations are queued. While the queue is full, further ones are ignored.
const REGISTRATION_QUEUE: usize = 4096;

/// How many agents to wait for, and how long.
#[derive(Debug, clap::Args)]
pub(super) struct DiscoveryArgs {
    /// How many suitable agents to wait for; fewer are an error.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Agents")]
    pub at_least: usize,
    /// How long to wait for them; for a target as long as for its answer.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = args::duration, help_heading = "Agents")]
    pub look: Duration,
}

/// A short-lived mapper.
pub(super) struct Fleet {
    pub mapper: Mapper,
    connection: crate::Node,
    /// The broker's URL, without a password.
    pub broker: String,
    started: Instant,
    /// When the last agent registered.
    last_registration: Instant,
    registrations: mpsc::Receiver<(Identity, Instant)>,
}

impl Fleet {
    /// Connects, and asks all agents to register.
    pub(super) async fn start(node: &Node) -> Result<Self> {
        Self::start_at(node.connect().await?, node.broker()).await
    }

    async fn start_at(connection: crate::Node, broker: String) -> Result<Self> {
        let (sender, registrations) = mpsc::channel(REGISTRATION_QUEUE);
        let mapper = connection.mapper().short_lived().on_agent(move |event| {
            if let AgentEvent::Registered(record) = event {
                let _ = sender.try_send((record.identity.clone(), Instant::now()));
            }
        });
        let started = Instant::now();
        let mapper = mapper.start().await.map_err(|error| remedy::mapper(&error, &broker))?;
        Ok(Self { mapper, connection, broker, started, last_registration: started, registrations })
    }

    /// The agents that have registered by now.
    pub(super) async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>> {
        self.mapper.agents().await.map_err(|error| CliError::of(Exit::Failure, &error))
    }

    /// Waits until enough agents match and no more are registering, or until the limit. Returns all agents, and how many match.
    pub(super) async fn discover(
        &mut self,
        at_least: usize,
        limit: Duration,
        matches: impl Fn(&AgentRecord) -> bool,
    ) -> Result<(Vec<Arc<AgentRecord>>, usize)> {
        let deadline = self.started + limit;
        loop {
            // Before the agents are read: one that registers in between ends the wait below.
            self.drain_registrations();
            let agents = self.agents().await?;
            let count = agents.iter().filter(|record| matches(record)).count();
            let complete = (self.started + MIN_DISCOVERY_TIME).max(self.last_registration + QUIET_PERIOD);
            let next = if count >= at_least.max(1) { complete.min(deadline) } else { deadline };
            if Instant::now() >= next {
                return Ok((agents, count));
            }
            self.next_registration(next).await;
        }
    }

    /// Waits until an agent has registered; none if it has not until the limit.
    pub(super) async fn wait_for(&mut self, agent: &Identity, limit: Duration) -> Result<Option<Arc<AgentRecord>>> {
        let deadline = self.started + limit;
        loop {
            self.drain_registrations();
            if let Some(record) = self.agents().await?.into_iter().find(|record| record.identity == *agent) {
                return Ok(Some(record));
            }
            if self.next_registration(deadline).await.is_none() {
                return Ok(None);
            }
        }
    }

    /// Pings each agent once, one after the other, so that they do not delay each other: it is asked to register again.
    pub(super) async fn ping(
        &mut self,
        agents: &[Arc<AgentRecord>],
        timeout: Duration,
    ) -> BTreeMap<Identity, Result<Duration, Failure>> {
        let mut results = BTreeMap::new();
        for record in agents {
            // Earlier registrations are no responses.
            self.drain_registrations();
            let sent = Instant::now();
            let result = match self.mapper.request_registration(record).await {
                Ok(()) => loop {
                    match self.next_registration(sent + timeout).await {
                        Some((agent, at)) if agent == record.identity => break Ok(at.saturating_duration_since(sent)),
                        Some(_) => {}
                        None => {
                            let message = format!("no answer within {timeout:?}");
                            break Err(Failure::new(FailureCode::TimedOut, message));
                        }
                    }
                },
                Err(error) => Err(Failure::new(FailureCode::Lost, chain(&error))),
            };
            results.insert(record.identity.clone(), result);
        }
        results
    }

    fn drain_registrations(&mut self) {
        while let Ok((_, at)) = self.registrations.try_recv() {
            self.last_registration = at;
        }
    }

    /// The next registration, and when it arrived; none at the deadline.
    async fn next_registration(&mut self, deadline: Instant) -> Option<(Identity, Instant)> {
        let registration = timeout_at(deadline, self.registrations.recv()).await.ok()??;
        self.last_registration = registration.1;
        Some(registration)
    }

    /// How many messages were refused, and why; none if no message was. It often explains why an agent is missing.
    pub(super) fn refusals(&self) -> Option<String> {
        let refused: Vec<_> = self.mapper.refusals().into_iter().filter(|(_, count)| *count > 0).collect();
        let total = refused.iter().map(|(_, count)| usize::try_from(*count).unwrap_or(usize::MAX)).sum();
        let kinds: Vec<String> = refused.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        (!kinds.is_empty()).then(|| format!("{} refused ({})", counted(total, "message"), kinds.join(", ")))
    }

    /// The error that an agent is missing, with the refused messages in its remedy.
    pub(super) fn not_offered(&self, message: impl std::fmt::Display, help: &str) -> CliError {
        let failure = CliError::new(Exit::NotOffered, message);
        match self.refusals() {
            Some(refusals) => failure
                .help(format!("{refusals}: the certificates of their senders may be unknown here; otherwise {help}")),
            None => failure.help(help),
        }
    }

    /// Disconnects.
    pub(super) async fn close(self) {
        close(self.connection.close()).await;
    }
}

/// Runs a command with a short-lived mapper.
pub(super) fn run<T>(
    global: &Global,
    node: &NodeArgs,
    command: impl AsyncFnOnce(&mut Fleet) -> Result<T>,
) -> Result<T> {
    let node = node.node(global, Role::Mapper)?;
    runtime::run(async {
        let mut fleet = Fleet::start(&node).await?;
        let result = command(&mut fleet).await;
        fleet.close().await;
        result
    })
}

/// Waits until a connection is closed properly, but not for long.
pub(super) async fn close(closing: impl Future<Output = ()>) {
    let _ = timeout(CLOSE_TIMEOUT, closing).await;
}

/// The first of many names.
pub(super) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<&str> = names.into_iter().collect();
    match names.split_at_checked(SHOWN) {
        Some((shown, more)) if !more.is_empty() => format!("{} and {} more", shown.join(", "), more.len()),
        _ if names.is_empty() => "nothing".into(),
        _ => names.join(", "),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::agent::{Agent, actor};
    use crate::packet::Payload;
    use crate::serializer::PlainSerializer;
    use crate::transport::MemoryBroker;

    pub(in crate::cli) async fn fleet(broker: &MemoryBroker) -> Fleet {
        let serializer = PlainSerializer::json(Identity::mapper("m").unwrap());
        let connection = crate::Node::new(serializer, broker.connect());
        Fleet::start_at(connection, "memory".into()).await.unwrap()
    }

    pub(in crate::cli) async fn agent(broker: &MemoryBroker, name: &str, prefix: &str, tags: &[&str]) -> Agent {
        let echo = actor(prefix)
            .expose("echo", async |payload: Payload| Ok::<_, Failure>(payload))
            .expose("fail", async |_: Payload| Err::<(), _>(Failure::failed("on purpose")));
        let serializer = PlainSerializer::json(Identity::agent(name).unwrap());
        let agent = crate::Node::new(serializer, broker.connect()).agent().actor(echo);
        let agent = tags.iter().fold(agent, |agent, tag| agent.tag(tag.parse().unwrap()));
        agent.start().await.unwrap()
    }

    fn names(agents: &[Arc<AgentRecord>]) -> Vec<&str> {
        agents.iter().map(|record| record.identity.name()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn u02_discovery_finds_all_running_agents() {
        let broker = MemoryBroker::new();
        let _agents = (agent(&broker, "a", "x", &[]).await, agent(&broker, "b", "x", &[]).await);
        let mut fleet = fleet(&broker).await;
        let found = fleet.discover(1, Duration::from_secs(5), |_| true).await.unwrap();
        assert_eq!((names(&found.0), found.1), (vec!["a", "b"], 2));
        assert!(fleet.started.elapsed() < Duration::from_secs(1), "it does not wait for the limit");
    }

    #[tokio::test(start_paused = true)]
    async fn u02_discovery_waits_for_late_agents_up_to_limit() {
        let broker = MemoryBroker::new();
        let _early = agent(&broker, "early", "x", &[]).await;
        let mut fleet = fleet(&broker).await;
        let late = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            agent(&broker, "late", "x", &[]).await
        };
        let is_late = |agent: &AgentRecord| agent.identity.name() == "late";
        let (_late, found) = tokio::join!(late, fleet.discover(1, Duration::from_secs(2), is_late));
        let (agents, count) = found.unwrap();
        assert_eq!((names(&agents), count), (vec!["early", "late"], 1));
        let (agents, count) = fleet.discover(1, Duration::from_secs(3), |_| false).await.unwrap();
        assert_eq!((agents.len(), count, fleet.started.elapsed()), (2, 0, Duration::from_secs(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn u02_target_is_found_at_once_or_missing_at_limit() {
        let broker = MemoryBroker::new();
        let _a = agent(&broker, "a", "x", &[]).await;
        let mut fleet = fleet(&broker).await;
        let (a, b) = (Identity::agent("a").unwrap(), Identity::agent("b").unwrap());
        assert_eq!(fleet.wait_for(&a, Duration::from_secs(1)).await.unwrap().unwrap().identity, a);
        assert!(fleet.started.elapsed() < MIN_DISCOVERY_TIME);
        assert!(fleet.wait_for(&b, Duration::from_secs(1)).await.unwrap().is_none());
        assert_eq!(fleet.started.elapsed(), Duration::from_secs(1));
    }
}

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
    run(global, &args.node, async |fleet| {
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
    run(global, node, async |fleet| args.run(global, fleet).await)
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
mod agents_tests {
    use super::*;

    #[test]
    fn u02_ping_target_all_means_every_agent() {
        let agent = |name| Ok(PingTarget::Agent(Identity::agent(name).unwrap()));
        for (text, target) in [("all", Ok(PingTarget::All)), ("fred", agent("fred")), ("nanite-all", agent("all"))] {
            assert_eq!(PingTarget::parse(text), target);
        }
    }
}
