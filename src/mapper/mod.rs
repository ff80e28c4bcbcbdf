//! Mappers: they know the agents and give them work.

mod dispatch;
mod duplicates;
mod offline;
mod others;
#[cfg(feature = "redis")]
mod redis;
mod run;
mod selector;
mod state;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{Notify, OnceCell, watch};
use tokio::task::AbortHandle;

pub use dispatch::MapperDispatch;
#[cfg(feature = "redis")]
pub use redis::{DangerousRedis, RedisError, RedisOptions, RedisRefusal, RedisState};
pub use selector::{All, Candidate, LeastLoaded, Random, RoundRobin, Selector};
pub use state::{AgentQuery, AgentRecord, ClusterState, Heartbeat, LocalState, StateContext, StateError};

use crate::audit::AuditLog;
use crate::clock::{Clock, SystemClock};
use crate::files::{Broadcast, BroadcastError, Progress, Receiver, Transfer};
use crate::link::{Link, SendError};
use crate::packet::{Identity, Role, Token};
use crate::policy::{AllowVerified, Policy};
use crate::request::{AgentWorkload, Answers, Events, PendingRequests, RequestBuilder, RequestError};
use crate::serializer::{InboundQueue, OpenErrorKind, Serializer};
use crate::transport::{QueueKind, Transport, TransportError, topology};
use selector::Selectors;

/// How many answers, and how many heartbeats, are unacknowledged at a time.
const PREFETCH: u16 = 512;

/// What happens to agents, as a mapper sees it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum AgentEvent {
    /// An agent came, or registered anew.
    Registered(Arc<AgentRecord>),
    /// An agent said that it goes.
    Unregistered(Identity),
    /// An agent was silent for too long.
    TimedOut(Arc<AgentRecord>),
}

/// Builds a [`Mapper`]: who it is and how it talks are given first, everything else has a default.
#[derive(Debug)]
pub struct MapperBuilder {
    serializer: Arc<dyn Serializer>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    state: Arc<dyn ClusterState>,
    policy: Arc<dyn Policy>,
    agent_timeout: Duration,
    request_timeout: Duration,
    hooks: Vec<Hook>,
    short_lived: bool,
    offline_failsafe: bool,
    offline_redelivery: Duration,
    persistent: bool,
    audit: Option<AuditLog>,
}

