//! The agents, as a command sees them: each command runs a short-lived mapper, which connects, waits for registrations, and ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::error::{CliError, Exit};
use super::node::Node;
use super::output::counted;
use super::remedy;
use crate::mapper::{AgentEvent, AgentRecord, Mapper, MapperBuilder};
use crate::packet::Identity;

/// How long to wait for registrations at least, so that the choice is among all agents.
const MIN_DISCOVERY_TIME: Duration = Duration::from_millis(300);
/// All agents count as known when none has registered for this long.
const QUIET_PERIOD: Duration = Duration::from_millis(150);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A short-lived mapper.
pub(super) struct Fleet {
    pub mapper: Mapper,
    connection: crate::Node,
    broker: String,
    started: Instant,
    /// When the last agent registered.
    registered: watch::Receiver<Option<Instant>>,
}

impl Fleet {
    /// Connects, and asks all agents to register.
    pub(super) async fn start(node: &Node) -> Result<Self, CliError> {
        Self::start_with(node, |mapper| mapper).await
    }

    /// The same, with more options for the mapper.
    pub(super) async fn start_with(
        node: &Node,
        options: impl FnOnce(MapperBuilder) -> MapperBuilder,
    ) -> Result<Self, CliError> {
        Self::start_at(node.connect().await?, node.broker(), options).await
    }

    async fn start_at(
        connection: crate::Node,
        broker: String,
        options: impl FnOnce(MapperBuilder) -> MapperBuilder,
    ) -> Result<Self, CliError> {
        let (sender, registered) = watch::channel(None);
        let mapper = options(connection.mapper()).short_lived().on_agent(move |event| {
            if let AgentEvent::Registered(_) = event {
                sender.send_replace(Some(Instant::now()));
            }
        });
        let started = Instant::now();
        let mapper = mapper.start().await.map_err(|error| remedy::mapper(&error, &broker))?;
        Ok(Self { mapper, connection, broker, started, registered })
    }

    /// The broker's URL, without a password.
    pub(super) fn broker(&self) -> &str {
        &self.broker
    }

    /// The agents that have registered by now.
    pub(super) async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, CliError> {
        self.mapper.agents().await.map_err(|error| CliError::of(Exit::Failure, &error))
    }

    /// Waits until there are enough agents and no more are registering, or until the limit.
    pub(super) async fn wait_for_agents(
        &mut self,
        limit: Duration,
        enough: impl Fn(&[Arc<AgentRecord>]) -> bool,
    ) -> Result<Vec<Arc<AgentRecord>>, CliError> {
        let deadline = self.started + limit;
        loop {
            // Read before the agents: one that registers in between wakes the wait below.
            let last = *self.registered.borrow_and_update();
            let agents = self.agents().await?;
            let quiet = last.map_or(self.started, |last| last + QUIET_PERIOD);
            let complete = (self.started + MIN_DISCOVERY_TIME).max(quiet).min(deadline);
            let next = if enough(&agents) { complete } else { deadline };
            if Instant::now() >= next {
                return Ok(agents);
            }
            let _ = timeout_at(next, self.registered.changed()).await;
        }
    }

    /// Waits until an agent has registered; none if it has not until the limit.
    pub(super) async fn wait_for(
        &mut self,
        agent: &Identity,
        limit: Duration,
    ) -> Result<Option<Arc<AgentRecord>>, CliError> {
        let deadline = self.started + limit;
        loop {
            self.registered.mark_unchanged();
            if let Some(record) = self.agents().await?.into_iter().find(|record| record.identity == *agent) {
                return Ok(Some(record));
            }
            if timeout_at(deadline, self.registered.changed()).await.is_err() {
                return Ok(None);
            }
        }
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
    use crate::packet::{Failure, Payload};
    use crate::serializer::PlainSerializer;
    use crate::transport::MemoryBroker;

    pub(in crate::cli) async fn fleet(broker: &MemoryBroker) -> Fleet {
        let serializer = PlainSerializer::json(Identity::mapper("m").unwrap());
        let connection = crate::Node::new(serializer, broker.connect());
        Fleet::start_at(connection, "memory".into(), |mapper| mapper).await.unwrap()
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
    async fn u02_the_choice_is_among_all_that_are_there() {
        let broker = MemoryBroker::new();
        let _agents = (agent(&broker, "a", "x", &[]).await, agent(&broker, "b", "x", &[]).await);
        let mut fleet = fleet(&broker).await;
        let found = fleet.wait_for_agents(Duration::from_secs(5), |agents| !agents.is_empty()).await.unwrap();
        assert_eq!(names(&found), ["a", "b"]);
        assert!(fleet.started.elapsed() < Duration::from_secs(1), "it does not wait for the limit");
    }

    #[tokio::test(start_paused = true)]
    async fn u02_one_that_comes_late_is_waited_for_up_to_the_limit() {
        let broker = MemoryBroker::new();
        let _early = agent(&broker, "early", "x", &[]).await;
        let mut fleet = fleet(&broker).await;
        let late = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            agent(&broker, "late", "x", &[]).await
        };
        let is_late = |agents: &[Arc<AgentRecord>]| names(agents).contains(&"late");
        let (_late, found) = tokio::join!(late, fleet.wait_for_agents(Duration::from_secs(2), is_late));
        assert_eq!(names(&found.unwrap()), ["early", "late"]);
        let never = fleet.wait_for_agents(Duration::from_secs(3), |_| false).await.unwrap();
        assert_eq!((never.len(), fleet.started.elapsed()), (2, Duration::from_secs(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn u02_a_target_is_asked_as_soon_as_it_is_there_and_missed_at_the_limit() {
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
