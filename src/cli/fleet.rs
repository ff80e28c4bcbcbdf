//! A mapper for one question: it starts, gets to know the agents, asks, and ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use super::error::{CliError, Exit};
use super::node::Node;
use super::remedy;
use super::text::counted;
use crate::mapper::{AgentEvent, AgentRecord, Mapper, MapperBuilder};
use crate::packet::Identity;
use crate::transport::Transport;

/// How long agents are listened for at least, so that the choice is among all of them.
const LOOK: Duration = Duration::from_millis(300);
/// The agents count as known when none has registered for so long.
const QUIET: Duration = Duration::from_millis(150);
/// How long it may take to say goodbye to the broker.
const CLOSE: Duration = Duration::from_secs(2);

/// A mapper that lives for one command.
pub(super) struct Fleet {
    pub mapper: Mapper,
    transport: Arc<dyn Transport>,
    broker: String,
    started: Instant,
    /// When the last agent registered.
    registered: watch::Receiver<Option<Instant>>,
}

impl Fleet {
    /// Connects, and asks all agents to register.
    ///
    /// # Errors
    /// [`CliError`] when the broker cannot be reached or used.
    pub(super) async fn start(node: &Node) -> Result<Self, CliError> {
        Self::start_with(node, |mapper| mapper).await
    }

    /// The same, with more options for the mapper.
    pub(super) async fn start_with(
        node: &Node,
        options: impl FnOnce(MapperBuilder) -> MapperBuilder,
    ) -> Result<Self, CliError> {
        let transport = node.connect().await?;
        let mapper = Mapper::builder(node.serializer.clone(), transport.clone());
        Self::of(options(mapper), transport, node.broker()).await
    }

    async fn of(mapper: MapperBuilder, transport: Arc<dyn Transport>, broker: String) -> Result<Self, CliError> {
        let (note, registered) = watch::channel(None);
        let mapper = mapper.short_lived().on_agent(move |event| {
            if let AgentEvent::Registered(_) = event {
                note.send_replace(Some(Instant::now()));
            }
        });
        let started = Instant::now();
        let mapper = mapper.start().await.map_err(|error| remedy::mapper(&error, &broker))?;
        Ok(Self { mapper, transport, broker, started, registered })
    }

    /// The broker's URL, without a password.
    pub(super) fn broker(&self) -> &str {
        &self.broker
    }

    /// The agents that are known by now.
    pub(super) async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, CliError> {
        self.mapper.agents().await.map_err(|error| CliError::of(Exit::Failure, &error))
    }

    /// Waits until the agents are known: those that are `enough` have come and no more are coming, or the limit is reached.
    pub(super) async fn settle(
        &mut self,
        limit: Duration,
        enough: impl Fn(&[Arc<AgentRecord>]) -> bool,
    ) -> Result<Vec<Arc<AgentRecord>>, CliError> {
        let until = self.started + limit;
        loop {
            // Looked at before the agents: one that comes in between wakes the wait below.
            let last = *self.registered.borrow_and_update();
            let agents = self.agents().await?;
            let all_here = (self.started + LOOK).max(last.map_or(self.started, |last| last + QUIET)).min(until);
            let next = if enough(&agents) { all_here } else { until };
            if Instant::now() >= next {
                return Ok(agents);
            }
            let _ = timeout_at(next, self.registered.changed()).await;
        }
    }

    /// Waits until an agent is there.
    pub(super) async fn present(
        &mut self,
        agent: &Identity,
        limit: Duration,
    ) -> Result<Option<Arc<AgentRecord>>, CliError> {
        let until = self.started + limit;
        loop {
            self.registered.mark_unchanged();
            if let Some(record) = self.agents().await?.into_iter().find(|record| record.identity == *agent) {
                return Ok(Some(record));
            }
            if timeout_at(until, self.registered.changed()).await.is_err() {
                return Ok(None);
            }
        }
    }

    /// What was refused meanwhile, in words; none when nothing was. It often says why nobody seems to be there.
    pub(super) fn refused(&self) -> Option<String> {
        let refused: Vec<_> = self.mapper.refusals().into_iter().filter(|(_, count)| *count > 0).collect();
        let total = refused.iter().map(|(_, count)| usize::try_from(*count).unwrap_or(usize::MAX)).sum();
        let kinds: Vec<String> = refused.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        (!kinds.is_empty()).then(|| format!("{} refused ({})", counted(total, "message"), kinds.join(", ")))
    }

    /// Says goodbye to the broker.
    pub(super) async fn close(self) {
        close(&self.transport).await;
    }
}

/// Closes a connection in order, so that the broker has no reason to complain; not for long.
pub(super) async fn close(transport: &Arc<dyn Transport>) {
    let _ = timeout(CLOSE, transport.close()).await;
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::agent::{Agent, actor};
    use crate::packet::{Failure, Payload};
    use crate::serializer::PlainSerializer;
    use crate::transport::MemoryBroker;

    pub(in crate::cli) async fn fleet(broker: &MemoryBroker) -> Fleet {
        let transport: Arc<dyn Transport> = Arc::new(broker.connect());
        let mapper = Mapper::builder(PlainSerializer::json(Identity::mapper("m").unwrap()), transport.clone());
        Fleet::of(mapper, transport, "memory".into()).await.unwrap()
    }

    pub(in crate::cli) async fn agent(broker: &MemoryBroker, name: &str, prefix: &str, tags: &[&str]) -> Agent {
        let echo = actor(prefix)
            .expose("echo", async |payload: Payload| Ok::<_, Failure>(payload))
            .expose("fail", async |_: Payload| Err::<(), _>(Failure::failed("on purpose")));
        let identity = Identity::agent(name).unwrap();
        let mut agent = Agent::builder(PlainSerializer::json(identity), broker.connect()).actor(echo);
        for tag in tags {
            agent = agent.tag(tag.parse().unwrap());
        }
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
        let found = fleet.settle(Duration::from_secs(5), |agents| !agents.is_empty()).await.unwrap();
        assert_eq!(names(&found), ["a", "b"]);
        assert!(fleet.started.elapsed() < Duration::from_secs(1), "it waits no longer than it has to");
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
        let (_late, found) = tokio::join!(late, fleet.settle(Duration::from_secs(2), is_late));
        assert_eq!(names(&found.unwrap()), ["early", "late"]);
        let never = fleet.settle(Duration::from_secs(3), |_| false).await.unwrap();
        assert_eq!((never.len(), fleet.started.elapsed()), (2, Duration::from_secs(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn u02_a_target_is_asked_as_soon_as_it_is_there_and_missed_at_the_limit() {
        let broker = MemoryBroker::new();
        let _a = agent(&broker, "a", "x", &[]).await;
        let mut fleet = fleet(&broker).await;
        let (a, b) = (Identity::agent("a").unwrap(), Identity::agent("b").unwrap());
        assert_eq!(fleet.present(&a, Duration::from_secs(1)).await.unwrap().unwrap().identity, a);
        assert!(fleet.started.elapsed() < LOOK);
        assert!(fleet.present(&b, Duration::from_secs(1)).await.unwrap().is_none());
        assert_eq!(fleet.started.elapsed(), Duration::from_secs(1));
    }
}