struct Hook(Box<dyn Fn(&AgentEvent) + Send + Sync>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

/// A control node that knows the agents and gives them work. It is a handle: cloning it is cheap, and the mapper stops when the
/// last clone, and the last request under way, is dropped.
#[derive(Clone, Debug)]
pub struct Mapper {
    shared: Arc<Shared>,
    _tasks: Arc<Tasks>,
}

/// What the mapper's tasks and handles share.
#[derive(Debug)]
struct Shared {
    link: Link,
    state: Arc<dyn ClusterState>,
    policy: Arc<dyn Policy>,
    jobs: Arc<PendingRequests>,
    selectors: Selectors,
    agent_timeout: Duration,
    request_timeout: Duration,
    offline_failsafe: bool,
    offline_redelivery: Duration,
    persistent: bool,
    hooks: Vec<Hook>,
    /// Told whenever an agent has registered, here or elsewhere.
    changed: Notify,
    /// Counts how often other mappers have made themselves known.
    advertised: watch::Sender<u64>,
    /// The other mappers have had time to make themselves known.
    settled: OnceCell<()>,
}

/// The mapper's tasks; they end with this.
#[derive(Debug)]
struct Tasks(Vec<AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Why a mapper cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapperError {
    /// The identity is an agent's.
    #[error("{0} is not a mapper")]
    Role(Identity),
    /// Its queues cannot be used.
    #[error("cannot use the mapper's queues")]
    Transport(#[from] TransportError),
    /// The place of what it knows of agents cannot be used.
    #[error("cannot use the mapper's state")]
    State(#[from] StateError),
}

impl MapperBuilder {
    /// Where what is known of agents is kept; in this process by default.
    #[must_use]
    pub fn state(mut self, state: impl ClusterState + 'static) -> Self {
        self.state = Arc::new(state);
        self
    }

    /// Who may register what, and ask for what; everybody with a valid certificate by default.
    #[must_use]
    pub fn policy(mut self, policy: impl Policy + 'static) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// After how long a silent agent is dropped; 60 s by default: four heartbeats.
    #[must_use]
    pub fn agent_timeout(mut self, timeout: Duration) -> Self {
        self.agent_timeout = timeout;
        self
    }

    /// How long answers may take, where a request says nothing else; 30 s by default.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Has this called whenever an agent registers, unregisters or times out. It must not block.
    #[must_use]
    pub fn on_agent(mut self, hook: impl Fn(&AgentEvent) + Send + Sync + 'static) -> Self {
        self.hooks.push(Hook(Box::new(hook)));
        self
    }

    /// Whether a request or push waits in the offline queue when nobody offers its service, where it does not say itself; it does
    /// not by default. A push waits up to 7 days, a request up to its timeout.
    #[must_use]
    pub fn offline_failsafe(mut self, offline: bool) -> Self {
        self.offline_failsafe = offline;
        self
    }

    /// How often what waits in the offline queue is tried again, beside whenever an agent registers; 10 s by default.
    #[must_use]
    pub fn offline_redelivery_frequency(mut self, every: Duration) -> Self {
        self.offline_redelivery = every;
        self
    }

    /// Whether messages outlive a restart of the broker, where they do not say themselves; they do not by default.
    #[must_use]
    pub fn persistent(mut self, persistent: bool) -> Self {
        self.persistent = persistent;
        self
    }

    /// Writes every message that is accepted or refused, and every decision, to this log; none by default.
    #[must_use]
    pub fn audit(mut self, log: AuditLog) -> Self {
        self.audit = Some(log);
        self
    }

    /// For a program that asks for something and ends: nothing of the mapper stays at the broker when its connection is gone.
    /// The price: answers that come while the connection is away are lost. Requests of other nodes, and the offline queue, are
    /// left to other mappers.
    #[must_use]
    pub fn short_lived(mut self) -> Self {
        self.short_lived = true;
        self
    }

    /// The clock; the system's by default.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Starts the mapper: it consumes its queues and asks all agents to register.
    ///
    /// # Errors
    /// [`MapperError`] says why it cannot start.
    pub async fn start(self) -> Result<Mapper, MapperError> {
        let identity = self.serializer.identity();
        if identity.role() != Role::Mapper {
            return Err(MapperError::Role(identity.clone()));
        }
        let link = Link::builder(self.serializer, self.transport)
            .clock(self.clock)
            .audit(self.audit)
            .serves_requests(!self.short_lived);
        let (link, unverified_peers) = link.unverified_peers();
        let link = link.build();
        let shared = Arc::new(Shared {
            link,
            state: self.state,
            policy: self.policy,
            jobs: Arc::default(),
            selectors: Selectors::default(),
            agent_timeout: self.agent_timeout,
            request_timeout: self.request_timeout,
            offline_failsafe: self.offline_failsafe,
            offline_redelivery: self.offline_redelivery.max(Duration::from_millis(1)),
            persistent: self.persistent,
            hooks: self.hooks,
            changed: Notify::new(),
            advertised: watch::Sender::new(0),
            settled: OnceCell::new(),
        });
        let (link, name) = (&shared.link, shared.link.identity().as_str());
        let context = StateContext::new(shared.policy.clone(), link.clock().clone(), shared.agent_timeout);
        shared.state.start(context).await?;
        let presence = topology::mapper_presence(name, link.instance());
        let presence = link.subscribe(&presence, InboundQueue::Presence, PREFETCH).await?;
        let mut inbox = topology::mapper_inbox(name, link.instance());
        if self.short_lived {
            inbox.kind = QueueKind::Exclusive;
        }
        let inbox = link.subscribe(&inbox, InboundQueue::MapperInbox, PREFETCH).await?;
        let mut tasks = vec![
            tokio::spawn(run::presence(shared.clone(), presence)).abort_handle(),
            tokio::spawn(run::answers(shared.clone(), inbox)).abort_handle(),
            tokio::spawn(run::reaper(shared.clone())).abort_handle(),
            tokio::spawn(run::elsewhere(shared.clone())).abort_handle(),
        ];
        tasks.push(tokio::spawn(run::unverified_peers(shared.clone(), unverified_peers)).abort_handle());
        if link.learns_peers() {
            tasks.push(tokio::spawn(run::hellos(shared.clone())).abort_handle());
        }
        if !self.short_lived {
            let requests = link.subscribe(&topology::requests(), InboundQueue::Requests, PREFETCH).await?;
            tasks.push(tokio::spawn(others::requests(shared.clone(), requests)).abort_handle());
            let stored = link.subscribe(&topology::offline(), InboundQueue::Offline, offline::HELD).await?;
            tasks.push(tokio::spawn(offline::redeliver(shared.clone(), stored)).abort_handle());
        }
        let mapper = Mapper { shared, _tasks: Arc::new(Tasks(tasks)) };
        mapper.shared.ask(None).await;
        Ok(mapper)
    }
}

impl Mapper {
    /// A mapper with the identity of `serializer`, connected through `transport`.
    ///
    /// [`Node::mapper`](crate::Node::mapper) is the shorter way when certificates are in files.
    ///
    /// ```
    /// use nanite::mapper::Mapper;
    /// use nanite::packet::Identity;
    /// use nanite::serializer::PlainSerializer;
    /// use nanite::transport::MemoryBroker;
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let serializer = PlainSerializer::json(Identity::mapper("desk")?);
    /// let mapper = Mapper::builder(serializer, MemoryBroker::new().connect()).start().await?;
    /// assert!(mapper.agents().await?.is_empty());
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(serializer: impl Serializer + 'static, transport: impl Transport + 'static) -> MapperBuilder {
        MapperBuilder {
            serializer: Arc::new(serializer),
            transport: Arc::new(transport),
            clock: Arc::new(SystemClock),
            state: Arc::new(LocalState::new()),
            policy: Arc::new(AllowVerified),
            agent_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(30),
            hooks: Vec::new(),
            short_lived: false,
            offline_failsafe: false,
            offline_redelivery: Duration::from_secs(10),
            persistent: false,
            audit: None,
        }
    }

    /// A request for `service`. It is sent when it is awaited, and gives the answers of all its targets.
    pub fn request(&self, service: &str, payload: impl Serialize) -> RequestBuilder<MapperDispatch> {
        let by = MapperDispatch { mapper: self.clone(), selector: None };
        RequestBuilder::new(by, service, payload).timeout(self.shared.request_timeout)
    }

    /// A push to `service`, to the least loaded agent: work without an answer. For more options, make a
    /// [request](Mapper::request) and end it with [`RequestBuilder::push`].
    ///
    /// # Errors
    /// [`RequestError`] when it could not be given to anybody.
    pub async fn push(&self, service: &str, payload: impl Serialize) -> Result<Vec<Identity>, RequestError> {
        self.request(service, payload).push().await
    }

    /// Sends a file to every agent that takes files of its domain, as fast as the slowest of them confirms, in constant memory.
    /// `progress` is called after every chunk. The answers say for each agent whether it has the whole file.
    ///
    /// # Errors
    /// [`BroadcastError`] when it could be sent to nobody.
    pub async fn broadcast(
        &self,
        broadcast: Broadcast,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Answers, BroadcastError> {
        let agents = self.agents().await.map_err(|error| BroadcastError::State(error.into()))?;
        let takers = agents.iter().filter(|record| record.files.binary_search(&broadcast.domain).is_ok());
        let receivers: Vec<Receiver> =
            takers.map(|record| Receiver { identity: record.identity.clone(), instance: record.instance }).collect();
        if receivers.is_empty() {
            return Err(BroadcastError::NobodySubscribed(broadcast.domain));
        }
        let events = Events::begin(&self.shared.jobs, Token::random()?, Duration::MAX, self.clone());
        Transfer::new(&self.shared.link, events, receivers).run(broadcast, progress).await
    }

    /// The agents that live, in the order of their identities.
    ///
    /// # Errors
    /// [`StateError`] when what is known of agents cannot be read.
    pub async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let silent_since = self.shared.silent_since();
        let mut agents = self.shared.state.agents().await?;
        agents.retain(|record| record.last_seen >= silent_since);
        Ok(agents)
    }

    /// What this mapper has each of these agents do, and how the work ended that it gave them.
    pub fn work<'a>(&self, agents: impl IntoIterator<Item = &'a Identity>) -> Vec<AgentWorkload> {
        self.shared.jobs.work(agents.into_iter())
    }

    /// Forgets an agent, until it is heard again: its next heartbeat makes this mapper ask it to register. Says whether it was
    /// known.
    ///
    /// # Errors
    /// [`StateError`] when it cannot be done.
    pub async fn forget(&self, agent: &Identity) -> Result<bool, StateError> {
        self.shared.state.remove(agent, None).await
    }

    /// Asks an agent that is known to this mapper to register again. It answers with a registration made now, which the
    /// [hooks](MapperBuilder::on_agent) see: a round trip of two messages that shows that the agent's process lives.
    ///
    /// # Errors
    /// [`SendError`] when it could not be asked: [`TransportError::Unroutable`] when its process is gone.
    pub async fn ask(&self, agent: &AgentRecord) -> Result<(), SendError> {
        let instance = (agent.instance != 0).then_some(agent.instance);
        self.shared.advertise(Some((agent.identity.clone(), instance))).await
    }

    /// Waits until an agent registers, from the moment of this call on: make it before you look at
    /// [`agents`](Mapper::agents), await it after, and nobody is missed in between. Cancel safe.
    pub fn agent_registered(&self) -> impl Future<Output = ()> + Send + '_ {
        self.shared.changed.notified()
    }

    /// Makes this mapper known anew, and asks all agents to register: as after its certificate was renewed, which they learn by that.
    ///
    /// # Errors
    /// [`SendError`] when it could not be sent.
    pub async fn announce(&self) -> Result<(), SendError> {
        self.shared.advertise(None).await?;
        self.shared.link.announce_to_mappers().await
    }

    /// Who this mapper is.
    pub fn identity(&self) -> &Identity {
        self.shared.link.identity()
    }

    /// How many messages were refused at each step.
    pub fn refusals(&self) -> Vec<(OpenErrorKind, u64)> {
        self.shared.link.refusals()
    }
}
