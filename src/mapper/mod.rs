//! Mappers: nodes that know the agents and dispatch requests to them.
//!
//! [`Mapper`] is the handle of a running mapper. A [`Selector`] chooses agents for a request, and a [`ClusterState`] stores what mappers
//! know about agents: in memory ([`LocalState`]) or shared in Redis (`RedisState`, with the feature `redis`).

mod dispatch;
mod offline_queue;
mod places;
mod presence;
mod proxied_requests;
#[cfg(feature = "redis")]
mod redis;
mod registry;
mod selector;

mod state;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{Notify, OnceCell, watch};

pub use dispatch::MapperDispatch;
#[cfg(feature = "redis")]
pub use redis::{DangerousRedisOptions, RedisError, RedisOptions, RedisRefusal, RedisState};
pub use registry::AgentEvent;
pub use registry::LocalState;
pub use selector::{All, Candidate, LeastLoaded, Random, RoundRobin, Selector};
pub use state::{AgentQuery, AgentRecord, ClusterState, Heartbeat, StateContext, StateError};

use crate::audit::AuditLog;
use crate::clock::{Clock, SystemClock};
use crate::files::{Broadcast, BroadcastError, OutgoingTransfer, Progress, Receiver};
use crate::link::{Link, SendError};
use crate::packet::{Identity, Role, Token};
use crate::policy::{AllowVerified, Policy};
use crate::request::{AgentWorkload, Answers, Events, RequestBuilder, RequestError};
use crate::serializer::{InboundQueue, OpenErrorKind, Serializer};
use crate::transport::{QueueKind, Transport, TransportError, topology};
use registry::{AgentHook, RegistrationRequest, Shared, Tasks};
use selector::Selectors;

/// How many messages of each of its own queues may be unacknowledged.
const PREFETCH: u16 = 512;

/// Configures a [`Mapper`], then starts it. Everything has a default; see [`Mapper::builder`] and [`Node::mapper`](crate::Node::mapper).
///
/// ```
/// use std::time::Duration;
/// use nanite::mapper::AgentEvent;
/// # use nanite::{Node, packet::Identity, serializer::PlainSerializer, transport::MemoryBroker};
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let node = Node::new(PlainSerializer::json(Identity::mapper("desk")?), MemoryBroker::new().connect());
/// let mapper = node
///     .mapper()
///     .agent_timeout(Duration::from_secs(30))
///     .offline_failsafe(true)
///     .on_agent(|event| {
///         if let AgentEvent::Registered(agent) = event {
///             println!("{} offers {:?}", agent.identity, agent.services);
///         }
///     })
///     .start()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a mapper does not run until it is started"]
pub struct MapperBuilder {
    serializer: Arc<dyn Serializer>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    state: Arc<dyn ClusterState>,
    policy: Arc<dyn Policy>,
    agent_timeout: Duration,
    request_timeout: Duration,
    hooks: Vec<AgentHook>,
    short_lived: bool,
    offline_failsafe: bool,
    offline_redelivery: Duration,
    persistent: bool,
    audit: Option<AuditLog>,
}

/// A node that knows the agents and dispatches requests to them. It is a handle: cloning it is cheap, and the mapper stops when the last
/// clone is dropped and the last request has ended.
#[derive(Clone, Debug)]
pub struct Mapper {
    shared: Arc<Shared>,
    tasks: Arc<Tasks>,
}

/// Why a mapper cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapperError {
    /// The identity is an agent's.
    #[error("{0} is not a mapper")]
    Role(Identity),
    /// The mapper's queues cannot be used.
    #[error("cannot use the mapper's queues")]
    Transport(#[from] TransportError),
    /// The state cannot be used.
    #[error("cannot use the mapper's state")]
    State(#[from] StateError),
}

impl MapperBuilder {
    /// Where the mapper stores what it knows about agents; in memory by default.
    pub fn state(mut self, state: impl ClusterState + 'static) -> Self {
        self.state = Arc::new(state);
        self
    }

    /// Decides which agents may register which services, and which nodes may request what through this mapper. By default, every node
    /// with a valid certificate may.
    pub fn policy(mut self, policy: impl Policy + 'static) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// How long an agent may be silent before it is removed; 60 s (four heartbeats) by default.
    pub fn agent_timeout(mut self, timeout: Duration) -> Self {
        self.agent_timeout = timeout;
        self
    }

    /// The default timeout of requests; 30 s by default.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Calls `hook` whenever an agent registers, unregisters or times out. It must not block. Can be given several times.
    pub fn on_agent(mut self, hook: impl Fn(&AgentEvent) + Send + Sync + 'static) -> Self {
        self.hooks.push(AgentHook(Box::new(hook)));
        self
    }

    /// Whether a request or push waits in the offline queue if no agent offers its service, unless the request says otherwise; off by
    /// default. A push waits up to 7 days, a request up to its timeout.
    pub fn offline_failsafe(mut self, offline: bool) -> Self {
        self.offline_failsafe = offline;
        self
    }

    /// How often messages in the offline queue are tried again; every 10 s by default, and whenever an agent registers.
    pub fn offline_redelivery_frequency(mut self, every: Duration) -> Self {
        self.offline_redelivery = every;
        self
    }

    /// Whether messages survive a restart of the broker, unless the request says otherwise; off by default.
    pub fn persistent(mut self, persistent: bool) -> Self {
        self.persistent = persistent;
        self
    }

    /// The audit log, for every message that is accepted or refused and every decision of the policy; none by default.
    pub fn audit(mut self, log: AuditLog) -> Self {
        self.audit = Some(log);
        self
    }

    /// For a program that sends some requests and exits: nothing of the mapper remains at the broker. In return, answers that arrive
    /// while the connection is lost are lost too. Requests of other nodes and the offline queue are left to other mappers.
    pub fn short_lived(mut self) -> Self {
        self.short_lived = true;
        self
    }

    /// The clock; the system's by default.
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Starts the mapper, and asks all agents to register.
    ///
    /// # Errors
    /// [`MapperError`] if the identity is not a mapper's, or the queues or the state cannot be used.
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
            pending: Arc::default(),
            selectors: Selectors::default(),
            agent_timeout: self.agent_timeout,
            request_timeout: self.request_timeout,
            offline_failsafe: self.offline_failsafe,
            offline_redelivery: self.offline_redelivery.max(Duration::from_millis(1)),
            persistent: self.persistent,
            hooks: self.hooks,
            agents_changed: Notify::new(),
            advertisements: watch::Sender::new(0),
            mappers_discovered: OnceCell::new(),
        });
        let (link, name) = (&shared.link, shared.link.identity().as_str());
        let context = StateContext::new(shared.policy.clone(), link.clock().clone(), shared.agent_timeout);
        shared.state.start(context).await?;
        let registrations = topology::mapper_presence(name, link.instance());
        let registrations = link.subscribe(&registrations, InboundQueue::Presence, PREFETCH).await?;
        let mut inbox = topology::mapper_inbox(name, link.instance());
        if self.short_lived {
            inbox.kind = QueueKind::Exclusive;
        }
        let inbox = link.subscribe(&inbox, InboundQueue::MapperInbox, PREFETCH).await?;
        let mut tasks = Tasks::default();
        tasks.spawn(presence::handle_presence(shared.clone(), registrations));
        tasks.spawn(presence::receive_answers(shared.clone(), inbox));
        tasks.spawn(presence::remove_silent_agents(shared.clone()));
        tasks.spawn(presence::watch_state(shared.clone()));
        tasks.spawn(presence::answer_unverified_peers(shared.clone(), unverified_peers));
        if link.learns_peers() {
            tasks.spawn(presence::advertise_regularly(shared.clone()));
        }
        if !self.short_lived {
            let requests = link
                .subscribe(&topology::requests(), InboundQueue::Requests, proxied_requests::REQUESTS_PREFETCH)
                .await?;
            tasks.spawn(proxied_requests::handle_requests(shared.clone(), requests));
            let stored =
                link.subscribe(&topology::offline(), InboundQueue::Offline, offline_queue::OFFLINE_PREFETCH).await?;
            tasks.spawn(offline_queue::redeliver(shared.clone(), stored));
        }
        let mapper = Mapper { shared, tasks: Arc::new(tasks) };
        mapper.shared.request_registration(RegistrationRequest::All).await;
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

    /// A request to the agents that offer `service`. It is sent when it is awaited, and returns the answers of all its targets. By default
    /// there is one target, the least loaded agent.
    ///
    /// ```
    /// use std::time::Duration;
    /// use nanite::agent::{Agent, actor, reply};
    /// # use nanite::{mapper::Mapper, packet::Identity, serializer::PlainSerializer, transport::MemoryBroker};
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let broker = MemoryBroker::new();
    /// # let node = |identity| (PlainSerializer::json(identity), broker.connect());
    /// # let (fred, transport) = node(Identity::agent("fred")?);
    /// let text = actor("text").expose("upper", |text: String| async move { reply(text.to_uppercase()) });
    /// let agent = Agent::builder(fred, transport).actor(text).start().await?;
    /// # let (desk, transport) = node(Identity::mapper("desk")?);
    /// # let mapper = Mapper::builder(desk, transport).start().await?;
    ///
    /// let answers = mapper.request("/text/upper", "hello").wait_for_agents(Duration::from_secs(10)).await?;
    /// for (agent, value) in answers.results() {
    ///     assert_eq!((agent.name(), value.as_str()), ("fred", Some("HELLO")));
    /// }
    /// # agent.stop().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn request(&self, service: &str, payload: impl Serialize) -> RequestBuilder<MapperDispatch> {
        let dispatch = MapperDispatch::new(self.shared.clone(), self.tasks.clone());
        RequestBuilder::new(dispatch, service, payload).timeout(self.shared.request_timeout)
    }

    /// Sends a push, a request without an answer, to the least loaded agent that offers `service`. Returns the agents that it was sent to;
    /// none if it was stored in the offline queue. For more options, use [`request`](Mapper::request) with [`RequestBuilder::push`].
    ///
    /// ```
    /// # use nanite::{mapper::Mapper, packet::Identity, serializer::PlainSerializer, transport::MemoryBroker};
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let desk = PlainSerializer::json(Identity::mapper("desk")?);
    /// # let mapper = Mapper::builder(desk, MemoryBroker::new().connect()).offline_failsafe(true).start().await?;
    /// let agents = mapper.push("/log/write", "started").await?;
    /// assert!(agents.is_empty(), "it waits in the offline queue for an agent");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`RequestError`] if it could not be sent.
    pub async fn push(&self, service: &str, payload: impl Serialize) -> Result<Vec<Identity>, RequestError> {
        self.request(service, payload).push().await
    }

    /// Sends a file to all agents that subscribe to its domain, as fast as the slowest of them confirms, in constant memory. `progress` is
    /// called after every chunk. The answers say for each agent whether it has received the whole file.
    ///
    /// ```no_run
    /// use nanite::files::Broadcast;
    /// # use nanite::mapper::Mapper;
    ///
    /// # async fn send(mapper: Mapper) -> Result<(), Box<dyn std::error::Error>> {
    /// let file = Broadcast::new("release.tar.gz", "releases".parse()?);
    /// let answers = mapper.broadcast(file, |_| {}).await?;
    /// println!("{} agents have it", answers.results().count());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`BroadcastError`] if no agent subscribes to the domain, or the file cannot be read or sent.
    pub async fn broadcast(
        &self,
        broadcast: Broadcast,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Answers, BroadcastError> {
        let agents = self.agents().await.map_err(|error| BroadcastError::State(error.into()))?;
        let subscribers = agents.iter().filter(|record| record.files.binary_search(&broadcast.domain).is_ok());
        let receivers: Vec<Receiver> = subscribers
            .map(|record| Receiver { identity: record.identity.clone(), instance: record.instance })
            .collect();
        if receivers.is_empty() {
            return Err(BroadcastError::NoSubscribers(broadcast.domain));
        }
        let events = Events::begin(&self.shared.pending, Token::random()?, Duration::MAX, self.clone());
        OutgoingTransfer::new(&self.shared.link, events, receivers).run(broadcast, progress).await
    }

    /// All agents that have not timed out, ordered by identity.
    ///
    /// # Errors
    /// [`StateError`] if the state cannot be read.
    pub async fn agents(&self) -> Result<Vec<Arc<AgentRecord>>, StateError> {
        let silent_since = self.shared.silent_since();
        let mut agents = self.shared.state.agents().await?;
        agents.retain(|record| record.last_seen >= silent_since);
        Ok(agents)
    }

    /// For each of these agents, how many requests of this mapper it is working on, has answered and has failed.
    pub fn workloads<'a>(&self, agents: impl IntoIterator<Item = &'a Identity>) -> Vec<AgentWorkload> {
        self.shared.pending.work(agents.into_iter())
    }

    /// Removes an agent; returns whether it was registered. If the agent still runs, this mapper asks it to register again at its next
    /// heartbeat.
    ///
    /// # Errors
    /// [`StateError`] if the agent cannot be removed.
    pub async fn forget(&self, agent: &Identity) -> Result<bool, StateError> {
        self.shared.state.remove(agent, None).await
    }

    /// Asks an agent to register again. The new registration, which [hooks](MapperBuilder::on_agent) see, proves that the agent's process
    /// is running.
    ///
    /// # Errors
    /// [`SendError`] if it cannot be sent; [`TransportError::Unroutable`] if the agent's process has ended.
    pub async fn request_registration(&self, agent: &AgentRecord) -> Result<(), SendError> {
        let instance = (agent.instance != 0).then_some(agent.instance);
        self.shared.try_request_registration(RegistrationRequest::to(agent.identity.clone(), instance)).await
    }

    /// Completes when an agent registers after this call. To wait for an agent without missing it, call this, then look at
    /// [`agents`](Mapper::agents), then await it. Cancel safe.
    ///
    /// ```
    /// # use nanite::agent::{Agent, actor, reply};
    /// # use nanite::{mapper::Mapper, packet::Identity, serializer::PlainSerializer, transport::MemoryBroker};
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let broker = MemoryBroker::new();
    /// # let fred = Agent::builder(PlainSerializer::json(Identity::agent("fred")?), broker.connect());
    /// # let fred = fred.actor(actor("echo").expose("it", |text: String| async move { reply(text) })).start().await?;
    /// # let desk = PlainSerializer::json(Identity::mapper("desk")?);
    /// # let mapper = Mapper::builder(desk, broker.connect()).start().await?;
    /// loop {
    ///     let registered = mapper.agent_registered();
    ///     if !mapper.agents().await?.is_empty() {
    ///         break;
    ///     }
    ///     registered.await;
    /// }
    /// # fred.stop().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn agent_registered(&self) -> impl Future<Output = ()> + Send + '_ {
        self.shared.agents_changed.notified()
    }

    /// Announces this mapper to other nodes, and asks all agents to register. Call it after the mapper's certificate was renewed, so that
    /// they learn the new one.
    ///
    /// # Errors
    /// [`SendError`] if it cannot be sent.
    pub async fn announce(&self) -> Result<(), SendError> {
        self.shared.try_request_registration(RegistrationRequest::All).await?;
        self.shared.link.announce_to_mappers().await
    }

    /// The mapper's identity.
    pub fn identity(&self) -> &Identity {
        self.shared.link.identity()
    }

    /// How many received messages were refused, by reason.
    pub fn refusals(&self) -> Vec<(OpenErrorKind, u64)> {
        self.shared.link.refusals()
    }
}
